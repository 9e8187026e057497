"""What ``kedit tune`` tries of a hyper-parameter: the words in which an editor declares its ``space``.

Each hyper-parameter has a list of values, or, where they depend on the model's depth, a function from its number of
blocks to that list. What is left out stays as ``params/methods`` has it.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

Options = Sequence[Any] | Callable[[int], Sequence[Any]]


def trying(**options: Options) -> dict[str, Options]:
    """A space."""
    return options


def decades(low: int, high: int) -> list[float]:
    """1 and 3 times every power of ten between two, both included."""
    return [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in (1, 3)]


def a_layer(below: float = 1.0) -> Options:
    """Each block in so large a lower part of the model."""
    return lambda blocks: range(ceil(below * blocks))


def in_a_row(*lengths: int, below: float = 1.0) -> Options:
    """Each so many neighbouring blocks in so large a lower part of the model."""

    def options(blocks: int) -> list[list[int]]:
        ends = range(1, ceil(below * blocks) + 1)
        return [[*range(end - length, end)] for length in lengths for end in ends if length <= end]

    return options
