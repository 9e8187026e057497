"""Which value? The search for the vector that makes the model say the new object.

Shared by ROME, MEMIT, PMET and AlphaEdit (ROME section 3.1; MEMIT section 4.2). A vector delta is
added to the residual stream after one block, at the subject's last token, and optimised so that
prompts in several contexts continue with the target while "{subject} is a" stays as it was.

Nothing before the subject's last token, and no block up to the edited one, depends on delta. So one
forward reads all rows and keeps the keys and values of those tokens; each step then runs only the
remaining tokens through the remaining blocks, with logits only where the loss reads them. The result
is that of running everything at every step (tests/test_values.py holds the plain version). KN, GRACE
and fine-tuning use the same ``Tail`` for what they change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.model.forward import LookupText, Tail
from kedit.model.journal import EditFailed
from kedit.model.lm import LM

STOP = 0.05
"""The search ends when the total loss is below this."""


@dataclass(frozen=True)
class Search:
    """Settings of the search: ``steps`` counts forwards, so there are at most steps - 1 updates."""

    layer: int
    steps: int = 25
    lr: float = 0.5
    decay: float = 1e-3
    clamp: float = 4.0
    kl: float = 0.0625


@dataclass(frozen=True)
class Found:
    """delta (d,) float32, the norm of what it is added to, the losses, and p(target) at the end."""

    delta: Tensor
    init_norm: float
    losses: list[float]
    probability: float


class Objective:
    """What every search optimises for: the target after each text, and an unchanged "{subject} is a".

    Args:
        texts: the prompt in each context.
        kl_text: "{subject} is a"; only what comes before its subject's end matters.
        target: token ids to be said after each text.
        layer: block after whose output the tail starts.

    Attributes:
        tail: the texts with the target's tokens but the last, then ``kl_text``.
    """

    def __init__(self, lm: LM, texts: Sequence[LookupText], kl_text: LookupText, target: Sequence[int], layer: int):
        self.lm = lm
        full = [LookupText((*text.ids, *target[:-1]), text.lookup) for text in texts]
        full.append(LookupText(kl_text.ids[: kl_text.lookup + 1], kl_text.lookup))
        self.tail = Tail(lm, full, [layer])
        # the target's j-th token is predicted at the text's last position + j
        ends = torch.tensor([len(text.ids) - 1 - text.lookup for text in texts], device=lm.device)
        self.reads = ends[:, None] + torch.arange(len(target), device=lm.device)
        self.every = torch.arange(len(texts), device=lm.device)[:, None]
        self.labels = torch.tensor([list(target)] * len(texts), device=lm.device)[..., None]
        self._before: Tensor | None = None

    def terms(self, hidden: Tensor) -> tuple[Tensor, Tensor, bool]:
        """From final hidden states of the tail's rows.

        Returns:
            (rows, target) log-probabilities of the target's tokens; KL(first call || this one) right
            after the subject of ``kl_text``; whether every token of the target is the likeliest one.
        """
        logprobs = self.lm.logits(hidden[self.every, self.reads]).log_softmax(-1)
        said = logprobs.gather(2, self.labels)[..., 0]
        after = self.lm.logits(hidden[len(self.every), 0]).log_softmax(-1)
        if self._before is None:
            self._before = after.detach()
        divergence = (self._before.exp() * (self._before - after)).sum()
        return said, divergence, bool((logprobs.amax(-1) == said).all())


def project(delta: Tensor, limit: Tensor) -> None:
    """Rescale delta in place to the norm ``limit`` if it is longer."""
    if (norm := delta.norm()) > limit:
        delta *= limit / norm


def search(
    lm: LM, texts: Sequence[LookupText], kl_text: LookupText, target: Sequence[int], init: Tensor, settings: Search
) -> Found:
    """Optimise delta by Adam (methods: ROME eq. 4 and MEMIT eq. 16).

    loss = mean over rows of the target's mean negative log-likelihood
           + kl * KL(before || now) right after the subject of ``kl_text``
           + decay * |delta| / |init|^2,
    and after each update delta is projected onto the ball of radius clamp * |init|.

    Args:
        texts, kl_text, target: see ``Objective``.
        init: (d,) output of the edited site on the bare prompt, which delta is added to.

    Raises:
        EditFailed: the loss is not finite.
    """
    objective = Objective(lm, texts, kl_text, target, settings.layer)
    states = objective.tail.states[settings.layer]
    first = torch.zeros(states.shape[1], 1, device=lm.device)
    first[0] = 1.0

    init_norm = init.float().norm()
    delta = torch.zeros_like(init, dtype=torch.float32, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.lr)
    losses, probability = [], 0.0
    for step in range(settings.steps):
        with torch.enable_grad():
            hidden = objective.tail.run(settings.layer, states + (first * delta).to(states))
            said, divergence, _ = objective.terms(hidden)
            decay = settings.decay * delta.norm() / init_norm**2
            loss = -said.mean(1).mean() + settings.kl * divergence + decay
        losses.append(loss.item())
        probability = said.detach().sum(1).exp().mean().item()
        if not torch.isfinite(loss):
            raise EditFailed(f"the loss of the value search is {losses[-1]} at step {step}")
        if losses[-1] < STOP or step == settings.steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            project(delta, settings.clamp * init_norm)
    return Found(delta.detach(), init_norm.item(), losses, probability)
