"""Did the edits happen? Reliability, generalisation and locality over all edits so far.

Teacher-forced as in CounterFact (Meng et al. 2022): is the new object likelier than the old one on
the edited prompt (reliability) and on its paraphrases (generalisation), and do neighbours with the
same old object keep it (locality)? Beside it free generation: does the greedy continuation begin with
the object? Locality counts only neighbours that the unedited model gets right, so an error that was
there before is neither damage nor merit.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain

from kedit.data.requests import EditRequest, spaced
from kedit.evaluation.records import Item
from kedit.model.lm import LM
from kedit.model.scoring import Drafts, read

ROOM = 32
"""Tokens of the model's window that are kept for answers, even for short ones, so that a prompt is always cut alike."""
METRICS = ("reliability", "generalisation", "locality")


def _questions(request: EditRequest) -> Iterator[tuple[str, str, str, str]]:
    """(metric, prompt, new, old) of everything that is asked about a request."""
    yield "reliability", request.text, request.target_new, request.target_true
    for paraphrase in request.paraphrases:
        yield "generalisation", paraphrase, request.target_new, request.target_true
    for neighbour, answer in request.neighbours:
        yield "locality", neighbour, request.target_new, answer


def measure(lm: LM, requests: Sequence[EditRequest], guesses: Drafts | None = None) -> list[Item]:
    """Ask the model as it is now about each request; ``guesses`` are the ``drafts`` of ``scoring.read``.

    Each item holds the request's ``id``, the ``kind`` of question, the mean log-probability a token of
    the ``new`` and the ``true`` object, and the generated ``text``, long enough for either object.
    """
    asked = [(request.id, *question) for request in requests for question in _questions(request)]
    answers = [[lm.encode(spaced(target, prompt)) for target in targets] for _, _, prompt, *targets in asked]
    longest, newline = max(map(len, chain(*answers)), default=1), lm.encode("\n")[0]
    room = max(1, lm.window - max(longest + 1, ROOM))  # what does not fit is cut off at the left, as lm-eval does
    contexts = [[*lm.begin, *lm.encode(prompt)][-room:] for _, _, prompt, _, _ in asked]
    pairs = [(context, answer) for context, both in zip(contexts, answers, strict=True) for answer in both]
    scores, texts = read(lm, pairs, contexts, longest + 1, lambda _, tokens: tokens[-1] == newline, guesses)
    means = [round(total / len(target), 4) for (total, _), (_, target) in zip(scores, pairs, strict=True)]
    items = []
    for (name, kind, _, new, true), tokens, *logprobs in zip(asked, texts, means[::2], means[1::2], strict=True):
        text = lm.tokenizer.decode(tokens, skip_special_tokens=True)
        said = "new" if says(text, new) else "true" if says(text, true) else "other"
        items.append(Item(id=name, kind=kind, new=logprobs[0], true=logprobs[1], text=text, says=said))
    return items


def says(text: str, target: str) -> bool:
    """Whether a generated text begins with the target, whole words, whatever the case."""
    return re.match(rf"\W*{re.escape(target.strip())}(?!\w)", text, re.IGNORECASE) is not None


def outcomes(items: Sequence[Item], before: Sequence[Item]) -> dict[str, list[Item]]:
    """Successes by metric, each with what the unedited model did on the same question.

    Args:
        items: what ``measure`` found at a checkpoint.
        before: what it found on the unedited model, for the same requests or more.

    Returns:
        metric (also with ``_generated``) -> items with ``id`` (of the request), ``value`` and ``base``.
    """
    questions: dict[tuple[str, str], list[Item]] = {}
    for item in before:
        questions.setdefault((item["id"], item["kind"]), []).append(item)
    unedited = {place: iter(asked) for place, asked in questions.items()}
    found: dict[str, list[Item]] = {f"{metric}{how}": [] for metric in METRICS for how in ("", "_generated")}
    for item in items:
        name, kind = item["id"], item["kind"]
        both = (item, next(unedited[name, kind]))
        wanted, other = ("true", "new") if kind == "locality" else ("new", "true")
        forced = [float(answer[wanted] > answer[other]) for answer in both]
        generated = [float(answer["says"] == wanted) for answer in both]
        for metric, (value, base) in ((kind, forced), (f"{kind}_generated", generated)):
            if kind != "locality" or base:
                found[metric].append(Item(id=name, value=value, base=base))
    return found
