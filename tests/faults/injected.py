"""What the tests of bad input share: how many cases, what may come of one, and how a case is recorded."""

import contextlib
import io
from collections.abc import Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from record import FULL, record

from kedit import KeditError


def cases(short: int, full: int) -> settings:
    """So many cases, the same ones every time."""
    return settings(
        max_examples=full if FULL else short,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def is_sentence(text: str) -> bool:
    """Whether it is one line that ends as a sentence does."""
    text = text.strip()
    return bool(text) and "\n" not in text and "Traceback" not in text and text[-1] in ".?"


@contextlib.contextmanager
def judged(fault_class: str) -> Iterator[list[str]]:
    """Record the case: handled unless the block raises. A KeditError of one sentence is put into the list instead."""
    refused: list[str] = []
    try:
        try:
            yield refused
        except KeditError as error:
            refused.append(str(error))
        assert all(map(is_sentence, refused)), refused
    except BaseException as error:
        record(fault_class, [f"{type(error).__name__}: {error}"])
        raise
    record(fault_class)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed on stderr meanwhile."""
    seen = io.StringIO()
    with contextlib.redirect_stderr(seen):
        yield seen


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**12, -(10**30), 0.0, 0.5, 5e-1, 1e300, -1.0, float("nan"), float("inf")]),
    st.sampled_from(
        ["", " ", "rome", "control", "edit", "../x", "a/b", "null", "true", "5e-1", "1", "\ud800", "\0", "a\nb"]
    ),
    st.text(max_size=6),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "layer", "name", ""]), inner, max_size=2)
    ),
    max_leaves=5,
)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """One byte changed, the end cut off, or a piece put in."""
    place = st.integers(0, max(0, len(data) - 1))
    flipped = st.builds(
        lambda at, bit: data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :], place, st.integers(0, 7)
    )
    cut = st.builds(lambda at: data[:at], place)
    stuffed = st.builds(lambda at, more: data[:at] + more + data[at:], place, st.binary(min_size=1, max_size=4))
    return st.one_of(flipped, flipped, cut, stuffed)
