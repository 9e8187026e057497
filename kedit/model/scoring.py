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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from kedit.model.lm import LM
from kedit.model.memory import Route, routes
from kedit.model.tree import CONTEXT, DISCARDED, GUESS, PREFIX, Cache, Ids, Token, forward, span

PACK_TOKENS = 384
"""Tokens in one packed sequence: enough to keep the matrix products busy, few enough for its mask."""
BATCH_TEXTS = 16
"""Texts generated together: each token's attention passes over those of all the others, and all are kept."""
GUESS_TOKENS = 16
"""Guessed tokens in one forward, of all its texts: so few cost next to nothing beside reading the weights."""
NGRAMS = (8, 4, 2, 1)
"""Lengths of the endings by which a guess is looked up, the most telling first."""

Score = tuple[float, bool]
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
        for each pair the sum of the continuation's log-probabilities and whether greedy decoding gives
        it; for each prompt the new token ids.
    """

    def done(question: int, tokens: list[int]) -> bool:
        return finished(question - len(pairs), tokens)

    questions: list[Question] = [*pairs, *((prompt, None) for prompt in prompts)]
    answers = _read(lm, dict(enumerate(questions)), limit, done, drafts)
    taken = routes(lm, list(dict.fromkeys(tuple(context) for context, _ in questions)))
    routed: dict[tuple[int, int], tuple[LM, dict[int, Question]]] = {}
    for index, (context, continuation) in enumerate(questions):
        if (route := taken.get(tuple(context))) is None:
            continue
        if route.weight < 1:
            answers[index] = _read_mixture(lm, context, route, continuation, limit, partial(done, index))
        else:
            group = routed.setdefault((id(route.lm), route.group), (route.lm, {}))
            group[1][index] = route.ids, continuation
    for reader, group in routed.values():
        answers |= _read(reader, group, limit, done, drafts)
    ordered = [answers[index] for index in range(len(questions))]
    return ordered[: len(pairs)], ordered[len(pairs) :]


def loglikelihoods(lm: LM, pairs: Sequence[tuple[Ids, Ids]]) -> list[Score]:
    """Sum of log-probabilities of each continuation after its context, and whether greedy decoding gives it."""
    return read(lm, pairs, [])[0]


def common_prefix(sequences: Sequence[Ids]) -> list[int]:
    """Longest common prefix that leaves every sequence at least one token."""
    low, high = min(sequences), max(sequences)
    limit, length = min(map(len, sequences)) - 1, 0
    while length < limit and low[length] == high[length]:
        length += 1
    return list(low[:length])


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
        return total, logprobs.argmax(-1).tolist() == list(continuation)
    tokens: list[int] = []
    while len(tokens) < limit and not (tokens and finished(tokens)):
        tokens.append(int(_mixture(lm, context, route, tokens)[-1].argmax()))
    return tokens


# One model, without routes --------------------------------------------------------------------------


@dataclass
class Context:
    """A distinct context and the questions about it, by index: continuations to score, texts to generate."""

    number: int
    ids: tuple[int, ...]
    continuations: dict[int, Ids] = field(default_factory=dict)
    generated: list[int] = field(default_factory=list)
    guess: list[int] = field(default_factory=list)


def _read(
    lm: LM, questions: Mapping[int, Question], limit: int, finished: Finished, drafts: Drafts | None
) -> dict[int, Any]:
    """Answers of one model to questions, by index: a score, or the generated tokens."""
    contexts: dict[tuple[int, ...], Context] = {}
    for index, (ids, continuation) in questions.items():
        context = contexts.setdefault(tuple(ids), Context(len(contexts), tuple(ids)))
        if continuation is not None:
            context.continuations[index] = continuation
        else:
            context.generated.append(index)
            context.guess = (drafts or {}).get(context.ids, [])[: limit - 1]
    if not contexts:
        return {}
    prefix = common_prefix(list(contexts))
    trunk = forward(lm, span(prefix, PREFIX, CONTEXT, 0), None)[1] if prefix else None
    answers: dict[int, Any] = {}
    texts: list[Text] = []
    for pack in _packs(contexts.values(), len(prefix)):
        tokens, ends, predictors = _lay_out(pack, len(prefix))
        hidden, cache = forward(lm, tokens, trunk, [end[0] for end in ends])
        answers |= _scores(lm, hidden, predictors, questions)
        starts = [(context, end) for context, end in zip(pack, ends, strict=True) if context.generated]
        best = iter(lm.logits(hidden[[index for _, end in starts for index in end]]).argmax(-1).tolist())
        for context, end in starts:
            text = Text(context, limit, partial(finished, context.generated[0]))
            right = text.accept(context.guess, list(islice(best, len(end))))
            text.cache = cache.of_context(context.number, len(context.ids) + right)
            texts.append(text)
    _generate(lm, texts, trunk)
    if drafts is not None:
        drafts |= {text.context.ids: text.tokens for text in texts}
    return answers | {index: text.tokens for text in texts for index in text.context.generated}


def _packs(contexts: Iterable[Context], prefix: int) -> list[list[Context]]:
    """Contexts in order, in groups of at most PACK_TOKENS tokens after the prefix (or one context)."""
    packs: list[list[Context]] = []
    room = 0
    for context in contexts:
        continuations = sum(len(continuation) - 1 for continuation in context.continuations.values())
        size = len(context.ids) - prefix + len(context.guess) + continuations
        if not packs or size > room:
            packs.append([])
            room = PACK_TOKENS
        packs[-1].append(context)
        room -= size
    return packs


def _lay_out(pack: Sequence[Context], prefix: int) -> tuple[list[Token], list[range], dict[int, list[int]]]:
    """Contexts side by side, each with its guess and its continuations (but for their last tokens).

    Returns:
        the tokens; for each context the indices of its last token and of its guess; for each continuation
        the indices of the tokens that predict it.
    """
    tokens: list[Token] = []
    ends: list[range] = []
    predictors: dict[int, list[int]] = {}
    for context in pack:
        depth = len(context.ids)
        tokens += span(context.ids[prefix:], context.number, CONTEXT, prefix)
        last = len(tokens) - 1
        tokens += span(context.guess, context.number, GUESS, depth)
        ends.append(range(last, len(tokens)))
        for branch, (index, continuation) in enumerate(context.continuations.items(), 1):
            predictors[index] = [last, *range(len(tokens), len(tokens) + len(continuation) - 1)]
            tokens += span(continuation[:-1], context.number, branch, depth)
    return tokens, ends, predictors


def _scores(
    lm: LM, hidden: Tensor, predictors: Mapping[int, list[int]], questions: Mapping[int, Question]
) -> dict[int, Score]:
    """Scores of continuations, from the final hidden states (T, d) at the indices that predict them."""
    rows = {index: row for row, index in enumerate(sorted(set(chain(*predictors.values()))))}
    logprobs = lm.logits(hidden[list(rows)]).log_softmax(-1)
    best = logprobs.argmax(-1).tolist()
    scores: dict[int, Score] = {}
    for question, indices in predictors.items():
        tokens, at = list(questions[question][1]), [rows[index] for index in indices]
        scores[question] = sum(logprobs[at, tokens].tolist()), [best[row] for row in at] == tokens
    return scores


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
        self._extend([*context.guess, *context.ids])

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
        right = 0
        while right < len(guess) and greedy[right] == guess[right]:
            if self.finished([*self.tokens, *guess[: right + 1]]):
                break
            right += 1
        self.tokens += greedy[: right + 1]
        self._extend(greedy[: right + 1])
        return right

    def guess(self, most: int) -> list[int]:
        """At most ``most`` tokens that may follow, and fewer than are wanted."""
        start = next((self._after[ending] for ending in self._endings() if ending in self._after), None)
        if start is None:
            return []
        ahead = self._all[start:]  # a text that repeats itself goes round
        count = min(most, self.reach, self.limit - len(self.tokens) - 1)
        return [ahead[i % len(ahead)] for i in range(count)]


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
        depth = len(text.context.ids) + len(text.tokens) - 1
        tokens += span([text.tokens[-1], *guess], text.context.number, CONTEXT, depth)
    start = cache.tokens.shape[1]
    hidden, cache = forward(lm, tokens, cache)
    best = iter(lm.logits(hidden).argmax(-1).tolist())
    for text, guess in zip(texts, guesses, strict=True):
        right = text.accept(guess, list(islice(best, 1 + len(guess))))
        if guess:
            text.reach = min(2 * text.reach, GUESS_TOKENS) if right == len(guess) else max(1, right)
        end = start + 1 + len(guess)
        cache.tokens[1, start + 1 + right : end] = DISCARDED
        start = end
    return cache
