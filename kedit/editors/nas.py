"""NAS, norm-anchor scaling: every value that is written has the norm that values have in the unedited model.

"Norm Anchors Make Model Edits Last", 2026 (arXiv 2602.02543), with its authors' code. Searches on an edited model start
from longer vectors and find longer ones, so that weights grow exponentially with the number of edits. What is written
here is scaled to one norm, the anchor, which is measured once. A rule on top of any method that searches for a value.
"""

import logging
import random
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from torch import Tensor
from tqdm import tqdm

from kedit import KeditError
from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.editors import alphaedit, locate_then_edit, memit
from kedit.editors.bounds import Count, Positive, Share
from kedit.editors.value_search import Search
from kedit.model.forward import LookupText, activations, lookup_texts
from kedit.model.journal import Edit, EditFailed
from kedit.store import Store, cache_folder, claim, digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Settings of the anchor: the mean norm of ``sample`` values, the share ``trim`` of the largest left out.

    ``factor``: an edit whose value is more than so many times as long is not made; None: all are. Published: a sample
    of 1000.
    """

    factor: Positive | None = 2.0
    sample: Count = 200
    trim: Share = 0.05


def sampled(model: str, hparams: Any) -> list[EditRequest]:
    """The facts whose values are measured: of the train split, which no run edits. It needs no model."""
    known = facts.load("pico" if model.startswith("pico-") else "bundled", "train")
    return random.Random(hparams.seed).sample(known, min(hparams.sample, len(known)))


class Anchored(locate_then_edit.LocateThenEdit):
    """v* = v0 + delta becomes a v* / |v*|: v0 is the output of the last edited layer's MLP, a the anchor.

    Where |v*| > factor a the authors' code puts v0 in its place, and adds the key of that edit to AlphaEdit's history
    all the same. Here nothing at all is written of such an edit, and ``info["skipped"]`` says so.

    Attributes:
        anchor: a, once prepared.
    """

    anchor: float

    def _prepare(self) -> None:
        super()._prepare()
        hp = self.hparams
        search = {one.name: getattr(hp, one.name) for one in fields(Search)}
        requests = sampled(self.lm.name, hp)
        key = digest("anchor", self.lm.fingerprint, hp.layers[-1], search, [request.key() for request in requests])
        store = Store(cache_folder() / "anchors")
        with claim(store.path(key), wait=True):  # somebody else may be at it
            if (norms := store.get_json(key)) is None:
                store.put_json(key, norms := self._norms(requests))
        self.anchor = fmean(sorted(norms)[: len(norms) - int(hp.trim * len(norms))])
        log.info("%s: values of %s are scaled to a norm of %.4g", self.label, self.lm.name, self.anchor)

    def _norms(self, requests: list[EditRequest]) -> list[float]:
        """Norms of the values that the search finds for facts on the bare prompt, where it finds one."""
        last, norms = self.hparams.layers[-1], []
        site = "block" if self.lm.anatomy.direct[last] else "value"
        for request in tqdm(requests, "norms of values, once", unit="value", mininterval=5):
            try:
                texts = lookup_texts(self.lm, request, ["{}"])
                start = activations(self.lm, texts, [last], site)[last][0].double()
                delta = super()._search(request, texts, start, Edit(self.name, request.id))
            except EditFailed:
                continue
            norms.append((self._value(texts) + delta).norm().item())
        if not norms:
            raise KeditError(f"{self.label} found no value for any of {len(requests)} facts of the train split.")
        return norms

    def _value(self, texts: list[LookupText]) -> Tensor:
        """v0 of the model as it is, on the bare prompt: (d,) float64."""
        last = self.hparams.layers[-1]
        return activations(self.lm, texts[:1], [last], "value")[last][0].double()

    def _search(self, request: EditRequest, texts: list[LookupText], init: Tensor, edit: Edit) -> Tensor:
        first = "value_norm" not in edit.info  # else lower layers are written, and the edit is being made
        delta, value = super()._search(request, texts, init, edit), self._value(texts)
        size = (value + delta).norm()
        edit.info["value_norm"] = size.item()
        if first and self.hparams.factor is not None and size > self.hparams.factor * self.anchor:
            edit.info["skipped"] = True
        scale = self.anchor / size
        return scale * delta + (scale - 1) * value

    @classmethod
    def artefact(cls, model: str, fingerprint: str, hparams: Any) -> dict[str, str]:
        """Hash of the facts that the anchor was measured on; the rest is in the recipe."""
        return {"sampled": digest([request.key() for request in sampled(model, hparams)])}


@dataclass(frozen=True, kw_only=True)
class Hparams(Anchor, alphaedit.Hparams):
    """Settings of the anchor and of AlphaEdit."""


@dataclass(frozen=True, kw_only=True)
class OnMEMIT(Anchor, memit.Hparams):
    """Settings of the anchor and of MEMIT."""


class NAS(Anchored, alphaedit.AlphaEdit):
    """AlphaEdit with anchored values, as published."""

    name = "nas"
    style = ("#cc79a7", "*", "-")
    Hparams = Hparams


class NASOnMEMIT(Anchored, memit.MEMIT):
    """MEMIT with anchored values: what they do without null space and history."""

    name = "nas-memit"
    label = "NAS on MEMIT"
    style = ("#cc79a7", "s", "--")
    Hparams = OnMEMIT
