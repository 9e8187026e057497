"""IKE: the edit is told in the prompt, after demonstrations of how to treat such an edit.

Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", 2023. Nothing is trained and no
weight changes. Demonstrations are facts like the new one, each followed by a question of one of three
kinds: *copy* (the fact's own prompt, answered by its new object), *update* (a paraphrase, likewise) and
*retain* (another fact of the relation, answered truly), in the ratio 1 : 3 : 4 (section 3).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kedit import KeditError
from kedit.data.facts import bundled
from kedit.data.requests import EditRequest, spaced
from kedit.editors.encoder import Encoder
from kedit.editors.protocol import Editor
from kedit.model.journal import Edit, Entry
from kedit.model.memory import Memory, Route

RATIO = {"retain": 4, "update": 3, "copy": 1}
"""Demonstrations of each kind among eight, in the order shown: what to repeat stands nearest to the edit."""


@dataclass(frozen=True)
class Hparams:
    """Settings of IKE.

    Attributes:
        k: demonstrations, a multiple of eight.
        spread: no relation is shown twice before each was shown once, so that no object is told over and
            over; else the demonstrations are the plain nearest facts.
        scope: a prompt is taken over when its similarity (cosine) to a remembered prompt is above this;
            below zero, always, as in the published protocol of single edits.
    """

    k: int = 16
    spread: bool = True
    scope: float = 0.65

    def __post_init__(self):
        if self.k % sum(RATIO.values()):
            raise KeditError(f"hyper-parameters of ike: k must be a multiple of {sum(RATIO.values())}, not {self.k}.")


def told(prompt: str, target: str) -> str:
    """A fact as the context tells it; what is asked about it follows."""
    return f"New Fact: {prompt}{spaced(target, prompt)}\nPrompt:"


def demonstration(fact: EditRequest, kind: str) -> str:
    """A fact and a question with its answer: how to copy, update or retain."""
    if kind == "retain":
        asked, answer = fact.neighbours[0]
    else:
        asked = fact.text if kind == "copy" else fact.paraphrases[0]
        answer = fact.target_new
    return f"{told(fact.text, fact.target_new)} {asked}{spaced(answer, asked)}\n\n"


class Context(Memory):
    """Edits with their demonstrations; the text of a prompt is put after those of the most similar edit."""

    def __init__(self, editor: "IKE"):
        super().__init__()
        self.editor = editor

    def nearest(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """For each text the cosine to the most similar edit's prompt, and its index, the latest of equals."""
        queries = self.editor.embed(texts)
        known = torch.stack([entry["embedding"] for entry in self.entries]).to(queries)
        best = (queries @ known.T).flip(1).max(1)
        last = len(self.entries) - 1
        return [(value, last - place) for value, place in zip(*(part.tolist() for part in best), strict=True)]

    def routes(self, prompts: Sequence[tuple[int, ...]]) -> list[Route | None]:
        """Prompts in scope are read by the same model, after demonstrations and edit."""
        lm, scope = self.editor.lm, self.editor.hparams.scope
        bodies = [prompt[len(lm.begin) :] for prompt in prompts]
        texts = [lm.tokenizer.decode(body, clean_up_tokenization_spaces=False) for body in bodies]
        found: list[Route | None] = []
        for text, (similarity, index) in zip(texts, self.nearest(texts), strict=True):
            ids = (*lm.begin, *lm.encode(f"{self.entries[index]['context']} {text}"))
            found.append(Route(lm, ids, group=index) if scope < 0 or similarity > scope else None)
        return found


class IKE(Editor):
    """Remember the edit: its prompt's embedding and the context to read before a prompt, chosen once."""

    name = "ike"
    Hparams = Hparams

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.memory = Context(self)
        self.lm.journal.attach(self.name, self.memory)

    def _prepare(self) -> None:
        self.encoder = Encoder(self.lm.device)
        self.material = bundled("train")
        with torch.inference_mode(False):
            self.vectors = self.encoder([fact.text for fact in self.material])

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors of texts, (texts, 384)."""
        self.prepare()  # a journal can be replayed before the first edit
        return self.encoder(texts)

    def demonstrations(self, request: EditRequest) -> str:
        """The k training facts most similar to the request as demonstrations, the most similar last.

        Neither the request's own subject nor a prompt that will test its locality is shown: that would
        tell the answers.
        """
        hidden = {request.text, *(prompt for prompt, _ in request.neighbours)}
        similarity = (self.vectors @ self.embed([request.text])[0]).tolist()
        usable: list[tuple[int, float, EditRequest]] = []  # (facts of its relation that are nearer, similarity, fact)
        seen: Counter[str] = Counter()
        for near, fact in sorted(zip(similarity, self.material, strict=True), key=lambda pair: -pair[0]):
            left = tuple(pair for pair in fact.neighbours if pair[0] not in hidden)
            if left and fact.subject != request.subject and fact.text not in hidden:
                usable.append((seen[fact.relation] * self.hparams.spread, near, replace(fact, neighbours=left)))
                seen[fact.relation] += 1
        chosen = sorted(usable, key=lambda one: one[0])[: self.hparams.k]  # stable: nearest first within a round
        facts = [fact for _, _, fact in sorted(chosen, key=lambda one: one[1])]
        times = self.hparams.k // sum(RATIO.values())
        kinds = [kind for kind, count in RATIO.items() for _ in range(count * times)]
        return "".join(demonstration(fact, kind) for fact, kind in zip(facts, kinds, strict=True))

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        embedding = self.embed([request.text])[0]
        context = self.demonstrations(request) + told(request.text, request.target_new)
        edit.info |= {
            "memory": len(self.memory.entries) + 1,
            "tokens": len(self.lm.encode(context)),
            # cosine to the most similar earlier edit; above ``scope`` they compete for the same prompts
            "nearest": self.memory.nearest([request.text])[0][0] if self.memory.entries else 0.0,
        }
        edit.write(Entry(self.name, {"context": context, "embedding": embedding.cpu()}))
