"""Gradient descent on a few tensors: what the value search, PMET, fine-tuning and GRACE have in common.

Each optimises what it writes by Adam through ``kedit.model.forward.Tail``, which runs only the tokens and
blocks that depend on it. They differ in the loss, in when they stop, and in the bounds they keep.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kedit.model.forward import Tail
from kedit.model.journal import EditFailed
from kedit.model.lm import LM


def descend(
    variables: Sequence[Tensor],
    loss_now: Callable[[], Tensor],
    what: str,
    *,
    steps: int,
    lr: float,
    converged: Callable[[float], bool] = lambda loss: False,
    project: Callable[[], None] = lambda: None,
) -> list[float]:
    """Minimise a loss by Adam; the variables are changed in place.

    Args:
        variables: tensors that require gradients.
        loss_now: the loss, a scalar, at the variables as they are.
        what: has this loss, for the error.
        steps: updates at most.
        converged: whether to end at this loss; asked before each update.
        project: brings the variables back within bounds; called after each update.

    Returns:
        the loss before each update and after the last.

    Raises:
        EditFailed: the loss is not finite.
    """
    optimiser = torch.optim.Adam(variables, lr=lr)
    losses: list[float] = []
    for step in range(steps + 1):
        with torch.enable_grad():
            loss = loss_now()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise EditFailed(f"the loss of {what} is {losses[-1]} at step {step}")
        if step == steps or converged(losses[-1]):
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


def run_shifted(tail: Tail, layer: int, delta: Tensor) -> Tensor:
    """Final hidden states (B, T, d) of the tails, a vector (d,) added to their first tokens' states after a layer."""
    states = tail.states[layer]
    first = torch.zeros(states.shape[1], 1, device=states.device)
    first[0] = 1.0
    return tail.run(layer, states + (first * delta).to(states))
