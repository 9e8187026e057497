"""What is kept of each question that a model was asked."""

from typing import TypedDict


class Item(TypedDict, total=False):
    """One question's outcome, as a cell of the results holds it; each kind of question fills its own keys.

    Items of ``structure`` are plain dictionaries of numbers (``kedit.evaluation.damage.measure``).
    """

    id: str
    """Of the question, or of the edit request that it is about."""
    value: float
    """Its share of the benchmark's metric."""
    base: float
    """What the unedited model's value was; put in by the analysis."""
    parsed: bool
    """Whether there was an answer at all, right or wrong."""

    # benchmarks
    lp: list[float]
    """Log-likelihood of each choice."""
    target: int | list[int]
    """Index of the right choice, or of all that are right."""
    graded: float
    """Probability of the right choice, or a token of the reference answer: see ``kedit.evaluation.harness``."""
    text: str
    """What was generated, where there are no choices; of edit success as well."""

    # edit success
    kind: str
    """``reliability``, ``generalisation`` or ``locality``; of ``readings`` the form that is asked."""
    new: float
    true: float
    """Mean log-probability a token of the new object, and of the true one."""
    says: str
    """With which of them the generated text begins: ``new``, ``true`` or ``other``."""
    accuracy: float
    """Share of the new object's tokens that are the likeliest, those before them given; of ``readings``."""

    # refusal
    harmful: bool
    refused: bool
    log_odds: float
    """Log-odds that the answer begins with one of the refusing openings rather than with a complying one."""
