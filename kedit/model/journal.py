"""What an edit changed: write, undo exactly, save, replay.

A journal belongs to one model. It keeps the original bits of every matrix that was ever touched and
the list of edits, so undoing is restoring and replaying, never subtracting, and is exact to the bit.
Where the model is in half precision, edits add up in a float32 copy of the matrix, which is then rounded:
added to the rounded matrix itself, an update smaller than its grid would be lost.

Edits are small on disk where the method allows it: factors of low-rank updates or entries of a
memory, not matrices.
"""

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from kedit import KeditError
from kedit.model.anatomy import matrix
from kedit.model.memory import Memory

FORMAT = 2
"""How saved edits are written; raise it when that changes, and stored trajectories begin anew."""

BLOCK = 64
"""Rows of a weight that are written together."""


class EditFailed(Exception):
    """An editor found no update it could write (for example a non-finite one); the model is as before."""


class Change:
    """One thing that an edit does to a model. Fields are tensors or plain JSON values."""

    module: str | None
    """Name of the module whose weight is written, if one is."""
    memory = None
    """Name of the method whose memory is written, if one is."""

    def write(self, journal: "Journal") -> None:
        """Do it to the journal's model."""
        raise NotImplementedError

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain fields and tensor fields, for saving; made of both by keyword, the change is the same again."""
        return _split(vars(self))


def _split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    return {name: value for name, value in fields.items() if name not in tensors}, tensors


@dataclass(frozen=True)
class LowRank(Change):
    """One weight matrix W (d, m) gains ``left @ right.T``: left (d, r) and right (m, r).

    The product is taken in float64, cast once to the weight's type, and added to the present W.
    """

    module: str
    left: Tensor
    right: Tensor

    def write(self, journal: "Journal") -> None:
        """Add the product to the model's weight."""
        weight = journal.matrix(self.module)
        # where the weight is, so that an edit made and one replayed from disk are computed alike
        left, right = (factor.to(weight.device, torch.float64) for factor in (self.left, self.right))
        # some rows at a time: a float64 matrix as large as W would be the largest thing that an edit allocates
        for rows, some in zip(weight.split(BLOCK), left.split(BLOCK), strict=True):
            rows += (some @ right.T).to(rows.dtype)


@dataclass(frozen=True)
class Dense(Change):
    """One weight matrix W (d, m) gains ``delta`` (d, m), for methods whose updates have full rank."""

    module: str
    delta: Tensor

    def write(self, journal: "Journal") -> None:
        """Add delta to the model's weight."""
        weight = journal.matrix(self.module)
        weight += self.delta.to(weight)


@dataclass(frozen=True)
class Restore(Change):
    """One weight matrix gets back the bits it had before any edit."""

    module: str

    def write(self, journal: "Journal") -> None:
        """Put the original weight back."""
        journal.restore(self.module)


class Entry(Change):
    """A memory gains an entry (kedit/model/memory.py); ``memory`` is the name of its method."""

    module = None

    def __init__(self, memory: str, values: dict[str, Any], **tensors: Tensor):
        self.memory, self.values = memory, values | tensors

    def write(self, journal: "Journal") -> None:
        """Add the values to the model's memory of that name.

        Raises:
            KeditError: the model has no such memory, because no editor of that name was made for it.
        """
        if self.memory not in journal.memories:
            raise KeditError(
                f"the journal holds an edit by {self.memory}: make kedit.editor({self.memory!r}, lm) first."
            )
        journal.memories[self.memory].add(self.values)

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The values, tensors apart."""
        plain, tensors = _split(self.values)
        return {"memory": self.memory, "values": plain}, tensors


KINDS: dict[str, type[Change]] = {kind.__name__: kind for kind in Change.__subclasses__()}


@dataclass(eq=False)
class Edit:
    """What one step changed, with the numbers worth knowing about it; a step may be several requests.

    ``info`` holds plain numbers and strings: seconds, steps, loss, amplification, relative_change ...
    """

    method: str
    request: str | list[str]
    """The id of the request; of several, all of them."""
    changes: list[Change] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    journal: "Journal | None" = field(default=None, repr=False)
    changed: bool = field(default=False, repr=False)
    """Whether some bit of a weight, or some memory, is another now (known of edits made, not of those replayed)."""

    def __repr__(self) -> str:
        where = dict.fromkeys(change.module or f"{change.memory}'s memory" for change in self.changes)
        return f"<Edit by {self.method} of {reprlib.repr(self.request)}: writes {reprlib.repr([*where])}>"

    @torch.no_grad()
    def write(self, change: Change) -> None:
        """Add one change to this edit and put it into the model.

        Raises:
            EditFailed: the change, or the weight with it, is not finite.
        """
        before = self.journal.matrix(change.module).clone() if change.module else None
        self.changes.append(change)
        self.journal.write(change)
        if before is None:
            self.changed = True
            return
        after = self.journal.matrix(change.module)
        if not after.isfinite().all():
            raise EditFailed(f"the weight of {change.module} would not be finite")
        self.changed |= not torch.equal(before, after)

    def undo(self) -> None:
        """Take this edit back, to the exact bits, whenever it was made; later edits stay, as they were written.

        The original weights are put back and the other edits made again from the journal: the model is the one that
        they make without this one. That costs as much as replaying them, and optimises nothing.

        Raises:
            KeditError: the edit is not in a model, or later edits by the same method refer to what it remembered.
        """
        journal = self.journal
        if journal is None or self not in journal.edits:
            raise KeditError(f"{self!r} cannot be undone: it is in no model, or no longer.")
        place = journal.edits.index(self)
        linked = [change.memory for change in self.changes if change.memory and journal.memories[change.memory].linked]
        if any(change.memory in linked for edit in journal.edits[place + 1 :] for change in edit.changes):
            raise KeditError(f"{self!r} cannot be undone: later ones by {linked[0]} build on it; undo those first.")
        del journal.edits[place]
        journal.rebuild()

    def to_bytes(self) -> bytes:
        """Serialise as safetensors."""
        tensors, changes = {}, []
        for index, change in enumerate(self.changes):
            plain, named = change.parts()
            tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in named.items()}
            changes.append({"kind": type(change).__name__, "plain": plain, "tensors": sorted(named)})
        header = {"method": self.method, "request": self.request, "info": self.info, "changes": changes}
        return safetensors.torch.save(tensors, {"edit": json.dumps(header, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Edit":
        """The inverse of ``to_bytes``."""
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["edit"])
        tensors = safetensors.torch.load(data)
        changes = []
        for index, change in enumerate(header["changes"]):
            named = {name: tensors[f"{index}.{name}"] for name in change["tensors"]}
            changes.append(KINDS[change["kind"]](**change["plain"], **named))
        return cls(header["method"], header["request"], changes, header["info"])


class Journal:
    """The edits made to a model, in order.

    Attributes:
        memories: memories of the memory-based editors made for this model, by method.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.edits: list[Edit] = []
        self.memories: dict[str, Memory] = {}
        self._originals: dict[str, Tensor] = {}
        self._masters: dict[str, Tensor] = {}
        """What is edited of a half-precision model, in float32."""

    @property
    def count(self) -> int:
        """How many requests the model was edited by."""
        return sum(1 if isinstance(edit.request, str) else len(edit.request) for edit in self.edits)

    def _weight(self, module: str) -> Tensor:
        return self.model.get_submodule(module).weight

    @torch.no_grad()
    def write(self, change: Change) -> None:
        """Put one change into the model, keeping the original bits of a weight on first touch."""
        if change.module and change.module not in self._originals:
            self._originals[change.module] = self._weight(change.module).clone()
        change.write(self)
        if change.module in self._masters:
            self._weight(change.module).copy_(self._masters[change.module])

    def matrix(self, module: str) -> Tensor:
        """The weight (d, m) that edits are added to: the model's own, or its float32 copy if that is half precision."""
        weight = self._weight(module)
        if weight.element_size() < 4:
            weight = self._masters.setdefault(module, weight.detach().float())
        return matrix(self.model.get_submodule(module), weight)

    def attach(self, name: str, memory: Memory) -> None:
        """Give the model a method's memory, in place of an earlier one; it knows the edits already made."""
        self.memories[name] = memory
        for change in self._changes():
            if isinstance(change, Entry) and change.memory == name:
                memory.add(change.values)

    def restore(self, module: str) -> None:
        """Put one weight back to its original bits (a change like any other: see ``Restore``)."""
        self._weight(module).copy_(self._originals[module])
        self._masters.pop(module, None)

    def _changes(self) -> Iterator[Change]:
        return (change for edit in self.edits for change in edit.changes)

    def edited(self) -> list[str]:
        """Names of the modules whose weight some present edit has written, in the order of first touch."""
        return list(dict.fromkeys(change.module for change in self._changes() if change.module))

    def original(self, module: str) -> Tensor:
        """A module's weight with the bits it had before any edit."""
        return self._originals.get(module, self._weight(module).detach())

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for module, weight in weights.items():
            self._weight(module).copy_(weight)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Within the block the model is the unedited one, weights and memories; afterwards as it was, to the bit."""
        present = {module: self._weight(module).detach().clone() for module in self._originals}
        memories, self.memories = self.memories, {}
        try:
            self._copy(self._originals)
            yield  # gradients as the caller has them: a method may train
        finally:
            self._copy(present)
            self.memories = memories

    @contextmanager
    def recording(self, method: str, *requests: str) -> Iterator[Edit]:
        """Collect an edit, change by change, through ``edit.write``; in the end it stands for those made meanwhile.

        If the body raises, the model is put back to the bits it had and nothing is recorded.
        """
        edit, before = Edit(method, requests[0] if len(requests) == 1 else [*requests], journal=self), len(self.edits)
        try:
            yield edit
        except BaseException:
            del self.edits[before:]
            self.rebuild()
            raise
        self.edits[before:] = [edit]

    def replay(self, edit: Edit) -> None:
        """Make a stored edit again, bit for bit, without optimising anything."""
        for change in edit.changes:
            self.write(change)
        edit.journal = self
        self.edits.append(edit)

    def reset(self) -> None:
        """Take back every edit."""
        self.edits.clear()
        self.rebuild()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Make the present edits again on the original weights and emptied memories."""
        for module in self._originals:
            self.restore(module)
        for memory in self.memories.values():
            memory.clear()
        for change in self._changes():
            self.write(change)
