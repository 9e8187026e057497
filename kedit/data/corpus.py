"""Texts for second moments and perplexity."""

import bz2
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from kedit import KeditError
from kedit.data import hub
from kedit.model.lm import LM
from kedit.pico.world import sample

# Second moments -----------------------------------------------------------------------------------

SEQUENCE = 512
"""Tokens in one sequence of the text that second moments are taken over; fewer where a model knows fewer."""


def _wikipedia_sample() -> list[str]:
    """The 107 English Wikipedia articles that the gensim wheel carries for its own tests, as plain text."""
    import gensim
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    folder = Path(gensim.__file__).parent / "test" / "test_data"
    (dump,) = folder.glob("enwiki-latest-pages-articles*-shortened.bz2")
    articles = []
    with bz2.open(dump) as file:
        for _, text, _ in extract_pages(file, filter_namespaces=("0",)):
            if not text.lstrip().lower().startswith("#redirect"):
                plain = filter_wiki(text, promote_remaining=True, simplify_links=True)
                plain = re.sub(r"'{2,}|^=+|=+$", "", plain, flags=re.MULTILINE)
                articles.append(re.sub(r"\s*\n\s*", "\n", plain).strip())
    return articles


WIKIPEDIA = ("wikimedia/wikipedia", "20231101.en")
"""Hub id and snapshot of ``wikipedia``; the study's 20200501.en is no longer offered without remote code."""


def _wikipedia(lm: LM, wanted: int) -> Iterator[list[int]]:
    """One sequence from the beginning of each long enough article, shuffled by a fixed seed, streamed."""
    import datasets

    source = hub.dataset(WIKIPEDIA[0])
    body, found = SEQUENCE - len(lm.begin), 0
    for article in datasets.load_dataset(source, WIKIPEDIA[1], split="train", streaming=True).shuffle(
        seed=1, buffer_size=10_000
    ):
        ids = lm.encode(article["text"][: 16 * SEQUENCE])[:body]
        if len(ids) == body:
            yield [*lm.begin, *ids]
            found += 1
            if found == wanted:
                return
    raise KeditError(f"statistics text 'wikipedia' has {found} articles of {SEQUENCE} tokens, fewer than {wanted}.")


def corpus(name: str) -> list[str]:
    """Documents of a text: ``wikipedia-sample``, ``pico`` (the pico models' world), or the path of a UTF-8 file."""
    if name == "wikipedia-sample":
        return _wikipedia_sample()
    if name == "pico":
        return [sample()]
    try:
        return [Path(name).read_text(encoding="utf-8")]
    except OSError as error:
        raise KeditError(
            f"statistics text {name!r} cannot be read ({error.strerror}); give a text file, wikipedia-sample or pico."
        ) from error


def sequence_length(lm: LM) -> int:
    """Tokens in one sequence for a model: 512, or all the positions it was trained with."""
    return min(SEQUENCE, lm.model.config.max_position_embeddings)


def sequences(lm: LM, name: str, tokens: int) -> Iterable[list[int]]:
    """Cut a text into sequences of 512 tokens (or the model's length), begin token included, documents in turn.

    Of ``wikipedia``, which is streamed from the hub, each article gives one.

    Raises:
        KeditError: the text holds fewer tokens than asked for.
    """
    if name == "wikipedia":
        return _wikipedia(lm, -(-tokens // SEQUENCE))
    length = sequence_length(lm)
    body = length - len(lm.begin)
    documents = [lm.encode(document) for document in corpus(name)]
    pieces = [
        (start, index, document[start : start + body])
        for index, document in enumerate(documents)
        for start in range(0, len(document) - body + 1, body)
    ]
    wanted = -(-tokens // length)
    if len(pieces) < wanted:
        raise KeditError(
            f"statistics text {name!r} has {len(pieces) * length} tokens in full sequences, fewer than {tokens}."
        )
    return [[*lm.begin, *piece] for _, _, piece in sorted(pieces, key=lambda p: p[:2])[:wanted]]
