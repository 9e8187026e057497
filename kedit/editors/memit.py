"""MEMIT: the change is spread over several layers by ridge regression against the keys' second moment.

Meng et al., "Mass-Editing Memory in a Transformer", 2023. Each layer, from the lowest up, takes an
equal part of the residual between the residual stream and its optimised value z. PMET and AlphaEdit
change single steps of this and derive from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors import locate_then_edit
from kedit.editors.bounds import Count, Layers, Positive
from kedit.editors.space import decades, in_a_row
from kedit.model.anatomy import matrix
from kedit.model.forward import LookupText, activations
from kedit.model.journal import Edit, EditFailed, LowRank


@dataclass(frozen=True, kw_only=True)
class Hparams(locate_then_edit.Hparams):
    """Settings of MEMIT; ``mom2_weight`` is lambda, the weight of the second moment (a mean, not a sum)."""

    layers: Layers
    context_lengths: tuple[tuple[Count, Count], ...] = ((10, 5),)
    mom2_weight: Positive


class MEMIT(locate_then_edit.LocateThenEdit):
    """Per layer: W gains R K^T (lambda C + K K^T)^-1 with R an equal part of z - h (eq. 14, alg. 1).

    Where a norm or a factor stands after the MLP, z is searched for in front of it, and no update of a lower layer
    moves h by R. There each lower layer takes its part of delta, and the last layer's value is searched for once
    more, with the lower layers as edited: so what the search reaches, the edited model says.

    Several requests are written at once: a column each of R (d, n) and K (m, n), every z found before anything is
    written.
    """

    name = "memit"
    style = ("#0072b2", "s", "-")
    Hparams = Hparams
    space = locate_then_edit.LocateThenEdit.space | {
        "layers": in_a_row(1, 3, 5, below=0.7),
        "mom2_weight": decades(-3, 4),
    }
    site = "block"  # where z is optimised: the residual stream after the last edited layer

    def _keys(self, texts: Sequence[LookupText], layer: int) -> Tensor:
        """The key in each context: (texts, m)."""
        return activations(self.lm, texts, [layer], "key")[layer]

    def _key(self, texts: Sequence[LookupText], layer: int) -> Tensor:
        """Mean of group means: the bare prompt counts as much as all prefixed ones. (m,) float64."""
        keys = self._keys(texts, layer).double()
        return (keys[0] + keys[1:].mean(0)) / 2 if len(keys) > 1 else keys[0]

    def _spread(self, residual: Tensor, layers: int) -> Tensor:
        """The part of the residual for the lowest of the layers to come."""
        return residual / layers

    def _gain(self, layer: int, keys: Tensor) -> Tensor:
        """(lambda C + K K^T)^-1 K by Woodbury, never forming the matrix; keys (m, n) -> (m, n)."""
        solved = self.statistics.solve(layer, keys) / self.hparams.mom2_weight
        inner = torch.eye(keys.shape[1], dtype=torch.float64, device=keys.device) + keys.T @ solved
        return torch.linalg.solve(inner, solved, left=False)

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        self._apply_batch([request], edit, [edit])

    def _apply_batch(self, requests: Sequence[EditRequest], edit: Edit, each: Sequence[Edit]) -> None:
        lm, layers = self.lm, self.hparams.layers
        texts, last = [self._texts(request) for request in requests], layers[-1]
        inside = self.site == "block" and not lm.anatomy.direct[last]
        site = "value" if inside else self.site

        def state() -> Tensor:  # of every request, (n, d)
            bare = [activations(lm, one[:1], [last], site)[last][0] for one in texts]
            return torch.stack(bare).double()

        def searched(start: Tensor) -> Tensor:
            return torch.stack([self._search(*of) for of in zip(requests, texts, start, each, strict=True)])

        start = state()
        delta = searched(start)
        z = start + delta
        for one in each:
            one.info["relative_change"] = []
        for position, layer in enumerate(layers):
            # Lower layers are already changed, so keys and the residual are read anew each time.
            keys = torch.stack([self._key(one, layer) for one in texts], 1)
            remaining = len(layers) - position
            if inside and remaining == 1 < len(layers):
                z = state() + searched(state())
            lower = inside and remaining > 1
            left = delta / len(layers) if lower else self._spread(z - state(), remaining)
            right = self._gain(layer, keys)
            if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
                raise EditFailed(f"the update of layer {layer} is not finite")
            down = lm.anatomy.down(layer)
            size = matrix(down).norm().item()
            for one, residual, gain in zip(each, left, right.T, strict=True):
                one.info["relative_change"].append((residual.norm() * gain.norm()).item() / size)
            edit.write(LowRank(lm.anatomy.name(down), left.T.contiguous(), right))
        for one, missed, moved in zip(each, z - state(), delta, strict=True):
            one.info["left"] = (missed.norm() / moved.norm()).item()
