"""Did the edits happen? Reliability, generalisation and locality over all edits so far.

Teacher-forced as in CounterFact (Meng et al. 2022): is the new object likelier than the old one on
the edited prompt (reliability) and on its paraphrases (generalisation), and do neighbours with the
same old object keep it (locality)? Beside it free generation: does the greedy continuation begin with
the object? Locality counts only neighbours that the unedited model gets right, so an error that was
there before is neither damage nor merit.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from kedit.data.requests import EditRequest, spaced
from kedit.evaluation.records import Item
from kedit.model.lm import LM
from kedit.model.scoring import Drafts, read

METRICS = ("reliability", "generalisation", "locality")


def _prompts(request: EditRequest) -> Iterator[tuple[str, str, str, str]]:
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
    items, pairs, prompts = [], [], []
    longest = 1
    for request in requests:
        for kind, prompt, new, true in _prompts(request):
            context = [*lm.begin, *lm.encode(prompt)]
            items.append({"id": request.id, "kind": kind, "answers": (new, true)})
            for target in (new, true):
                ids = lm.encode(spaced(target, prompt))
                pairs.append((context, ids))
                longest = max(longest, len(ids))
            prompts.append(context)

    newline = lm.encode("\n")[0]
    scores, texts = read(lm, pairs, prompts, longest + 1, lambda _, tokens: tokens[-1] == newline, guesses)
    for index, item in enumerate(items):
        for offset, name in enumerate(("new", "true")):
            total, _ = scores[2 * index + offset]
            item[name] = round(total / len(pairs[2 * index + offset][1]), 4)
        text = lm.tokenizer.decode(texts[index], skip_special_tokens=True)
        new, true = item.pop("answers")
        item["text"] = text
        item["says"] = "new" if says(text, new) else "true" if says(text, true) else "other"
    return items


def says(text: str, target: str) -> bool:
    """Whether a generated text begins with the target, whole words, whatever the case."""
    return re.match(rf"\W*{re.escape(target.strip())}(?!\w)", text, re.IGNORECASE) is not None


def outcomes(items: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Successes by metric, each with what the unedited model did on the same question.

    Args:
        items: what ``measure`` found at a checkpoint.
        before: what it found on the unedited model, for the same requests or more.

    Returns:
        metric (also with ``_generated``) -> items with ``id`` (of the request), ``value`` and ``base``.
    """
    questions: dict[tuple[str, str], list[dict]] = {}
    for item in before:
        questions.setdefault((item["id"], item["kind"]), []).append(item)
    found: dict[str, list[dict[str, Any]]] = {}
    for metric in METRICS:
        found[metric], found[f"{metric}_generated"] = [], []
    seen: dict[tuple[str, str], int] = {}
    for item in items:
        kind = item["kind"]
        place = (item["id"], kind)
        base = questions[place][seen.setdefault(place, 0)]
        seen[place] += 1
        wanted = "true" if kind == "locality" else "new"
        other = "new" if wanted == "true" else "true"
        forced = [float(i[wanted] > i[other]) for i in (item, base)]
        generated = [float(i["says"] == wanted) for i in (item, base)]
        for metric, (value, start) in ((kind, forced), (f"{kind}_generated", generated)):
            if kind != "locality" or start:
                found[metric].append({"id": item["id"], "value": value, "base": start})
    return found
