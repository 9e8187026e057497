"""Which value? The search, by gradient descent, for what makes the model say the new object.

Shared by ROME, MEMIT, PMET and AlphaEdit (ROME section 3.1; MEMIT section 4.2). A vector delta is
added to the residual stream after one block, at the subject's last token, and optimised so that
prompts in several contexts continue with the target while "{subject} is a" stays as it was.

Nothing before the subject's last token, and no block up to the edited one, depends on delta. So one
forward reads all rows and keeps the keys and values of those tokens; each step then runs only the
remaining tokens through the remaining blocks, with logits only where the loss reads them. The result
is that of running everything at every step (tests/test_values.py holds the plain version). GRACE and
fine-tuning descend in the same way, on another loss.

Where a norm or a factor stands between the MLP and the residual stream (``Anatomy.direct``), delta is added in
front of it, to the MLP's output, and each step runs the edited block too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kedit.editors.bounds import LATER, Count, NotNegative, Positive
from kedit.model.forward import Hook, LookupText, Tail, hooked
from kedit.model.journal import EditFailed
from kedit.model.lm import LM

STOP = 0.05
"""The search ends when the total loss is below this."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of the search.

    ``steps`` counts updates; ROME's ``v_num_grad_steps`` counts forwards, which are one more. ``early``: how many
    forwards may find the target the likeliest after every prefixed text; the last of them ends the search (ENCORE).
    """

    steps: Count = 24
    lr: Positive = 0.5
    weight_decay: NotNegative = 1e-3
    clamp_norm_factor: Positive = 4.0
    kl_factor: NotNegative = 0.0625
    early: Count | None = field(default=None, metadata=LATER)


def descend(
    variables: Sequence[Tensor],
    loss_now: Callable[[], Tensor],
    settings: Any,
    converged: Callable[[float], bool] = lambda loss: False,
    project: Callable[[], None] = lambda: None,
) -> list[float]:
    """Minimise a loss by Adam; the variables are changed in place.

    Args:
        variables: tensors that require gradients.
        loss_now: the loss, a scalar, at the variables as they are.
        settings: ``steps``, the updates at most, and ``lr``.
        converged: whether to end at this loss; asked before each update.
        project: brings the variables back within bounds; called after each update.

    Returns:
        the loss before each update and after the last.

    Raises:
        EditFailed: the loss is not finite.
    """
    optimiser = torch.optim.Adam(variables, lr=settings.lr)
    losses: list[float] = []
    for step in range(settings.steps + 1):
        with torch.enable_grad():
            loss = loss_now()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise EditFailed(f"the loss is {losses[-1]} at step {step}")
        if step == settings.steps or converged(losses[-1]):
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            project()
    return losses


def nll_loss(lm: LM, hidden: Tensor, target: Sequence[int]) -> Tensor:
    """Mean negative log-likelihood of a target's tokens, each predicted by one of the final hidden states (T, d)."""
    labels = torch.tensor(target, device=hidden.device)[:, None]
    return -lm.logits(hidden).log_softmax(-1).gather(1, labels).mean()


def adding(delta: Tensor, places: int | Sequence[int] = 0) -> Hook:
    """A hook: the module's output gains a vector at one position of every row, by default the first."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[range(len(output)), places] += delta.to(output)
        return changed

    return hook


def run_shifted(tail: Tail, layer: int, delta: Tensor, inside: bool = False) -> Tensor:
    """Final hidden states (B, T, d) of the tails, a vector (d,) added to their first tokens' states after a layer.

    ``inside``: to the output of the layer's MLP instead; the tail then starts below the layer.
    """
    if inside:
        with hooked({tail.lm.anatomy.down(layer): adding(delta)}):
            return tail.run(layer - 1, tail.states[layer - 1])
    states = tail.states[layer]
    first = torch.zeros(states.shape[1], 1, device=states.device)
    first[0] = 1.0
    return tail.run(layer, states + (first * delta).to(states))


def clamp(deltas: Sequence[Tensor], norms: Sequence[Tensor], settings: Search) -> None:
    """Rescale each delta in place to the norm clamp_norm_factor * |init| if it is longer."""
    for delta, norm in zip(deltas, norms, strict=True):
        if (size := delta.norm()) > (limit := settings.clamp_norm_factor * norm):
            delta *= limit / size


class Objective:
    """What every search optimises for: the target after each text, and an unchanged "{subject} is a".

    Args:
        texts: the prompt in each context.
        kl_text: "{subject} is a"; only what comes before its subject's end matters.
        target: token ids to be predicted after each text.
        layer: block after whose output the tail starts.
        inside: whether that is the block below instead, since what is changed is within the layer.

    Attributes:
        tail: the texts with the target's tokens but the last, then ``kl_text``.
        kl, logprobs, likeliest: of the last evaluation, without gradients: the divergence; (rows, target)
            log-probabilities of the target's tokens; whether every one of them is the likeliest token.
        hits: evaluations so far in which every one was after all texts but the first, which is the bare prompt.
    """

    def __init__(
        self, lm: LM, texts: Sequence[LookupText], kl_text: LookupText, target: Sequence[int], layer: int,
        inside: bool = False,
    ):  # fmt: skip
        self.lm, self.layer, self.inside = lm, layer, inside
        rows = [LookupText((*text.ids, *target[:-1]), text.lookup) for text in texts]
        rows.append(LookupText(kl_text.ids[: kl_text.lookup + 1], kl_text.lookup))
        self.tail = Tail(lm, rows, [layer - inside])
        # the target's j-th token is predicted at the text's last position + j
        ends = torch.tensor([len(text.ids) - 1 - text.lookup for text in texts], device=lm.device)
        self._positions = ends[:, None] + torch.arange(len(target), device=lm.device)
        self._rows = torch.arange(len(texts), device=lm.device)[:, None]
        self._labels = torch.tensor([list(target)] * len(texts), device=lm.device)[..., None]
        self._before: Tensor | None = None
        self.likeliest, self.hits = False, 0

    def losses(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The target's negative log-likelihood, mean over its tokens and over rows; KL(this call || the first).

        The divergence is that of the edited model from the original one (ROME eq. 4).

        Args:
            hidden: final hidden states of the tail's rows. The divergence is taken right after the subject of
                ``kl_text``.
        """
        every = self.lm.logits(hidden[self._rows, self._positions]).log_softmax(-1)
        logprobs = every.gather(2, self._labels)[..., 0]
        after = self.lm.logits(hidden[len(self._rows), 0]).log_softmax(-1)
        if self._before is None:
            self._before = after.detach()
        kl = (after.exp() * (after - self._before)).sum()
        self.logprobs, self.kl = logprobs.detach(), kl.detach()
        likeliest = every.amax(-1) == logprobs
        self.likeliest = bool(likeliest.all())
        self.hits += bool(likeliest[int(len(likeliest) > 1) :].all())
        return -logprobs.mean(1).mean(), kl

    def reached(self, loss: float, settings: Search) -> bool:
        """Whether a search ends at its last evaluation, which had this loss."""
        return loss < STOP or (settings.early is not None and self.hits >= settings.early)

    def info(self, losses: Sequence[float]) -> dict[str, Any]:
        """What a journal tells of a search with these losses: updates, the last loss, and p(target) at the end."""
        probability = self.logprobs.sum(1).exp().mean().item()
        return {"steps": len(losses) - 1, "loss": losses[-1], "probability": probability}


def search(objective: Objective, init: Tensor, settings: Search) -> tuple[Tensor, list[float]]:
    """Optimise delta by Adam (ROME eq. 4, MEMIT eq. 16), within the ball of radius clamp_norm_factor * |init|.

    loss = nll_loss + kl_factor * KL + weight_decay * |delta| / |init|^2.

    Args:
        init: (d,) output of the edited site on the bare prompt, which delta is added to.

    Returns:
        delta (d,) float32; the losses (see ``descend``).

    Raises:
        EditFailed: the loss is not finite.
    """
    init_norm = init.float().norm()
    delta = torch.zeros_like(init, dtype=torch.float32, requires_grad=True)

    def loss_now() -> Tensor:
        nll_loss, kl = objective.losses(run_shifted(objective.tail, objective.layer, delta, objective.inside))
        weight_decay = settings.weight_decay * delta.norm() / init_norm**2
        return nll_loss + settings.kl_factor * kl + weight_decay

    converged = partial(objective.reached, settings=settings)
    losses = descend([delta], loss_now, settings, converged, lambda: clamp([delta], [init_norm], settings))
    return delta.detach(), losses
