"""What breaks inside? The edited weights, the states and the answers on held-out text, beside the unedited ones.

Weights: for every matrix that the present edits wrote, how far it moved and what that did to its singular
values. States: each block's output at the same tokens, before and after. Answers: next-token distributions
on the same text.

The text is cut into short passages. A passage's first tokens are the prompt, the rest is predicted token
by token, so a memory-based method has a prompt to answer for, as in any other reading (kedit/model/scoring.py):
where its memory takes a prompt over, the answers are those of the route. Its weights are untouched by
construction, so theirs is a damage of exactly zero, and so is that of the states unless the memory
writes into them (GRACE does; SERAC and IKE have another reader or another text answer instead).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kedit.data.corpus import sequence_length, sequences
from kedit.model.forward import capture
from kedit.model.lm import LM
from kedit.model.memory import Route, routes

PASSAGE, PROMPT = 64, 16
"""Tokens read of each passage, begin token included, and how many of them are its prompt."""
PASSAGES = 24


# Weights --------------------------------------------------------------------------------------------


def singular_values(weight: Tensor, small: bool = True) -> Tensor:
    """Singular values of a matrix (d, m), largest first, float64; all NaN if the matrix is not finite.

    From the eigenvalues of the smaller Gram matrix in float64: about five times cheaper than an SVD, and
    right to 1e-8 of the largest value. Where ``small`` values matter and there are some under a millionth
    of it, as in a matrix that edits have blown up, a full SVD follows. (A 4096 x 11008 matrix costs about
    0.4 Tflop; nothing is sampled, so nothing is random.)
    """
    wide = weight.detach().double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    gram = wide @ wide.T
    if not gram.isfinite().all():
        return torch.full((len(gram),), math.nan, dtype=torch.float64, device=weight.device)
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    return torch.linalg.svdvals(wide) if small and values[-1] < 1e-6 * values[0] else values


def effective_rank(values: Tensor) -> float:
    """In how many directions a change with these singular values goes: exp of the entropy of their energies.

    1 for a rank-one change, r for r equal singular values, 0 for no change. Energies (squares) rather than
    the values themselves (Roy and Vetterli 2007), so that the rounding of weights, tiny in every
    direction, does not count as rank.
    """
    energy = values.square()
    return torch.special.entr(energy / energy.sum()).sum().exp().item() if energy.any() else 0.0


def _weights(lm: LM, unedited: "Unedited") -> Iterator[dict[str, Any]]:
    for module in lm.journal.edited():
        before, after = lm.journal.original(module).double(), lm.model.get_submodule(module).weight.double()
        change = after - before
        was, now, moved = unedited.singular_values(module), singular_values(after), singular_values(change, small=False)
        yield {
            "kind": "weight",
            "id": module,
            "relative": (change.norm() / before.norm()).item(),
            "spectral": (now[0] / was[0]).item(),
            "spectral_change": (moved[0] / was[0]).item(),
            "condition": (now[0] / now[-1] / (was[0] / was[-1])).item(),
            "effective_rank": effective_rank(moved),
        }


# Text -----------------------------------------------------------------------------------------------


def held_out(lm: LM, text: str, skip: int, passages: int = PASSAGES) -> list[list[int]]:
    """Passages of 64 token ids, one from each 512-token sequence after those that second moments use.

    Args:
        text: a name or path as in ``statistics.text`` of a parameter file.
        skip: tokens of it that second moments use; 0 when it is another text.

    Raises:
        KeditError: the text is too short.
    """
    length = sequence_length(lm)
    first = -(-skip // length)
    return [ids[:PASSAGE] for ids in islice(sequences(lm, text, (first + passages) * length), first, None)]


def _states(lm: LM, prompt: Sequence[int], more: Sequence[int]) -> Tensor:
    """Each block's output and the final norm's, (blocks + 1, tokens, d), as prompt and continuation are read."""
    blocks = dict(enumerate(lm.anatomy.blocks))
    with ExitStack() as stack:
        for memory in lm.memories.values():
            stack.enter_context(memory.answering([len(prompt) - 1]))
        seen = stack.enter_context(capture(lm, blocks, inputs=False))
        ids = torch.tensor([[*prompt, *more]], device=lm.device)
        last = lm.anatomy.base(input_ids=ids, use_cache=False).last_hidden_state
    return torch.stack([*(seen[layer][0] for layer in blocks), last[0]])


def _answers(lm: LM, final: Tensor, prompt: Sequence[int], more: Sequence[int], route: Route | None) -> Tensor:
    """Log-probabilities (more, vocabulary) of what comes after the prompt and after each token of the rest.

    ``final`` are the model's own final states (tokens, d), used as far as no route takes the prompt over.
    """
    own = lm.logits(final[len(prompt) - 1 : -1]).log_softmax(-1)
    if route is None:
        return own
    states = _states(route.lm, route.ids, more)[-1]
    routed = _answers(route.lm, states, route.ids, more, None)
    if route.weight == 1:
        return routed
    return torch.logaddexp(own + math.log1p(-route.weight), routed + math.log(route.weight))


class Unedited:
    """What the damaged model is compared with, computed once: no edit changes it."""

    def __init__(self, lm: LM):
        def states(ids: tuple[int, ...]) -> Tensor:
            with lm.journal.unedited():
                return _states(lm, ids[:PROMPT], ids[PROMPT:])

        self.held_out = cache(partial(held_out, lm))
        self.states = cache(states)
        self.singular_values = cache(lambda module: singular_values(lm.journal.original(module)))


def _passage(lm: LM, ids: Sequence[int], before: Tensor, route: Route | None) -> tuple[dict[str, Any], Tensor]:
    """A passage's item, but for its id, and how far each block's states moved (2, blocks).

    That is their cosine distance and relative L2 distance from the unedited ones, ``before``, averaged over tokens.
    """
    prompt, more = ids[:PROMPT], ids[PROMPT:]
    after = _states(lm, prompt, more)
    # without the begin token, which is no text, and whose state is that of an attention sink
    was, now = (states[:-1, len(lm.begin) :].float() for states in (before, after))
    size = was.norm(dim=-1)
    # half the squared distance of unit vectors is 1 - cos, and exactly 0 for equal states
    unit = was / size[..., None] - now / now.norm(dim=-1, keepdim=True)
    drift = torch.stack([unit.square().sum(-1).mean(1) / 2, ((now - was).norm(dim=-1) / size).mean(1)])
    new = _answers(lm, after[-1], prompt, more, route)
    with lm.journal.unedited():
        old = _answers(lm, before[-1], prompt, more, None)
    item: dict[str, Any] = {"tokens": len(more), "routed": route is not None}
    for suffix, logprobs in (("", new), ("_unedited", old)):
        item[f"nll{suffix}"] = -logprobs[range(len(more)), more].mean().item()
        item[f"entropy{suffix}"] = -(logprobs.exp() * logprobs).sum(-1).mean().item()
    item["kl"] = (old.exp() * (old - new)).sum(-1).mean().item()
    return item, drift


@torch.inference_mode()
def measure(
    lm: LM, text: str, skip: int, passages: int = PASSAGES, unedited: Unedited | None = None
) -> list[dict[str, Any]]:
    """Damage to the model as it is now, against the unedited one; ``held_out`` explains the arguments.

    ``unedited`` spares computing again what earlier calls on this model have.

    Items by ``kind``, all numbers plain floats, exactly 0 (differences) or 1 (ratios) without edits:

    - ``weight``, one for each edited matrix (``id``: its module): ``relative`` |dW|_F / |W|_F, ``spectral``
      |W + dW|_2 / |W|_2, ``spectral_change`` |dW|_2 / |W|_2, ``condition`` (ratio of condition numbers),
      ``effective_rank`` of dW. W is the unedited matrix, dW what all edits together changed.
    - ``layer``, one for each block (``id``: its number): ``cosine`` distance and ``l2`` relative distance
      of its outputs, means over the text's tokens.
    - ``text``, one for each passage (``id``): ``tokens`` predicted, and their mean ``nll`` and ``entropy``
      in nats, each also ``_unedited``; ``kl`` from the unedited distribution to this one; ``routed``,
      whether a memory took the prompt over.
    """
    unedited = unedited or Unedited(lm)
    texts = unedited.held_out(text, skip, passages)
    taken = routes(lm, list(dict.fromkeys(tuple(ids[:PROMPT]) for ids in texts)))
    read = [_passage(lm, ids, unedited.states(tuple(ids)), taken.get(tuple(ids[:PROMPT]))) for ids in texts]
    cosine, l2 = torch.stack([drift for _, drift in read]).mean(0).tolist()
    return [
        *_weights(lm, unedited),
        *({"kind": "layer", "id": str(layer), "cosine": cosine[layer], "l2": l2[layer]} for layer in range(lm.layers)),
        *({"kind": "text", "id": str(index), **item} for index, (item, _) in enumerate(read)),
    ]
