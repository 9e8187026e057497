"""Second moments of the keys, and what is derived from them."""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from kedit import KeditError
from kedit.data.corpus import WIKIPEDIA, corpus, sequences
from kedit.model.forward import capture, stop_after
from kedit.model.lm import LM
from kedit.store import cache_folder, claim, read, write

log = logging.getLogger(__name__)

TOKENS = 98_304
"""Of the text that second moments are taken over, unless said otherwise."""


def default_text(model: str) -> str:
    """The text for a model: the pico models know the words of their own world only."""
    return "pico" if model.startswith("pico-") else "wikipedia-sample"


def key_of(model: str, fingerprint: str, text: str | None = None, tokens: int = TOKENS) -> dict[str, Any]:
    """What a model's second moments over a text depend on, for hashing; it needs no model."""
    text = text or default_text(model)
    if text == "wikipedia":
        version = "-".join(WIKIPEDIA).replace("/", "-")
    elif text == "wikipedia-sample":
        version = "gensim-4.4.0"  # whose dump it is, as that version reads it
    else:
        version = hashlib.sha256("\x1e".join(corpus(text)).encode()).hexdigest()[:16]
    return {"model": fingerprint, "text": text, "tokens": tokens, "hash": version}


class SecondMoments:
    """Second moments of a model's keys, C = mean of k k^T over a text, one (m, m) matrix a layer.

    Computed on the unedited model in one pass for all layers asked for, and kept on disk by the
    fingerprint of model and text. So are its Cholesky factor and its eigenvectors, in float64: what costs
    m^3 is paid once for a model and a layer, not once an edit or a process. A ready-made set of matrices
    can be given instead (``moments``), to compare with another implementation on identical inputs.
    """

    def __init__(
        self, lm: LM, text: str | None = None, tokens: int = TOKENS, moments: Mapping[int, Tensor] | None = None
    ):
        self.lm, self.text, self.tokens = lm, text or default_text(lm.name), tokens
        self._given = moments is not None
        self._moments: dict[int, Tensor] = dict(moments or {})
        self._factors: dict[tuple[int, float], Tensor] = {}

    @cached_property
    def key(self) -> dict[str, Any]:
        """What the matrices depend on, for hashing."""
        if not self._given:
            return key_of(self.lm.name, self.lm.fingerprint, self.text, self.tokens)
        digest = hashlib.sha256()
        for layer, moment in sorted(self._moments.items()):
            digest.update(f"{layer}".encode() + moment.double().numpy().tobytes())
        return {"given": digest.hexdigest()[:16]}

    def _file(self, name: str) -> tuple[Path, str]:
        """A file of the cache, and its key."""
        text = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(self.text).name)
        place = f"moments/{self.lm.fingerprint}/{text}-{self.key['hash']}-{self.tokens}/{name}"
        return cache_folder() / place, place

    def _load(self, name: str, device: str = "cpu") -> dict[str, Tensor] | None:
        if self._given or (stored := read(*self._file(name))) is None:
            return None
        # copied, since what lies at odd addresses, as in a file, is multiplied in another order: other last bits
        return {part: tensor.to(device, copy=True) for part, tensor in load(stored).items()}

    def prepare(self, layers: Sequence[int]) -> None:
        """Have the second moments of these layers ready, from disk or by one pass over the text."""
        if self._missing(layers) and self._given:
            raise KeditError(f"the statistics given hold no second moment for layer {self._missing(layers)[0]}.")
        if self._missing(layers):
            with claim(self._file("all")[0], wait=True):  # somebody else may be at it
                if missing := self._missing(layers):
                    self._collect(missing)

    def _missing(self, layers: Sequence[int]) -> list[int]:
        """Of these layers, those whose second moments are not on disk either."""
        for layer in layers:
            if layer not in self._moments and (stored := self._load(f"{layer}")):
                self._moments[layer] = stored["moment"]
        return [layer for layer in layers if layer not in self._moments]

    @torch.no_grad()
    def _collect(self, layers: Sequence[int]) -> None:
        lm = self.lm
        texts, read = sequences(lm, self.text, self.tokens), 0
        speed = 5e13 if lm.device.type == "cuda" else 5e10 * torch.get_num_threads()  # operations a second, roughly
        minutes = 2 * lm.model.num_parameters() * self.tokens / speed / 60
        log.info("second moments of layers %s of %s, once: about %.1f minutes", [*layers], lm.name, minutes)
        sums = dict.fromkeys(layers, 0.0)
        sites = {layer: lm.anatomy.down(layer) for layer in layers}
        last = lm.anatomy.blocks[max(layers)]
        with lm.journal.unedited():
            for text in tqdm(texts, desc=f"second moments, layers {list(layers)}", unit="seq", mininterval=1):
                with capture(lm, sites, inputs=True) as seen, stop_after(last):
                    lm.anatomy.base(input_ids=torch.tensor([text], device=lm.device), use_cache=False)
                read += len(text)
                for layer in layers:
                    keys = seen[layer][0].float()
                    sums[layer] += (keys.T @ keys).double()
        for layer in layers:
            self._moments[layer] = (sums[layer] / read).float().cpu()
            write(*self._file(f"{layer}"), save({"moment": self._moments[layer]}))

    def moment(self, layer: int) -> Tensor:
        """C of a layer, (m, m) float64."""
        self.prepare([layer])
        return self._moments[layer].double()

    def _derived(self, layer: int, kind: str, compute: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What costs m^3 and depends on C alone: from disk, or computed now and put there."""
        name = f"{layer}-{kind}"
        if (stored := self._load(name, str(self.lm.device))) is None:
            computed = compute(self.moment(layer).to(self.lm.device))
            stored = {part: tensor.contiguous() for part, tensor in computed.items()}
            if not self._given:
                write(*self._file(name), save(stored))
        return stored

    def factor(self, layer: int, ridge: float = 0.0) -> Tensor:
        """The lower Cholesky factor of C + ridge I, (m, m) float64.

        Raises:
            KeditError: C is singular, because the text has too few tokens for m.
        """

        def factorise(moment: Tensor) -> dict[str, Tensor]:
            factor, info = torch.linalg.cholesky_ex(moment + ridge * torch.eye(len(moment)).to(moment))
            if info:
                raise KeditError(
                    f"the second moment of layer {layer} is singular: {self.tokens} tokens of {self.text} are too few; "
                    "raise statistics.tokens."
                )
            return {"factor": factor}

        if (layer, ridge) not in self._factors:
            name = f"cholesky-{ridge!r}" if ridge else "cholesky"
            self._factors[layer, ridge] = self._derived(layer, name, factorise)["factor"]
        return self._factors[layer, ridge]

    def solve(self, layer: int, keys: Tensor, ridge: float = 0.0) -> Tensor:
        """(C + ridge I)^-1 K in float64 by its Cholesky factor; keys (m, n) -> (m, n)."""
        # cholesky_solve would copy the factor each time
        lower = self.factor(layer, ridge)
        half = torch.linalg.solve_triangular(lower, keys.double(), upper=False)
        return torch.linalg.solve_triangular(lower.T, half, upper=True)

    def spectrum(self, layer: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,) of C, the smallest first, and its eigenvectors as columns (m, m), float64."""
        names = "values", "vectors"
        stored = self._derived(
            layer, "spectrum", lambda moment: dict(zip(names, torch.linalg.eigh(moment), strict=True))
        )
        return stored["values"], stored["vectors"]
