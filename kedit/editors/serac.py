"""SERAC: edits are remembered as text, and a counterfactual model answers where one of them applies.

Mitchell et al., "Memory-Based Model Editing at Scale", 2022. Three parts beside the untouched model: a
memory of edits; a scope classifier, which finds the remembered edit that a prompt is about, if any; and
a counterfactual model, which reads that edit before the prompt and answers by it. Classifier and
counterfactual model are trained once, by the paper's supervised objective (section 3.2).

The paper trains a small language model and a DistilBERT. Here the counterfactual model is the model
itself with its own normalisation weights, the only ones that are trained; the rest of it is the base
model's, shared, not copied (so editing those weights by another method changes both). The classifier is
a linear projection of a frozen sentence embedding (kedit/encoder.py). What is trained is under 1 MB.
"""

import copy
import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from kedit.data import facts
from kedit.data.facts import bundled, bundled_zsre
from kedit.data.requests import EditRequest, spaced
from kedit.editors.encoder import WIDTH, Encoder
from kedit.editors.protocol import Editor, committed
from kedit.model.forward import pad
from kedit.model.journal import Edit, Entry
from kedit.model.lm import LM
from kedit.model.memory import Memory, Route
from kedit.store import cache_folder, digest, write_atomic

log = logging.getLogger(__name__)

NORMS = (nn.LayerNorm, LlamaRMSNorm, MistralRMSNorm)
HARD = 4
"""Negatives that count for each prompt in training: the most similar ones of its batch."""
QUESTIONS = 0.25
"""Share of training edits that come as a question and its answer, as in ZsRE."""
SAVE = 20
"""Steps between checkpoints of the training."""


@dataclass(frozen=True)
class Hparams:
    """Settings of SERAC and of its training; with ``steps=0`` nothing is trained.

    Attributes:
        threshold: a prompt is in scope when its similarity to a remembered edit is above this.
        soft: answers in scope are mixed, the counterfactual model's share being the similarity; else it
            answers alone.
        scale: the projection starts as ``scale`` times the identity, which sets the radius of the scope.
        steps: updates of both parts; the learning rates fall linearly to zero.
        lr, batch: Adam's first learning rate for the normalisation weights, and edits in a batch.
        scope_lr, scope_batch: the same for the projection; a batch comes from four relations.
    """

    threshold: float = 0.5
    soft: bool = False
    scale: float = 0.9
    steps: int = 100
    lr: float = 3e-3
    batch: int = 8
    scope_lr: float = 1e-3
    scope_batch: int = 64
    seed: int = 0


# The trained parts ----------------------------------------------------------------------------------


def counterfactual(lm: LM) -> LM:
    """A second model that shares everything with the first but the normalisation weights, which are copies."""
    own = {id(weight) for weight in norms(lm).values()}
    shared = {id(t): t for t in (*lm.model.parameters(), *lm.model.buffers()) if id(t) not in own}
    return LM(copy.deepcopy(lm.model, shared), lm.tokenizer, lm.name, bool(lm.begin))


def norms(lm: LM) -> dict[str, nn.Parameter]:
    """The normalisation weights of a model, by name."""
    return {
        f"{name}.{kind}": weight
        for name, module in lm.model.named_modules()
        if isinstance(module, NORMS)
        for kind, weight in module.named_parameters(recurse=False)
    }


def remembered(prompt: str, target: str) -> str:
    """An edit as the counterfactual model reads it before a prompt."""
    return f"New Fact: {prompt}{spaced(target, prompt)}.\n"


# Training -------------------------------------------------------------------------------------------

Fact = tuple[EditRequest, tuple[str, ...]]


def _material() -> list[Fact]:
    """Training facts, each with the ways to ask for it: its prompt, its paraphrases, its question."""
    asked = zip(bundled("train"), bundled_zsre("train"), strict=True)
    return [(fact, (fact.text, *fact.paraphrases, question.text)) for fact, question in asked]


def _told(fact: Fact, rng: random.Random) -> str:
    """The prompt by which a fact is edited."""
    return fact[1][-1] if rng.random() < QUESTIONS else fact[1][0]


def scope_loss(projection: Tensor, encoder: Encoder, material: Sequence[Fact], size: int, rng: random.Random) -> Tensor:
    """Balanced cross-entropy of "this prompt is about this edit" (paper, section 3.2).

    Facts come from a few relations, so that most negatives are hard: other subjects in the same words.
    """
    relations: dict[str, list[Fact]] = {}
    for fact in material:
        relations.setdefault(fact[0].relation, []).append(fact)
    chosen = [relations[name] for name in rng.sample(sorted(relations), min(4, len(relations)))]
    batch = [fact for some in chosen for fact in rng.sample(some, min(len(some), size // len(chosen)))]
    edits = encoder([_told(fact, rng) for fact in batch]) @ projection.T
    prompts = encoder([text for _, texts in batch for text in texts]) @ projection.T
    own = torch.tensor([index for index, (_, texts) in enumerate(batch) for _ in texts], device=prompts.device)
    far = (prompts.square().sum(1)[:, None] + edits.square().sum(1) - 2 * prompts @ edits.T).clamp(min=1e-6)
    mine = nn.functional.one_hot(own, len(batch)).bool()
    others = -torch.log(-torch.expm1(-far[~mine].view(len(own), -1)))  # -log(1 - similarity)
    return far[mine].mean() + others.topk(min(HARD, len(batch) - 1), 1).values.mean()


def answer_loss(lm: LM, material: Sequence[Fact], size: int, rng: random.Random) -> Tensor:
    """Mean negative log-likelihood a token of new objects, given the right edit and any way to ask for it."""
    texts, ends = [], []
    for fact in rng.sample(material, size):
        prompt, target = rng.choice(fact[1]), fact[0].target_new
        head = [*lm.begin, *lm.encode(remembered(_told(fact, rng), target)), *lm.encode(prompt)]
        texts.append([*head, *lm.encode(spaced(target, prompt))])
        ends.append(len(head))
    ids, mask = pad(texts, lm.device)
    hidden = lm.anatomy.base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    rows = [row for row, (text, end) in enumerate(zip(texts, ends, strict=True)) for _ in text[end:]]
    places = torch.tensor([n for text, end in zip(texts, ends, strict=True) for n in range(end, len(text))])
    labels = ids[rows, places]
    return nn.functional.cross_entropy(lm.logits(hidden[rows, places - 1]), labels)


def identity(lm: LM, hparams: Hparams) -> dict[str, str]:
    """What the trained parts depend on: the model, the settings of training, the facts."""
    settings = {name: value for name, value in asdict(hparams).items() if name not in ("threshold", "soft")}
    data = hashlib.sha256(facts.BUNDLED.read_bytes()).hexdigest()
    return {"model": lm.fingerprint, "settings": digest("serac", settings, data)[:16]}


def artefact_path(lm: LM) -> Path:
    """Where a model's committed parts are, if it has them."""
    return committed("serac", lm.name)


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(tensors, {"serac": json.dumps(about, sort_keys=True)}))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["serac"])  # noqa: SIM118


@torch.inference_mode(False)
@torch.enable_grad()
def train(lm: LM, hparams: Hparams, *, artefact: Path | None = None) -> dict[str, Tensor]:
    """Train on the bundled facts' train split; killed and started again, it goes on to the same result.

    A step's examples depend on the seed and its number alone. The model itself stays as it is.

    Args:
        artefact: write the result to this file as well.

    Returns:
        ``projection`` (384, 384) and the counterfactual model's normalisation weights, by name.

    Raises:
        RuntimeError: the model has edits; SERAC is trained on the unedited model.
    """
    twin, encoder, material = counterfactual(lm), Encoder(lm.device), _material()
    projection = nn.Parameter(hparams.scale * torch.eye(WIDTH, device=lm.device))
    weights = {"projection": projection, **{name: weight.requires_grad_() for name, weight in norms(twin).items()}}
    first = [hparams.scope_lr, *[hparams.lr] * (len(weights) - 1)]
    optimiser = torch.optim.Adam([{"params": [weight]} for weight in weights.values()])
    path = cache_folder().joinpath("serac", *identity(lm, hparams).values()).with_suffix(".safetensors")
    step = 0
    if path.exists():
        tensors, about = _load(path)
        step = about["step"]
        for name, weight in weights.items():
            weight.data.copy_(tensors[name])
            moments = {kind: tensors[f"adam/{kind}/{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
            optimiser.state[weight] = {"step": moments.pop("step")} | {k: m.to(weight) for k, m in moments.items()}
    if step < hparams.steps:
        if lm.journal.edits:
            raise RuntimeError("SERAC is trained on the unedited model; undo the edits first")
        encoder([text for _, texts in material for text in texts])  # at once: last bits depend on the batches
    with tqdm(total=hparams.steps, initial=step, desc="training SERAC", unit="step", mininterval=1) as bar:
        while step < hparams.steps:
            rng = random.Random(f"{hparams.seed}/{step}")
            for group, rate in zip(optimiser.param_groups, first, strict=True):
                group["lr"] = rate * (1 - step / hparams.steps)
            optimiser.zero_grad()
            # The two losses share no weight, so the factors between them are those between the learning rates.
            scope = scope_loss(projection, encoder, material, hparams.scope_batch, rng)
            answer = answer_loss(twin, material, hparams.batch, rng)
            (scope + answer).backward()
            optimiser.step()
            step += 1
            bar.set_postfix(scope=f"{scope.item():.3f}", answer=f"{answer.item():.3f}", refresh=False)
            bar.update()
            if step % SAVE == 0 or step == hparams.steps:
                state = {f"adam/{k}/{name}": t for name, w in weights.items() for k, t in optimiser.state[w].items()}
                _save(path, {**weights, **state}, {"step": step})
    found = {name: weight.detach() for name, weight in weights.items()}
    if artefact:
        _save(artefact, found, identity(lm, hparams))
    return found


def trained(lm: LM, hparams: Hparams) -> dict[str, Tensor]:
    """The trained parts for a model and settings: committed, or in the cache, or trained now."""
    if (path := artefact_path(lm)).exists():
        tensors, about = _load(path)
        if about == identity(lm, hparams):
            return tensors
        log.info("%s was trained for another model or with other settings", path)
    return train(lm, hparams)


# The editor -----------------------------------------------------------------------------------------


class Scope(Memory):
    """Edits with their places in the projected space; finds the one that a prompt is about."""

    def __init__(self, editor: "SERAC"):
        super().__init__()
        self.editor = editor

    def nearest(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """For each text the similarity of the most similar edit, and its index, the latest of equals."""
        queries = self.editor.project(texts)
        known = torch.stack([entry["embedding"] for entry in self.entries]).to(queries)
        far = torch.cdist(queries, known, compute_mode="donot_use_mm_for_euclid_dist").square()
        best = (-far).exp().flip(1).max(1)
        last = len(self.entries) - 1
        return [(value, last - place) for value, place in zip(*(part.tolist() for part in best), strict=True)]

    def routes(self, prompts: Sequence[tuple[int, ...]]) -> list[Route | None]:
        """Prompts in scope go to the counterfactual model, with the edit before them."""
        lm, hp = self.editor.lm, self.editor.hparams
        bodies = [prompt[len(lm.begin) :] for prompt in prompts]
        texts = [lm.tokenizer.decode(body, clean_up_tokenization_spaces=False) for body in bodies]
        found: list[Route | None] = []
        for body, (similarity, index) in zip(bodies, self.nearest(texts), strict=True):
            if similarity > hp.threshold:
                ids = (*lm.begin, *lm.encode(self.entries[index]["text"]), *body)
                found.append(Route(self.editor.reader, ids, similarity if hp.soft else 1.0, index))
            else:
                found.append(None)
        return found


class SERAC(Editor):
    """Remember the edit: its text, and where its prompt lies in the projected space (embedded once).

    What is embedded is the prompt without the new object, which no later prompt will hold.
    """

    name = "serac"
    trained = True
    Hparams = Hparams

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.memory = Scope(self)
        self.lm.journal.attach(self.name, self.memory)

    def key(self) -> dict[str, Any]:
        """What the method's edits depend on besides model and requests, for hashing."""
        return {**super().key(), "training": identity(self.lm, self.hparams)["settings"]}

    def _prepare(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weights = trained(self.lm, self.hparams)
            self.encoder, self.reader = Encoder(self.lm.device), counterfactual(self.lm)
            self.projection = weights["projection"].to(self.lm.device)
            for name, weight in norms(self.reader).items():
                weight.copy_(weights[name])

    def project(self, texts: Sequence[str]) -> Tensor:
        """Texts in the space where squared distance says what is in scope: (texts, 384)."""
        self.prepare()  # a journal can be replayed before the first edit
        return self.encoder(texts) @ self.projection.T

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        text = remembered(request.text, request.target_new)
        edit.info |= {
            "memory": len(self.memory.entries) + 1,
            "tokens": len(self.lm.encode(text)),
            # similarity to the most similar earlier edit; above the threshold their scopes overlap
            "nearest": self.memory.nearest([request.text])[0][0] if self.memory.entries else 0.0,
        }
        edit.write(Entry(self.name, {"text": text, "embedding": self.project([request.text])[0].cpu()}))
