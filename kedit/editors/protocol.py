"""The protocol of an editor."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.editors.second_moments import SecondMoments
from kedit.model.journal import Edit
from kedit.model.lm import LM


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
        statistics: SecondMoments | None = None,
        contexts: Sequence[str] | None = None,
    ):
        self.lm = lm
        self.hparams = hparams
        self.statistics = statistics or SecondMoments(lm)
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
        """SecondMoments, templates, training: what a method needs before its first edit."""

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


def committed(method: str, model: str) -> Path:
    """Where the trained parts of a method for a model lie in the repository, if they do."""
    return facts.BUNDLED.with_name(f"{method}-{model.rpartition('/')[-1].lower()}.safetensors")
