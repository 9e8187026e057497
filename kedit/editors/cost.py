"""What editing costs, from shapes alone: operations, weights read, bytes kept. No model is loaded.

Two operations a parameter and token read, and as much again for each half of a backward pass that is
needed; what a method costs is its own (``Editor.cost``).
"""

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


def searching(shape: Shape, rows: int, steps: int, layer: int) -> Work:
    """Steps forward and backward (by activations: as much again) through the blocks above a layer, on texts' tails."""
    return reading(shape, rows * TAIL, rows * TAIL) * (2 * steps * (1 - layer / shape.layers))
