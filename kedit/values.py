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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kedit.journal import EditFailed
from kedit.keys import Row, capture, pad, stop_after
from kedit.models import LM

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


class _Injected(nn.Module):
    """Stands in for a block already computed: hands on the states it is given."""

    def __init__(self):
        super().__init__()
        self.states: Tensor | None = None

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        return hidden if self.states is None else self.states


@contextmanager
def skipping(blocks: nn.ModuleList, layer: int) -> Iterator[_Injected]:
    """Within the block, blocks 0..layer cost nothing; the last of them yields ``.states``."""
    kept = list(blocks[: layer + 1])
    injected = _Injected()
    try:
        for index in range(layer + 1):
            blocks[index] = injected if index == layer else _Injected()
        yield injected
    finally:
        for index, block in enumerate(kept):
            blocks[index] = block


class Tail:
    """Texts read once up to their subject's last token, ready to be run on from there.

    Args:
        texts: rows; each is split at its subject's last token p into a prefix (positions < p) and a
            tail (p to the end).
        layers: blocks after whose output the tail can be run on; -1 is the embedding.

    Attributes:
        states: layer -> (B, T, d) output of that block on the tails, right-padded.
    """

    @torch.no_grad()
    def __init__(self, lm: LM, texts: Sequence[Row], layers: Sequence[int]):
        self.lm = lm
        starts = torch.tensor([text.subject for text in texts], device=lm.device)
        prefix = int(starts.max())
        self.past = []
        if prefix:
            ids, _ = pad([text.ids[: text.subject] for text in texts], lm.device)
            cache = DynamicCache()  # no mask: no token looks at the padding after it
            lm.anatomy.base(input_ids=ids, past_key_values=cache, use_cache=True)
            self.past = [(kv.keys, kv.values) for kv in cache.layers]

        self.tail_ids, tail_mask = pad([text.ids[text.subject :] for text in texts], lm.device)
        self.positions = starts[:, None] + torch.arange(self.tail_ids.shape[1], device=lm.device)
        before = torch.arange(prefix, device=lm.device)[None] < starts[:, None]
        self.mask = torch.cat([before.long(), tail_mask], 1)
        self.states = {-1: lm.anatomy.base.get_input_embeddings()(self.tail_ids)}
        if sites := {str(layer): lm.anatomy.blocks[layer] for layer in layers if layer >= 0}:
            with capture(lm, sites, inputs=False) as seen, stop_after(lm.anatomy.blocks[max(layers)]):
                self.run(-1, self.states[-1])
            self.states |= {int(name): output for name, output in seen.items()}

    def run(self, layer: int, states: Tensor) -> Tensor:
        """Run on from the states after ``layer``: (B, T, d) -> final hidden states (B, T, d).

        With a single text, the states may hold any number of versions of its tail.
        """
        rows = len(states)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.past):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        start = {"inputs_embeds": states} if layer < 0 else {"input_ids": self.tail_ids.expand(rows, -1)}
        with skipping(self.lm.anatomy.blocks, layer) as injected:
            injected.states = states
            return self.lm.anatomy.base(
                **start,
                attention_mask=self.mask.expand(rows, -1),
                position_ids=self.positions.expand(rows, -1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state


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

    def __init__(self, lm: LM, texts: Sequence[Row], kl_text: Row, target: Sequence[int], layer: int):
        self.lm = lm
        full = [Row((*text.ids, *target[:-1]), text.subject) for text in texts]
        full.append(Row(kl_text.ids[: kl_text.subject + 1], kl_text.subject))
        self.tail = Tail(lm, full, [layer])
        # the target's j-th token is predicted at the text's last position + j
        ends = torch.tensor([len(text.ids) - 1 - text.subject for text in texts], device=lm.device)
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


def search(lm: LM, texts: Sequence[Row], kl_text: Row, target: Sequence[int], init: Tensor, settings: Search) -> Found:
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
