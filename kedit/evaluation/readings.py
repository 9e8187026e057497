"""Did an edit take? Three ways to score it, on three forms of the question, of all edits so far.

The edit's own prompt, its first paraphrase, and a question and answer, where the edit set has one. For each: is the new
object likelier than the old one, both given (the *comparison*, as CounterFact has it)? Which share of the new object's
tokens is the likeliest, the earlier ones and their number given (*token accuracy*, as toolkits have it)? And what does
the model write by itself, until it stops: does it begin with the new object, and not come back to the old one ("The
Mirage of Model Editing", Yang et al. 2025)?
"""

import re
from collections.abc import Sequence

from kedit.data.facts import RELATIONS
from kedit.data.requests import EditRequest, spaced
from kedit.evaluation.records import Item
from kedit.evaluation.success import says
from kedit.model.lm import LM
from kedit.model.scoring import Drafts, read

ROOM = 32
"""Tokens that the model may write before it is stopped."""
STOP = re.compile(r"\n|(?<=\w\w\w)\s?[.!?](?=\s|$)")
"""Where a text stops by itself, besides its end token: at the end of a line or a sentence (not of "St.")."""


def forms(request: EditRequest) -> dict[str, str]:
    """What is asked of an edit: form -> prompt."""
    found = {"prompt": request.text} | dict(zip(["paraphrase"], request.paraphrases, strict=False))
    asked = [text for text in request.generation if text.endswith("Answer:")]
    if request.relation in RELATIONS:
        asked = [f"Question: {RELATIONS[request.relation]['question'].replace('{}', request.subject)} Answer:"]
    return found | ({"question": asked[0]} if asked else {})


def measure(lm: LM, requests: Sequence[EditRequest], guesses: Drafts | None = None) -> list[Item]:
    """Ask the model as it is now about each request; ``guesses`` are the ``drafts`` of ``scoring.read``.

    Each item holds the request's ``id``, the form as ``kind``, ``new`` and ``true`` as those of edit success, the token
    ``accuracy``, the ``text`` that was written up to its stop, and what it ``says``: new, true, or other, also where it
    names both objects.
    """
    asked = [(request, kind, prompt) for request in requests for kind, prompt in forms(request).items()]
    end, room = lm.tokenizer.eos_token_id, lm.window - ROOM
    contexts = [[*lm.begin, *lm.encode(prompt)][-room:] for *_, prompt in asked]
    pairs = [
        (context, lm.encode(spaced(target, prompt)))
        for (request, _, prompt), context in zip(asked, contexts, strict=True)
        for target in (request.target_new, request.target_true)
    ]

    def finished(_: int, tokens: list[int]) -> bool:
        return tokens[-1] == end or STOP.search(lm.tokenizer.decode(tokens)) is not None

    scores, texts = read(lm, pairs, contexts, ROOM, finished, guesses)
    means = [round(total / len(target), 4) for (total, _), (_, target) in zip(scores, pairs, strict=True)]
    items = []
    for (request, kind, _), tokens, new, true, (_, accuracy) in zip(
        asked, texts, means[::2], means[1::2], scores[::2], strict=True
    ):
        text = STOP.split(lm.tokenizer.decode(tokens, skip_special_tokens=True).lstrip())[0]
        said = said_in(text, request)
        items.append(Item(id=request.id, kind=kind, new=new, true=true, accuracy=accuracy, text=text, says=said))
    return items


def said_in(text: str, request: EditRequest) -> str:
    """With which object a text begins, new or true; other where it names both."""
    both = {"new": request.target_new.strip(), "true": request.target_true.strip()}
    if all(re.search(rf"\b{re.escape(target)}\b", text, re.IGNORECASE) for target in both.values()):
        return "other"
    return next((name for name, target in both.items() if says(text, target)), "other")
