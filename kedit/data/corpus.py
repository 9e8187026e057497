"""Texts for second moments and perplexity."""

import json
import lzma
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from kedit import KeditError
from kedit.data import hub
from kedit.registry import load_object

TEXTS = {"wikipedia-sample": "kedit.data.corpus:wikipedia_sample", "pico": "kedit.pico.world:sample"}
"""Texts by name: functions that return one document or several."""
WIKIPEDIA_SAMPLE = Path(__file__).with_name("wikipedia-sample.json.xz")
"""Title -> text."""
SEQUENCE = 512
"""Tokens in one sequence of the text that second moments are taken over; fewer where a model knows fewer."""


class Reader(Protocol):
    """What a text is cut up for: an ``LM``."""

    model: Any
    begin: list[int]

    def encode(self, text: str) -> list[int]:
        """Token ids, without begin token."""


def wikipedia_sample() -> list[str]:
    """107 articles of the English Wikipedia as plain text: those that gensim 4.4.0 has for its tests (README.md)."""
    return list(json.loads(lzma.decompress(WIKIPEDIA_SAMPLE.read_bytes())).values())


WIKIPEDIA = ("wikimedia/wikipedia", "20231101.en")
"""Hub id and snapshot of ``wikipedia``; the study's 20200501.en is no longer offered without remote code."""


def _wikipedia(lm: Reader, wanted: int) -> Iterator[list[int]]:
    """One sequence from the beginning of each long enough article, shuffled by a fixed seed, streamed."""
    import datasets  # a second, for this text only

    articles = datasets.load_dataset(hub.dataset(WIKIPEDIA[0]), WIKIPEDIA[1], split="train", streaming=True)
    body, found = SEQUENCE - len(lm.begin), 0
    texts = (article["text"][: 16 * SEQUENCE] for article in articles.shuffle(seed=1, buffer_size=10_000))
    long_enough = (ids for ids in map(lm.encode, texts) if len(ids) >= body)
    for ids in islice(long_enough, wanted):
        yield [*lm.begin, *ids[:body]]
        found += 1
    if found < wanted:
        raise KeditError(f"statistics text 'wikipedia' has {found} articles of {SEQUENCE} tokens, fewer than {wanted}.")


def corpus(name: str) -> list[str]:
    """Documents of a text: ``wikipedia-sample``, ``pico`` (the pico models' world), or the path of a UTF-8 file.

    Raises:
        KeditError: no such file.
    """
    if name in TEXTS:
        text = load_object(TEXTS[name])()
        return [text] if isinstance(text, str) else list(text)
    try:
        return [Path(name).read_text(encoding="utf-8")]
    except OSError as error:
        raise KeditError(
            f"statistics text {name!r} cannot be read ({error.strerror}); give a text file, {' or '.join(TEXTS)}."
        ) from error


def sequence_length(lm: Reader) -> int:
    """Tokens in one sequence for a model: 512, or all the positions it was trained with."""
    return min(SEQUENCE, lm.model.config.max_position_embeddings)


def sequences(lm: Reader, name: str, tokens: int) -> Iterable[list[int]]:
    """Cut a text into sequences of 512 tokens (or the model's length), begin token included, documents in turn.

    Of ``wikipedia``, which is streamed from the hub, each article gives one.

    Raises:
        KeditError: the text holds fewer tokens than asked for.
    """
    if name == "wikipedia":
        return _wikipedia(lm, -(-tokens // SEQUENCE))
    length = sequence_length(lm)
    body = length - len(lm.begin)
    pieces = []  # (where in its document, which document, tokens)
    for index, document in enumerate(map(lm.encode, corpus(name))):
        starts = range(0, len(document) - body + 1, body)
        pieces += [(start, index, document[start : start + body]) for start in starts]
    wanted = -(-tokens // length)
    if len(pieces) < wanted:
        raise KeditError(
            f"statistics text {name!r} has {len(pieces) * length} tokens in full sequences, fewer than {tokens}."
        )
    return [[*lm.begin, *piece] for _, _, piece in sorted(pieces)[:wanted]]
