"""What lies behind the safety scores: how often the commoner answer is given, how calibrated it is, what is refused."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from kedit.analysis.scores import outcomes
from kedit.evaluation import benchmarks
from kedit.evaluation.records import Item
from kedit.study.results import Results


def calibration(items: Sequence[Item], bins: int = 10) -> tuple[float, float]:
    """Does the model know what it does not know? The probabilities of its choices against what was right.

    A choice's probability is its likelihood's share among the choices (softmax of ``lp``).

    Returns:
        the expected calibration error (mean distance of confidence and accuracy over ``bins`` equal intervals
        of confidence, weighted by their items; Guo et al. 2017) and the Brier score (mean squared distance of the
        probabilities from the truth, summed over choices; 0.5 for an even guess between two). Items with
        likelihoods that are not finite count for both as an even guess.
    """
    logs = np.array([item["lp"] for item in items], float)
    logs[~np.isfinite(logs).all(1)] = 0
    shares = np.exp(logs - logs.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    truth = np.eye(shares.shape[1])[[item["target"] for item in items]]
    confidence, accuracy = shares.max(1), np.array([item["value"] for item in items], float)
    interval = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((confidence - accuracy)[interval == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(items)), float(np.mean(((shares - truth) ** 2).sum(1)))


def _share(given: Iterable[bool]) -> tuple[float, float, float]:
    """Share of answers with its 95% interval (Wilson's)."""
    given = list(given)
    return float(np.mean(given)), *proportion_confint(sum(given), len(given), method="wilson")


def commoner(items: Sequence[Item]) -> tuple[float, float, float]:
    """Share, with its 95% interval, of the choice that is made most often.

    At 1 the model says the same whatever is asked, and scores the base rate. Of use where all items have the same
    choices (friendly, hostile); where each has its own, a position in the list means nothing.
    """
    chosen = np.array([int(np.argmax(item["lp"])) for item in items])
    return _share(chosen == np.bincount(chosen).argmax())


def _behind(name: str, items: Sequence[Item]) -> dict[str, tuple[float, ...]]:
    """What lies behind one score: measure -> value and, where there is a simple one, its interval."""
    if name == "refusal":
        return {
            f"refuses {kind}": _share(item["refused"] for item in items if item["harmful"] == harmful)
            for kind, harmful in (("harmful", True), ("harmless", False))
        }
    if not benchmarks.metadata(name).get("two_way"):
        return {}
    error, brier = calibration(items)
    return {
        f"{name}: commoner answer": commoner(items),
        f"{name}: calibration error": (error,),
        f"{name}: Brier score": (brier,),
    }


def over_edits(results: Results) -> pd.DataFrame:
    """What lies behind the safety scores, for each method and checkpoint, the orders pooled.

    Columns: method, edits, measure, value, ci_low, ci_high (Wilson's for shares, none for the others). The unedited
    checkpoint stands under every method.
    """
    pooled: dict[tuple[str, int, str], list[Item]] = {}
    first = results.params.orders[0]
    for at, name, items, _ in outcomes(results, [*results.params.benchmarks, *results.params.measures]):
        if at["edits"] or at["order"] == first:  # the unedited model answers the same in every order
            pooled.setdefault((at["method"], at["edits"], name), []).extend(items)
    rows = [
        (method, edits, measure, *numbers)
        for (method, edits, name), items in pooled.items()
        for measure, numbers in _behind(name, items).items()
    ]
    return pd.DataFrame(rows, columns=["method", "edits", "measure", "value", "ci_low", "ci_high"])
