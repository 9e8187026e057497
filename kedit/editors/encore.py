"""ENCORE: MEMIT that holds the keys of earlier edits, penalises its update's norm, and stops its search early.

Gupta et al., "Lifelong Sequential Knowledge Editing without Model Degradation", 2025. All three are switches of MEMIT.
The authors' code edits in batches, and counts tokens: it stops when as many of the target's are the likeliest as there
are contexts, whatever the target's length. Here all of them must be.
"""

from dataclasses import dataclass

from kedit.editors import memit
from kedit.editors.bounds import Count, NotNegative
from kedit.editors.space import decades


@dataclass(frozen=True, kw_only=True)
class Hparams(memit.Hparams):
    """Settings of ENCORE, on by default as published for Llama-3-8B; ``ridge`` is lambda_n, and belongs to a lambda."""

    history: bool = True
    ridge: NotNegative = 20.0
    early: Count | None = 2


class ENCORE(memit.MEMIT):
    """Per layer: W gains R K^T (lambda C + S + lambda_n I + K K^T)^-1, S of the keys of earlier edits, as used then."""

    name = "encore"
    style = ("#0072b2", "P", "-.")
    Hparams = Hparams
    space = memit.MEMIT.space | {"ridge": decades(-1, 1), "early": (1, 2, 3)}
