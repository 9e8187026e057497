"""What editing costs, from shapes alone: operations, weights read, bytes kept. No model is loaded.

Two operations a parameter and token read, and as much again for each half of a backward pass that is
needed; what a method costs is its own (``Editor.cost``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

FLOAT = 4
"""Bytes of a float32: of edits, of edited matrices, and of a model's weights unless ``Shape.weight`` says otherwise."""
PROMPT, TARGET = 20, 3
"""Tokens of an edit's prompt and of its target."""
TAIL = TARGET + PROMPT / 4
"""Tokens from the subject's last to the end of the target."""


@dataclass(frozen=True)
class Shape:
    """An architecture: width, blocks, inner width and number of matrices of its MLP, keys' width, vocabulary."""

    d: int
    layers: int
    m: int
    mlp: int
    kv: int
    vocabulary: int
    parameters: int
    window: int
    gated: bool = False
    weight: int = FLOAT

    @property
    def bytes(self) -> int:
        """Of the weights in memory."""
        return self.parameters * self.weight


@dataclass(frozen=True)
class Work:
    """Operations, and bytes of weights read, which is what takes the time where few tokens go through at once."""

    flops: float = 0.0
    read: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.read + other.read)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.read * factor)


@dataclass(frozen=True)
class Cost:
    """What a method costs on a model, beyond having the model.

    Attributes:
        edit: the work of one edit; searches that stop early are not foreseen.
        once: the work before the first edit, if nothing is stored.
        journal_bytes: what is stored of one edit.
        device_bytes, host_bytes: memory where the model is, and of the host.
    """

    edit: Work = Work()
    once: Work = Work()
    journal_bytes: int = 4000
    device_bytes: int = 0
    host_bytes: int = 0


def reading(shape: Shape, tokens: float, at_once: float) -> Work:
    """Reading so many tokens forward, so many at once."""
    return Work(2 * shape.parameters * tokens, shape.bytes * tokens / at_once)


def descent(shape: Shape, rows: int, steps: int, layer: int) -> Work:
    """Steps forward and backward (by activations: as much again) through the blocks above a layer, on texts' tails."""
    return reading(shape, rows * TAIL, rows * TAIL) * (2 * steps * (1 - layer / shape.layers))


def locate_then_edit(
    shape: Shape,
    layers: Sequence[int],
    steps: int,
    context_lengths: Sequence[tuple[int, int]],
    tokens: int,
    *,
    factorisations: int = 1,
    factors: int = 2,
) -> Cost:
    """ROME's, MEMIT's and their kin's: a value search, keys in every context, second moments.

    Args:
        steps: updates of the search; it runs forward once more.
        tokens: of the text that second moments are taken over.
        factorisations: of a second moment, counted as Cholesky's.
        factors: matrices (m, m) kept for a layer on the host, in float64 as second moments are while summed.
    """
    rows = 2 + sum(count for _, count in context_lengths)  # the bare prompt, and that of the KL term
    keys = reading(shape, rows * (PROMPT + 10), rows * (PROMPT + 10)) * len(layers)
    solves = Work(4 * shape.m**2 * len(layers))
    passes = reading(shape, tokens, 512) * ((max(layers) + 1) / shape.layers)
    products = Work(2 * tokens * shape.m**2 * len(layers))
    square = 8 * shape.m**2
    return Cost(
        edit=descent(shape, rows, steps + 1, max(layers)) + keys + solves,
        once=passes + products + Work(shape.m**3 / 3 * len(layers) * factorisations),
        journal_bytes=2 * (shape.d + shape.m) * FLOAT * len(layers),
        device_bytes=len(layers) * (square + FLOAT * shape.d * shape.m) + square,
        host_bytes=len(layers) * square * factors,
    )
