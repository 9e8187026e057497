"""GRACE: a codebook at one layer answers for prompts whose key is close enough to one it knows.

Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", 2023;
methods section 5. The weights stay as they are. Where a prompt ends, the layer's input is compared with
the keys; within the radius of the nearest, the layer's output is replaced by the value learned for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedit.data.requests import EditRequest, spaced
from kedit.editors.cost import FLOAT, Cost, Shape, descent
from kedit.editors.protocol import Editor
from kedit.model.forward import LookupText, Tail, activations
from kedit.model.journal import Edit, EditFailed, Entry
from kedit.model.lm import LM
from kedit.model.memory import Memory

GAP = 1e-5  # how far apart two radii are kept when a ball is split
SAME = 1e-3  # keys closer than this share of their norm are one prompt's, read with other rounding


@dataclass(frozen=True)
class Hparams:
    """Settings of GRACE.

    ``epsilon``: radius of a new key, as a share of its norm (the published 1.0 is absolute and means
    another thing in every layer of every model). ``warm``: a value starts from the layer's own output
    instead of random numbers. ``every``: 1; 128 emulates released code that takes edits in batches of 128
    and applies the first of each.
    """

    layer: int
    steps: int = 50
    lr: float = 1.0
    epsilon: float = 0.06
    warm: bool = False
    every: int = 1
    seed: int = 0


class Codebook(Memory):
    """Rows of key, value, radius and label (the target's token ids). Entries set a row, or add one."""

    def __init__(self, lm: LM, layer: int):
        super().__init__()
        self.site = lm.anatomy.down(layer)

    def add(self, entry: dict[str, Any]) -> None:
        """Set some fields of the row ``place``, which may be a new one."""
        fields = {name: value for name, value in entry.items() if name != "place"}
        if entry["place"] == len(self.entries):
            self.entries.append(fields)
        else:
            self.entries[entry["place"]] = {**self.entries[entry["place"]], **fields}

    def nearest(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (n,) to the nearest row and its place (n,), the latest of equals; keys (n, m)."""
        known = torch.stack([row["key"] for row in self.entries]).to(keys)
        distances = torch.cdist(keys, known, compute_mode="donot_use_mm_for_euclid_dist").flip(1)
        best = distances.min(1)
        return best.values, len(self.entries) - 1 - best.indices

    @contextmanager
    def answering(self, places: Sequence[int]) -> Iterator[None]:
        """Within the block, the layer's output at the places is replaced where a row is near enough."""
        if not self.entries or not places:
            yield
            return

        def answer(module, args, output: Tensor) -> Tensor:
            distances, rows = self.nearest(args[0][0, places])
            changed = output.clone()
            for place, distance, row in zip(places, distances.tolist(), rows.tolist(), strict=True):
                if distance <= self.entries[row]["epsilon"]:
                    changed[0, place] = self.entries[row]["value"].to(output)
            return changed

        handle = self.site.register_forward_hook(answer)
        try:
            yield
        finally:
            handle.remove()


class GRACE(Editor):
    """Add a key, or widen or split the ball it falls into (algorithm 1), then learn the value by Adam."""

    name = "grace"
    style = ("#009e73", "^", "-")
    Hparams = Hparams

    def make_memory(self) -> Codebook:
        """An empty codebook."""
        return Codebook(self.lm, self.hparams.layer)

    @classmethod
    def cost(cls, shape: Shape, hparams: Hparams, tokens: int) -> Cost:
        """A search for one vector; key and value are stored."""
        work = descent(shape, 1, hparams.steps, hparams.layer)
        return Cost(edit=work, journal_bytes=(shape.d + shape.m) * FLOAT)

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm, hp, rows = self.lm, self.hparams, self.memory.entries
        if len(lm.journal.edits) % hp.every:
            edit.info["skipped"] = True
            return
        ids = [*lm.begin, *lm.encode(request.text)]
        prompt = LookupText(tuple(ids), len(ids) - 1)
        target = lm.encode(spaced(request.target_new, request.prompt))
        key = activations(lm, [prompt], [hp.layer], "key")[hp.layer][0].float()
        output = activations(lm, [prompt], [hp.layer], "value")[hp.layer][0].float()
        radius = hp.epsilon * key.norm().item()

        place, value = len(rows), self._start(output)
        entry: dict[str, Any] = {"key": key.cpu(), "epsilon": radius, "label": list(target)}
        if rows:
            distance, nearest = (found.item() for found in self.memory.nearest(key[None]))
            row = rows[nearest]
            if distance <= radius + row["epsilon"]:
                if row["label"] == list(target):  # the same answer: one ball that covers both
                    place, value = nearest, row["value"].to(output, copy=True)
                    entry = {"epsilon": max(distance, row["epsilon"])}
                elif distance < SAME * key.norm().item():  # the very prompt again: no ball could tell the two apart
                    place, entry = nearest, {"epsilon": row["epsilon"], "label": list(target)}
                else:  # another answer: two balls that do not meet
                    edit.write(Entry(self.name, {"place": nearest, "epsilon": distance / 2 - GAP}))
                    entry["epsilon"] = distance / 2
            edit.info["distance"] = distance
        value, losses = self._learn(prompt, target, value, output)
        edit.info |= {
            "rows": max(len(rows), place + 1),
            "epsilon": entry["epsilon"],
            "loss": losses[-1],
            "loss_before": losses[0],
            "value_norm": value.norm().item(),
        }
        edit.write(Entry(self.name, {"place": place, **entry, "value": value.cpu()}))

    def _start(self, output: Tensor) -> Tensor:
        """Where a new value starts: (d,)."""
        if self.hparams.warm:
            return output.clone()
        generator = torch.Generator().manual_seed(self.hparams.seed + len(self.memory.entries))
        return torch.rand(output.shape, generator=generator).to(output.device)

    def _learn(
        self, prompt: LookupText, target: Sequence[int], value: Tensor, output: Tensor
    ) -> tuple[Tensor, list[float]]:
        """Adam on the value alone, through the blocks above the layer, from the prompt's last token on."""
        lm, hp = self.lm, self.hparams
        tail = Tail(lm, [LookupText((*prompt.ids, *target[:-1]), prompt.lookup)], [hp.layer])
        states = tail.states[hp.layer]
        first = torch.zeros(states.shape[1], 1, device=lm.device)
        first[0] = 1.0
        labels = torch.tensor(target, device=lm.device)[:, None]
        value.requires_grad_()
        optimiser = torch.optim.Adam([value], lr=hp.lr)
        losses = []
        for step in range(hp.steps + 1):
            with torch.enable_grad():
                hidden = tail.run(hp.layer, states + (first * (value - output)).to(states))[0]
                loss = -lm.logits(hidden).log_softmax(-1).gather(1, labels).mean()
            losses.append(loss.item())
            if not torch.isfinite(loss):
                raise EditFailed(f"the loss of the value is {losses[-1]} at step {step}")
            if step == hp.steps:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return value.detach(), losses
