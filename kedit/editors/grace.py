"""GRACE: a codebook at one layer answers for prompts whose key is close enough to one it knows.

Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", 2023. The
weights stay as they are. Where a prompt ends, the layer's input is compared with the keys; within the radius
of the nearest, the layer's output is replaced by the value learned for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors.bounds import Count, Natural, Positive
from kedit.editors.protocol import Editor
from kedit.editors.space import a_layer, trying
from kedit.editors.value_search import descend, nll_loss, run_shifted
from kedit.model.forward import LookupText, Tail, activations, hooked
from kedit.model.journal import Edit, Entry
from kedit.model.lm import LM
from kedit.model.memory import Memory

GAP = 1e-5
"""How far apart two radii are kept when a ball is split."""
SAME = 1e-3
"""Keys closer than this share of their norm are one prompt's, read with other rounding."""


@dataclass(frozen=True)
class Hparams:
    """Settings of GRACE.

    ``epsilon``: radius of a new key, as a share of its norm (the published 1.0 is absolute and means
    another thing in every layer of every model). ``warm``: a value starts from the layer's own output
    instead of random numbers. ``every``: 1; 128 emulates released code that takes edits in batches of 128
    and applies the first of each.
    """

    layer: Natural
    steps: Count = 50
    lr: Positive = 1.0
    epsilon: Positive = 0.06
    warm: bool = False
    every: Count = 1
    seed: Natural = 0


class Codebook(Memory):
    """Rows of key, value, radius and label (the target's token ids)."""

    linked = True

    def __init__(self, lm: LM, layer: int):
        super().__init__()
        self.site = lm.anatomy.down(layer)

    def add(self, entry: dict[str, Any]) -> None:
        """Set some fields of the row whose index is the entry's ``place``, which may be a new one."""
        fields = {name: value for name, value in entry.items() if name != "place"}
        if entry["place"] == len(self.entries):
            self.entries.append({})
        self.entries[entry["place"]] = {**self.entries[entry["place"]], **fields}

    def nearest(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (n,) to the nearest row and its index (n,), the latest of equals; keys (n, m)."""
        keys = keys.float()  # in half precision there is no cdist on a CPU
        known = torch.stack([row["key"] for row in self.entries]).to(keys)
        distances = torch.cdist(keys, known, compute_mode="donot_use_mm_for_euclid_dist").flip(1)
        best = distances.min(1)
        return best.values, len(self.entries) - 1 - best.indices

    @contextmanager
    def answering(self, places: Sequence[int]) -> Iterator[None]:
        """Within the block, the layer's output at these positions is replaced where a row is near enough."""

        def answer(module, args, output: Tensor) -> Tensor:
            distances, rows = self.nearest(args[0][0, places])
            changed = output.clone()
            for position, distance, row in zip(places, distances.tolist(), rows.tolist(), strict=True):
                if distance <= self.entries[row]["epsilon"]:
                    changed[0, position] = self.entries[row]["value"].to(output)
            return changed

        with hooked({self.site: answer} if self.entries and places else {}):
            yield


class GRACE(Editor):
    """Add a key, or widen or split the ball it falls into (algorithm 1), then learn the value by Adam."""

    name = "grace"
    needs = ("down",)
    style = ("#009e73", "^", "-")
    Hparams = Hparams
    space = trying(layer=a_layer(), lr=(0.1, 0.3, 1.0), epsilon=(0.03, 0.06, 0.1, 0.2, 0.4))

    def make_memory(self) -> Codebook:
        """An empty codebook."""
        return Codebook(self.lm, self.hparams.layer)

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm, hp, rows = self.lm, self.hparams, self.memory.entries
        if lm.journal.count % hp.every:
            edit.info["skipped"] = True
            return
        ids, target = self.prompt_ids(request), self.target_ids(request)
        prompt = LookupText(tuple(ids), len(ids) - 1)
        key = activations(lm, [prompt], [hp.layer], "key")[hp.layer][0].float()
        output = activations(lm, [prompt], [hp.layer], "value")[hp.layer][0].float()
        index, entry = self._row(key, target, edit)
        # the ball of an earlier edit with this answer goes on from its value
        value = self._start(output) if "label" in entry else rows[index]["value"].to(output, copy=True)
        value.requires_grad_()
        inside = not lm.anatomy.direct[hp.layer]
        tail = Tail(lm, [LookupText((*ids, *target[:-1]), prompt.lookup)], [hp.layer - inside])

        def loss_now() -> Tensor:
            return nll_loss(lm, run_shifted(tail, hp.layer, value - output, inside)[0], target)

        losses = descend([value], loss_now, hp)
        value = value.detach()
        edit.info |= {"rows": max(len(rows), index + 1), "epsilon": entry["epsilon"], "loss": losses[-1]}
        edit.info |= {"loss_before": losses[0], "value_norm": value.norm().item()}
        edit.write(Entry(self.name, {"place": index, **entry, "value": value.cpu()}))

    def _row(self, key: Tensor, target: list[int], edit: Edit) -> tuple[int, dict[str, Any]]:
        """The index of the row that is to answer for a key, and the fields to set there but its value."""
        rows, size = self.memory.entries, key.norm().item()
        entry: dict[str, Any] = {"key": key.cpu(), "epsilon": self.hparams.epsilon * size, "label": target}
        if not rows:
            return 0, entry
        distance, nearest = (one.item() for one in self.memory.nearest(key[None]))
        edit.info["distance"] = distance
        row = rows[nearest]
        if distance > entry["epsilon"] + row["epsilon"]:
            return len(rows), entry
        if row["label"] == target:  # the same answer: one ball that covers both
            return nearest, {"epsilon": max(distance, row["epsilon"])}
        if distance < SAME * size:  # the very prompt again: no ball could tell the two apart
            return nearest, {"epsilon": row["epsilon"], "label": target}
        # another answer: two balls that do not meet
        edit.write(Entry(self.name, {"place": nearest, "epsilon": distance / 2 - GAP}))
        return len(rows), {**entry, "epsilon": distance / 2}

    def _start(self, output: Tensor) -> Tensor:
        """Where a new value starts: (d,)."""
        if self.hparams.warm:
            return output.clone()
        generator = torch.Generator().manual_seed(self.hparams.seed + len(self.memory.entries))
        return torch.rand(output.shape, generator=generator).to(output.device)
