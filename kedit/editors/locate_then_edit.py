"""What ROME, MEMIT, PMET and AlphaEdit share: contexts, second moments, and the search for a value.

They locate a fact at the subject's last token, in the second MLP projection of some blocks, and solve for
updates that map the key there to a new value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors.bounds import Count, Natural
from kedit.editors.protocol import Editor
from kedit.editors.space import trying
from kedit.editors.value_search import Objective, Search, search
from kedit.model.forward import LookupText, lookup_text, lookup_texts
from kedit.model.journal import Edit
from kedit.model.lm import LM

SEEDS = ("The", "Therefore", "Because", "I", "You")
"""First words of sampled contexts."""


@torch.no_grad()
def context_templates(lm: LM, lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[str]:
    """The bare ``{}`` and sampled prefixes: for each (tokens, count), that many ``"<text>. {}"``.

    Texts are sampled from the model itself (top-5) from fixed first words; a length includes the
    first word. Seeded, so the same model gives the same templates (ROME and MEMIT, appendix on
    hyper-parameters).
    """
    generator = torch.Generator().manual_seed(seed)
    templates = ["{}"]
    for tokens, index in ((tokens, index) for tokens, count in lengths for index in range(count)):
        ids = [*lm.begin, *lm.encode(SEEDS[index % len(SEEDS)])]
        while len(ids) < len(lm.begin) + tokens:
            logits = lm.model(torch.tensor([ids], device=lm.device), use_cache=False).logits[0, -1]
            top = logits.float().topk(5)
            pick = torch.multinomial(top.values.softmax(-1).cpu(), 1, generator=generator)
            ids.append(int(top.indices[pick]))
        text = lm.tokenizer.decode(ids[len(lm.begin) :], skip_special_tokens=True)
        templates.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return templates


@dataclass(frozen=True, kw_only=True)
class Hparams(Search):
    """Settings of the search and of the contexts; ``context_lengths`` are pairs (tokens, how many)."""

    context_lengths: tuple[tuple[Count, Count], ...] = ((5, 10), (10, 10))
    seed: Natural = 0


class LocateThenEdit(Editor):
    """Hyper-parameters must have ``layers``, of which the last is where the value is searched for."""

    needs = ("down",)
    space = trying(lr=(0.1, 0.2, 0.5), weight_decay=(0.001, 0.5), clamp_norm_factor=(0.75, 1.0, 2.0, 4.0, 8.0))

    @classmethod
    def moments_at(cls, hparams: Any) -> Sequence[int]:
        """Layers whose second moments enter the edits."""
        return hparams.layers

    def _prepare(self) -> None:
        super()._prepare()
        if self.contexts is None:
            self.contexts = context_templates(self.lm, self.hparams.context_lengths, self.hparams.seed)

    def _texts(self, request: EditRequest) -> list[LookupText]:
        """The prompt in each context, the bare one first."""
        return lookup_texts(self.lm, request, self.contexts)

    def _objective(self, request: EditRequest, texts: Sequence[LookupText], inside: bool) -> Objective:
        """The target after the texts, by a change at the last layer, or inside its block."""
        kl_text = lookup_text(self.lm, "{} is a", request.subject)
        return Objective(self.lm, texts, kl_text, self.target_ids(request), self.hparams.layers[-1], inside)

    def _search(self, request: EditRequest, texts: Sequence[LookupText], init: Tensor, edit: Edit) -> Tensor:
        """The change of the value ``init`` at the last layer, (d,) float64."""
        objective = self._objective(request, texts, inside=not self.lm.anatomy.direct[self.hparams.layers[-1]])
        delta, losses = search(objective, init, self.hparams)
        edit.info |= objective.info(losses)
        return delta.double()
