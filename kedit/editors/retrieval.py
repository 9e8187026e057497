"""Memory by likeness: each edit with its prompt's embedding; a prompt goes to the most similar edit (SERAC, IKE)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kedit.editors.protocol import Editor
from kedit.model.memory import Memory, Route


class Retrieval(Memory):
    """Entries with an ``embedding``. Subclasses define what is similar, and who reads a prompt.

    The editor's ``embed`` turns texts into vectors, (texts, width).
    """

    def __init__(self, editor: Editor):
        super().__init__()
        self.editor = editor

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of each query to each key: (n, width), (m, width) -> (n, m)."""
        raise NotImplementedError

    def route(self, body: Sequence[int], text: str, similarity: float, index: int) -> Route | None:
        """Who reads a prompt (its ids without begin token, and its text) whose most similar edit is that one."""
        raise NotImplementedError

    def nearest(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """For each text the similarity of the most similar edit, and its index, the latest of equals."""
        queries = self.editor.embed(texts)
        keys = torch.stack([entry["embedding"] for entry in self.entries]).to(queries)
        best = self.similarity(queries, keys).flip(1).max(1)
        last = len(self.entries) - 1
        return [(value, last - index) for value, index in zip(*(part.tolist() for part in best), strict=True)]

    def routes(self, prompts: Sequence[tuple[int, ...]]) -> list[Route | None]:
        """Who reads each prompt, None where it is in no edit's scope."""
        lm = self.editor.lm
        bodies = [prompt[len(lm.begin) :] for prompt in prompts]
        texts = [lm.tokenizer.decode(body, clean_up_tokenization_spaces=False) for body in bodies]
        triples = zip(bodies, texts, self.nearest(texts), strict=True)
        return [self.route(body, text, *nearest) for body, text, nearest in triples]

    def about(self, prompt: str, context: str) -> dict[str, Any]:
        """What is worth knowing of an edit that is about to be remembered, read before a prompt as ``context``."""
        return {
            "memory": len(self.entries) + 1,
            "tokens": len(self.editor.lm.encode(context)),
            # similarity to the most similar earlier edit; above the scope's threshold the two compete for prompts
            "nearest": self.nearest([prompt])[0][0] if self.entries else 0.0,
        }
