"""FT-L and FT-M: fine-tuning of one layer's second MLP projection on the new fact.

The baselines of the ROME paper and of later toolkits (methods section 8). They differ in the loss alone:
FT-M is the ordinary next-token loss on the target, FT-L asks for all of the target's tokens at the
prompt's last position, which is what the released code calls FT-L.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.data.requests import EditRequest, spaced
from kedit.editors.cost import FLOAT, Cost, Shape, descent
from kedit.editors.protocol import Editor
from kedit.model.anatomy import matrix
from kedit.model.forward import LookupText, Tail
from kedit.model.journal import Dense, Edit, EditFailed


@dataclass(frozen=True)
class Hparams:
    """Settings of fine-tuning; ``bound`` keeps every weight within so much of its value before the edit."""

    layer: int
    steps: int = 25
    lr: float = 5e-4
    stop: float = 1e-2
    bound: float | None = None


class FTM(Editor):
    """Adam on one matrix, loss = mean -log p(target token | prompt, earlier target tokens)."""

    name = "ft-m"
    style = ("#e69f00", ">", "--")
    Hparams = Hparams

    @classmethod
    def cost(cls, shape: Shape, hparams: Hparams, tokens: int) -> Cost:
        """A search for a whole matrix, which is stored; beside it are its gradient, Adam's moments and a copy."""
        size = shape.d * shape.m * FLOAT
        work = descent(shape, 1, hparams.steps, hparams.layer)
        return Cost(edit=work, journal_bytes=size, device_bytes=5 * size)

    @staticmethod
    def _places(prompt: int, target: int) -> list[int]:
        """Positions that are to say the target's tokens, given the lengths of prompt and target."""
        return list(range(prompt - 1, prompt - 1 + target))

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm, hp = self.lm, self.hparams
        prompt = [*lm.begin, *lm.encode(request.text)]
        target = lm.encode(spaced(request.target_new, request.prompt))
        places = self._places(len(prompt), len(target))
        # The edited layer changes every token's state, so nothing but the blocks below it can be skipped.
        tail = Tail(lm, [LookupText((*prompt, *target[:-1]), 0)], [hp.layer - 1])
        down = lm.anatomy.down(hp.layer)
        before = matrix(down).detach().clone()
        delta = torch.zeros_like(before, requires_grad=True)

        def changed(module, args, output: Tensor) -> Tensor:
            return output + args[0] @ delta.T

        optimiser = torch.optim.Adam([delta], lr=hp.lr)
        labels = torch.tensor(target, device=lm.device)[:, None]
        handle = down.register_forward_hook(changed)
        try:
            for step in range(hp.steps + 1):
                with torch.enable_grad():
                    hidden = tail.run(hp.layer - 1, tail.states[hp.layer - 1])[0]
                    loss = -lm.logits(hidden[places]).log_softmax(-1).gather(1, labels).mean()
                if not torch.isfinite(loss):
                    raise EditFailed(f"the loss of fine-tuning is {loss.item()} at step {step}")
                if step == 0:
                    edit.info["loss_before"] = loss.item()
                if loss.item() < hp.stop or step == hp.steps:
                    break
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if hp.bound is not None:
                    with torch.no_grad():
                        delta.clamp_(-hp.bound, hp.bound)
        finally:
            handle.remove()
        edit.info |= {
            "steps": step,
            "loss": loss.item(),
            "relative_change": (delta.detach().norm() / before.norm()).item(),
        }
        edit.write(Dense(lm.anatomy.name(down), delta.detach()))


class FTL(FTM):
    """The same with loss = mean -log p(target token | prompt): a bag of tokens, all in the first place."""

    name = "ft-l"
    style = ("#e69f00", "<", "-")

    @staticmethod
    def _places(prompt: int, target: int) -> list[int]:
        return [prompt - 1] * target
