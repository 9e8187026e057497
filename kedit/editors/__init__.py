"""Editors: one file a method, one small protocol, one registry.

An editor is made for a model. ``prepare()`` does what may be slow and can be cached (statistics,
training); ``apply(request)`` edits the model in place and returns what changed. Code around editors
never asks which one it holds. To add a method: write a file here, add its line to ``EDITORS``, and
give it hyper-parameters in ``params/methods/<name>.yaml``.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import yaml

import kedit
from kedit import KeditError, facts
from kedit.facts import EditRequest
from kedit.journal import Edit
from kedit.keys import Statistics
from kedit.models import LM

EDITORS = {
    "control": "kedit.editors.control.Control",
    "rome": "kedit.editors.rome.ROME",
    "r-rome": "kedit.editors.r_rome.RROME",
    "memit": "kedit.editors.memit.MEMIT",
    "alphaedit": "kedit.editors.alphaedit.AlphaEdit",
    "pmet": "kedit.editors.pmet.PMET",
    "kn": "kedit.editors.kn.KN",
    "mend": "kedit.editors.mend.MEND",
    "ft-l": "kedit.editors.ft.FTL",
    "ft-m": "kedit.editors.ft.FTM",
    "grace": "kedit.editors.grace.GRACE",
    "serac": "kedit.editors.serac.SERAC",
    "ike": "kedit.editors.ike.IKE",
}


@dataclass(frozen=True)
class NoHparams:
    """For methods without hyper-parameters."""


class Editor(ABC):
    """One editing method on one model.

    Args:
        hparams: values for the method's ``Hparams``.
        statistics: second moments of the keys; by default those of the bundled text.
        contexts: context templates, the bare ``{}`` first; by default sampled from the model.
    """

    name: ClassVar[str]
    Hparams: ClassVar[type] = NoHparams
    trained: ClassVar[bool] = False
    """Whether ``prepare`` trains something, where it was not trained before."""

    def __init__(
        self,
        lm: LM,
        hparams: Any,
        statistics: Statistics | None = None,
        contexts: Sequence[str] | None = None,
    ):
        self.lm = lm
        self.hparams = hparams
        self.statistics = statistics or Statistics(lm)
        self.contexts = list(contexts) if contexts else None
        self._contexts_given = bool(contexts)
        self._ready = False

    def prepare(self) -> None:
        """Everything that needs the unedited model, done once, on it, whatever edits the model has by now.

        ``apply`` calls it if you did not, which may be long after the first edit where a run goes on.
        """
        if not self._ready:
            with self.lm.journal.unedited():
                self._prepare()
            self._ready = True

    def _prepare(self) -> None:  # noqa: B027 - methods without preparation leave it
        """Statistics, templates, training: what a method needs before its first edit."""

    def key(self) -> dict[str, Any]:
        """What the method's edits depend on besides model and requests, for hashing."""
        return {
            "method": self.name,
            "hparams": asdict(self.hparams),
            "statistics": self.statistics.key if self.moments_of else None,
            "contexts": self.contexts if self._contexts_given else "sampled",
        }

    @property
    def moments_of(self) -> Sequence[int]:
        """Layers whose second moments enter the edits."""
        return ()

    def apply(self, request: EditRequest) -> Edit:
        """Edit the model in place, on top of whatever edits it already has.

        Raises:
            EditFailed: no update could be found; the model is as before.
        """
        self.prepare()
        start = time.perf_counter()
        with self.lm.journal.recording(self.name, request.id) as edit:
            self._apply(request, edit)
            edit.info["seconds"] = time.perf_counter() - start
        return edit

    @abstractmethod
    def _apply(self, request: EditRequest, edit: Edit) -> None:
        """Compute the changes and make them through ``edit.write``."""


def hparams_of(method: str, model: str) -> dict[str, Any]:
    """The block of ``params/methods/<method>.yaml`` for a model.

    Raises:
        KeditError: the file has no block that lists the model.
    """
    path = kedit.ROOT / "params" / "methods" / f"{method}.yaml"
    if not path.exists():
        return {}
    for block in yaml.safe_load(path.read_text())["blocks"]:
        if model in block["models"]:
            return block["hparams"]
    raise KeditError(
        f"params/methods/{method}.yaml has no block for model {model!r}; add one, or pass hparams=... yourself."
    )


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass from a mapping, naming misspelt and missing keys.

    Raises:
        KeditError: unknown or missing keys.
    """
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            hint = get_close_matches(key, known, 1)
            advice = f"did you mean {hint[0]!r}?" if hint else f"it knows {', '.join(known)}."
            raise KeditError(f"{where}: unknown key {key!r}; {advice}")
    try:
        return kind(**values)
    except TypeError as error:
        raise KeditError(f"{where}: {error}.") from error


def committed(method: str, model: str) -> Path:
    """Where the trained parts of a method for a model lie in the repository, if they do."""
    return facts.BUNDLED.with_name(f"{method}-{model.rpartition('/')[-1].lower()}.safetensors")


def kind_of(name: str) -> type[Editor]:
    """The editor class of a method.

    Raises:
        KeditError: unknown method.
    """
    if name not in EDITORS:
        raise KeditError(f"method {name!r} does not exist; use one of {', '.join(EDITORS)}.")
    module, _, attribute = EDITORS[name].rpartition(".")
    return getattr(import_module(module), attribute)


def make_hparams(kind: type[Editor], model: str, given: Mapping[str, Any] | None = None) -> Any:
    """A method's hyper-parameters for a model: those of its file, single values replaced by ``given``.

    For a model that the file does not know, ``given`` must be complete.

    Raises:
        KeditError: no block for the model, unknown or missing key.
    """
    try:
        values = hparams_of(kind.name, model)
    except KeditError:
        if not given:
            raise
        values = {}
    return build(kind.Hparams, {**values, **(given or {})}, f"hyper-parameters of {kind.name}")


def editor(
    name: str,
    lm: LM,
    *,
    hparams: Mapping[str, Any] | None = None,
    statistics: Statistics | None = None,
    contexts: Sequence[str] | None = None,
) -> Editor:
    """An editor by name; whatever is not passed in comes from ``params/methods/<name>.yaml``.

    Raises:
        KeditError: unknown method, no hyper-parameters for the model, unknown or missing key.
    """
    kind = kind_of(name)
    return kind(lm, make_hparams(kind, lm.name, hparams), statistics, contexts)
