"""Reading the live model: log-probabilities of continuations and greedy generation.

Every text is read once. Contexts that start alike (few-shot exemplars) share the reading of what they
have in common; continuations of one context (the choices of a question) share the reading of the
context; single-token continuations are read off the context's last logits. Keys and values are cached
for one state of the model only, so nothing outlives an edit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from kedit.keys import pad
from kedit.models import LM

BUDGET = 12_288
"""Tokens (cached ones included) in one batch; bounds memory, not results."""

Past = list[tuple[Tensor, Tensor]]


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Longest common prefix that leaves every sequence at least one token."""
    low, high = min(sequences), max(sequences)
    length = 0
    limit = min(map(len, sequences)) - 1
    while length < limit and low[length] == high[length]:
        length += 1
    return list(low[:length])


def _cache(past: Past) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(past):
        cache.update(keys, values, index)
    return cache


def _past(cache: DynamicCache) -> Past:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _select(past: Past, rows: Tensor) -> Past:
    return [(keys[rows], values[rows]) for keys, values in past]


@dataclass
class Reading:
    """A batch of contexts that has been read.

    Attributes:
        logits: (B, V) float32, for the token after each context.
        past: keys and values, (B, heads, S, width) a layer.
        mask: (B, S), 0 where a context is padded.
        lengths: (B,) tokens of each context.
    """

    lm: LM
    logits: Tensor
    past: Past
    mask: Tensor
    lengths: Tensor

    def rows(self, which: Sequence[int]) -> "Reading":
        """The same for some of the rows, in any order, repeats allowed."""
        index = torch.tensor(which, device=self.logits.device)
        return Reading(self.lm, self.logits[index], _select(self.past, index), self.mask[index], self.lengths[index])

    def read_on(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, "Reading"]:
        """Read further tokens (B, T), right-padded: final hidden states (B, T, d) and the new reading."""
        lm = self.lm
        cache = _cache(self.past)
        whole = torch.cat([self.mask, mask], 1)
        hidden = lm.anatomy.base(
            input_ids=ids,
            attention_mask=whole,
            position_ids=self.lengths[:, None] + torch.arange(ids.shape[1], device=ids.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        count = mask.sum(1)
        last = hidden[torch.arange(len(ids), device=ids.device), count - 1]
        return hidden, Reading(lm, lm.logits(last), _past(cache), whole, self.lengths + count)


def _start(lm: LM, prefix: Sequence[int], batch: int) -> Reading:
    """The reading of a shared prefix, as ``batch`` equal rows."""
    device = lm.device
    if not prefix:
        empty = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return Reading(lm, torch.empty(batch, 0), [], empty, torch.zeros(batch, dtype=torch.long, device=device))
    cache = DynamicCache()
    lm.anatomy.base(input_ids=torch.tensor([list(prefix)], device=device), past_key_values=cache, use_cache=True)
    past = [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in _past(cache)]
    mask = torch.ones(batch, len(prefix), dtype=torch.long, device=device)
    return Reading(lm, torch.empty(batch, 0), past, mask, mask.sum(1))


def readings(lm: LM, contexts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Reading]]:
    """Read distinct contexts, longest first, in batches: (indices into contexts, their reading)."""
    prefix = common_prefix(contexts)
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    shared: Reading | None = None
    while order:
        size = max(1, BUDGET // (len(contexts[order[0]]) + 8))
        batch, order = order[:size], order[size:]
        if shared is None:
            shared = _start(lm, prefix, 1)
        start = shared.rows([0] * len(batch)) if prefix else _start(lm, prefix, len(batch))
        ids, mask = pad([contexts[i][len(prefix) :] for i in batch], lm.device)
        yield batch, start.read_on(ids, mask)[1]


def _continuations(reading: Reading, asked: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[float, bool]]:
    """(sum of log-probabilities, is it the greedy choice) of (row, continuation) pairs of a reading."""
    logprobs = reading.logits.log_softmax(-1)
    greedy = reading.logits.argmax(-1)
    sums = [float(logprobs[row, tokens[0]]) for row, tokens in asked]
    matches = [int(greedy[row]) == tokens[0] for row, tokens in asked]
    longer = sorted((i for i, (_, tokens) in enumerate(asked) if len(tokens) > 1), key=lambda i: -len(asked[i][1]))
    width = reading.mask.shape[1]
    while longer:
        size = max(1, BUDGET // (width + len(asked[longer[0]][1])))
        batch, longer = longer[:size], longer[size:]
        ids, mask = pad([asked[i][1][:-1] for i in batch], reading.logits.device)
        hidden, _ = reading.rows([asked[i][0] for i in batch]).read_on(ids, mask)
        labels, _ = pad([asked[i][1][1:] for i in batch], reading.logits.device)
        where = mask.bool()
        logits = reading.lm.logits(hidden[where])
        said = torch.zeros(mask.shape, dtype=logits.dtype, device=logits.device)
        said[where] = logits.log_softmax(-1).gather(1, labels[where][:, None])[:, 0]
        hit = torch.ones_like(where)
        hit[where] = logits.argmax(-1) == labels[where]
        for i, total, match in zip(batch, said.sum(1).tolist(), hit.all(1).tolist(), strict=True):
            sums[i] += total
            matches[i] = matches[i] and match
    return list(zip(sums, matches, strict=True))


def _generate(reading: Reading, limit: int, finished: Callable[[int, list[int]], bool]) -> list[list[int]]:
    """Greedy tokens for each row until ``finished(row, tokens)`` or the limit."""
    tokens: list[list[int]] = [[] for _ in range(len(reading.logits))]
    active = list(range(len(tokens)))
    for step in range(limit):
        chosen = reading.logits.argmax(-1).tolist()
        for row, token in zip(active, chosen, strict=True):
            tokens[row].append(token)
        kept = [i for i, row in enumerate(active) if not finished(row, tokens[row])]
        if not kept or step == limit - 1:
            break
        if len(kept) < len(active):
            reading, active = reading.rows(kept), [active[i] for i in kept]
        ids = torch.tensor([[tokens[row][-1]] for row in active], device=reading.logits.device)
        _, reading = reading.read_on(ids, torch.ones_like(ids))
    return tokens


@torch.inference_mode()
def loglikelihoods(lm: LM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """Sum of log-probabilities of each continuation after its context, and whether greedy decoding says it.

    Args:
        pairs: (context ids, begin token included; continuation ids, at least one).
    """
    return read(lm, pairs, [])[0]


@torch.inference_mode()
def read(
    lm: LM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    prompts: Sequence[Sequence[int]],
    limit: int = 16,
    finished: Callable[[int, list[int]], bool] = lambda row, tokens: False,
) -> tuple[list[tuple[float, bool]], list[list[int]]]:
    """Score continuations and generate from prompts, each distinct context read once for both.

    Args:
        pairs: as for ``loglikelihoods``.
        prompts: contexts to continue greedily, by at most ``limit`` tokens.
        finished: (index of the prompt, its tokens so far) -> stop here.

    Returns:
        one (sum of log-probabilities, greedy) a pair, and one list of token ids a prompt.
    """
    asked: dict[tuple[int, ...], list[int]] = {}
    wanted: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        asked.setdefault(tuple(context), []).append(index)
    for index, prompt in enumerate(prompts):
        wanted.setdefault(tuple(prompt), []).append(index)
    contexts = list(dict.fromkeys([*asked, *wanted]))
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    texts: list[list[int]] = [[] for _ in prompts]
    if not contexts:
        return scores, texts
    for batch, reading in readings(lm, contexts):
        here = [(row, index) for row, i in enumerate(batch) for index in asked.get(contexts[i], ())]
        for (_, index), score in zip(
            here, _continuations(reading, [(row, pairs[index][1]) for row, index in here]), strict=True
        ):
            scores[index] = score
        rows = [row for row, i in enumerate(batch) if contexts[i] in wanted]
        if rows:
            owners = [wanted[contexts[batch[row]]] for row in rows]
            generated = _generate(reading.rows(rows), limit, lambda row, tokens: finished(owners[row][0], tokens))
            for indices, tokens in zip(owners, generated, strict=True):
                for index in indices:
                    texts[index] = tokens
    return scores, texts
