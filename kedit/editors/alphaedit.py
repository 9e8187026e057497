"""AlphaEdit: MEMIT whose updates cannot touch the directions that keys of ordinary text take.

Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", 2025; methods
section 8. Updates are confined to the span of U, the eigenvectors of C with the smallest eigenvalues,
and the keys of earlier edits are held as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors import memit
from kedit.editors.cost import Cost, Shape, locate_then_edit
from kedit.model.journal import Edit, Entry
from kedit.model.memory import Memory


@dataclass(frozen=True, kw_only=True)
class Hparams(memit.Hparams):
    """Settings of AlphaEdit; ``weight`` is not used.

    ``share``: the null space is as many of the smallest eigenvalues of C as together hold this share of
    their sum, which means the same for every layer and model. ``threshold``, if given, is instead the
    published absolute bound on eigenvalues (0.02). ``ridge`` is the method's L2.
    """

    weight: float = 0.0
    share: float = 0.1
    threshold: float | None = None
    ridge: float = 10.0


class Held(Memory):
    """Keys of earlier edits, (layers, m) each, and what the next edit needs of them.

    For each layer those keys in the basis of the null space, (r, n), and the Cholesky factor (n, n) of
    L2 I + their Gram matrix, which grows by a row an edit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside: dict[int, Tensor] = {}
        self.factors: dict[int, Tensor] = {}
        self.bases: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forget all."""
        super().clear()
        self.inside.clear()
        self.factors.clear()

    def read(self, place: int, basis: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Keys of the layer at ``place`` within the basis, and the factor, brought up to the last edit."""
        known = self.inside.get(place, basis.new_zeros(basis.shape[1], 0))
        factor = self.factors.get(place, basis.new_zeros(0, 0))
        for entry in self.entries[known.shape[1] :]:
            known, factor = grown(known, factor, basis.T @ entry["keys"][place].to(basis), ridge)
        self.inside[place], self.factors[place] = known, factor
        return known, factor


def grown(known: Tensor, factor: Tensor, key: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """One key more: keys (r, n + 1) and the Cholesky factor of ridge I + their Gram matrix."""
    across = torch.linalg.solve_triangular(factor, (known.T @ key)[:, None], upper=False)
    corner = (ridge + key @ key - across.square().sum()).sqrt().view(1, 1)
    factor = torch.cat([torch.nn.functional.pad(factor, (0, 1)), torch.cat([across.T, corner], 1)])
    return torch.cat([known, key[:, None]], 1), factor


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

    def make_memory(self) -> Held:
        """Keys of earlier edits."""
        return Held()

    @classmethod
    def cost(cls, shape: Shape, hparams: Hparams, tokens: int) -> Cost:
        """MEMIT's, with eigenvectors in place of Cholesky factors."""
        return locate_then_edit(
            shape, hparams.layers, hparams.steps - 1, hparams.contexts, tokens, factorisations=30, factors=3
        )

    def basis(self, layer: int) -> Tensor:
        """U, an orthonormal basis of the null space: (m, r) float64."""
        if layer not in self.memory.bases:
            values, vectors = self.statistics.spectrum(layer)
            if self.hparams.threshold is not None:
                rank = int((values < self.hparams.threshold).sum())
            else:
                rank = int((values.cumsum(0) <= self.hparams.share * values.sum()).sum())
            self.memory.bases[layer] = vectors[:, :rank].contiguous()
        return self.memory.bases[layer]

    def _gain(self, layer: int, keys: Tensor) -> Tensor:
        basis, ridge = self.basis(layer), self.hparams.ridge
        inside = basis.T @ keys
        known, factor = self.memory.read(self.hparams.layers.index(layer), basis, ridge)
        for key in inside.T:
            known, factor = grown(known, factor, key, ridge)
        solved = torch.cholesky_solve(known.T @ inside, factor)
        return basis @ (inside - known @ solved) / ridge

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        super()._apply(request, edit)
        # What is held from now on are the keys in the edited model.
        keys = [self._key(self._texts(request), layer) for layer in self.hparams.layers]
        edit.info["rank"] = [self.basis(layer).shape[1] for layer in self.hparams.layers]
        edit.write(Entry(self.name, {"keys": torch.stack(keys).cpu()}))
