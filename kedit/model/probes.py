"""Does kedit read this model right, and does an edit do what it says? Asked of every architecture before it is used.

Two short texts that begin alike are read as the model reads them itself and as kedit does. Where the answers
differ kedit would be wrong in silence; so the model is refused, or the methods that need what was not found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kedit import KeditError
from kedit.model.anatomy import matrix, projections
from kedit.model.forward import Hook, LookupText, Tail, capture, hooked
from kedit.model.tree import CONTEXT, PREFIX, forward, span

if TYPE_CHECKING:
    from kedit.model.lm import LM

TEXTS = "The capital of France is Paris.", "Rome is the capital of Italy."
LENGTH = 10
"""Tokens read of each text; the first half is that of the first."""

_known: dict[tuple[type, str], dict[str, Any]] = {}
"""What this process knows by now: what probes found, by class and configuration, which are what it depends on."""


@torch.no_grad()
def probe(lm: LM) -> None:
    """Ask a model, and put what it answers into its anatomy: ``direct``, ``tuples`` and ``missing``.

    Raises:
        KeditError: kedit cannot read it.
    """
    anatomy = lm.anatomy
    key = type(lm.model), lm.model.config.to_json_string()
    if key not in _known:
        try:
            problem = _read(lm)
        except Exception as error:  # whatever foreign code may raise when it is called as kedit calls it
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem:
            raise KeditError(f"kedit cannot read {anatomy.architecture}, so no method can be used on it: {problem}.")
        if "down" not in anatomy.missing:
            _touch(lm)
        _known[key] = {name: getattr(anatomy, name) for name in ("orders", "direct", "tuples", "missing")}
    vars(anatomy).update(_known[key])
    anatomy.arrange()


def _texts(lm: LM) -> Tensor:
    """The two texts (2, LENGTH)."""
    rows = [[*lm.begin, *lm.encode(text)] for text in TEXTS]
    ids = torch.tensor([(row * LENGTH)[:LENGTH] for row in rows], device=lm.device)
    ids[1, : LENGTH // 2] = ids[0, : LENGTH // 2]
    return ids % lm.anatomy.base.get_input_embeddings().num_embeddings


def _near(lm: LM, one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same thing differ by no more than rounding."""
    tolerance = max(1e-3, 8 * torch.finfo(lm.model.dtype).eps)
    return bool((one - other).norm() <= tolerance * other.norm())


def _read(lm: LM) -> str | None:
    """What is wrong with kedit's reading of the model, if anything is."""
    anatomy, ids, half = lm.anatomy, _texts(lm), LENGTH // 2
    every = [projections(block) for block in anatomy.blocks]
    seen: dict[nn.Module, Any] = {}  # in the order in which they run
    with hooked(dict.fromkeys([anatomy.blocks[0], anatomy.base, *chain(*every)], lambda *ran: seen.update([ran[::2]]))):
        logits = lm.model(ids, use_cache=False).logits.float()
    anatomy.tuples, hidden = isinstance(seen[anatomy.blocks[0]], tuple), seen[anatomy.base].last_hidden_state
    anatomy.orders = [[some.index(module) for module in seen if module in some] for some in every]
    anatomy.arrange()
    if not _near(lm, lm.logits(hidden), logits):
        return "its logits are not those of its last states and its head, scaled and capped"
    if not _near(lm, logits[0, :half], logits[1, :half]):
        return "its tokens see later ones"
    _, trunk = forward(lm, span(ids[0, :half].tolist(), PREFIX, CONTEXT, 0), None)
    branches = [token for n, row in enumerate(ids[:, half:].tolist()) for token in span(row, n, CONTEXT, half)]
    packed, _ = forward(lm, branches, trunk)
    if not _near(lm, lm.logits(packed), logits[:, half:].flatten(0, 1)):
        return "texts packed side by side, as kedit reads them, get other answers"
    tail = Tail(lm, [LookupText(tuple(row), half - n) for n, row in enumerate(ids.tolist())], [0])
    if not _near(lm, tail.run(0, tail.states[0])[:, half - 1], hidden[range(2), [LENGTH - 1, LENGTH - 2]]):
        return "texts run on from a block get other answers"
    return None


# What edits touch -----------------------------------------------------------------------------------


def _replacing(index: Any, change: Callable[[Tensor], Tensor]) -> Hook:
    """A hook: a part of the module's output is changed."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[index] = change(output[index])
        return output

    return hook


def _touch(lm: LM) -> None:
    """Run each block once more with what editors change in it changed, and see what comes of it.

    The first text gets a vector at ``down``, at its second token, and at ``attn_out``, at its last. In the second
    text, what a gated MLP multiplies its gate by changes its sign, as the key must then do.
    """
    anatomy, generator = lm.anatomy, torch.Generator().manual_seed(0)
    downs = {layer: anatomy.down(layer) for layer in range(lm.layers)}

    def again(layer: int, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, key = output[0] if isinstance(output, tuple) else output, keys[layer]
        noise = torch.randn(before.shape[-1], generator=generator).to(before) * before[0, 1].std()
        up, width = anatomy.up(layer), matrix(downs[layer]).shape[1]
        fused = anatomy.gate(layer) is None
        hooks = {downs[layer]: _replacing((0, 1), lambda output: output + noise)}
        if attn_out := anatomy.attn_out(layer):
            hooks[attn_out] = _replacing((0, -1), lambda output: output + noise)
        if gated := not fused or matrix(up).shape[0] > width:
            hooks[up] = _replacing((1, slice(None), slice(width if fused else 0, None)), torch.neg)
        with hooked(hooks), capture(lm, {0: downs[layer]}, inputs=True) as seen:
            after = block.forward(*args, **kwargs)
        change = (after[0] if isinstance(after, tuple) else after)[0] - before[0]
        anatomy.direct[layer] = _near(lm, change[1], noise)
        if not change[1].any():
            anatomy.missing["down"] = "what its MLPs' second projections write does not reach the next block"
        if not change[-1].any():
            anatomy.missing["attn_out"] = "what its attention's projections write does not reach the next block"
        if gated and not _near(lm, -seen[0][1], key[1]):
            anatomy.missing["neurons"] = "it was not found what gates its MLPs"

    hooks = enumerate(anatomy.blocks)
    handles = [block.register_forward_hook(partial(again, layer), with_kwargs=True) for layer, block in hooks]
    try:
        with capture(lm, downs, inputs=True) as keys:
            anatomy.base(input_ids=_texts(lm), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
