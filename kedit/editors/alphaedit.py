"""AlphaEdit: MEMIT whose updates cannot touch the directions that keys of ordinary text take.

Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", 2025. Updates are
confined to the span of U, the eigenvectors of C with the smallest eigenvalues, and the keys of earlier
edits are held as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors import locate_then_edit, memit
from kedit.editors.bounds import LATER, Count, Layers, Positive, Share
from kedit.editors.history import grow, none
from kedit.editors.space import decades, in_a_row
from kedit.model.forward import LookupText
from kedit.model.journal import Edit


@dataclass(frozen=True, kw_only=True)
class Hparams(locate_then_edit.Hparams):
    """Settings of AlphaEdit.

    ``null_space_share``: the null space is as many of the smallest eigenvalues of C as together hold this share
    of their sum, which means the same for every layer and model. ``nullspace_threshold``, if given, is instead
    the published absolute bound on eigenvalues (0.02). ``l2`` is the method's L2. Without ``history`` M is left
    out: what the null space does alone.
    """

    layers: Layers
    null_space_share: Share = 0.1
    nullspace_threshold: Positive | None = None
    l2: Positive = 10.0
    context_lengths: tuple[tuple[Count, Count], ...] = ((10, 5),)
    history: bool = field(default=True, metadata=LATER)


class AlphaEdit(memit.MEMIT):
    """Per layer: W gains R K^T P (K K^T P + M P + L2 I)^-1, P = U U^T (eq. 14), M of earlier edits' keys.

    In the basis U this is the symmetric system (U^T (K K^T + M) U + L2 I) Y = U^T K (kedit/editors/history.py).
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
        known, factor = none(inside)
        if self.memory is not None:
            known, factor = self.memory.read(self.hparams.layers.index(layer), lambda key: basis.T @ key, l2, inside)
        for key in inside.T:
            known, factor = grow(known, factor, key, l2)
        solved = torch.cholesky_solve(known.T @ inside, factor)
        return basis @ (inside - known @ solved) / l2

    def _apply_batch(self, requests: Sequence[EditRequest], edit: Edit, each: Sequence[Edit]) -> None:
        super()._apply_batch(requests, edit, each)
        for one in each:
            one.info["rank"] = [self.basis(layer).shape[1] for layer in self.hparams.layers]

    def _held(self, texts: Sequence[LookupText], used: Tensor) -> Tensor:
        """What is held from now on are the keys in the edited model."""
        return torch.stack([self._key(texts, layer) for layer in self.hparams.layers])
