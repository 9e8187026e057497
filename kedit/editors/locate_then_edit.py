"""What ROME, MEMIT, PMET and AlphaEdit share: contexts, second moments, and the search for a value.

They locate a fact at the subject's last token, in the second MLP projection of some blocks, and solve for
updates that map the key there to a new value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors.contexts import context_templates
from kedit.editors.cost import FLOAT, PROMPT, Cost, Shape, Work, reading, searching
from kedit.editors.protocol import Editor
from kedit.editors.value_search import Objective, Search, search
from kedit.model.forward import LookupText, lookup_text, lookup_texts
from kedit.model.journal import Edit


@dataclass(frozen=True, kw_only=True)
class Hparams(Search):
    """Settings of the search and of the contexts; ``context_lengths`` are pairs (tokens, how many)."""

    context_lengths: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    seed: int = 0


class LocateThenEdit(Editor):
    """Hyper-parameters must have ``layers``, of which the last is where the value is searched for."""

    moments_work: ClassVar[int] = 1
    """What is derived from a second moment takes so many Cholesky factorisations, ..."""
    moments_kept: ClassVar[int] = 2
    """... and so many (m, m) matrices are in memory for each layer."""

    @classmethod
    def moments_at(cls, hparams: Any) -> Sequence[int]:
        """Layers whose second moments enter the edits."""
        return hparams.layers

    @classmethod
    def cost(cls, shape: Shape, hparams: Any, tokens: int) -> Cost:
        """A value search, which runs forward once more than it updates; keys in every context; second moments."""
        layers = hparams.layers
        rows = 2 + sum(count for _, count in hparams.context_lengths)  # the bare prompt, and that of the KL term
        keys = reading(shape, rows * (PROMPT + 10), rows * (PROMPT + 10)) * len(layers)
        solves = Work(4 * shape.m**2 * len(layers))
        passes = reading(shape, tokens, 512) * ((max(layers) + 1) / shape.layers)
        products = Work(2 * tokens * shape.m**2 * len(layers))
        square = 8 * shape.m**2  # a second moment is summed and factorised in float64
        return Cost(
            edit=searching(shape, rows, hparams.steps + 1, max(layers)) + keys + solves,
            once=passes + products + Work(shape.m**3 / 3 * len(layers) * cls.moments_work),
            journal_bytes=2 * (shape.d + shape.m) * FLOAT * len(layers),
            device_bytes=len(layers) * (square + FLOAT * shape.d * shape.m) + square,
            host_bytes=len(layers) * square * cls.moments_kept,
        )

    def _prepare(self) -> None:
        if self.contexts is None:
            self.contexts = context_templates(self.lm, self.hparams.context_lengths, self.hparams.seed)
        self.statistics.prepare(self.moments_of)

    def _texts(self, request: EditRequest) -> list[LookupText]:
        """The prompt in each context, the bare one first."""
        return lookup_texts(self.lm, request, self.contexts)

    def _objective(self, request: EditRequest, texts: Sequence[LookupText], layer: int) -> Objective:
        kl_text = lookup_text(self.lm, "{} is a", request.subject)
        return Objective(self.lm, texts, kl_text, self.target_ids(request), layer)

    def _search(self, request: EditRequest, texts: Sequence[LookupText], init: Tensor, edit: Edit) -> Tensor:
        """The change of the value ``init`` at the last layer, (d,) float64."""
        objective = self._objective(request, texts, self.hparams.layers[-1])
        delta, losses = search(objective, init, self.hparams)
        edit.info |= objective.info(losses)
        return delta.double()
