"""PRUNE: after all edits, the largest singular values of what they changed are brought down.

Ma et al., "Perturbation-Restrained Sequential Model Editing", 2024. Not a way to edit but a way to look at an edited
model: edits go on from the unrestrained weights, and a checkpoint shows a restrained copy (``Editor.shown``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor

from kedit.editors import memit
from kedit.editors.bounds import Positive
from kedit.model.anatomy import matrix


@dataclass(frozen=True, kw_only=True)
class Hparams(memit.Hparams):
    """Settings of MEMIT, and ``alpha``, the base of the logarithm (e, or 1.2 in the authors' code).

    ``onto``: what the restrained change is added to. PRUNE's is the original weight; baselines of other papers, as
    their code reads, add it to the edited one, which has the whole change in it already.
    """

    alpha: Positive = 1.2
    onto: Literal["original", "edited"] = "original"


def restrained(change: Tensor, largest: float, alpha: float) -> Tensor:
    """A change (d, m) float64 whose singular values s >= largest become log s - log largest + largest, to base alpha.

    That is less than s only where largest > 1 / ln alpha: 5.5 for 1.2, 1 for e.
    """
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    over = values >= largest
    logs = (values[over] / largest).log() / log(alpha) + largest
    return change + left[:, over] * (logs - values[over]) @ right[over]


class PRUNE(memit.MEMIT):
    """MEMIT's edits; what is shown is W0 + F(W - W0), W0 the original weight, F by the largest singular value of W0."""

    name = "prune"
    style = ("#56b4e9", "s", "-.")
    Hparams = Hparams

    @contextmanager
    @torch.no_grad()
    def shown(self) -> Iterator[None]:
        """Within the block every edited matrix has its change restrained; afterwards it has its bits again."""
        lm, journal, before = self.lm, self.lm.journal, {}
        try:
            for name in journal.edited():
                module = lm.model.get_submodule(name)
                original, edited = (matrix(module, one).double() for one in (journal.original(name), module.weight))
                before[module] = module.weight.detach().clone()
                largest = torch.linalg.matrix_norm(original, 2).item()
                change = restrained(edited - original, largest, self.hparams.alpha)
                matrix(module).copy_((original if self.hparams.onto == "original" else edited) + change)
            yield
        finally:
            for module, weight in before.items():
                module.weight.copy_(weight)
