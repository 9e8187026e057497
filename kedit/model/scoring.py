"""Reading the live model: log-probabilities of continuations and greedy generation.

Everything that is asked is laid out as a tree of tokens: a prefix that all contexts share (few-shot
exemplars), the contexts, and the continuations of each context (the choices of a question). Every
token of the tree runs through the model once. Many branches are packed into one sequence without
padding; a mask lets each token see its own ancestors only and its position is its depth, so each
branch is computed as if it stood alone (tests/test_scoring.py compares). The keys and values kept
between forwards belong to one state of the model and outlive no edit.

Memory-based edits take part here: each memory is told where prompts end, and prompts that it routes
elsewhere are read again by the route's model, after everything was read as if no memory were there, so
that prompts out of scope keep their very bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kedit.model.lm import LM
from kedit.model.memory import Route, routes

PACK = 384
"""Tokens in one packed sequence: enough to keep the matrix products busy, few enough for its mask."""
ROWS = 16
"""Texts generated together: each token looks past those of all the others, which costs time, and all are kept."""

GRAMS = (8, 4, 2, 1)
"""Tokens by which a guess is looked up, the most telling first."""
GUESSES = 16
"""Guessed tokens in one forward, which its texts share: few cost next to nothing beside the weights' reading."""

Ids = Sequence[int]
TRUNK, NOBODY = -1, -2  # owners of the prefix's tokens and of wrong guesses
CONTEXT, GUESS = 0, -1  # branches of a context's own tokens and of a guess at what follows it


def common_prefix(sequences: Sequence[Ids]) -> list[int]:
    """Longest common prefix that leaves every sequence at least one token."""
    low, high = min(sequences), max(sequences)
    limit, length = min(map(len, sequences)) - 1, 0
    while length < limit and low[length] == high[length]:
        length += 1
    return list(low[:length])


@dataclass
class Tokens:
    """Tokens of a tree: which context each belongs to, which continuation (0: none), and its depth."""

    owner: Tensor
    branch: Tensor
    position: Tensor

    def __getitem__(self, index) -> "Tokens":
        return Tokens(self.owner[index], self.branch[index], self.position[index])

    @staticmethod
    def cat(parts: Sequence["Tokens"]) -> "Tokens":
        """Tokens one after another."""
        return Tokens(*(torch.cat([getattr(p, n) for p in parts]) for n in ("owner", "branch", "position")))


@dataclass
class Room:
    """Space for keys and values, (2, heads, tokens, width), of which the first tokens are filled."""

    both: Tensor
    filled: int = 0


class Kept(DynamicLayer):
    """Keys and values of one layer, (1, heads, tokens, width), where possible at the beginning of a room.

    What is read next is written after them, and nothing is copied but where the room is full or
    something else has been read after the same tokens.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None):
        super().__init__()
        self.room: Room | None = None
        if keys is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Take in what follows; all keys and values by now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.room is None or self.room.filled != start or self.room.both.shape[2] < end:
            self.room = Room(key_states.new_empty(2, key_states.shape[1], end + PACK, key_states.shape[3]))
            self._write(0, self.keys, self.values)
        self._write(start, key_states, value_states)
        both = self.room.both[:, :, :end]
        self.keys, self.values = both[:1], both[1:]
        return self.keys, self.values

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        self.room.filled = start + keys.shape[2]
        self.room.both[:1, :, start : self.room.filled] = keys
        self.room.both[1:, :, start : self.room.filled] = values


@dataclass
class Read:
    """Tokens that have been read: their keys and values in each layer."""

    tokens: Tokens
    past: list[Kept]

    def __getitem__(self, index: Tensor) -> "Read":
        # of a model on several devices, each layer's keys and values are where the layer is
        places = [index.to(layer.device) for layer in self.past]
        past = [Kept(layer.keys[:, :, at], layer.values[:, :, at]) for at, layer in zip(places, self.past, strict=True)]
        return Read(self.tokens[index], past)

    @staticmethod
    def cat(parts: Sequence["Read"]) -> "Read":
        """Several readings side by side."""
        layers = zip(*(part.past for part in parts), strict=True)
        past = [
            Kept(torch.cat([k.keys for k in layer], 2), torch.cat([k.values for k in layer], 2)) for layer in layers
        ]
        return Read(Tokens.cat([part.tokens for part in parts]), past)


def _forward(lm: LM, ids: Ids, tokens: Tokens, before: Read | None, ends: Sequence[int] = ()) -> tuple[Tensor, Read]:
    """Run tokens through the model: their final hidden states (T, d), and all that is read by now.

    ``ends`` are the places of contexts' last tokens, where a memory may answer.
    """
    cache = DynamicCache()
    cache.layers = [copy(layer) for layer in before.past] if before else [Kept() for _ in range(lm.layers)]
    seen = Tokens.cat([before.tokens, tokens]) if before else tokens
    same = (seen.owner == tokens.owner[:, None]) & ((seen.branch == CONTEXT) | (seen.branch == tokens.branch[:, None]))
    depth = tokens.position[:, None] - seen.position
    visible = (same | (seen.owner == TRUNK)) & (depth >= 0)
    if window := getattr(lm.model.config, "sliding_window", None):
        visible &= depth < window
    dtype = lm.model.dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=lm.device).masked_fill(~visible, torch.finfo(dtype).min)
    with ExitStack() as stack:
        for memory in lm.memories.values():
            stack.enter_context(memory.answering(ends))
        hidden = lm.anatomy.base(
            input_ids=torch.tensor([list(ids)], device=lm.device),
            attention_mask=mask[None, None],
            position_ids=tokens.position[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]
    return hidden, Read(seen, cache.layers)


def _tokens(lm: LM, owner: int, branch: int, start: int, count: int) -> Tokens:
    full = torch.full((count,), owner, device=lm.device)
    return Tokens(full, torch.full_like(full, branch), torch.arange(start, start + count, device=lm.device))


def _packs(costs: Sequence[int]) -> Iterator[list[int]]:
    """Indices in order, in groups of at most PACK tokens (or one index)."""
    pack: list[int] = []
    for index, cost in enumerate(costs):
        if pack and sum(costs[i] for i in pack) + cost > PACK:
            yield pack
            pack = []
        pack.append(index)
    if pack:
        yield pack


Scores = list[tuple[float, bool]]
Finished = Callable[[int, list[int]], bool]
Drafts = dict[tuple[int, ...], list[int]]


@torch.inference_mode()
def read(
    lm: LM,
    pairs: Sequence[tuple[Ids, Ids]],
    prompts: Sequence[Ids],
    limit: int = 16,
    finished: Finished = lambda prompt, tokens: False,
    drafts: Drafts | None = None,
) -> tuple[Scores, list[list[int]]]:
    """Score continuations and generate from prompts; each distinct context is read once for both.

    Args:
        pairs: (context ids, begin token included; continuation ids, at least one).
        prompts: contexts to continue greedily, by at most ``limit`` tokens.
        finished: (index of the prompt, its new tokens) -> stop here.
        drafts: guesses by prompt, such as what the model said before an edit. A guess is read in one go and
            kept as far as greedy decoding would have said the same, so it changes the cost and nothing
            else. Updated with what is generated.

    Returns:
        for each pair the sum of the continuation's log-probabilities and whether greedy decoding says
        it; for each prompt the new token ids.
    """
    scores, texts = _read(lm, pairs, prompts, limit, finished, drafts)
    contexts = [tuple(context) for context, _ in pairs] + [tuple(prompt) for prompt in prompts]
    taken = routes(lm, list(dict.fromkeys(contexts)))
    groups: dict[tuple[int, int, bool], tuple[list[int], list[int]]] = {}
    for index, context in enumerate(contexts):
        if route := taken.get(context):
            inside = groups.setdefault((id(route.lm), route.group, route.share < 1), ([], []))
            inside[index >= len(pairs)].append(index if index < len(pairs) else index - len(pairs))
    for (_, _, mixed), (scored, generated) in groups.items():
        route = taken[contexts[scored[0] if scored else len(pairs) + generated[0]]]

        def done(place: int, tokens: list[int], generated: list[int] = generated) -> bool:
            return finished(generated[place], tokens)

        if mixed:
            for index in scored:
                scores[index] = _mixed_score(lm, *pairs[index], taken[contexts[index]])
            for place, index in enumerate(generated):
                texts[index] = _mixed_text(lm, prompts[index], taken[tuple(prompts[index])], limit, place, done)
            continue
        new_scores, new_texts = _read(
            route.lm,
            [(taken[contexts[index]].ids, pairs[index][1]) for index in scored],
            [taken[tuple(prompts[index])].ids for index in generated],
            limit,
            done,
            drafts,
        )
        for index, score in zip(scored, new_scores, strict=True):
            scores[index] = score
        for index, text in zip(generated, new_texts, strict=True):
            texts[index] = text
    return scores, texts


def _mixture(lm: LM, context: Ids, route: Route, more: Ids) -> Tensor:
    """log((1 - s) p + s q) at the context's end and at each token after it: (1 + more, vocabulary)."""
    parts = []
    for reader, ids, share in ((lm, context, 1 - route.share), (route.lm, route.ids, route.share)):
        hidden = _forward(reader, [*ids, *more], _tokens(reader, 0, CONTEXT, 0, len(ids) + len(more)), None)[0]
        parts.append(reader.logits(hidden[len(ids) - 1 :]).log_softmax(-1) + torch.tensor(share).log())
    return torch.stack(parts).logsumexp(0)


def _mixed_score(lm: LM, context: Ids, continuation: Ids, route: Route) -> tuple[float, bool]:
    """The score of a continuation under a mixture of two readers, read plainly."""
    logprobs = _mixture(lm, context, route, continuation[:-1])
    said = logprobs[range(len(continuation)), list(continuation)].sum().item()
    return said, logprobs.argmax(-1).tolist() == list(continuation)


def _mixed_text(lm: LM, prompt: Ids, route: Route, limit: int, place: int, finished: Finished) -> list[int]:
    """Greedy decoding from a mixture of two readers, read plainly."""
    tokens: list[int] = []
    while len(tokens) < limit and not (tokens and finished(place, tokens)):
        tokens.append(int(_mixture(lm, prompt, route, tokens)[-1].argmax()))
    return tokens


def _read(
    lm: LM,
    pairs: Sequence[tuple[Ids, Ids]],
    prompts: Sequence[Ids],
    limit: int,
    finished: Finished,
    drafts: Drafts | None,
) -> tuple[Scores, list[list[int]]]:
    """``read`` on one model, whatever its memories would route elsewhere."""
    asked: dict[tuple[int, ...], list[int]] = {}
    wanted: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        asked.setdefault(tuple(context), []).append(index)
    for index, prompt in enumerate(prompts):
        wanted.setdefault(tuple(prompt), []).append(index)
    contexts = list(dict.fromkeys([*asked, *wanted]))
    scores: Scores = [(0.0, False)] * len(pairs)
    texts: list[list[int]] = [[] for _ in prompts]
    if not contexts:
        return scores, texts

    prefix = common_prefix(contexts)
    trunk = _forward(lm, prefix, _tokens(lm, TRUNK, CONTEXT, 0, len(prefix)), None)[1] if prefix else None
    guesses = {c: (drafts or {}).get(c, [])[: limit - 1] for c in wanted}
    costs = [
        len(c) - len(prefix) + len(guesses.get(c, ())) + sum(len(pairs[i][1]) - 1 for i in asked.get(c, ()))
        for c in contexts
    ]
    waiting: list[tuple[Text, Read]] = []  # a text so far, and all but its last token as read
    for pack in _packs(costs):
        ids: list[int] = []
        parts: list[Tokens] = []
        ends: list[list[int]] = []  # places of each context's last token and of its guess
        reads: list[list[int]] = []  # for each pair of the pack, the places that predict its tokens
        for owner in pack:
            context = contexts[owner]
            parts.append(_tokens(lm, owner, CONTEXT, len(prefix), len(context) - len(prefix)))
            ids += context[len(prefix) :]
            guess = guesses.get(context, [])
            ends.append(list(range(len(ids) - 1, len(ids) + len(guess))))
            parts.append(_tokens(lm, owner, GUESS, len(context), len(guess)))
            ids += guess
            for branch, index in enumerate(asked.get(context, ()), 1):
                more = pairs[index][1][:-1]
                parts.append(_tokens(lm, owner, branch, len(context), len(more)))
                reads.append([ends[-1][0], *range(len(ids), len(ids) + len(more))])
                ids += more
        hidden, seen = _forward(lm, ids, Tokens.cat(parts), trunk, [places[0] for places in ends])
        indices = [index for owner in pack for index in asked.get(contexts[owner], ())]
        _score(lm, hidden, reads, [pairs[index][1] for index in indices], indices, scores)

        starts = [(owner, places) for owner, places in zip(pack, ends, strict=True) if contexts[owner] in wanted]
        flat = [place for _, places in starts for place in places]
        best = iter(lm.logits(hidden[flat]).argmax(-1).tolist() if flat else ())
        for owner, places in starts:
            context = contexts[owner]
            said = [next(best) for _ in places]
            prompt = wanted[context][0]
            right = _right(said, guesses[context], lambda tokens, prompt=prompt: finished(prompt, tokens))
            text = Text(prompt, [*guesses[context], *context])
            text.add(said[: right + 1])
            waiting.append((text, _adopt(seen, owner, len(context) + right)))
    _generate(lm, waiting, trunk, limit, finished)
    for text, _ in waiting:
        context = tuple(prompts[text.prompt])
        for index in wanted[context]:
            texts[index] = text.tokens
        if drafts is not None:
            drafts[context] = text.tokens
    return scores, texts


def _right(said: Sequence[int], guess: Sequence[int], finished: Callable[[list[int]], bool]) -> int:
    """How much of a guess the model says itself, up to where the text is finished."""
    right = 0
    while right < len(guess) and said[right] == guess[right] and not finished(list(guess[: right + 1])):
        right += 1
    return right


class Text:
    """A text that is being generated, and guesses at how it goes on.

    Models repeat: exemplars, the question, themselves. The guess is what followed the last few tokens when they
    last stood in the text (prompt lookup decoding); it gets longer while it is right. A wrong guess costs time and
    changes nothing.
    """

    def __init__(self, prompt: int, before: Sequence[int]):
        self.prompt = prompt
        self.tokens: list[int] = []
        self.reach = 1
        self._all: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._extend(before)

    def _ends(self) -> Iterator[tuple[int, ...]]:
        return (tuple(self._all[-count:]) for count in GRAMS)

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._after.update(dict.fromkeys(self._ends(), len(self._all)))  # the last tokens have none after them
            self._all.append(token)

    def add(self, tokens: Sequence[int]) -> None:
        """Go on by tokens."""
        self.tokens += tokens
        self._extend(tokens)

    def guess(self, most: int) -> list[int]:
        """At most ``most`` tokens that may follow."""
        place = next((self._after[end] for end in self._ends() if end in self._after), None)
        if place is None:
            return []
        ahead = self._all[place:]  # a text that repeats itself goes round
        return [ahead[i % len(ahead)] for i in range(min(most, self.reach))]

    def judge(self, guessed: int, right: int) -> None:
        """Learn how much of a guess was right."""
        if guessed:
            self.reach = min(2 * self.reach, GUESSES) if right == guessed else max(1, right)


def _adopt(seen: Read, owner: int, depth: int) -> Read:
    """A context and what was right of its guess, up to a depth, as one text of its own."""
    tokens = seen.tokens
    mine = (tokens.owner == owner) & (tokens.branch <= CONTEXT) & (tokens.position < depth)
    own = seen[mine.nonzero()[:, 0]]
    own.tokens.branch.fill_(CONTEXT)
    return own


def _score(
    lm: LM,
    hidden: Tensor,
    reads: Sequence[list[int]],
    continuations: Sequence[Ids],
    indices: Sequence[int],
    scores: Scores,
) -> None:
    """Fill in the scores of continuations whose tokens are predicted at the places ``reads``."""
    if not reads:
        return
    places = sorted({place for row in reads for place in row})
    logprobs = lm.logits(hidden[places]).log_softmax(-1)
    rank = {place: i for i, place in enumerate(places)}
    best = logprobs.argmax(-1).tolist()
    flat = [
        (rank[place], token)
        for row, ids in zip(reads, continuations, strict=True)
        for place, token in zip(row, ids, strict=True)
    ]
    said = iter(logprobs[[i for i, _ in flat], [token for _, token in flat]].tolist())
    for index, row, ids in zip(indices, reads, continuations, strict=True):
        greedy = all(best[rank[place]] == token for place, token in zip(row, ids, strict=True))
        scores[index] = (sum(next(said) for _ in ids), greedy)


def _generate(
    lm: LM,
    waiting: Sequence[tuple[Text, Read]],
    trunk: Read | None,
    limit: int,
    finished: Finished,
) -> None:
    """Greedy decoding of texts, up to ROWS side by side; each has said one token or more that is not yet read."""
    owners = {text.prompt: int(own.tokens.owner[0]) for text, own in waiting}
    depth = {text.prompt: int(own.tokens.position[-1]) + 1 for text, own in waiting}  # of the last token said

    def unfinished(some: Sequence[Text]) -> list[Text]:
        return [t for t in some if len(t.tokens) < limit and not finished(t.prompt, t.tokens)]

    reads = {text.prompt: own for text, own in waiting}
    active: list[Text] = []
    queue, seen = unfinished([text for text, _ in waiting]), trunk
    while active or queue:
        if queue and len(active) <= ROWS * 3 // 4:  # some at a time, since all that was read is copied
            joining, queue = queue[: ROWS - len(active)], queue[ROWS - len(active) :]
            seen = Read.cat([*([seen] if seen else []), *(reads[text.prompt] for text in joining)])
            active += joining
        share = GUESSES // len(active)
        guesses = [text.guess(min(share, limit - len(text.tokens) - 1)) for text in active]
        parts = [
            _tokens(lm, owners[text.prompt], CONTEXT, depth[text.prompt], 1 + len(guess))
            for text, guess in zip(active, guesses, strict=True)
        ]
        ids = [i for text, guess in zip(active, guesses, strict=True) for i in (text.tokens[-1], *guess)]
        place = len(seen.tokens.owner)
        hidden, seen = _forward(lm, ids, Tokens.cat(parts), seen)
        best = iter(lm.logits(hidden).argmax(-1).tolist())
        for text, guess in zip(active, guesses, strict=True):
            said = [next(best) for _ in range(1 + len(guess))]
            right = _right(said, guess, lambda more, text=text: finished(text.prompt, text.tokens + more))
            text.judge(len(guess), right)
            text.add(said[: right + 1])
            depth[text.prompt] += right + 1
            seen.tokens.owner[place + right + 1 : place + 1 + len(guess)] = NOBODY
            place += 1 + len(guess)
        left = unfinished(active)
        if len(left) < len(active) or (seen.tokens.owner == NOBODY).sum() > PACK:
            # what finished texts have read is of no more use, nor are wrong guesses
            keep = torch.tensor([TRUNK, *(owners[t.prompt] for t in left)], device=lm.device)
            seen = seen[torch.isin(seen.tokens.owner, keep).nonzero()[:, 0]]
        active = left


def loglikelihoods(lm: LM, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
    """Sum of log-probabilities of each continuation after its context, and whether greedy decoding says it."""
    return read(lm, pairs, [])[0]
