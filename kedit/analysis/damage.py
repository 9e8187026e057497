"""Structure damage: what breaks first?"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from kedit.analysis.scores import COLLAPSED, RESAMPLES, kept, table
from kedit.study.results import Results

# Structure damage: what breaks first? ----------------------------------------------------------------

# measure -> (its value without edits, the value from which it gives the alarm). Doubling for ratios, a
# tenth of the matrix for the change, a tenth of the way to orthogonal (or half the state's length) for the
# states, a nat for the answers: set before any run was seen, not fitted to one.
MEASURES = {
    "relative": (0.0, 0.1),
    "spectral": (1.0, 2.0),
    "condition": (1.0, 2.0),
    "cosine": (0.0, 0.1),
    "l2": (0.0, 0.5),
    "perplexity": (1.0, 2.0),
    "entropy": (0.0, 1.0),
    "kl": (0.0, 1.0),
}


def damage(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """One number a measure from the items of ``kedit.damage.measure``; without edits those of ``MEASURES``.

    Weights (``relative``, ``spectral``, ``condition``): the worst matrix. States (``cosine``, ``l2``): the last
    block, whose output is unembedded. Answers: ``perplexity`` (ratio to the unedited model's on the same
    tokens), ``entropy`` (size of its change, nats), ``kl`` (nats). ``routed``: share of passages that a
    memory took over. What is not a number, because the model is broken, is infinite damage.
    """
    kinds: dict[str, list[dict[str, Any]]] = {"weight": [], "layer": [], "text": []}
    for item in items:
        kinds[item["kind"]].append(item)
    found = {
        name: float(np.max([item[name] for item in kinds["weight"]] or MEASURES[name][0]))
        for name in ("relative", "spectral", "condition")
    }
    found |= {name: kinds["layer"][-1][name] for name in ("cosine", "l2")}
    tokens = [item["tokens"] for item in kinds["text"]]

    def mean(name: str) -> float:
        return float(np.average([item[name] for item in kinds["text"]], weights=tokens))

    with np.errstate(over="ignore"):
        found["perplexity"] = float(np.exp(mean("nll") - mean("nll_unedited")))
    found |= {"entropy": abs(mean("entropy") - mean("entropy_unedited")), "kl": mean("kl")}
    found = {name: math.inf if math.isnan(value) else value for name, value in found.items()}
    return found | {"routed": float(np.mean([item["routed"] for item in kinds["text"]]))}


def checkpoints(results: Results) -> pd.DataFrame:
    """Every checkpoint's damage (``damage``, where it was measured) beside the ability ``kept``, for each order."""
    found = {}
    for cell in results.cells:
        if cell["benchmark"] == "structure":
            found[cell["model"], cell["method"], cell["variant"], cell["order"], cell["edits"]] = damage(cell["items"])
    rows = []
    for row in kept(table(results)).to_dict("records"):
        place = (row["model"], row["method"], row["variant"], row["order"], row["edits"])
        rows.append(row | found[place if row["edits"] else (row["model"], None, None, None, 0)])
    return pd.DataFrame(rows)


def predictors(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Which measure of damage predicts collapse, and how early?

    Args:
        checkpoints: one row a checkpoint: columns ``model``, ``method``, ``variant`` and ``order`` as far as
            there (together a trajectory), ``edits``, ``kept`` (as ``kept`` finds it) and any of ``MEASURES``.
            Checkpoints without edits and the control are left out, being unedited by definition. Damage is
            cheaper than ability: ``kept`` may be missing where only damage was measured, and then helps to
            see when a threshold is crossed (a lead is never longer than to the first checkpoint that shows
            the collapse, which may have come before).

    Returns:
        one row a measure, the strongest first: ``rho``, Spearman's rank correlation with ``kept`` over all
        checkpoints (negative: more damage, less ability), ``rho_low`` and ``rho_high`` its 95% percentile
        bootstrap interval over whole trajectories (the checkpoints of one depend on each other), ``n``
        checkpoints in ``trajectories``. Of the trajectories that collapse (first checkpoint with ``kept``
        under ``COLLAPSED``), ``collapsed`` in number: how many cross the measure's ``threshold`` ``before``
        that checkpoint, and the median ``lead`` in edits of those that cross it at all (0 at the same
        checkpoint, negative after it). ``false_alarms``: trajectories that cross it and do not collapse.
    """
    place = [name for name in ("model", "method", "variant", "order") if name in checkpoints]
    edited = (checkpoints.edits > 0) & (checkpoints.method != "control")
    frame = checkpoints[edited].sort_values("edits", kind="stable")
    trajectories = [own for _, own in frame.groupby(place, sort=False, dropna=False)]
    rows = []
    for measure, (_, threshold) in MEASURES.items():
        if measure not in frame:
            continue
        row = {"measure": measure, **_rank_correlation(trajectories, measure), "n": int(frame.kept.count())}
        leads, collapsed, alarms = [], 0, 0
        for own in trajectories:
            fallen, crossed = own.edits[own.kept < COLLAPSED], own.edits[own[measure] >= threshold]
            collapsed += len(fallen) > 0
            alarms += len(crossed) > 0 and not len(fallen)
            if len(fallen) and len(crossed):
                leads.append(int(fallen.iloc[0] - crossed.iloc[0]))
        row |= {"trajectories": len(trajectories), "collapsed": collapsed, "threshold": threshold}
        row |= {"before": sum(lead > 0 for lead in leads), "lead": float(np.median(leads)) if leads else math.nan}
        rows.append(row | {"false_alarms": alarms})
    return pd.DataFrame(rows).sort_values("rho", kind="stable", ignore_index=True)


def _rank_correlation(trajectories: Sequence[pd.DataFrame], measure: str) -> dict[str, float]:
    """Spearman's rho of a measure and the ability kept, with its bootstrap interval over trajectories."""
    pairs = [own[[measure, "kept"]].dropna().to_numpy(float) for own in trajectories]

    def rho(which: np.ndarray) -> float:
        ranks = scipy_stats.rankdata(np.concatenate([pairs[index] for index in which]), axis=0)
        if np.ptp(ranks, axis=0).min() == 0:
            return 0.0  # what does not vary predicts nothing
        return float(np.corrcoef(ranks.T)[0, 1])

    every = np.arange(len(pairs))
    low = high = math.nan
    if len(pairs) > 1:
        interval = scipy_stats.bootstrap(
            (every,),
            rho,
            vectorized=False,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"rho": rho(every), "rho_low": low, "rho_high": high}
