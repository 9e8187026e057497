"""FT-L and FT-M: fine-tuning of one layer's second MLP projection on the new fact.

The baselines of the ROME paper and of later toolkits. They differ in the loss alone: FT-M is the ordinary
next-token loss on the target, FT-L asks for all of the target's tokens at the prompt's last position, which
is what the released code calls FT-L.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors.bounds import Count, Natural, NotNegative, Positive
from kedit.editors.protocol import Editor
from kedit.editors.space import a_layer, decades, trying
from kedit.editors.value_search import descend, nll_loss
from kedit.model.anatomy import matrix
from kedit.model.forward import LookupText, Tail, hooked
from kedit.model.journal import Dense, Edit


@dataclass(frozen=True)
class Hparams:
    """Settings of fine-tuning; ``bound`` keeps every weight within so much of its value before the edit."""

    layer: Natural
    steps: Count = 25
    lr: Positive = 5e-4
    stop: NotNegative = 1e-2
    bound: Positive | None = None


class FTM(Editor):
    """Adam on one matrix, loss = mean -log p(target token | prompt, earlier target tokens)."""

    name = "ft-m"
    needs = ("down",)
    style = ("#e69f00", ">", "--")
    Hparams = Hparams
    space = trying(layer=a_layer(), lr=decades(-5, -3), bound=(None, 5e-4, 5e-5))
    advance = 1
    """How far the position that is to predict moves with each token of the target."""

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm, hp = self.lm, self.hparams
        prompt, target = self.prompt_ids(request), self.target_ids(request)
        positions = [len(prompt) - 1 + self.advance * j for j in range(len(target))]
        # The edited layer changes every token's state, so nothing but the blocks below it can be skipped.
        below, down = hp.layer - 1, lm.anatomy.down(hp.layer)
        tail = Tail(lm, [LookupText((*prompt, *target[:-1]), 0)], [below])
        delta = torch.zeros_like(matrix(down), requires_grad=True)

        def loss_now() -> Tensor:
            return nll_loss(lm, tail.run(below, tail.states[below])[0][positions], target)

        def bound() -> None:
            if hp.bound is not None:
                delta.clamp_(-hp.bound, hp.bound)

        with hooked({down: lambda module, args, output: output + args[0] @ delta.T}):
            losses = descend([delta], loss_now, hp, lambda loss: loss < hp.stop, bound)
        edit.info |= {"loss_before": losses[0], "steps": len(losses) - 1, "loss": losses[-1]}
        edit.info["relative_change"] = (delta.detach().norm() / matrix(down).norm()).item()
        edit.write(Dense(lm.anatomy.name(down), delta.detach()))


class FTL(FTM):
    """The same with loss = mean -log p(target token | prompt): a bag of tokens, all at the first's position."""

    name = "ft-l"
    style = ("#e69f00", "<", "-")
    advance = 0
