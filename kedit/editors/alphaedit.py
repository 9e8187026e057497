"""AlphaEdit: MEMIT whose updates cannot touch the directions that keys of ordinary text take.

Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", 2025. Updates are
confined to the span of U, the eigenvectors of C with the smallest eigenvalues, and the keys of earlier
edits are held as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors import locate_then_edit, memit
from kedit.editors.bounds import Count, Layers, Positive, Share
from kedit.editors.space import decades, in_a_row
from kedit.model.journal import Edit, Entry
from kedit.model.memory import Memory


@dataclass(frozen=True, kw_only=True)
class Hparams(locate_then_edit.Hparams):
    """Settings of AlphaEdit.

    ``null_space_share``: the null space is as many of the smallest eigenvalues of C as together hold this share
    of their sum, which means the same for every layer and model. ``nullspace_threshold``, if given, is instead
    the published absolute bound on eigenvalues (0.02). ``l2`` is the method's L2.
    """

    layers: Layers
    null_space_share: Share = 0.1
    nullspace_threshold: Positive | None = None
    l2: Positive = 10.0
    context_lengths: tuple[tuple[Count, Count], ...] = ((10, 5),)


class KeyMemory(Memory):
    """Keys of earlier edits, (layers, m) each, and what the next edit needs of them.

    For each layer those keys in the basis of the null space, (r, n), and the Cholesky factor (n, n) of
    L2 I + their Gram matrix, which grows by a row an edit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._grown: dict[int, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget all."""
        super().clear()
        self._grown.clear()

    def read(self, position: int, basis: Tensor, l2: float) -> tuple[Tensor, Tensor]:
        """Keys of the layer at a position within the basis, and the factor, brought up to the last edit."""
        empty = basis.new_zeros(basis.shape[1], 0), basis.new_zeros(0, 0)
        keys, factor = self._grown.get(position, empty)
        for entry in self.entries[keys.shape[1] :]:
            key = entry["keys"][position].to(basis, copy=True)  # as in SecondMoments: replayed edits have the same bits
            keys, factor = grow(keys, factor, basis.T @ key, l2)
        self._grown[position] = keys, factor
        return keys, factor


def grow(keys: Tensor, factor: Tensor, key: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """One key more: keys (r, n + 1) and the Cholesky factor of L2 I + their Gram matrix."""
    across = torch.linalg.solve_triangular(factor, (keys.T @ key)[:, None], upper=False)
    corner = (l2 + key @ key - across.square().sum()).sqrt().view(1, 1)
    factor = torch.cat([torch.nn.functional.pad(factor, (0, 1)), torch.cat([across.T, corner], 1)])
    return torch.cat([keys, key[:, None]], 1), factor


class AlphaEdit(memit.MEMIT):
    """Per layer: W gains R K^T P (K K^T P + M P + L2 I)^-1, P = U U^T (eq. 14), M of earlier edits' keys.

    In the basis U this is the symmetric system (U^T (K K^T + M) U + L2 I) Y = U^T K. Its matrix is a
    multiple of the identity plus one rank for every edit so far, so Woodbury's identity needs a factor
    of the size of their number only, and that is the last edit's with one row more.
    """

    name = "alphaedit"
    label = "AlphaEdit"
    style = ("#0072b2", "*", "--")
    Hparams = Hparams
    space = locate_then_edit.LocateThenEdit.space | {
        "layers": in_a_row(1, 3, 5, below=0.7),
        "null_space_share": (0.02, 0.05, 0.1, 0.2),
        "nullspace_threshold": (None,),
        "l2": decades(-3, 1),
    }

    def make_memory(self) -> KeyMemory:
        """The keys of earlier edits."""
        return KeyMemory()

    @cached_property
    def _bases(self) -> dict[int, Tensor]:
        return {}

    def basis(self, layer: int) -> Tensor:
        """U, an orthonormal basis of the null space: (m, r) float64."""
        if layer not in self._bases:
            values, vectors = self.statistics.spectrum(layer)
            small = values.cumsum(0) <= self.hparams.null_space_share * values.sum()
            if self.hparams.nullspace_threshold is not None:
                small = values < self.hparams.nullspace_threshold
            self._bases[layer] = vectors[:, : int(small.sum())].contiguous()
        return self._bases[layer]

    def _gain(self, layer: int, keys: Tensor) -> Tensor:
        basis, l2 = self.basis(layer), self.hparams.l2
        inside = basis.T @ keys
        known, factor = self.memory.read(self.hparams.layers.index(layer), basis, l2)
        for key in inside.T:
            known, factor = grow(known, factor, key, l2)
        solved = torch.cholesky_solve(known.T @ inside, factor)
        return basis @ (inside - known @ solved) / l2

    def _apply_batch(self, requests: Sequence[EditRequest], edit: Edit, each: Sequence[Edit]) -> None:
        super()._apply_batch(requests, edit, each)
        # What is held from now on are the keys in the edited model.
        for request, one in zip(requests, each, strict=True):
            keys = [self._key(self._texts(request), layer) for layer in self.hparams.layers]
            one.info["rank"] = [self.basis(layer).shape[1] for layer in self.hparams.layers]
            edit.write(Entry(self.name, {"keys": torch.stack(keys).cpu()}))
