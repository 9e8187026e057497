"""SERAC: edits are remembered as text, and a counterfactual model answers where one of them applies.

Mitchell et al., "Memory-Based Model Editing at Scale", 2022. Three parts beside the untouched model: a
memory of edits; a scope classifier, which finds the remembered edit that a prompt is about, if any; and
a counterfactual model, which reads that edit before the prompt and answers by it. Classifier and
counterfactual model are trained once, by the paper's supervised objective (section 3.2).

The paper trains a small language model and a DistilBERT. Here the counterfactual model is the model
itself with its own normalisation weights, the only ones that are trained; the rest of it is the base
model's, shared, not copied (so editing those weights by another method changes both). The classifier is
a linear projection of a frozen sentence embedding (kedit/editors/retrieval.py). What is trained is under 1 MB.
"""

import copy
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kedit.data.facts import bundled, bundled_zsre
from kedit.data.requests import EditRequest, spaced
from kedit.editors.bounds import Count, Natural, Positive, Share
from kedit.editors.retrieval import WIDTH, Encoder, RetrievalEditor
from kedit.editors.space import trying
from kedit.editors.training import ScoredText, TrainedEditor, Training, scored
from kedit.model.forward import pad
from kedit.model.journal import Edit
from kedit.model.lm import LM
from kedit.model.memory import Route

HARD = 4
"""Negatives that count for each prompt in training: the most similar ones of its batch."""
QUESTIONS = 0.25
"""How often a training edit comes as a question and its answer, as in ZsRE."""
SAVE = 20
"""Steps between checkpoints of the training."""


@dataclass(frozen=True)
class Hparams:
    """Settings of SERAC and of its training; with ``steps=0`` nothing is trained.

    Attributes:
        threshold: a prompt is in scope when its similarity to a remembered edit is above this.
        soft: answers in scope are mixed, the counterfactual model weighing as much as the similarity; else it
            answers alone.
        scale: the projection starts as ``scale`` times the identity, which sets the radius of the scope.
        steps: updates of both parts; the learning rates fall linearly to zero.
        lr, batch: Adam's first learning rate for the normalisation weights, and edits in a batch.
        scope_lr, scope_batch: the same for the projection; a batch comes from four relations.
    """

    threshold: Share = 0.5
    soft: bool = False
    scale: Positive = 0.9
    steps: Natural = 100
    lr: Positive = 3e-3
    batch: Count = 8
    scope_lr: Positive = 1e-3
    scope_batch: Count = 64
    seed: Natural = 0


# The trained parts ----------------------------------------------------------------------------------


def counterfactual(lm: LM) -> LM:
    """A second model that shares everything with the first but the normalisation weights, which are copies."""
    copied = {id(weight) for weight in norms(lm).values()}
    shared = {id(t): t for t in (*lm.model.parameters(), *lm.model.buffers()) if id(t) not in copied}
    return LM(copy.deepcopy(lm.model, shared), lm.tokenizer, lm.name, bool(lm.begin))


def norms(lm: LM) -> dict[str, nn.Parameter]:
    """The normalisation weights of a model, by name."""
    norms = lm.anatomy.norms.items()
    return {f"{name}.{kind}": weight for name, module in norms for kind, weight in module.named_parameters()}


def statement(prompt: str, target: str) -> str:
    """An edit as the counterfactual model reads it before a prompt."""
    return f"New Fact: {prompt}{spaced(target, prompt)}.\n"


# Training -------------------------------------------------------------------------------------------


def training_facts() -> list[EditRequest]:
    """The bundled facts of the train split; the paraphrases are all ways to ask: prompt, paraphrases, question."""
    pairs = zip(bundled("train"), bundled_zsre("train"), strict=True)
    return [replace(fact, paraphrases=(fact.text, *fact.paraphrases, question.text)) for fact, question in pairs]


def edit_prompt(fact: EditRequest, rng: random.Random) -> str:
    """The prompt by which a training fact is edited."""
    return fact.paraphrases[-1 if rng.random() < QUESTIONS else 0]


def scope_loss(projection: Tensor, encoder: Encoder, facts: list[EditRequest], size: int, rng: random.Random) -> Tensor:
    """Balanced cross-entropy of "this prompt is about this edit" (paper, section 3.2).

    Facts come from a few relations, so that most negatives are hard: other subjects in the same words.
    """
    relations = defaultdict(list)
    for fact in facts:
        relations[fact.relation].append(fact)
    chosen = [relations[name] for name in rng.sample(sorted(relations), min(4, len(relations)))]
    batch = [fact for some in chosen for fact in rng.sample(some, min(len(some), size // len(chosen)))]
    edits = encoder([edit_prompt(fact, rng) for fact in batch]) @ projection.T
    asked = encoder([prompt for fact in batch for prompt in fact.paraphrases]) @ projection.T
    owners = torch.tensor([n for n, fact in enumerate(batch) for _ in fact.paraphrases], device=asked.device)
    distances = (asked.square().sum(1)[:, None] + edits.square().sum(1) - 2 * asked @ edits.T).clamp(min=1e-6)
    right = nn.functional.one_hot(owners, len(batch)).bool()
    wrong = -torch.log(-torch.expm1(-distances[~right].view(len(owners), -1)))  # -log(1 - similarity)
    return distances[right].mean() + wrong.topk(min(HARD, len(batch) - 1), 1).values.mean()


def answer_loss(lm: LM, facts: list[EditRequest], size: int, rng: random.Random) -> Tensor:
    """Mean negative log-likelihood a token of new objects, given the right edit and any way to ask for it."""
    texts = []
    for fact in rng.sample(facts, size):
        prompt, edit = rng.choice(fact.paraphrases), edit_prompt(fact, rng)
        texts.append(ScoredText.of(lm, prompt, fact.target_new, before=statement(edit, fact.target_new)))
    ids, mask = pad([text.ids for text in texts], lm.device)
    hidden = lm.anatomy.base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    rows, positions, labels = scored(texts)
    return nn.functional.cross_entropy(lm.logits(hidden[rows, positions]), torch.tensor(labels, device=lm.device))


# The editor -----------------------------------------------------------------------------------------


class SERAC(RetrievalEditor, TrainedEditor):
    """Remember the edit: its text, and where its prompt lies in the projected space (embedded once).

    What is embedded is the prompt without the new object, which no later prompt will hold.
    """

    name = "serac"
    needs = ("norms",)
    style = ("#117733", "P", "--")
    Hparams = Hparams
    space = trying(threshold=(0.3, 0.4, 0.5, 0.6, 0.7), soft=(False, True))
    edit_hparams = ("threshold", "soft")

    @classmethod
    def training(cls, lm: LM, hparams: Hparams) -> Training:
        """Both parts at once. Their losses share no weight, so the learning rates are all that weighs them."""
        twin, encoder, facts = counterfactual(lm), Encoder(lm.device), training_facts()
        projection = nn.Parameter(hparams.scale * torch.eye(WIDTH, device=lm.device))
        weights = {name: weight.requires_grad_() for name, weight in norms(twin).items()}

        def loss(rng: random.Random) -> Tensor:
            scope = scope_loss(projection, encoder, facts, hparams.scope_batch, rng)
            return scope + answer_loss(twin, facts, hparams.batch, rng)

        return Training(
            tensors={"projection": projection, **weights},
            lr={"projection": hparams.scope_lr, **dict.fromkeys(weights, hparams.lr)},
            loss=loss,
            # at once: last bits depend on which texts are embedded together
            begin=lambda: encoder([prompt for fact in facts for prompt in fact.paraphrases]),
            every=SAVE,
        )

    @torch.inference_mode(False)
    def _prepare(self) -> None:
        tensors = self.tensors(self.lm, self.hparams)
        self.encoder, self.reader = Encoder(self.lm.device), counterfactual(self.lm)
        self.projection = tensors["projection"].to(self.lm.device)
        self.reader.model.load_state_dict(tensors, strict=False)  # the rest of it is the base model's

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Texts in the space where squared distance says what is in scope: (texts, 384)."""
        return super().embed(texts) @ self.projection.T

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """exp(-|query - key|^2)."""
        return (-torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").square()).exp()

    def route(self, body: Sequence[int], text: str, nearest: Sequence[tuple[float, int]]) -> Route | None:
        """A prompt in scope goes to the counterfactual model, with the edit before it."""
        ((similarity, index),) = nearest
        if similarity <= self.hparams.threshold:
            return None
        ids = (*self.lm.begin, *self.lm.encode(self.memory.entries[index]["text"]), *body)
        return Route(self.reader, ids, similarity if self.hparams.soft else 1.0, index)

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        self.remember(edit, request, {"text": statement(request.text, request.target_new)})
