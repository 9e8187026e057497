"""Trees of tokens, read in packed sequences with a key-value cache.

A tree is a prefix that all contexts share, the contexts, and branches after each context. Every token of it
runs through the model once: branches are packed into one sequence without padding, a mask lets each token
see its own ancestors only, and its position is its depth, so each branch is computed as if it stood alone
(tests/test_scoring.py compares).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from kedit.model.lm import LM

PREFIX, DISCARDED = -1, -2  # context numbers of the shared prefix and of wrong guesses
CONTEXT, TEXT = -1, -2  # branches: the context itself, the text that is generated after it; 0, 1, ... are continuations

SPARE = 384
"""Tokens that a buffer has room for beside those it is made for: a packed sequence."""

Ids = Sequence[int]
Token = tuple[int, int, int, int]
"""A token of a tree: its id, the number of its context, its branch and its position."""


@dataclass
class Buffer:
    """Space for keys and values, (2, heads, tokens, width), of which the first tokens are filled."""

    space: Tensor
    filled: int


class CacheLayer(DynamicLayer):
    """Keys and values of one layer, (2, heads, tokens, width), where possible the beginning of a buffer.

    Copies of a layer share its buffer. What is read next is written after its tokens, and nothing is
    copied unless the buffer is full or another copy has already written there.
    """

    buffer: Buffer | None = None

    def hold(self, both: Tensor) -> CacheLayer:
        """Take these keys and values for those of all tokens."""
        self.dtype, self.device, self.is_initialized = both.dtype, both.device, True
        self.both, self.keys, self.values = both, both[:1], both[1:]
        return self

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in the keys and values of further tokens; all of them by now."""
        more = torch.cat([key_states, value_states])
        before = self.both if self.is_initialized else more[:, :, :0]
        start, end = before.shape[2], before.shape[2] + more.shape[2]
        if self.buffer is None or self.buffer.filled != start or self.buffer.space.shape[2] < end:
            self.buffer = Buffer(more.new_empty(2, more.shape[1], end + SPARE, more.shape[3]), end)
            self.buffer.space[:, :, :start] = before
        self.buffer.space[:, :, start:end] = more
        self.buffer.filled = end
        self.hold(self.buffer.space[:, :, :end])
        return self.keys, self.values


@dataclass
class Cache:
    """Tokens that have been read, (4, tokens) with the rows of ``Token``, and their keys and values in each layer."""

    tokens: Tensor
    layers: list[CacheLayer]

    def select(self, which: Tensor) -> Cache:
        """The tokens that a mask (tokens,) picks, copied."""
        index = which.nonzero()[:, 0]
        # of a model on several devices, each layer's keys and values are where the layer is
        layers = [CacheLayer().hold(layer.both[:, :, index.to(layer.device)]) for layer in self.layers]
        return Cache(self.tokens[:, index], layers)

    @staticmethod
    def cat(caches: Sequence[Cache]) -> Cache:
        """Several caches side by side."""
        layers = zip(*(cache.layers for cache in caches), strict=True)
        joined = [CacheLayer().hold(torch.cat([layer.both for layer in same], 2)) for same in layers]
        return Cache(torch.cat([cache.tokens for cache in caches], 1), joined)


def span(ids: Ids, context: int, branch: int, position: int) -> list[Token]:
    """Tokens one after another on one branch, the first of them at a position."""
    return [(token, context, branch, position + i) for i, token in enumerate(ids)]


def forward(lm: LM, tokens: Sequence[Token], before: Cache | None, ends: Sequence[int] = ()) -> tuple[Tensor, Cache]:
    """Run tokens through the model after those of a cache: their final hidden states (T, d), and the longer cache.

    ``ends`` are the indices of contexts' last tokens, where a memory may answer.
    """
    new = torch.tensor(list(zip(*tokens, strict=True)), device=lm.device)
    seen = torch.cat([before.tokens, new], 1) if before else new
    cache = DynamicCache()
    cache.layers = [copy(layer) for layer in before.layers] if before else [CacheLayer() for _ in range(lm.layers)]
    _, context, branch, position = new[..., None]
    _, contexts, branches, positions = seen
    ancestors = (contexts == context) & ((branches == CONTEXT) | (branches == branch)) | (contexts == PREFIX)
    distance = position - positions
    visible = ancestors & (distance >= 0)
    mask = lm.anatomy.mask(visible[None, None], distance[None, None], lm.model.dtype)
    with ExitStack() as stack:
        for memory in lm.memories.values():
            stack.enter_context(memory.answering(ends))
        hidden = lm.anatomy.base(
            input_ids=new[:1],
            attention_mask=mask,
            position_ids=new[3:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]
    return hidden, Cache(seen, cache.layers)
