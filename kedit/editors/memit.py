"""MEMIT: the change is spread over several layers by ridge regression against the keys' second moment.

Meng et al., "Mass-Editing Memory in a Transformer", 2023. Each layer, from the lowest up, takes an
equal share of what is then left between the residual stream and its optimised value z. PMET and
AlphaEdit change single steps of this and derive from it.
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
from kedit.model.forward import LookupText, activations, lookup_text, lookup_texts
from kedit.model.journal import Edit, EditFailed, LowRank


@dataclass(frozen=True)
class Hparams:
    """Settings of MEMIT; ``weight`` is lambda, the weight of the second moment (a mean, not a sum)."""

    layers: tuple[int, ...]
    weight: float
    steps: int = 25
    lr: float = 0.5
    decay: float = 1e-3
    clamp: float = 4.0
    kl: float = 0.0625
    contexts: tuple[tuple[int, int], ...] = ((10, 5),)  # (tokens, how many)
    seed: int = 0

    @property
    def search(self) -> Search:
        """The part that the search for z needs: the site is in the last layer."""
        return Search(self.layers[-1], self.steps, self.lr, self.decay, self.clamp, self.kl)


class MEMIT(Editor):
    """Per layer: W gains R K^T (lambda C + K K^T)^-1 with R an equal share of z - h (eq. 14, alg. 1)."""

    name = "memit"
    style = ("#0072b2", "s", "-")
    Hparams = Hparams
    site = "block"  # where z is optimised: the residual stream after the last edited layer

    @classmethod
    def moments_at(cls, hparams: Hparams) -> Sequence[int]:
        """Layers whose second moments enter the edits."""
        return hparams.layers

    @classmethod
    def cost(cls, shape: Shape, hparams: Hparams, tokens: int) -> Cost:
        """What the method costs on a model of that shape, with second moments over so many tokens."""
        return locate_then_edit(shape, hparams.layers, hparams.steps - 1, hparams.contexts, tokens)

    def _prepare(self) -> None:
        if self.contexts is None:
            self.contexts = context_templates(self.lm, self.hparams.contexts, self.hparams.seed)
        self.statistics.prepare(self.moments_of)

    def _texts(self, request: EditRequest) -> list[LookupText]:
        """The prompt in each context, the bare one first."""
        return lookup_texts(self.lm, request, self.contexts)

    def _key(self, texts: Sequence[LookupText], layer: int) -> torch.Tensor:
        """Mean of group means: the bare prompt counts as much as all prefixed ones. (m,) float64."""
        keys = activations(self.lm, texts, [layer], "key")[layer].double()
        return (keys[0] + keys[1:].mean(0)) / 2 if len(keys) > 1 else keys[0]

    def _search(
        self, texts: Sequence[LookupText], kl_text: LookupText, target: Sequence[int], start: torch.Tensor, edit: Edit
    ):
        """delta at the site, (d,) float64."""
        found = search(self.lm, texts, kl_text, target, start, self.hparams.search)
        edit.info |= {"steps": len(found.losses), "loss": found.losses[-1], "probability": found.probability}
        return found.delta.double()

    def _share(self, left: torch.Tensor, layers: int) -> torch.Tensor:
        """What the lowest of the layers to come takes of what is left."""
        return left / layers

    def _gain(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """(lambda C + K K^T)^-1 K by Woodbury, never forming the matrix; keys (m, n) -> (m, n)."""
        solved = self.statistics.solve(layer, keys) / self.hparams.weight
        inner = torch.eye(keys.shape[1], dtype=torch.float64, device=keys.device) + keys.T @ solved
        return torch.linalg.solve(inner, solved, left=False)

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm, hp = self.lm, self.hparams
        texts = self._texts(request)
        last = hp.layers[-1]

        def state() -> torch.Tensor:
            return activations(lm, texts[:1], [last], self.site)[last][0].double()

        start = state()
        target = lm.encode(spaced(request.target_new, request.prompt))
        delta = self._search(texts, lookup_text(lm, "{} is a", request.subject), target, start, edit)
        goal = start + delta
        edit.info["relative_change"] = []
        for position, layer in enumerate(hp.layers):
            # Lower layers are already changed, so keys and what is left are read anew each time.
            key = self._key(texts, layer)
            share = self._share(goal - state(), len(hp.layers) - position)
            right = self._gain(layer, key[:, None])
            if not (torch.isfinite(share).all() and torch.isfinite(right).all()):
                raise EditFailed(f"the update of layer {layer} is not finite")
            down = lm.anatomy.down(layer)
            size = (share.norm() * right.norm()).item() / matrix(down).norm().item()
            edit.info["relative_change"].append(size)
            edit.write(LowRank(lm.anatomy.name(down), share[:, None], right))
        edit.info["left"] = ((goal - state()).norm() / delta.norm()).item()
