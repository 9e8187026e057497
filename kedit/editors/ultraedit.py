"""UltraEdit: one gradient a turn, normalised by running statistics, mapped to weights by ridge regression.

Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models", 2025. Nothing is
searched for: where a turn's answer tokens are predicted, each edited projection's input h and the gradient q of the
loss by its output are read once, and the step along q that each h is to make is solved for all at once. ``whiten`` is
what StableEdit (2026) changes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from kedit import KeditError
from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.editors.bounds import Count, Layers, Natural, Positive
from kedit.editors.protocol import Editor
from kedit.editors.training import ScoredText, scored
from kedit.model.anatomy import matrix
from kedit.model.forward import hooked, pad
from kedit.model.journal import Edit, EditFailed, Entry, LowRank
from kedit.model.lm import LM
from kedit.model.memory import Memory

EPS = 1e-7
"""Added to standard deviations."""
LEAST = 1e-6
"""Eigenvalues of q's covariance count as no less than this, as in StableEdit's code."""


@dataclass(frozen=True, kw_only=True)
class Hparams:
    """Settings of UltraEdit.

    Attributes:
        layers, parts: the projections edited: these parts of these blocks' MLPs.
        lr: how far a row moves along its normalised gradient, by its normalised squared length (about its width).
        ridge: 1 published; StableEdit 10.
        batch: requests in one loss, a mean over all their answer tokens; fewer where a turn has fewer.
        warmup: facts of the ``train`` split of the set ``facts`` whose rows are in the statistics before the first
            edit, without being edited. Published are turns of 100 and 0; a first turn of one edit has no spread.
        whiten: q is freed of all its correlations, not scaled feature by feature, once there are rows enough.
    """

    layers: Layers
    parts: Annotated[tuple[Literal["gate", "up", "down"], ...], Field(min_length=1)] = ("down",)
    lr: Positive = 1e-6
    ridge: Positive = 1.0
    batch: Count = 10
    warmup: Natural = 100
    facts: str = "bundled"
    whiten: bool = False


# Running statistics ---------------------------------------------------------------------------------


class Running(NamedTuple):
    """Of all rows so far: how many, their mean (f,), and the sum of squared deviations (f,), or of products (f, f)."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Tensor, products: bool = False) -> Self:
        """Of rows (N, f)."""
        away = rows - (mean := rows.mean(0))
        return cls(len(rows), mean, away.T @ away if products else away.square().sum(0))

    def merged(self, other: Self) -> Self:
        """Of both, exactly (Chan, Golub and LeVeque, 1979)."""
        count, away = self.count + other.count, other.mean - self.mean
        across = away.outer(away) if self.squares.ndim == 2 else away.square()
        squares = self.squares + other.squares + across * (self.count * other.count / count)
        return type(self)(count, self.mean + away * (other.count / count), squares)


Pair = tuple[Tensor, Tensor]
"""Rows h (N, in) and q (N, out) of a projection, float64."""
Totals = dict[str, Running]
"""By the shape of a projection, as ``<out>x<in>``, of the rows [h | q] of all projections of that shape; by ``q`` and
the shape, where q is whitened, of its rows q alone."""


class Statistics(Memory):
    """The rows (N, in + out) of each turn by shape, and the running statistics of all of them."""

    def __init__(self, whiten: bool):
        super().__init__()
        self.whiten, self.totals = whiten, Totals()

    def add(self, entry: dict[str, Any]) -> None:
        """Count the rows of a turn."""
        super().add(entry)
        for shape, rows in entry.items():
            every = {shape: Running.of(rows.double())}
            if self.whiten:
                out = int(shape.partition("x")[0])
                every["q" + shape] = Running.of(rows[:, -out:].double(), products=True)
            for key, new in every.items():
                self.totals[key] = self.totals[key].merged(new) if key in self.totals else new

    def clear(self) -> None:
        """Forget all."""
        super().clear()
        self.totals.clear()


# Rows ----------------------------------------------------------------------------------------------


def batches(texts: Sequence[ScoredText], size: int) -> list[Sequence[ScoredText]]:
    """So many texts at a time."""
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def shape(module: nn.Module) -> str:
    """Of a projection: ``<out>x<in>``."""
    return "x".join(map(str, matrix(module).shape))


def read(lm: LM, modules: Sequence[nn.Module], texts: Sequence[ScoredText]) -> tuple[list[Pair], float]:
    """What projections take in, and the gradients of what they give out, where texts' N scored tokens are predicted.

    Returns:
        a pair for each projection, and the loss: the mean negative log-likelihood of all N tokens.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen[module] = args[0].detach(), torch.zeros_like(output, requires_grad=True)
        return output + seen[module][1]  # no leaf itself: some blocks add in place to what a part gave them

    (ids, mask), (rows, places, labels) = pad([text.ids for text in texts], lm.device), scored(texts)
    with hooked(dict.fromkeys(modules, record)), torch.enable_grad():
        hidden = lm.anatomy.base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = lm.logits(hidden[rows, places])
        loss = nn.functional.cross_entropy(logits, torch.tensor(labels, device=lm.device))
        inputs, outputs = zip(*(seen[module] for module in modules), strict=True)
        gradients = torch.autograd.grad(loss, outputs)
    pairs = zip(inputs, gradients, strict=True)
    return [tuple(one[rows, places].to(lm.device, torch.float64) for one in pair) for pair in pairs], loss.item()


def by_shape(modules: Iterable[nn.Module], pairs: Iterable[Pair]) -> dict[str, Tensor]:
    """The rows [h | q] of all projections of a shape, as a memory keeps them: their very bits, in float32."""
    found: dict[str, list[Tensor]] = {}
    for module, pair in zip(modules, pairs, strict=True):
        found.setdefault(shape(module), []).append(torch.cat(pair, 1).float().cpu())
    return {name: torch.cat(some) for name, some in found.items()}


# The editor ----------------------------------------------------------------------------------------


class UltraEdit(Editor):
    """W gains V^T (H H^T + ridge I)^-1 H: rows H as read; V = -lr |h~|^2 q~ of rows as normalised."""

    name = "ultraedit"
    label = "UltraEdit"
    needs = ("down",)
    style = ("#882255", "X", "-")
    Hparams = Hparams

    def make_memory(self) -> Statistics:
        """The statistics of the edits, without warm-up."""
        return Statistics(self.hparams.whiten)

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The projections edited.

        Raises:
            KeditError: the model's MLPs have no gate of their own.
        """
        found = [getattr(self.lm.anatomy, part)(layer) for layer in self.hparams.layers for part in self.hparams.parts]
        if None in found:
            raise KeditError(f"{self.name} cannot edit the gate of {self.lm.anatomy.architecture}, which has none.")
        return found

    def _prepare(self) -> None:
        super()._prepare()
        known = facts.load(self.hparams.facts, "train")[: self.hparams.warmup]
        self._known, self._warm = [self._text(fact) for fact in known], dict[int, Totals]()

    def _text(self, request: EditRequest) -> ScoredText:
        return ScoredText.of(self.lm, request.text, request.target_new)

    def warm(self, size: int) -> Totals:
        """Statistics of the train facts on the unedited model, in losses of as many requests as those of a turn."""
        if self._known and size not in self._warm:
            statistics = Statistics(self.hparams.whiten)
            with self.lm.journal.unedited():
                for some in batches(self._known, size):
                    statistics.add(by_shape(self.modules, read(self.lm, self.modules, some)[0]))
            self._warm[size] = statistics.totals
        return self._warm.get(size, {})

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        self._apply_batch([request], edit, [edit])

    def _apply_batch(self, requests: Sequence[EditRequest], edit: Edit, each: Sequence[Edit]) -> None:
        texts, size = [self._text(request) for request in requests], min(self.hparams.batch, len(requests))
        start = self.warm(size)
        found, losses = zip(*(read(self.lm, self.modules, some) for some in batches(texts, size)), strict=True)
        pairs = [tuple(map(torch.cat, zip(*some, strict=True))) for some in zip(*found, strict=True)]
        edit.write(Entry(self.name, by_shape(self.modules, pairs)))
        totals = {key: start[key].merged(total) if key in start else total for key, total in self.memory.totals.items()}
        edit.info |= {"loss_before": sum(losses) / len(losses), "tokens": len(pairs[0][0]), "relative_change": []}
        edit.info["rows"] = max(total.count for total in totals.values())
        for module, (h, q) in zip(self.modules, pairs, strict=True):
            left, right = self._factors(h, q, totals, shape(module))
            if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
                raise EditFailed("the update is not finite")
            change = ((left.T @ left) * (right.T @ right)).sum().sqrt()
            edit.info["relative_change"].append(change.item() / matrix(module).norm().item())
            edit.write(LowRank(self.lm.anatomy.name(module), left.contiguous(), right))

    def _factors(self, h: Tensor, q: Tensor, totals: Totals, key: str) -> tuple[Tensor, Tensor]:
        """Rows h (N, in) and q (N, out) -> factors (out, N) and (in, N) of the update.

        Raises:
            EditFailed: a single row has no spread.
        """
        count, mean, squares = (part.to(h) if isinstance(part, Tensor) else part for part in totals[key])
        if count < 2:
            raise EditFailed("the statistics of a single answer token have no spread; set warmup")
        normal = (torch.cat([h, q], 1) - mean) / ((squares / (count - 1)).sqrt() + EPS)
        hh, qq = normal.split([h.shape[1], q.shape[1]], 1)
        if self.hparams.whiten and count > q.shape[1] + 1:
            _, mean, products = totals["q" + key]
            values, vectors = torch.linalg.eigh(products.to(h) / (count - 1))
            qq = (q - mean.to(h)) @ vectors / values.clamp(min=LEAST).sqrt() @ vectors.T
        gram = h @ h.T + self.hparams.ridge * torch.eye(len(h), dtype=h.dtype, device=h.device)
        return (-self.hparams.lr * hh.square().sum(1, keepdim=True) * qq).T, torch.linalg.solve(gram, h).T.contiguous()
