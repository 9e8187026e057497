"""PMET: MEMIT whose search moves attention and MLP apart, and which writes only the MLP's part.

Li et al., "PMET: Precise Model Editing in a Transformer", 2024. The outputs of the last layer's two
sub-layers are optimised together; the attention's part is then thrown away, so that the MLP is not made
to carry what attention did. That is also why a single edit takes less well than MEMIT's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors import memit
from kedit.editors.value_search import STOP, clamp, descend
from kedit.model.forward import Hook, LookupText, activations, hooked
from kedit.model.journal import Edit


@dataclass(frozen=True)
class Hparams(memit.Hparams):
    """Settings of PMET.

    ``left_padding`` is off; on, it emulates released code that counts positions from the left in
    batches padded on the left, so that every row but the longest is read and edited some tokens early.
    """

    left_padding: bool = False


def adding(delta: Tensor) -> Hook:
    """A hook: the module's output gains a vector at the first position of every row."""
    return lambda module, args, output: torch.cat([output[:, :1] + delta.to(output), output[:, 1:]], 1)


class PMET(memit.MEMIT):
    """Per layer: W gains (z - h) / sqrt(layers to come) times MEMIT's K^T (lambda C + K K^T)^-1 (eq. 9-14)."""

    name = "pmet"
    style = ("#56b4e9", "p", "-")
    Hparams = Hparams
    site = "value"  # the MLP's output in the last edited layer

    def _texts(self, request: EditRequest) -> list[LookupText]:
        texts = super()._texts(request)
        if not self.hparams.left_padding:
            return texts
        # Position p of a row that starts with k pads is the row's token p - k.
        longest = max(len(text.ids) for text in texts)
        return [LookupText(text.ids, max(0, text.lookup - (longest - len(text.ids)))) for text in texts]

    def _spread(self, residual: Tensor, layers: int) -> Tensor:
        return residual / layers**0.5

    def _search(self, request: EditRequest, texts: Sequence[LookupText], init: Tensor, edit: Edit) -> Tensor:
        """Adam over both sub-layers' deltas; once the target is the likeliest everywhere, its weight is a tenth."""
        lm, hp, layer = self.lm, self.hparams, self.hparams.layers[-1]
        objective = self._objective(request, texts, layer - 1)
        states = objective.tail.states[layer - 1]
        inits = [init, activations(lm, texts[:1], [layer], "attention")[layer][0]]
        norms = [one.float().norm() for one in inits]
        deltas = [torch.zeros_like(one, dtype=torch.float32, requires_grad=True) for one in inits]
        hooks = {lm.anatomy.down(layer): adding(deltas[0]), lm.anatomy.attn_out(layer): adding(deltas[1])}

        def loss_now() -> Tensor:
            nll_factor = 0.1 if objective.likeliest else 1.0  # as of the step before
            with hooked(hooks):
                nll_loss, kl = objective.losses(objective.tail.run(layer - 1, states))
            weight_decay = hp.weight_decay * sum(d.norm() / n**2 for d, n in zip(deltas, norms, strict=True))
            return nll_factor * nll_loss + hp.kl_factor * kl + weight_decay

        def converged(loss: float) -> bool:
            return loss < STOP or (objective.likeliest and (hp.kl_factor * objective.kl).item() <= 0.01)

        losses = descend(deltas, loss_now, hp, converged, lambda: clamp(deltas, norms, hp))
        edit.info |= objective.info(losses)
        return deltas[0].detach().double()
