"""PMET: MEMIT whose search moves attention and MLP apart, and which writes only the MLP's part.

Li et al., "PMET: Precise Model Editing in a Transformer", 2024. The outputs of the last layer's two
sub-layers are optimised together; the attention's part is then thrown away, so that the MLP is not made
to carry what attention did. That is also why a single edit takes less well than MEMIT's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors import memit
from kedit.editors.value_search import adding, clamp, descend
from kedit.model.forward import LookupText, activations, capture, hooked, lookup_text
from kedit.model.journal import Edit
from kedit.model.lm import LM


@dataclass(frozen=True)
class Hparams(memit.Hparams):
    """Settings of PMET.

    ``left_padding`` is off; on, it emulates released code that counts from the left in batches padded on the left, so
    that every row but the longest is read, edited and scored some tokens early: keys, delta, the target's tokens and
    the divergence. The bare prompt's delta, and the init that is added to it, are then often those of a pad.
    """

    left_padding: bool = False


@contextmanager
def eager(lm: LM) -> Iterator[None]:
    """Within the block attention is the plain one, by which a pad, that sees nothing, attends to everything alike.

    Others give it zeros, or what they please, and the released code scales by what stands there.
    """
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)


def left_padded(lm: LM, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids and mask (B, T) of rows padded on the left with the end token."""
    longest, token = max(map(len, rows)), lm.tokenizer.eos_token_id or 0
    ids = [[token] * (longest - len(row)) + [*row] for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=lm.device), "attention_mask": torch.tensor(mask, device=lm.device)}


class PMET(memit.MEMIT):
    """Per layer: W gains (z - h) / sqrt(layers to come) times MEMIT's K^T (lambda C + K K^T)^-1 (eq. 9-14)."""

    name = "pmet"
    style = ("#56b4e9", "p", "-")
    Hparams = Hparams
    needs = ("down", "attn_out")
    site = "value"  # the MLP's output in the last edited layer

    def _keys(self, texts: Sequence[LookupText], layer: int) -> Tensor:
        if not self.hparams.left_padding:
            return super()._keys(texts, layer)
        with eager(self.lm), capture(self.lm, {layer: self.lm.anatomy.down(layer)}, inputs=True) as seen:
            self.lm.anatomy.base(**left_padded(self.lm, [text.ids for text in texts]), use_cache=False)
        return seen[layer][range(len(texts)), [text.lookup for text in texts]]

    def _spread(self, residual: Tensor, layers: int) -> Tensor:
        return residual / layers**0.5

    def _search(self, request: EditRequest, texts: Sequence[LookupText], init: Tensor, edit: Edit) -> Tensor:
        """Adam over both sub-layers' deltas; once the target is the likeliest everywhere, its weight is a tenth."""
        lm, hp, layer = self.lm, self.hparams, self.hparams.layers[-1]
        objective = self._objective(request, texts, inside=True)
        tail, sites = objective.tail, (lm.anatomy.down(layer), lm.anatomy.attn_out(layer))
        if hp.left_padding:
            asked = [LookupText((*text.ids, *self.target_ids(request)[:-1]), text.lookup) for text in texts]
            asked.append(lookup_text(lm, "{} is a", request.subject))
            batch, places = left_padded(lm, [text.ids for text in asked]), [text.lookup for text in asked]
            counted = tail.positions.clamp(max=batch["input_ids"].shape[1] - 1)

            def run() -> Tensor:
                with eager(lm):
                    hidden = lm.anatomy.base(**batch, use_cache=False).last_hidden_state
                return hidden[torch.arange(len(asked), device=lm.device)[:, None], counted]

            with capture(lm, dict(enumerate(sites)), inputs=False) as seen:
                run()
            inits = [seen[number][0, places[0]] for number in range(2)]
        else:
            run, places = partial(tail.run, layer - 1, tail.states[layer - 1]), 0
            inits = [init, activations(lm, texts[:1], [layer], "attention")[layer][0]]
        norms = [one.float().norm() for one in inits]
        deltas = [torch.zeros_like(one, dtype=torch.float32, requires_grad=True) for one in inits]
        hooks = {site: adding(delta, places) for site, delta in zip(sites, deltas, strict=True)}

        def loss_now() -> Tensor:
            nll_factor = 0.1 if objective.likeliest else 1.0  # as of the step before
            with hooked(hooks):
                nll_loss, kl = objective.losses(run())
            weight_decay = hp.weight_decay * sum(d.norm() / n**2 for d, n in zip(deltas, norms, strict=True))
            return nll_factor * nll_loss + hp.kl_factor * kl + weight_decay

        def converged(loss: float) -> bool:
            return objective.reached(loss, hp) or (objective.likeliest and (hp.kl_factor * objective.kl).item() <= 0.01)

        losses = descend(deltas, loss_now, hp, converged, lambda: clamp(deltas, norms, hp))
        edit.info |= objective.info(losses)
        return inits[0].double() + deltas[0].detach().double() - init
