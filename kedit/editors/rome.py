"""ROME: one rank-one update of one layer's second MLP projection.

Meng et al., "Locating and Editing Factual Associations in GPT", 2022. Two questions: which key (the averaged
key of the subject, multiplied by the inverse second moment), and which value (kedit/editors/value_search.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors import locate_then_edit
from kedit.editors.bounds import Natural
from kedit.editors.space import a_layer
from kedit.model.anatomy import matrix
from kedit.model.forward import activations
from kedit.model.journal import Edit, EditFailed, LowRank


@dataclass(frozen=True)
class Hparams(locate_then_edit.Hparams):
    """Settings of ROME; ``covariance=False`` is what the study's released settings ran."""

    layer: Natural
    covariance: bool = True

    @property
    def layers(self) -> tuple[int]:
        """The one layer that is edited."""
        return (self.layer,)


class ROME(locate_then_edit.LocateThenEdit):
    """W gains (v* - W k) u^T / (k . u), so that the edited W maps k to v* exactly (eq. 2).

    As its authors' code does, u = C^-1 kbar is made from the key averaged over contexts while k is that of the
    bare prompt. The two differ most where the subject opens the text; R-ROME (kedit/editors/r_rome.py) does
    without the asymmetry.
    """

    name = "rome"
    style = ("#d55e00", "o", "-")
    Hparams = Hparams
    space = locate_then_edit.LocateThenEdit.space | {"layer": a_layer(below=0.7)}

    @classmethod
    def moments_at(cls, hparams: Hparams) -> Sequence[int]:
        """Layers whose second moments enter the edits."""
        return hparams.layers if hparams.covariance else ()

    def _direction(self, key: Tensor) -> Tensor:
        """C^-1 k, normalised; k itself without covariance. (m,) -> (m,) float64."""
        u = key.double()
        if self.hparams.covariance:
            u = self.statistics.solve(self.hparams.layer, u[:, None])[:, 0]
        return u / u.norm()

    def _mapped(self, keys: Tensor) -> Tensor:
        """The key that the edited layer is to map to v*: that of the bare prompt. (n, m) -> (m,)."""
        return keys[0]

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm, layer = self.lm, self.hparams.layer
        texts = self._texts(request)
        down = lm.anatomy.down(layer)
        keys = activations(lm, texts, [layer], "key")[layer].double()
        output = activations(lm, texts[:1], [layer], "value")[layer][0]
        delta = self._search(request, texts, output, edit)

        u, key, weight = self._direction(keys.mean(0)), self._mapped(keys), matrix(down)
        moved = (weight @ (key - keys[0]).to(weight)).to(keys)  # what W k is beyond the bare prompt's output
        residual = (delta - moved) / (key @ u)
        if not torch.isfinite(residual).all():
            raise EditFailed("the update is not finite")
        edit.info |= {
            # How much larger the update is than if one key were used throughout (R-ROME); about 1 is sound.
            "amplification": ((self._direction(key) @ key) / (key @ u)).item(),
            "relative_change": residual.norm().item() / weight.norm().item(),
        }
        edit.write(LowRank(lm.anatomy.name(down), residual[:, None], u[:, None]))
