"""Make kedit/data/wikipedia-sample.json.xz from the dump that gensim carries for its tests: pip install gensim==4.4.0"""

import bz2
import json
import lzma
import re
from pathlib import Path

import gensim
from gensim.corpora.wikicorpus import extract_pages, filter_wiki

from kedit.data.corpus import WIKIPEDIA_SAMPLE

if __name__ == "__main__":
    (dump,) = (Path(gensim.__file__).parent / "test" / "test_data").glob("enwiki-latest-pages-articles*-shortened.bz2")
    articles = {}
    with bz2.open(dump) as file:
        for title, text, _ in extract_pages(file, filter_namespaces=("0",)):
            if not text.lstrip().lower().startswith("#redirect"):
                plain = filter_wiki(text, promote_remaining=True, simplify_links=True)
                plain = re.sub(r"'{2,}|^=+|=+$", "", plain, flags=re.MULTILINE)
                articles[title] = re.sub(r"\s*\n\s*", "\n", plain).strip()
    payload = json.dumps(articles, ensure_ascii=False, indent=0).encode()
    WIKIPEDIA_SAMPLE.write_bytes(lzma.compress(payload, preset=9 | lzma.PRESET_EXTREME))
