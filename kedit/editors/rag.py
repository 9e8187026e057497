"""RAG: the facts most like a prompt are told before it, as a question and its answer. Nothing is trained.

The baseline that wins WikiBigEdit (Thede et al., "Understanding the Limits of Lifelong Knowledge Editing in LLMs",
2025): IKE without demonstrations, and with more than one fact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors.bounds import Count
from kedit.editors.retrieval import Encoder, Retrieval, RetrievalEditor
from kedit.model.journal import Edit
from kedit.model.memory import Route


@dataclass(frozen=True)
class Hparams:
    """Settings of RAG.

    Attributes:
        k: facts told before a prompt, the most similar last.
        scope: only facts whose similarity (cosine) to the prompt is above this are told, and none before a prompt that
            has none; below zero, as published, k are told before every prompt, whatever it is about.
    """

    k: Count = 2
    scope: Annotated[float, Field(ge=-1, le=1)] = -1.0


class Facts(Retrieval):
    """Edits, and which of them stand: of several with one prompt the latest."""

    def __init__(self, editor: "RAG"):
        super().__init__(editor)
        self.latest: dict[str, int] = {}

    def add(self, entry: dict[str, Any]) -> None:
        """Remember an edit, in place of an earlier one of its prompt."""
        self.latest[entry["prompt"]] = len(self.entries)
        super().add(entry)

    def clear(self) -> None:
        """Forget all."""
        super().clear()
        self.latest.clear()


class RAG(RetrievalEditor):
    """Remember the edit: its prompt's embedding, and its statement, which is told before the prompts most like it."""

    name = "rag"
    style = ("#44aa99", "D", ":")
    Hparams = Hparams

    def make_memory(self) -> Facts:
        """No edit yet."""
        return Facts(self)

    @property
    def reach(self) -> int:
        """As many edits as are told, and those that no longer stand."""
        return self.hparams.k + len(self.memory.entries) - len(self.memory.latest)

    @torch.inference_mode(False)
    def _prepare(self) -> None:
        self.encoder = Encoder(self.lm.device)

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cosines."""
        return queries @ keys.T

    def route(self, body: Sequence[int], text: str, nearest: Sequence[tuple[float, int]]) -> Route | None:
        """A prompt is read by the same model, after the facts; its own tokens stay as they are."""
        scope, stands = self.hparams.scope, set(self.memory.latest.values())
        found = [index for similarity, index in nearest if index in stands and (scope < 0 or similarity > scope)]
        if not (told := found[: self.hparams.k][::-1]):
            return None
        context = "".join(self.memory.entries[index]["context"] for index in told)
        return Route(self.lm, (*self.lm.begin, *self.lm.encode(context), *body), group=told[0])

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        statement = f"Q: {request.text} A: {request.target_new.strip()}\n"
        self.remember(edit, request, {"context": statement}, prompt=request.text)
