"""Reading the live model: log-probabilities of continuations and greedy generation.

Everything that is asked is laid out as a tree of tokens: a prefix that all contexts share (few-shot
exemplars), the contexts, and the continuations of each context (the choices of a question). Every
token of the tree runs through the model once. Many branches are packed into one sequence without
padding; a mask lets each token see its own ancestors only and its position is its depth, so each
branch is computed as if it stood alone (tests/test_scoring.py compares). Key-value caches are those of
one state of the model and outlive no edit.

Generation is prompt-lookup decoding: several texts advance side by side, and one forward reads a guess
at each, copied from where its last tokens stood before, and keeps what greedy decoding confirms.

Memory-based edits take part here: each memory learns where contexts end, and contexts that it routes
elsewhere are read again by the route's model, after everything was read as if no memory were there, so
that contexts out of scope keep their very bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, cycle, islice, takewhile
from operator import eq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit.model.memory import Route, routes
from kedit.model.tree import CONTEXT, DISCARDED, PREFIX, TEXT, Cache, Ids, Token, forward, span

if TYPE_CHECKING:
    from kedit.model.lm import LM

PACK_TOKENS = 384
"""Tokens in one packed sequence: enough to keep the matrix products busy, few enough for its mask."""
BATCH_TEXTS = 16
"""Texts generated together: each token's attention passes over those of all the others, and all are kept."""
GUESS_TOKENS = 16
"""Guessed tokens in one forward, of all its texts: so few cost next to nothing beside reading the weights."""
NGRAMS = (8, 4, 2, 1)
"""Lengths of the endings by which a guess is looked up, the most telling first."""

Score = tuple[float, float]
"""Sum of a continuation's log-probabilities; share of its tokens that are the likeliest, those before them given."""
Finished = Callable[[int, list[int]], bool]
Drafts = dict[tuple[int, ...], list[int]]
Question = tuple[Ids, Ids | None]
"""A context, and the continuation to score after it; None to generate what follows."""


@torch.inference_mode()
def read(
    lm: LM,
    pairs: Sequence[tuple[Ids, Ids]],
    prompts: Sequence[Ids],
    limit: int = 16,
    finished: Finished = lambda prompt, tokens: False,
    drafts: Drafts | None = None,
) -> tuple[list[Score], list[list[int]]]:
    """Score continuations and generate from prompts; each distinct context is read once for both.

    Args:
        pairs: (context ids, begin token included; continuation ids, at least one).
        prompts: contexts to continue greedily, by at most ``limit`` tokens.
        finished: (index of the prompt, its new tokens) -> stop here.
        drafts: guesses by prompt, such as what the model generated before an edit. A guess is read in one
            go and kept as far as greedy decoding agrees, so it changes the cost and nothing else. Updated
            with what is generated.

    Returns:
        for each pair the sum of the continuation's log-probabilities and the share of its tokens that are the
        likeliest (all of them: greedy decoding gives it); for each prompt the new token ids.
    """
    questions: dict[int, Question] = dict(enumerate(pairs, len(prompts)))  # read first, but numbered after the prompts
    questions |= {index: (prompt, None) for index, prompt in enumerate(prompts)}
    answers = _read(lm, questions, limit, finished, drafts)
    taken = routes(lm, list(dict.fromkeys(tuple(context) for context, _ in questions.values())))
    routed: dict[tuple[LM, int], dict[int, Question]] = {}
    longest = max([limit, *(len(continuation) for _, continuation in pairs)])
    for index, (context, continuation) in questions.items():
        route = taken.get(tuple(context))
        if route:  # what a route puts before a prompt may not fit into the window: cut off at the left
            route = replace(route, ids=route.ids[-max(1, route.lm.window - longest) :])
        if route and route.weight < 1:
            answers[index] = _read_mixture(lm, context, route, continuation, limit, partial(finished, index))
        elif route:
            routed.setdefault((route.lm, route.group), {})[index] = route.ids, continuation
    for (reader, _), group in routed.items():
        answers |= _read(reader, group, limit, finished, drafts)
    ordered = [answers[index] for index in range(len(questions))]
    return ordered[len(prompts) :], ordered[: len(prompts)]


def loglikelihoods(lm: LM, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
    """Sum of log-probabilities of each continuation after its context, and whether greedy decoding gives it."""
    return [(total, likeliest == 1) for total, likeliest in read(lm, pairs, [])[0]]


def common_prefix(sequences: Sequence[Ids]) -> list[int]:
    """Longest common prefix that leaves every sequence at least one token."""
    shortened = [ids[:-1] for ids in sequences]
    # what the first and the last in order share, all share
    extremes = zip(min(shortened, default=()), max(shortened, default=()), strict=False)
    return [low for low, _ in takewhile(lambda pair: pair[0] == pair[1], extremes)]


def _mixture(lm: LM, context: Ids, route: Route, more: Ids) -> Tensor:
    """log((1 - w) p + w q) at the context's end and at each token after it: (1 + more, vocabulary)."""
    parts = []
    for reader, ids, weight in ((lm, context, 1 - route.weight), (route.lm, route.ids, route.weight)):
        hidden, _ = forward(reader, span([*ids, *more], 0, CONTEXT, 0), None)
        parts.append(reader.logits(hidden[len(ids) - 1 :]).log_softmax(-1) + torch.tensor(weight).log())
    return torch.stack(parts).logsumexp(0)


def _read_mixture(
    lm: LM, context: Ids, route: Route, continuation: Ids | None, limit: int, finished: Callable[[list[int]], bool]
) -> Score | list[int]:
    """The answer of a mixture of two readers, without packing: a score, or greedily generated tokens."""
    if continuation is not None:
        logprobs = _mixture(lm, context, route, continuation[:-1])
        total = logprobs[range(len(continuation)), list(continuation)].sum().item()
        return total, _agreeing(logprobs.argmax(-1).tolist(), continuation)
    tokens: list[int] = []
    while len(tokens) < limit and not (tokens and finished(tokens)):
        tokens.append(int(_mixture(lm, context, route, tokens)[-1].argmax()))
    return tokens


# One model, without routes --------------------------------------------------------------------------


@dataclass
class Context:
    """A distinct context and the questions about it, which are known by their indices.

    Attributes:
        branches: what is read after it: a guess at the text to generate, and by question the continuation to
            score, but for its last token.
        generated: the questions that ask for the text.
    """

    number: int
    ids: tuple[int, ...]
    branches: dict[int, Ids] = field(default_factory=lambda: {TEXT: []})
    generated: list[int] = field(default_factory=list)


def _read(
    lm: LM, questions: Mapping[int, Question], limit: int, finished: Finished, drafts: Drafts | None
) -> dict[int, Any]:
    """Answers of one model to questions, by index: a score, or the generated tokens."""
    contexts: dict[tuple[int, ...], Context] = {}
    for index, (ids, continuation) in questions.items():
        context = contexts.setdefault(tuple(ids), Context(len(contexts), tuple(ids)))
        if continuation is not None:
            context.branches[index] = continuation[:-1]
        else:
            context.generated.append(index)
            context.branches[TEXT] = (drafts or {}).get(context.ids, [])[: limit - 1]
    prefix = common_prefix(list(contexts))
    trunk = forward(lm, span(prefix, PREFIX, CONTEXT, 0), None)[1] if prefix else None
    answers: dict[int, Any] = {}
    texts: list[Text] = []
    for pack in _packs(contexts.values(), len(prefix)):
        tokens, predictors = _lay_out(pack, len(prefix))
        hidden, cache = forward(lm, tokens, trunk, [predictors[context.number, TEXT][0] for context in pack])
        answers |= _scores(lm, hidden, predictors, questions)
        begun = [Text(context, limit, partial(finished, context.generated[0])) for context in pack if context.generated]
        rows = [row for text in begun for row in predictors[text.context.number, TEXT]]
        best = iter(lm.logits(hidden[rows]).argmax(-1).tolist())
        _, context, branch, position = cache.tokens
        for text in begun:
            guess = text.context.branches[TEXT]
            text.accept(guess, list(islice(best, 1 + len(guess))))
            text.cache = cache.select((context == text.context.number) & (branch <= CONTEXT) & (position < text.depth))
        texts += begun
    _generate(lm, texts, trunk)
    if drafts is not None:
        drafts |= {text.context.ids: text.tokens for text in texts}
    return answers | {index: text.tokens for text in texts for index in text.context.generated}


def _packs(contexts: Iterable[Context], prefix: int) -> list[list[Context]]:
    """Contexts in order, in groups of at most PACK_TOKENS tokens after the prefix (or one context)."""
    packs: list[list[Context]] = []
    room = 0
    for context in contexts:
        size = len(context.ids) - prefix + sum(map(len, context.branches.values()))
        if size > room:
            packs.append([])
            room = PACK_TOKENS
        packs[-1].append(context)
        room -= size
    return packs


def _lay_out(pack: Sequence[Context], prefix: int) -> tuple[list[Token], dict[tuple[int, int], list[int]]]:
    """Contexts side by side, each with its branches.

    Returns:
        the tokens; by context and branch the indices of the tokens that predict: the context's last, and the
        branch's.
    """
    tokens: list[Token] = []
    predictors: dict[tuple[int, int], list[int]] = {}
    for context in pack:
        tokens += span(context.ids[prefix:], context.number, CONTEXT, prefix)
        last = len(tokens) - 1
        for branch, ids in context.branches.items():
            predictors[context.number, branch] = [last, *range(len(tokens), len(tokens) + len(ids))]
            tokens += span(ids, context.number, branch, len(context.ids))
    return tokens, predictors


def _scores(
    lm: LM, hidden: Tensor, predictors: Mapping[tuple[int, int], list[int]], questions: Mapping[int, Question]
) -> dict[int, Score]:
    """Scores of continuations, from the final hidden states (T, d) at the indices that predict them."""
    scored = {branch: indices for (_, branch), indices in predictors.items() if branch != TEXT}
    rows = {index: row for row, index in enumerate(sorted(set(chain(*scored.values()))))}
    logprobs = lm.logits(hidden[list(rows)]).log_softmax(-1)
    best = logprobs.argmax(-1).tolist()
    scores: dict[int, Score] = {}
    for question, indices in scored.items():
        tokens, at = list(questions[question][1]), [rows[index] for index in indices]
        scores[question] = sum(logprobs[at, tokens].tolist()), _agreeing([best[row] for row in at], tokens)
    return scores


def _agreeing(tokens: Ids, others: Ids) -> float:
    return sum(map(eq, tokens, others)) / len(others)


# Generation -----------------------------------------------------------------------------------------


class Text:
    """A text that is being generated, and guesses at how it goes on (prompt-lookup decoding).

    Models repeat: exemplars, the question, themselves. The guess is what followed the last few tokens when they
    last stood in the text; it gets longer while it is right. A wrong guess costs time and changes nothing.

    Attributes:
        tokens: the new tokens; the last of them has not been read yet.
        reach: how many tokens to guess next.
        cache: the context and the new tokens that have been read, until the text joins others.
    """

    cache: Cache

    def __init__(self, context: Context, limit: int, finished: Callable[[list[int]], bool]):
        self.context, self.limit, self.finished = context, limit, finished
        self.tokens: list[int] = []
        self.reach = 1
        self._all: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._extend([*context.branches[TEXT], *context.ids])

    @property
    def depth(self) -> int:
        """How many tokens of the context and of the text have been read."""
        return len(self.context.ids) + len(self.tokens) - 1

    def _endings(self) -> Iterator[tuple[int, ...]]:
        return (tuple(self._all[-count:]) for count in NGRAMS)

    def _extend(self, tokens: Ids) -> None:
        for token in tokens:
            self._after.update(dict.fromkeys(self._endings(), len(self._all)))  # the last tokens have none after them
            self._all.append(token)

    def done(self) -> bool:
        """Whether nothing more is wanted."""
        return len(self.tokens) >= self.limit or self.finished(self.tokens)

    def accept(self, guess: Ids, greedy: Sequence[int]) -> int:
        """Go on by what greedy decoding confirms of a guess, and by the token it puts next.

        Args:
            greedy: the best token before the guess and after each of its tokens.

        Returns:
            how many tokens of the guess were right, up to where the text is finished.
        """
        for right, token in enumerate(greedy):
            self.tokens.append(token)
            self._extend([token])
            if right == len(guess) or token != guess[right] or self.finished(self.tokens):
                break
        return right

    def guess(self, most: int) -> list[int]:
        """At most ``most`` tokens that may follow, and fewer than are wanted."""
        start = next((self._after[ending] for ending in self._endings() if ending in self._after), len(self._all))
        count = min(most, self.reach, self.limit - len(self.tokens) - 1)
        return list(islice(cycle(self._all[start:]), count))  # a text that repeats itself goes round


def _generate(lm: LM, texts: Sequence[Text], cache: Cache | None) -> None:
    """Greedy decoding of texts, up to BATCH_TEXTS side by side, after the prefix in the cache."""
    queue = [text for text in texts if not text.done()]
    active: list[Text] = []
    while active or queue:
        if queue and len(active) <= BATCH_TEXTS * 3 // 4:  # some at a time, since the whole cache is copied
            room = BATCH_TEXTS - len(active)
            joining, queue = queue[:room], queue[room:]
            cache = Cache.cat([*([cache] if cache else []), *(text.cache for text in joining)])
            active += joining
        cache = _step(lm, active, cache)
        left = [text for text in active if not text.done()]
        if len(left) < len(active) or (cache.tokens[1] == DISCARDED).sum() > PACK_TOKENS:
            keep = torch.tensor([PREFIX, *(text.context.number for text in left)], device=lm.device)
            cache = cache.select(torch.isin(cache.tokens[1], keep))
        active = left


def _step(lm: LM, texts: Sequence[Text], cache: Cache) -> Cache:
    """One forward: every text goes on by one token and by what is right of its guess."""
    guesses = [text.guess(GUESS_TOKENS // len(texts)) for text in texts]
    tokens: list[Token] = []
    for text, guess in zip(texts, guesses, strict=True):
        tokens += span([text.tokens[-1], *guess], text.context.number, TEXT, text.depth)
    hidden, cache = forward(lm, tokens, cache)
    best = iter(lm.logits(hidden).argmax(-1).tolist())
    _, context, _, position = cache.tokens
    for text, guess in zip(texts, guesses, strict=True):
        right = text.accept(guess, list(islice(best, 1 + len(guess))))
        if guess:
            text.reach = min(2 * text.reach, GUESS_TOKENS) if right == len(guess) else max(1, right)
        context.masked_fill_((context == text.context.number) & (position >= text.depth), DISCARDED)
    return cache
