"""IKE: the edit is stated in the prompt, after demonstrations of how to treat such an edit.

Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", 2023. Nothing is trained and no
weight changes. Demonstrations are facts like the new one, each followed by a question of one of three
kinds: *copy* (the fact's own prompt, answered by its new object), *update* (a paraphrase, likewise) and
*retain* (another fact of the relation, answered truly), in the ratio 1 : 3 : 4 (section 3).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kedit.data.facts import bundled
from kedit.data.requests import EditRequest, spaced
from kedit.editors.retrieval import Encoder, RetrievalEditor
from kedit.editors.space import trying
from kedit.model.journal import Edit
from kedit.model.memory import Route

RATIO = {"retain": 4, "update": 3, "copy": 1}
"""Demonstrations of each kind among eight, in the order shown: what to repeat stands nearest to the edit."""


@dataclass(frozen=True)
class Hparams:
    """Settings of IKE.

    Attributes:
        k: demonstrations, a multiple of eight.
        spread: no relation is shown twice before each was shown once, so that no object is repeated over and
            over; else the demonstrations are the plain nearest facts.
        scope: a prompt is taken over when its similarity (cosine) to a remembered prompt is above this;
            below zero, always, as in the published protocol of single edits.
    """

    k: Annotated[int, Field(ge=1, multiple_of=sum(RATIO.values()))] = 16
    spread: bool = True
    scope: Annotated[float, Field(ge=-1, le=1)] = 0.65


def statement(prompt: str, target: str) -> str:
    """A fact as it stands in the context; a prompt follows."""
    return f"New Fact: {prompt}{spaced(target, prompt)}\nPrompt:"


def demonstration(fact: EditRequest, kind: str) -> str:
    """A fact and a prompt with its answer: how to copy, update or retain."""
    asked = {"copy": fact.text, "update": fact.paraphrases[0]}
    prompt, answer = (asked[kind], fact.target_new) if kind in asked else fact.neighbours[0]
    return f"{statement(fact.text, fact.target_new)} {prompt}{spaced(answer, prompt)}\n\n"


class IKE(RetrievalEditor):
    """Remember the edit: its prompt's embedding and the context to read before a prompt, chosen once."""

    name = "ike"
    style = ("#117733", "h", ":")
    Hparams = Hparams
    space = trying(k=(8, 16, 32), spread=(False, True), scope=(0.5, 0.55, 0.6, 0.65, 0.7, 0.75))

    @torch.inference_mode(False)
    def _prepare(self) -> None:
        self.encoder, self.facts = Encoder(self.lm.device), bundled("train")
        self.vectors = self.encoder([fact.text for fact in self.facts])

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cosines."""
        return queries @ keys.T

    def route(self, body: Sequence[int], text: str, nearest: Sequence[tuple[float, int]]) -> Route | None:
        """A prompt in scope is read by the same model, after demonstrations and edit."""
        ((similarity, index),) = nearest
        if self.hparams.scope >= 0 and similarity <= self.hparams.scope:
            return None
        context = self.memory.entries[index]["context"]
        return Route(self.lm, (*self.lm.begin, *self.lm.encode(f"{context} {text}")), group=index)

    def demonstrations(self, request: EditRequest) -> str:
        """The k training facts most similar to the request as demonstrations, the most similar last.

        Neither the request's own subject nor a prompt that will test its locality is shown: that would
        give the answers away.
        """
        tested = {request.text, *(prompt for prompt, _ in request.neighbours)}
        # the prompt is embedded alone: its last bits depend on what is embedded with it
        similarity = (self.vectors @ self.embed([request.text])[0]).tolist()
        usable: list[tuple[int, float, EditRequest]] = []  # (nearer facts of its relation, similarity, fact)
        nearer: Counter[str] = Counter()
        for near, fact in sorted(zip(similarity, self.facts, strict=True), key=lambda pair: -pair[0]):
            untested = tuple(pair for pair in fact.neighbours if pair[0] not in tested)
            if untested and fact.subject != request.subject and fact.text not in tested:
                rounds = nearer[fact.relation] * self.hparams.spread
                usable.append((rounds, near, replace(fact, neighbours=untested)))
                nearer[fact.relation] += 1
        chosen = sorted(usable, key=lambda one: one[0])[: self.hparams.k]  # stable: nearest first within a round
        facts = [fact for _, _, fact in sorted(chosen, key=lambda one: one[1])]
        kinds = [kind for kind, count in RATIO.items() for _ in range(count * self.hparams.k // sum(RATIO.values()))]
        return "".join(demonstration(fact, kind) for fact, kind in zip(facts, kinds, strict=True))

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        context = self.demonstrations(request) + statement(request.text, request.target_new)
        self.remember(edit, request, {"context": context})
