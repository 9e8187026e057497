"""Training for the editors that need it: one loop, one file format, one way to know what a file was trained for.

MEND's hyper-network and SERAC's parts are trained once for a model and settings. What comes of it is committed
(``kedit/data/<method>-<model>.safetensors``) or lies in the cache, and names the model and settings it belongs to.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from kedit import KeditError
from kedit.data import facts
from kedit.data.requests import spaced
from kedit.editors.protocol import Editor, committed
from kedit.model.lm import LM
from kedit.store import cache_folder, digest, write_atomic

log = logging.getLogger(__name__)

# Texts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredText:
    """Token ids, of which those from ``start`` on are scored."""

    ids: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, lm: LM, prompt: str, target: str, before: str = "", whole: bool = False) -> "ScoredText":
        """A prompt and its target, each tokenised alone; the target is scored, or the ``whole`` text.

        ``before`` is context that stands before the prompt, tokenised alone as well.
        """
        head = (*lm.begin, *lm.encode(before), *lm.encode(prompt))
        return cls((*head, *lm.encode(spaced(target, prompt))), max(1, len(lm.begin)) if whole else len(head))


def scored(texts: Sequence[ScoredText]) -> tuple[list[int], list[int], list[int]]:
    """Of every scored token: its text's index, the position that predicts it, and its id."""
    tokens = [(row, n, text.ids[n]) for row, text in enumerate(texts) for n in range(text.start, len(text.ids))]
    return [row for row, _, _ in tokens], [n - 1 for _, n, _ in tokens], [token for _, _, token in tokens]


# Files ----------------------------------------------------------------------------------------------


def save(path: Path, method: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, and under the method's name what is to be known of them."""
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key of metadata: safetensors writes several in any order, and the same training must give the same bytes
    write_atomic(path, safetensors.torch.save(data, {method: json.dumps(about, sort_keys=True)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what is to be known of them."""
    with safe_open(path, "pt") as file:
        (about,) = file.metadata().values()
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about)  # noqa: SIM118


# The loop -------------------------------------------------------------------------------------------


@dataclass
class Training:
    """What is trained, and how: by Adam. A checkpoint holds all of it.

    Attributes:
        tensors: all that changes, by name: parameters, and running moments if there are any.
        lr: the first learning rate of each parameter, by name; all fall linearly to zero.
        loss: a step's loss; examples are drawn by the given generator, which depends on the seed and the step's
            number alone.
        begin: what to do before the first step of this process.
        every: steps between checkpoints, and between validations.
        clip: largest norm of the gradient.
        validate: numbers on held-out examples; the state with the least ``loss`` among them is the result.
            Without it the last state is.
        step, least, best: steps done; the least validated loss, and the state that had it.
    """

    tensors: Mapping[str, Tensor]
    lr: Mapping[str, float]
    loss: Callable[[random.Random], Tensor]
    begin: Callable[[], Any]
    every: int
    clip: float = float("inf")
    validate: Callable[[], dict[str, float]] | None = None
    step: int = 0
    least: float = float("inf")
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.optimiser = torch.optim.Adam([{"params": [self.tensors[name]]} for name in self.lr])

    def save(self, checkpoint: Path, method: str) -> None:
        """Write all that ``load`` needs to go on: parts of tensors, as ``part/name``."""
        adam = {f"adam/{name}": self.optimiser.state[self.tensors[name]] for name in self.lr}
        parts = {"now": self.tensors, "best": self.best, **adam}
        tensors = {f"{part}/{name}": tensor for part, some in parts.items() for name, tensor in some.items()}
        save(checkpoint, method, tensors, {"step": self.step, "least": self.least})

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        tensors, about = load(checkpoint)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        for name, tensor in part("now/").items():
            self.tensors[name].copy_(tensor)
        self.step, self.least, self.best = about["step"], about["least"], part("best/")
        adam = {index: part(f"adam/{name}/") for index, name in enumerate(self.lr)}
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": adam})

    def run(self, editor: type[Editor], hparams: Any, checkpoint: Path) -> dict[str, Tensor]:
        """Train to the last step.

        Args:
            editor: whose tensors they are.
            hparams: with ``steps`` and ``seed``.

        Returns:
            the best state, or the last one where nothing is validated.

        Raises:
            KeditError: the training diverged.
        """
        steps = hparams.steps
        if self.step < steps:
            self.begin()
            bar = tqdm(range(self.step, steps), f"training {editor.label}", steps, initial=self.step, unit="step")
            for step in bar:
                loss = self.update(1 - step / steps, random.Random(f"{hparams.seed}/{step}"))
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                self.step = step + 1
                if self.step % self.every == 0 or self.step == steps:
                    self.keep_best(editor.label)
                    self.save(checkpoint, editor.name)
        result = self.best if self.validate else {name: tensor.detach() for name, tensor in self.tensors.items()}
        if not result or not all(tensor.isfinite().all() for tensor in result.values()):
            raise KeditError(f"training {editor.label} diverged; lower the rates in params/methods/{editor.name}.yaml.")
        return result

    def update(self, rate: float, rng: random.Random) -> float:
        """One step of Adam at ``rate`` times the first learning rates; its loss."""
        for group, lr in zip(self.optimiser.param_groups, self.lr.values(), strict=True):
            group["lr"] = lr * rate
        self.optimiser.zero_grad()
        loss = self.loss(rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.tensors[name] for name in self.lr], self.clip)
        self.optimiser.step()
        return loss.item()

    def keep_best(self, label: str) -> None:
        """Validate, and keep the state if it is the best so far."""
        if self.validate:
            numbers = self.validate()
            log.info("%s, step %d, validation: %s", label, self.step, json.dumps(numbers))
            if numbers["loss"] < self.least:
                self.least = numbers["loss"]
                self.best = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}


# The editor -----------------------------------------------------------------------------------------


class TrainedEditor(Editor):
    """An editor with tensors that are trained once for a model and settings. Subclasses say how: ``training``."""

    trained = True
    edit_hparams: ClassVar[tuple[str, ...]] = ()
    """Hyper-parameters of the edits alone, on which the training does not depend."""
    names_settings: ClassVar[bool] = True
    """Whether the hash of the settings holds the method's name; MEND's committed networks are known by one without."""

    @classmethod
    def training(cls, lm: LM, hparams: Any) -> Training:
        """How the tensors are trained."""
        raise NotImplementedError

    @classmethod
    def settings(cls, hparams: Any) -> str:
        """Hash of what the training depends on besides the model: its hyper-parameters and the bundled facts."""
        values = {name: value for name, value in asdict(hparams).items() if name not in cls.edit_hparams}
        bundled = facts.BUNDLED.read_bytes()
        if not cls.names_settings:
            return hashlib.sha256(json.dumps(values, sort_keys=True).encode() + bundled).hexdigest()[:16]
        return digest(cls.name, values, hashlib.sha256(bundled).hexdigest())[:16]

    @classmethod
    def identity(cls, lm: LM, hparams: Any) -> dict[str, str]:
        """What trained tensors are known by."""
        return {"model": lm.fingerprint, "settings": cls.settings(hparams)}

    @classmethod
    def recipe(cls, hparams: Any, statistics: Mapping[str, Any], contexts: Sequence[str] | None = None) -> dict:
        """What edits depend on, the facts trained on included."""
        return {**super().recipe(hparams, statistics, contexts), "training": cls.settings(hparams)}

    @classmethod
    @torch.inference_mode(False)
    @torch.enable_grad()
    def train(cls, lm: LM, hparams: Any, *, artefact: Path | None = None) -> dict[str, Tensor]:
        """Train on the bundled facts; killed and started again, it goes on to the same result.

        A step's examples depend on the seed and its number alone. The model itself stays as it is. The cache
        keeps the training by model and settings, so that one already done costs nothing.

        Args:
            artefact: write the result to this file as well.

        Returns:
            the trained tensors by name.

        Raises:
            RuntimeError: the model has edits; training needs the unedited one.
            KeditError: the training diverged.
        """
        identity = cls.identity(lm, hparams)
        checkpoint = cache_folder().joinpath(cls.name, *identity.values(), "training.safetensors")
        training = cls.training(lm, hparams)
        if checkpoint.exists():
            training.load(checkpoint)
        if lm.journal.edits and training.step < hparams.steps:
            raise RuntimeError(f"{cls.label} is trained on the unedited model; undo the edits first")
        tensors = training.run(cls, hparams, checkpoint)
        if artefact:
            save(artefact, cls.name, tensors, identity)
        return tensors

    @classmethod
    def tensors(cls, lm: LM, hparams: Any) -> dict[str, Tensor]:
        """The trained tensors for a model and settings: committed, or in the cache, or trained now."""
        path = committed(cls.name, lm.name)
        if path.exists():
            tensors, about = load(path)
            if about == cls.identity(lm, hparams):
                return tensors
            log.warning("%s was trained for another model, other settings or other facts", path)
        return cls.train(lm, hparams)
