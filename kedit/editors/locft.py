"""LocFT-BF: fine-tuning of one matrix on many edits at once, epoch by epoch, not one edit after another.

Yang et al., "Fine-tuning Done Right in Model Editing", 2025: breadth-first, in mini-batches over all edits, and
localised. It needs the edits together, which a sequence of edits does not give. Two forms are honest about that:
*chunks*, turns of many edits, each trained on alone from the weights as they are; and *replay*, in which every turn
trains the unedited matrix on all edits so far, which must therefore be kept: an upper bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.data.requests import EditRequest
from kedit.editors.bounds import Count, Natural, NotNegative, Positive
from kedit.editors.mend import UpperBlocks, nll
from kedit.editors.protocol import Editor
from kedit.editors.training import ScoredText
from kedit.model.anatomy import matrix
from kedit.model.forward import hooked
from kedit.model.journal import Dense, Edit, EditFailed, Entry, Restore
from kedit.model.lm import begin_token
from kedit.model.memory import Memory


@dataclass(frozen=True, kw_only=True)
class Hparams:
    """Settings of LocFT-BF.

    Attributes:
        epochs: at most; training ends after one whose mean loss is below ``stop``, and a batch below it is no step.
        batch: edits of which a step takes the mean loss.
        replay: train the unedited matrix on all edits so far; else the matrix as it is, on the turn's alone.
        end: whether the end of the text after the object is learned, as published.
        seed: of the order of the edits in each epoch.
    """

    layer: Natural
    epochs: Count = 25
    lr: Positive = 5e-4
    stop: NotNegative = 1e-2
    batch: Count = 100
    replay: bool = False
    end: bool = True
    seed: Natural = 0


class Earlier(Memory):
    """The texts of all edits so far, as token ids and where the object begins; those of ``replay`` rest on them."""

    linked = True


class LocFT(Editor):
    """Adam on one matrix; loss = mean over edits of the mean -log p of the tokens of an edit's object, and its end."""

    name = "locft"
    label = "LocFT-BF"
    needs = ("down",)
    style = ("#e69f00", "o", ":")
    Hparams = Hparams

    def make_memory(self) -> Memory | None:
        """The edits so far, where they are replayed."""
        return Earlier() if self.hparams.replay else None

    def _text(self, request: EditRequest) -> ScoredText:
        """Prompt, object and end: the end token, or where the tokenizer names none, what stands between texts."""
        prompt, target, tokenizer = self.prompt_ids(request), self.target_ids(request), self.lm.tokenizer
        if self.hparams.end:
            end = tokenizer.eos_token_id
            target = [*target, begin_token(tokenizer) if end is None else end]
        return ScoredText((*prompt, *target), len(prompt))

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        self._apply_batch([request], edit, [edit])

    def _apply_batch(self, requests: Sequence[EditRequest], edit: Edit, each: Sequence[Edit]) -> None:
        down = self.lm.anatomy.down(self.hparams.layer)
        texts, name = [self._text(request) for request in requests], self.lm.anatomy.name(down)
        if self.hparams.replay:
            new = [[list(text.ids), text.start] for text in texts]
            edit.write(Entry(self.name, {"texts": new}))
            edit.write(Restore(name))
            every = [text for entry in self.memory.entries for text in entry["texts"]]
            texts = [ScoredText(tuple(ids), start) for ids, start in every]
        delta, epochs = self._trained(texts)
        edit.info |= {"trained_on": len(texts), "steps": sum(steps for _, steps in epochs), "epochs": len(epochs)}
        edit.info |= {"loss_before": epochs[0][0].mean().item(), "loss": epochs[-1][0].mean().item()}
        edit.info["relative_change"] = (delta.norm() / matrix(down).norm()).item()
        edit.write(Dense(name, delta))

    def _trained(self, texts: Sequence[ScoredText]) -> tuple[Tensor, list[tuple[Tensor, int]]]:
        """The change of the matrix; for each epoch the edits' losses, as they were at their turn, and the steps made.

        Raises:
            EditFailed: a loss is not finite.
        """
        hp, upper = self.hparams, UpperBlocks(self.lm, [self.hparams.layer])
        down, epochs = self.lm.anatomy.down(hp.layer), list[tuple[Tensor, int]]()
        delta = torch.zeros_like(matrix(down), dtype=torch.float32, requires_grad=True)
        optimiser, generator = torch.optim.Adam([delta], lr=hp.lr), torch.Generator().manual_seed(hp.seed)
        with hooked({down: lambda module, args, output: output + args[0] @ delta.T.to(output)}), torch.enable_grad():
            while len(epochs) < hp.epochs and not (epochs and epochs[-1][0].mean() < hp.stop):
                losses, steps = torch.zeros(len(texts)), 0
                for rows in torch.randperm(len(texts), generator=generator).split(hp.batch):
                    some = [texts[row] for row in rows]
                    each = nll(upper.logprobs(some), some)
                    if not torch.isfinite(each).all():
                        raise EditFailed(f"a loss is not finite in epoch {len(epochs) + 1}")
                    losses[rows] = each.detach().cpu()
                    if (loss := each.mean()) >= hp.stop:
                        optimiser.zero_grad()
                        loss.backward()
                        optimiser.step()
                        steps += 1
                epochs.append((losses, steps))
        return delta.detach(), epochs
