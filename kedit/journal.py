"""What an edit changed: write, undo exactly, save, replay.

A journal belongs to one model. It keeps the original bits of every matrix that was ever touched and
the list of edits, so undoing is restoring and replaying, never subtracting, and is exact to the bit.
Edits are small on disk: factors of low-rank updates, not matrices.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kedit.models import LM


class EditFailed(Exception):
    """An editor found no update it could write (for example a non-finite one); the model is as before."""


@dataclass(frozen=True)
class LowRank:
    """One weight matrix W (d, m) gains ``left @ right.T``: left (d, r) and right (m, r), float64.

    The product is taken in float64, cast once to the weight's type, and added to the present W.
    """

    module: str
    left: Tensor
    right: Tensor

    def write(self, lm: "LM") -> None:
        """Add the product to the model's weight."""
        from kedit.models import matrix

        weight = matrix(lm.model.get_submodule(self.module))
        weight += (self.left @ self.right.T).to(weight)


@dataclass
class Edit:
    """What one step changed, with the numbers worth knowing about it.

    ``info`` holds plain numbers and strings: seconds, steps, loss, amplification, relative_change ...
    """

    method: str
    request: str
    changes: list[LowRank] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    journal: "Journal | None" = field(default=None, repr=False, compare=False)

    def write(self, change: LowRank) -> None:
        """Add one change to this edit and put it into the model."""
        self.changes.append(change)
        self.journal.write(change)

    def undo(self) -> None:
        """Take this edit back, to the exact bits; later edits must be undone first."""
        if self.journal is None:
            raise ValueError("this edit is not in a model's journal")
        self.journal.undo(self)

    def to_bytes(self) -> bytes:
        """Serialise as safetensors."""
        tensors = {}
        for index, change in enumerate(self.changes):
            tensors |= {f"{index}.left": change.left, f"{index}.right": change.right}
        header = {
            "method": self.method,
            "request": self.request,
            "info": self.info,
            "modules": [change.module for change in self.changes],
        }
        return safetensors.torch.save(tensors, {"edit": json.dumps(header, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Edit":
        """The inverse of ``to_bytes``."""
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["edit"])
        tensors = safetensors.torch.load(data)
        changes = [
            LowRank(module, tensors[f"{index}.left"], tensors[f"{index}.right"])
            for index, module in enumerate(header["modules"])
        ]
        return cls(header["method"], header["request"], changes, header["info"])


class Journal:
    """The edits made to a model, in order."""

    def __init__(self, lm: "LM"):
        self.lm = lm
        self.edits: list[Edit] = []
        self._originals: dict[str, Tensor] = {}

    def _weight(self, module: str) -> Tensor:
        return self.lm.model.get_submodule(module).weight

    def write(self, change: LowRank) -> None:
        """Put one change into the model, keeping the original bits on first touch."""
        if change.module not in self._originals:
            self._originals[change.module] = self._weight(change.module).detach().clone()
        change.write(self.lm)

    @contextmanager
    def recording(self, method: str, request: str) -> Iterator[Edit]:
        """Collect an edit, change by change, through ``edit.write``.

        If the body raises, the model is put back to the bits it had and nothing is recorded.
        """
        edit = Edit(method, request, journal=self)
        try:
            yield edit
        except BaseException:
            self._rebuild()
            raise
        self.edits.append(edit)

    def replay(self, edit: Edit) -> None:
        """Make a stored edit again, bit for bit, without optimising anything."""
        for change in edit.changes:
            self.write(change)
        edit.journal = self
        self.edits.append(edit)

    def undo(self, edit: Edit) -> None:
        """Take back the last edit.

        Raises:
            ValueError: the edit is not the last one.
        """
        if not self.edits or self.edits[-1] is not edit:
            raise ValueError("only the last edit can be undone; undo the later ones first")
        self.edits.pop()
        edit.journal = None
        self._rebuild()

    def reset(self) -> None:
        """Take back every edit."""
        for edit in self.edits:
            edit.journal = None
        self.edits.clear()
        self._rebuild()

    def _rebuild(self) -> None:
        with torch.no_grad():
            for module, original in self._originals.items():
                self._weight(module).copy_(original)
            for edit in self.edits:
                for change in edit.changes:
                    change.write(self.lm)
