"""MEMIT: the change is spread over several layers by ridge regression against the keys' second moment.

Meng et al., "Mass-Editing Memory in a Transformer", 2023. Each layer, from the lowest up, takes an
equal part of the residual between the residual stream and its optimised value z. PMET, AlphaEdit and ENCORE
change single steps of this and derive from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors import locate_then_edit
from kedit.editors.bounds import LATER, Count, Layers, NotNegative, Positive
from kedit.editors.history import KeyMemory
from kedit.editors.space import decades, in_a_row
from kedit.model.anatomy import matrix
from kedit.model.forward import LookupText, activations
from kedit.model.journal import Edit, EditFailed, Entry, LowRank


@dataclass(frozen=True, kw_only=True)
class Hparams(locate_then_edit.Hparams):
    """Settings of MEMIT; ``mom2_weight`` is lambda, the weight of the second moment (a mean, not a sum).

    ``history`` and ``ridge`` are not MEMIT's own: the keys of earlier edits are held too, and the update's norm is
    penalised with so large a weight (ENCORE's).
    """

    layers: Layers
    context_lengths: tuple[tuple[Count, Count], ...] = ((10, 5),)
    mom2_weight: Positive
    history: bool = field(default=False, metadata=LATER)
    ridge: NotNegative = field(default=0.0, metadata=LATER)


class MEMIT(locate_then_edit.LocateThenEdit):
    """Per layer: W gains R K^T (A + K K^T)^-1, A = lambda C, with R an equal part of z - h (eq. 14, alg. 1).

    With a history and a ridge A = lambda C + S + ridge I, S the sum of k k^T over the keys of all earlier edits.

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

    def make_memory(self) -> KeyMemory | None:
        """The keys of earlier edits, where there is a history."""
        return KeyMemory() if self.hparams.history else None

    def _held(self, texts: Sequence[LookupText], used: Tensor) -> Tensor:
        """What a history holds of a request: (layers, m), its keys as they were used, layer by layer."""
        return used.contiguous()

    def _solved(self, layer: int, keys: Tensor) -> Tensor:
        """A^-1 K, keys (m, n) -> (m, n): what it is without S, less what S takes off by Woodbury.

        With L the Cholesky factor of A without S, and H = L^-1 (keys of earlier edits), S takes off
        L^-T H (I + H^T H)^-1 H^T L^-1 K.
        """
        weight, ridge = self.hparams.mom2_weight, self.hparams.ridge / self.hparams.mom2_weight
        solved = self.statistics.solve(layer, keys, ridge) / weight
        if self.memory is None or not self.memory.entries:
            return solved
        lower, root = self.statistics.factor(layer, ridge), weight**0.5  # L is root times lower

        def mapped(key: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(lower, key.view(len(key), -1), upper=False).view(key.shape) / root

        inside = mapped(keys)
        held, factor = self.memory.read(self.hparams.layers.index(layer), mapped, 1.0, inside)
        moved = held @ torch.cholesky_solve(held.T @ inside, factor)
        return solved - torch.linalg.solve_triangular(lower.T, moved, upper=True) / root

    def _gain(self, layer: int, keys: Tensor) -> Tensor:
        """(A + K K^T)^-1 K by Woodbury, never forming the matrix; keys (m, n) -> (m, n)."""
        solved = self._solved(layer, keys)
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
        kept = [number for number, one in enumerate(each) if "skipped" not in one.info]
        if not kept:
            return
        requests, texts, each = ([some[number] for number in kept] for some in (requests, texts, each))
        delta, z, used = delta[kept], (start + delta)[kept], []
        for one in each:
            one.info["relative_change"] = []
        for position, layer in enumerate(layers):
            # Lower layers are already changed, so keys and the residual are read anew each time.
            keys = torch.stack([self._key(one, layer) for one in texts], 1)
            used.append(keys)
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
        for one, read in zip(texts, torch.stack(used).unbind(-1), strict=True) if self.hparams.history else ():
            edit.write(Entry(self.name, {"keys": self._held(one, read).cpu()}))
