"""ROME: one rank-one update of one layer's second MLP projection.

Meng et al., "Locating and Editing Factual Associations in GPT", 2022. Two questions: which key (the
averaged key of the subject, turned by the inverse second moment), and which value (kedit/editors/value_search.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kedit.data.requests import EditRequest, spaced
from kedit.editors.contexts import context_templates
from kedit.editors.cost import Cost, Shape, locate_then_edit
from kedit.editors.protocol import Editor
from kedit.editors.value_search import Search, search
from kedit.model.anatomy import matrix
from kedit.model.forward import activations, lookup_text, lookup_texts
from kedit.model.journal import Edit, EditFailed, LowRank


@dataclass(frozen=True)
class Hparams:
    """Settings of ROME; ``covariance=False`` is what the study's released settings ran."""

    layer: int
    steps: int = 25
    lr: float = 0.5
    decay: float = 1e-3
    clamp: float = 4.0
    kl: float = 0.0625
    covariance: bool = True
    contexts: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))  # (tokens, how many)
    seed: int = 0

    @property
    def search(self) -> Search:
        """The part that the value search needs."""
        return Search(self.layer, self.steps, self.lr, self.decay, self.clamp, self.kl)


class ROME(Editor):
    """W gains (v* - W k) u^T / (k . u), so that the edited W maps k to v* exactly (eq. 2).

    As its authors' code does, u is turned from the key averaged over contexts while k is that of the bare
    prompt. The two differ most where the subject opens the text; R-ROME (kedit/editors/r_rome.py) does
    without the asymmetry.
    """

    name = "rome"
    style = ("#d55e00", "o", "-")
    Hparams = Hparams

    @classmethod
    def moments_at(cls, hparams: Hparams) -> Sequence[int]:
        """Layers whose second moments enter the edits."""
        return [hparams.layer] if hparams.covariance else []

    @classmethod
    def cost(cls, shape: Shape, hparams: Hparams, tokens: int) -> Cost:
        """What the method costs on a model of that shape, with second moments over so many tokens."""
        return locate_then_edit(shape, [hparams.layer], hparams.steps - 1, hparams.contexts, tokens)

    def _prepare(self) -> None:
        if self.contexts is None:
            self.contexts = context_templates(self.lm, self.hparams.contexts, self.hparams.seed)
        self.statistics.prepare(self.moments_of)

    def _direction(self, key: torch.Tensor) -> torch.Tensor:
        """C^-1 k, normalised; k itself without covariance. (m,) -> (m,) float64."""
        turned = key.double()
        if self.hparams.covariance:
            turned = self.statistics.solve(self.hparams.layer, turned[:, None])[:, 0]
        return turned / turned.norm()

    def _mapped(self, keys: torch.Tensor) -> torch.Tensor:
        """The key that the edited layer is to map to v*: that of the bare prompt. (n, m) -> (m,)."""
        return keys[0]

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm, hp = self.lm, self.hparams
        texts = lookup_texts(lm, request, self.contexts)
        down = lm.anatomy.down(hp.layer)
        keys = activations(lm, texts, [hp.layer], "key")[hp.layer].double()
        output = activations(lm, texts[:1], [hp.layer], "value")[hp.layer][0]

        direction = self._direction(keys.mean(0))
        key = self._mapped(keys)
        target = lm.encode(spaced(request.target_new, request.prompt))
        found = search(lm, texts, lookup_text(lm, "{} is a", request.subject), target, output, hp.search)
        aligned = key @ direction
        weight = matrix(down)
        moved = (weight @ (key - keys[0]).to(weight)).to(keys)  # what W k is beyond the bare prompt's output
        residual = (found.delta.double() - moved) / aligned
        if not torch.isfinite(residual).all():
            raise EditFailed("the update is not finite")

        own = self._direction(key)
        before = weight.norm().item()
        edit.info |= {
            "steps": len(found.losses),
            "loss": found.losses[-1],
            "probability": found.probability,
            # How much larger the update is than if one key were used throughout (R-ROME); about 1 is sound.
            "amplification": ((own @ key) / aligned).item(),
            "relative_change": residual.norm().item() / before,
        }
        edit.write(LowRank(lm.anatomy.name(down), residual[:, None], direction[:, None]))
