"""Where a subject ends in a text, what the model computes there, and texts run on from there.

A key is the input of an MLP's second projection (m numbers) at one token, a value its output; see
section 3 of Meng et al., "Locating and Editing Factual Associations in GPT" (ROME, 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from kedit.data.requests import EditRequest
from kedit.model.anatomy import matrix
from kedit.model.journal import EditFailed

if TYPE_CHECKING:
    from kedit.model.lm import LM

# Texts and positions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookupText:
    """A tokenised text and its lookup index: where the subject's last token stands in it."""

    ids: tuple[int, ...]
    lookup: int


def lookup_text(lm: LM, prompt: str, subject: str, template: str = "{}") -> LookupText:
    """Fill a context template with a prompt and the prompt with its subject, and find the subject.

    The whole text is tokenised once; the subject's last token is the one whose character span covers
    the subject's last character, so nothing depends on how pieces would be tokenised alone.

    Raises:
        EditFailed: the subject's last token reaches into what follows it ("New York" in "New Yorkers").
    """
    frame = template.replace("{}", prompt, 1)
    head, _, tail = frame.partition("{}")
    end = len(head) + len(subject)
    encoded = lm.tokenizer(head + subject + tail, add_special_tokens=False, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    index = max(i for i, (start, stop) in enumerate(spans) if start < end <= stop)
    if spans[index][1] > end:
        raise EditFailed(f"in {head + subject + tail!r} the subject {subject!r} merges with what follows it")
    return LookupText((*lm.begin, *encoded["input_ids"]), index + len(lm.begin))


def lookup_texts(lm: LM, request: EditRequest, contexts: Sequence[str]) -> list[LookupText]:
    """A request's prompt in each context template; the first template is the bare ``{}``."""
    return [lookup_text(lm, request.prompt, request.subject, template) for template in contexts]


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad token sequences: ids (B, T) and mask (B, T)."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids, mask = (pad_sequence(some, batch_first=True) for some in (rows, [torch.ones_like(row) for row in rows]))
    return ids.to(device), mask.to(device)


# Reading activations -------------------------------------------------------------------------------


Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""(module, its positional inputs, its output) -> what takes the place of the output, or None to leave it."""


@contextmanager
def hooked(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Within the block, each module's forward is followed by its hook."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(lm: LM, modules: Mapping[Any, nn.Module], inputs: bool) -> Iterator[dict[Any, Tensor]]:
    """Within the block, every forward records the modules' inputs or outputs by name, on the model's first device."""
    seen: dict[Any, Tensor] = {}

    def record(name: Any, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = args[0] if inputs else output[0] if isinstance(output, tuple) else output
        seen[name] = (found if inputs else found.clone()).to(lm.device)  # some blocks add to what a part gave them

    with hooked({module: partial(record, name) for name, module in modules.items()}):
        yield seen


class _Stop(Exception):
    """Raised by a hook when nothing above it is needed."""


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """Within the block, a forward ends quietly once ``module`` has run; nothing above it is computed."""

    def stop(*_: Any) -> None:
        raise _Stop

    with suppress(_Stop), hooked({module: stop}):
        yield


@torch.no_grad()
def activations(lm: LM, texts: Sequence[LookupText], layers: Sequence[int], at: str) -> dict[int, Tensor]:
    """Activations at each text's lookup index, layer -> (texts, width).

    ``at`` is "key" (input of the second MLP projection, m wide), "value" (its output, d), "attention"
    (output of the attention's projection, d), "hidden" (output of the MLP's first projection, of its gate
    where there is one, m) or "block" (the block's output, d). Texts are cut after the subject and the
    forward stops after the last layer: causal attention makes what follows irrelevant.
    """
    anatomy = lm.anatomy
    find = {"key": anatomy.down, "value": anatomy.down, "attention": anatomy.attn_out, "hidden": anatomy.inner}
    sites = {layer: anatomy.blocks[layer] if at == "block" else find[at](layer) for layer in layers}
    ids, mask = pad([text.ids[: text.lookup + 1] for text in texts], lm.device)
    with capture(lm, sites, inputs=at == "key") as seen, stop_after(anatomy.blocks[max(layers)]):
        anatomy.base(input_ids=ids, attention_mask=mask, use_cache=False)
    width = matrix(anatomy.down(layers[0])).shape[1] if at == "hidden" else None  # a fused gate comes first
    return {layer: seen[layer][range(len(texts)), [text.lookup for text in texts], :width] for layer in layers}


class Injected(nn.Module):
    """Stands in for blocks already computed: hands on the states it is given."""

    states: Tensor
    tuples = False

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """The states, whatever comes in, as the blocks return theirs."""
        return (self.states, None) if self.tuples else self.states


@contextmanager
def skip_blocks(blocks: nn.ModuleList, layer: int, tuples: bool = False) -> Iterator[Injected]:
    """Within the block, blocks 0..layer cost nothing; the last of them yields ``.states``, which must be set."""
    skipped = list(blocks[: layer + 1])
    injected = Injected()
    injected.tuples = tuples
    try:
        for index in range(len(skipped)):
            blocks[index] = injected
        yield injected
    finally:
        for index, block in enumerate(skipped):
            blocks[index] = block


class Tail:
    """Texts read once up to their subject's last token, ready to be run on from there.

    Args:
        texts: each is split at its subject's last token p into a prefix (positions < p) and a
            tail (p to the end).
        layers: blocks after whose output the tail can be run on; -1 is the embedding.

    Attributes:
        states: layer -> (B, T, d) output of that block on the tails, right-padded.
    """

    @torch.no_grad()
    def __init__(self, lm: LM, texts: Sequence[LookupText], layers: Sequence[int]):
        self.lm = lm
        starts = torch.tensor([text.lookup for text in texts], device=lm.device)
        prefix = int(starts.max())
        self.prefix = DynamicCache()
        if prefix:
            ids, _ = pad([text.ids[: text.lookup] for text in texts], lm.device)
            # no mask: no token looks at the padding after it
            lm.anatomy.base(input_ids=ids, past_key_values=self.prefix, use_cache=True)
        self.tail_ids, tail_mask = pad([text.ids[text.lookup :] for text in texts], lm.device)
        self.positions = starts[:, None] + torch.arange(self.tail_ids.shape[1], device=lm.device)
        before = torch.arange(prefix, device=lm.device)[None] < starts[:, None]
        self.mask = torch.cat([before.long(), tail_mask], 1)
        self.states = {-1: lm.anatomy.base.get_input_embeddings()(self.tail_ids)}
        if sites := {layer: lm.anatomy.blocks[layer] for layer in layers if layer >= 0}:
            with capture(lm, sites, inputs=False) as seen, stop_after(lm.anatomy.blocks[max(layers)]):
                self.run(-1, self.states[-1])
            self.states |= seen

    def run(self, layer: int, states: Tensor) -> Tensor:
        """Run on from the states after ``layer``: (B, T, d) -> final hidden states (B, T, d).

        With a single text, the states may hold any number of versions of its tail.
        """
        rows = len(states)
        cache = DynamicCache()
        for index, layer_cache in enumerate(self.prefix.layers):
            cache.update(*(part.expand(rows, -1, -1, -1) for part in (layer_cache.keys, layer_cache.values)), index)
        start = {"inputs_embeds": states} if layer < 0 else {"input_ids": self.tail_ids.expand(rows, -1)}
        anatomy = self.lm.anatomy
        with skip_blocks(anatomy.blocks, layer, anatomy.tuples) as injected:
            injected.states = states
            return anatomy.base(
                **start,
                attention_mask=self._seen(rows),
                position_ids=self.positions.expand(rows, -1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

    def _seen(self, rows: int) -> Any:
        """The mask of what tokens see: written out where a window matters, as padding lies between prefix and tail."""
        anatomy = self.lm.anatomy
        if not anatomy.reach or self.mask.shape[1] <= anatomy.reach:
            return self.mask.expand(rows, -1)
        before = torch.arange(self.mask.shape[1] - self.positions.shape[1], device=self.mask.device)
        places = torch.cat([before.expand(len(self.positions), -1), self.positions], 1)
        distance = (self.positions[:, :, None] - places[:, None])[:, None]
        visible = self.mask[:, None, None].bool() & (distance >= 0)
        shape = (rows, -1, -1, -1)
        return anatomy.mask(visible.expand(shape), distance.expand(shape), self.lm.model.dtype)
