"""Training for the editors that need it: one loop, one file format, one way to know what a file was trained for.

MEND's hyper-network and SERAC's parts are trained once for a model and settings. What comes of it is committed
(``kedit/data/<method>-<model>.tensors``) or lies in the cache, and names the model and settings it belongs to.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from kedit import KeditError
from kedit.data import facts
from kedit.data.requests import spaced
from kedit.editors.bounds import stated
from kedit.editors.protocol import Editor, committed
from kedit.model.lm import LM
from kedit.store import cache_folder, claim, read, write

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


def save(path: Path, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, and what is to be known of them, as a derived file (``kedit.store``) that holds safetensors."""
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key of metadata: safetensors writes several in any order, and the same training must give the same bytes
    write(path, key, safetensors.torch.save(data, {"about": json.dumps(about, sort_keys=True)}))


def load(path: Path, key: str, remedy: str = "") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors of a file, and what is to be known of them; None if there is none, or it was damaged.

    Raises:
        KeditError: it is damaged, and there is a ``remedy``.
    """
    if (data := read(path, key, remedy)) is None:
        return None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return safetensors.torch.load(data), json.loads(header["__metadata__"]["about"])


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

    def save(self, checkpoint: Path, key: str) -> None:
        """Write all that ``load`` needs to go on: parts of tensors, as ``part/name``."""
        adam = {f"adam/{name}": self.optimiser.state[self.tensors[name]] for name in self.lr}
        parts = {"now": self.tensors, "best": self.best, **adam}
        tensors = {f"{part}/{name}": tensor for part, some in parts.items() for name, tensor in some.items()}
        save(checkpoint, key, tensors, {"step": self.step, "least": self.least})

    @torch.no_grad()
    def load(self, checkpoint: Path, key: str) -> None:
        """Go on from a checkpoint, if there is one."""
        if (found := load(checkpoint, key)) is None:
            return
        tensors, about = found

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        for name, tensor in part("now/").items():
            self.tensors[name].copy_(tensor)
        self.step, self.least, self.best = about["step"], about["least"], part("best/")
        adam = {index: part(f"adam/{name}/") for index, name in enumerate(self.lr)}
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": adam})

    def run(self, editor: type[Editor], hparams: Any, checkpoint: Path, key: str) -> dict[str, Tensor]:
        """Train to the last step.

        Args:
            editor: whose tensors they are.
            hparams: with ``steps`` and ``seed``.
            checkpoint, key: where the training is kept, and as what.

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
                    self.save(checkpoint, key)
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

    @classmethod
    def training(cls, lm: LM, hparams: Any) -> Training:
        """How the tensors are trained."""
        raise NotImplementedError

    @classmethod
    def settings(cls, hparams: Any) -> str:
        """Hash of what the training depends on besides the model: its hyper-parameters and the bundled facts."""
        values = {name: value for name, value in stated(hparams).items() if name not in cls.edit_hparams}
        text = json.dumps([cls.name, values], sort_keys=True).encode()
        return hashlib.sha256(text + facts.BUNDLED.read_bytes()).hexdigest()[:16]

    @classmethod
    def artefact(cls, model: str, fingerprint: str, hparams: Any) -> dict[str, str]:
        """Hash of the trained tensors that edits depend on; none where nothing was trained yet."""
        tensors = cls.found(model, fingerprint, hparams)
        return {"artefact": hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()} if tensors else {}

    def key(self) -> dict[str, Any]:
        """The recipe of this editor's edits; what is not trained yet is trained now, since they depend on it."""
        self.tensors(self.lm, self.hparams)
        return super().key()

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
        identity = {"model": lm.fingerprint, "settings": cls.settings(hparams)}
        folder, key = cls._cached(*identity.values())
        training = cls.training(lm, hparams)
        training.load(folder / "training", f"{key}/training")
        if lm.journal.edits and training.step < hparams.steps:
            raise RuntimeError(f"{cls.label} is trained on the unedited model; undo the edits first")
        tensors = training.run(cls, hparams, folder / "training", f"{key}/training")
        for path, name in ((folder / "trained", key), (artefact, cls.name)):
            if path:
                save(path, name, tensors, identity)
        return tensors

    @classmethod
    def _cached(cls, fingerprint: str, settings: str) -> tuple[Path, str]:
        """Where the cache keeps a training, and as what."""
        return cache_folder() / cls.name / fingerprint / settings, f"{cls.name}/{fingerprint}/{settings}"

    @classmethod
    def found(cls, model: str, fingerprint: str, hparams: Any) -> dict[str, Tensor] | None:
        """The trained tensors for a model and settings: committed, or in the cache; None if they are in neither.

        Raises:
            KeditError: the committed file is damaged.
        """
        path, identity = committed(cls.name, model), {"model": fingerprint, "settings": cls.settings(hparams)}
        remedy = f"get it again (git checkout), or train it again: python -m kedit train {cls.name} --model {model}"
        if (artefact := load(path, cls.name, remedy)) and artefact[1] == identity:
            return artefact[0]
        folder, key = cls._cached(*identity.values())
        cached = load(folder / "trained", key)
        return cached[0] if cached else None

    @classmethod
    def tensors(cls, lm: LM, hparams: Any) -> dict[str, Tensor]:
        """The trained tensors for a model and settings: committed, or in the cache, or trained now."""
        if (found := cls.found(lm.name, lm.fingerprint, hparams)) is not None:
            return found
        with claim(cls._cached(lm.fingerprint, cls.settings(hparams))[0], wait=True):  # somebody else may be at it
            if (found := cls.found(lm.name, lm.fingerprint, hparams)) is not None:
                return found
            log.info("%s has not been trained for this model, these settings and facts: it is now", cls.label)
            return cls.train(lm, hparams)
