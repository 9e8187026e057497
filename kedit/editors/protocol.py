"""The protocol of an editor: what it does, and what the rest of the house must know of it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kedit import KeditError
from kedit.data import facts
from kedit.data.requests import EditRequest, spaced
from kedit.editors.bounds import stated
from kedit.editors.second_moments import SecondMoments
from kedit.editors.space import Options
from kedit.model.journal import Edit, EditFailed
from kedit.model.lm import LM
from kedit.model.memory import Memory

Contexts = Sequence[str] | None
"""Context templates, the bare ``{}`` first; None where they are sampled from the model."""


@dataclass(frozen=True)
class NoHparams:
    """For methods without hyper-parameters."""


class Editor(ABC):
    """One editing method on one model.

    Subclasses implement ``_apply``, and override what else they need; none has its own ``__init__``.

    Args:
        hparams: values for the method's ``Hparams``.
        statistics: second moments of the keys; by default those of the bundled text.
        contexts: context templates that prompts are put into.

    Attributes:
        memory: what a memory-based method remembers of its edits; it hangs on the model's journal.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    """As printed; by default the name in capitals."""
    style: ClassVar[tuple[str, str, str]] = ("#882255", "d", "-.")
    """Colour, marker and dash of its curve: Okabe and Ito's colours, which the colour-blind can tell apart."""
    Hparams: ClassVar[type] = NoHparams
    space: ClassVar[Mapping[str, Options]] = {}
    """What ``kedit tune`` tries of each hyper-parameter."""
    trained: ClassVar[bool] = False
    """Whether ``prepare`` trains something, where it was not trained before."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Parts of a model without which the method cannot be used: keys of ``Anatomy.missing``."""
    edits: ClassVar[bool] = True
    """Whether an edit changes something; the control's do not."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls) and "label" not in vars(cls):
            cls.label = cls.name.upper()

    def __init__(self, lm: LM, hparams: Any, statistics: SecondMoments | None = None, contexts: Contexts = None):
        for part in self.needs:
            lm.anatomy.need(part, self.name)
        self.lm = lm
        self.hparams = hparams
        self.statistics = statistics or SecondMoments(lm)
        self.contexts = self._contexts_given = list(contexts) if contexts else None
        self._ready = False
        self.memory = self.make_memory()
        if self.memory is not None:
            lm.journal.attach(self.name, self.memory)

    def __repr__(self) -> str:
        return f"<Editor {self.name} for {self.lm.name}>"

    def make_memory(self) -> Memory | None:
        """The memory of a memory-based method, empty."""
        return None

    def prepare(self) -> None:
        """Everything that needs the unedited model, done once, on it, whatever edits the model has by now.

        ``apply`` calls it if you did not, which may be long after the first edit where a run goes on.
        """
        if not self._ready:
            with self.lm.journal.unedited():
                self._prepare()
            self._ready = True

    def _prepare(self) -> None:
        """Second moments, and what else a method needs before its first edit: context templates, training."""
        self.statistics.prepare(self.moments_of)

    @classmethod
    def moments_at(cls, hparams: Any) -> Sequence[int]:
        """Layers whose second moments enter the edits."""
        return ()

    @property
    def moments_of(self) -> Sequence[int]:
        """Layers whose second moments enter this editor's edits."""
        return self.moments_at(self.hparams)

    @classmethod
    def recipe(cls, hparams: Any, statistics: Mapping[str, Any], contexts: Contexts = None) -> dict[str, Any]:
        """What edits depend on besides model and requests, for hashing; it needs no model.

        Args:
            statistics: the key of the second moments (``SecondMoments.key``, ``second_moments.key_of``).
        """
        moments = dict(statistics) if cls.moments_at(hparams) else None
        given = list(contexts) if contexts else "sampled"
        return {"method": cls.name, "hparams": stated(hparams), "statistics": moments, "contexts": given}

    @classmethod
    def artefact(cls, model: str, fingerprint: str, hparams: Any) -> dict[str, str]:
        """What edits depend on besides the recipe: the hash of what was trained, for methods that train; no model."""
        return {}

    @classmethod
    def together(cls) -> bool:
        """Whether several requests are written in one step."""
        return cls._apply_batch is not Editor._apply_batch

    def key(self) -> dict[str, Any]:
        """The recipe of this editor's edits, and the hash of what was trained for them."""
        recipe = self.recipe(self.hparams, self.statistics.key if self.moments_of else {}, self._contexts_given)
        return recipe | self.artefact(self.lm.name, self.lm.fingerprint, self.hparams)

    def apply(self, requests: EditRequest | Sequence[EditRequest]) -> Edit:
        """Edit the model in place, on top of whatever edits it already has.

        Args:
            requests: one, or several. Several are written at once, by one update of each matrix, where the method can
                (``together``), else one after another.

        Returns:
            one edit, whatever was asked: it is undone, saved and replayed as a whole. Of several requests its ``info``
            holds that of ``each``.

        Raises:
            EditFailed: no update could be found for one of them; the model is as before.
            KeditError: there is no request.
        """
        several = [requests] if isinstance(requests, EditRequest) else list(requests)
        if not several:
            raise KeditError("there is nothing to edit: the list of requests is empty.")
        self.prepare()
        start = time.perf_counter()
        before = max(len(self.lm.encode(context)) for context in self.contexts or [""])
        for request in several:
            length = before + len(self.prompt_ids(request)) + len(self.target_ids(request))
            if length > self.lm.window:
                raise EditFailed(f"prompt and target take {length} tokens, and the model reads {self.lm.window}")
        with self.lm.journal.recording(self.name, *(request.id for request in several)) as edit:
            if len(several) == 1:
                each = [edit]
                self._apply(several[0], edit)
            else:
                each = [Edit(self.name, request.id) for request in several]
                self._apply_batch(several, edit, each)
                edit.info["each"] = [one.info for one in each]
            if self.edits and not edit.changed and not any("skipped" in one.info for one in each):
                raise EditFailed("no bit of the model changed")
            edit.info["seconds"] = time.perf_counter() - start
        return edit

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the model is as a checkpoint shows it, by default as it is edited; afterwards as before."""
        yield

    def prompt_ids(self, request: EditRequest) -> list[int]:
        """Token ids of the prompt with its subject, begin token included."""
        return [*self.lm.begin, *self.lm.encode(request.text)]

    def target_ids(self, request: EditRequest) -> list[int]:
        """Token ids of the new object as it continues the prompt."""
        return self.lm.encode(spaced(request.target_new, request.prompt))

    @abstractmethod
    def _apply(self, request: EditRequest, edit: Edit) -> None:
        """Compute the changes and make them through ``edit.write``."""

    def _apply_batch(self, requests: Sequence[EditRequest], edit: Edit, each: Sequence[Edit]) -> None:
        """The same for several requests; here one after another.

        Args:
            each: an edit for each request, whose ``info`` is to say what there is to know of it.
        """
        for request, one in zip(requests, each, strict=True):
            made = self.apply(request)
            one.info |= made.info
            edit.changes += made.changes
            edit.changed |= made.changed


def committed(method: str, model: str) -> Path:
    """Where the trained parts of a method for a model lie in the repository, if they do."""
    return facts.BUNDLED.with_name(f"{method}-{model.rpartition('/')[-1].lower()}.tensors")
