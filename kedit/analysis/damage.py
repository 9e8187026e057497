"""Structure damage: what breaks first?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from kedit.analysis.scores import COLLAPSED, LEVEL, LINE, TRAJECTORY, answers, table
from kedit.editors import kind_of
from kedit.evaluation.benchmarks import known, metadata
from kedit.study.results import Results


@dataclass(frozen=True)
class Indicator:
    """One number for the damage: its value without edits, where it gives the alarm, and its panel's title and axis.

    Ratios are drawn on logarithmic axes; distances on axes that are linear up to 0.01, so that no damage at all
    can be drawn on them.
    """

    undamaged: float
    alarm: float
    title: str
    axis: str


RESAMPLES = 2000
INDICATORS = {
    "relative": Indicator(0.0, 0.1, "weights: |dW| / |W|", "symlog"),
    "spectral": Indicator(1.0, 2.0, "spectral norm, ratio", "log"),
    "condition": Indicator(1.0, 2.0, "condition number, ratio", "log"),
    "cosine": Indicator(0.0, 0.1, "states: cosine distance", "symlog"),
    "l2": Indicator(0.0, 0.5, "states: relative distance", "symlog"),
    "perplexity": Indicator(1.0, 2.0, "perplexity, ratio", "log"),
    "entropy": Indicator(0.0, 1.0, "entropy, change (nats)", "symlog"),
    "kl": Indicator(0.0, 1.0, "KL from unedited (nats)", "symlog"),
}
"""Alarms: doubling for ratios, a tenth of the matrix for the change, a tenth of the way to orthogonal (or half the
state's length) for the states, a nat for the answers: set before any run was seen, not fitted to one."""


def damage(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Every indicator from the items of ``kedit.evaluation.damage.measure``.

    Weights (``relative``, ``spectral``, ``condition``): the worst matrix. States (``cosine``, ``l2``): the last
    block, whose output is unembedded. Answers: ``perplexity`` (ratio to the unedited model's on the same
    tokens), ``entropy`` (size of its change, nats), ``kl`` (nats). What is not a number, because the model is
    broken, is infinite damage.
    """
    weights, layers, texts = ([i for i in items if i["kind"] == kind] for kind in ("weight", "layer", "text"))
    tokens = [text["tokens"] for text in texts]

    def mean(name: str) -> float:
        return float(np.average([text[name] for text in texts], weights=tokens))

    damage = {
        name: float(np.max([weight[name] for weight in weights] or INDICATORS[name].undamaged))
        for name in ("relative", "spectral", "condition")
    }
    damage |= {name: layers[-1][name] for name in ("cosine", "l2")}
    with np.errstate(over="ignore"):
        damage["perplexity"] = float(np.exp(mean("nll") - mean("nll_unedited")))
    damage |= {"entropy": abs(mean("entropy") - mean("entropy_unedited")), "kl": mean("kl")}
    return {name: math.inf if math.isnan(value) else value for name, value in damage.items()}


def ability_kept(rows: pd.DataFrame, scale: str = "value") -> pd.DataFrame:
    """The ability score kept at each checkpoint: 1 all of what the unedited model has above chance, 0 none.

    Args:
        rows: of ``scores.table``.
        scale: ``value`` (right or wrong) or ``graded``.

    Returns:
        columns model, method, variant, order, edits and ``kept``, the mean over the benchmarks of some aspect that are
        off the floor.
    """
    rows = rows[rows.benchmark.isin(known()) & (rows.status != "floor")]
    rows = rows[rows.benchmark.map(lambda name: "aspect" in metadata(name))]
    rows = rows[(rows.metric == "graded") == (scale == "graded")]
    kept = (rows.value - rows.chance) / (rows.value - rows.delta - rows.chance)
    return rows.assign(kept=kept).groupby([*TRAJECTORY, "edits"], sort=False).kept.mean().reset_index()


def checkpoints(results: Results, scale: str = "value") -> pd.DataFrame:
    """Every checkpoint's damage beside the ability ``kept`` on a scale, for each order."""
    rows = [checkpoint | damage(items) for checkpoint, _, items, _ in answers(results, ["structure"])]
    return ability_kept(table(results), scale).merge(pd.DataFrame(rows))


def predictors(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Which indicator of damage predicts collapse, and how early?

    Args:
        checkpoints: one row a checkpoint: columns ``model``, ``method``, ``variant`` and ``order`` as far as
            there (together a trajectory), ``edits``, ``kept`` (as ``ability_kept`` finds it) and any of
            ``INDICATORS``. Checkpoints without edits and the control are left out, being unedited by definition.
            Damage is cheaper than ability: ``kept`` may be missing where only damage was measured, and then helps
            to see when an alarm is crossed (a lead is never longer than to the first checkpoint that shows
            the collapse, which may have come before).

    Returns:
        one row an indicator (``measure``), the strongest first: ``rho``, Spearman's rank correlation with ``kept``
        over all checkpoints (negative: more damage, less ability), ``rho_low`` and ``rho_high`` its 95% percentile
        bootstrap interval over whole trajectories (the checkpoints of one depend on each other); ``within`` and its
        interval the same of ranks within each method that does some damage, so that nothing leans on differences
        between methods, or on those that do none (nan where nothing varies). Of the
        trajectories that collapse (first checkpoint with ``kept`` under ``COLLAPSED``), ``collapsed`` in number:
        how many cross the alarm's ``threshold`` ``before`` that checkpoint, and the median ``lead`` in edits of
        those that cross it at all (0 at the same checkpoint, negative after it). ``false_alarms``: trajectories
        that cross it and do not collapse.
    """
    edited = (checkpoints.edits > 0) & checkpoints.method.map(lambda method: kind_of(method).edits)
    frame = checkpoints[edited].sort_values("edits", kind="stable")
    names = [name for name in TRAJECTORY if name in frame]
    trajectories = [rows for _, rows in frame.groupby(names, sort=False, dropna=False)]
    rows = []
    for name in (name for name in INDICATORS if name in frame):
        leads, collapsed, false_alarms = [], 0, 0
        for t in trajectories:
            fallen, crossed = t.edits[t.kept < COLLAPSED], t.edits[t[name] >= INDICATORS[name].alarm]
            collapsed += len(fallen) > 0
            false_alarms += len(crossed) > 0 and not len(fallen)
            if len(fallen) and len(crossed):
                leads.append(int(fallen.iloc[0] - crossed.iloc[0]))
        before, lead = sum(lead > 0 for lead in leads), float(np.median(leads)) if leads else math.nan
        harmed = [t for t in trajectories if (t[name] != INDICATORS[name].undamaged).any()]
        correlations = *_correlation(trajectories, name, False), *_correlation(harmed, name, True)
        rows.append((name, *correlations, collapsed, INDICATORS[name].alarm, before, lead, false_alarms))
    columns = ["measure", "rho", "rho_low", "rho_high", "within", "within_low", "within_high"]
    columns += ["collapsed", "threshold", "before", "lead", "false_alarms"]
    return pd.DataFrame(rows, columns=columns).sort_values("rho", kind="stable", ignore_index=True)


def _correlation(trajectories: Sequence[pd.DataFrame], name: str, within: bool) -> tuple[float, float, float]:
    """Spearman's rho of an indicator and the ability kept, with its bootstrap interval over trajectories.

    Args:
        within: ranks are taken within each method, and centred there.
    """
    pairs = [rows[[name, "kept"]].dropna().to_numpy(float) for rows in trajectories]
    lines = [tuple(rows[[c for c in LINE if c in rows]].iloc[0]) if within else () for rows in trajectories]

    def rho(which: np.ndarray) -> float:
        drawn: dict[tuple, list[np.ndarray]] = {}
        for index in which:
            drawn.setdefault(lines[index], []).append(pairs[index])
        ranks = [stats.rankdata(np.concatenate(some), axis=0) for some in drawn.values()]
        ranks = np.concatenate([each - each.mean(0) for each in ranks])
        spread = (ranks**2).sum(0)
        if not spread.min():
            return 0.0  # what does not vary predicts nothing
        return float((ranks[:, 0] * ranks[:, 1]).sum() / np.sqrt(spread.prod()))

    count = len(pairs)
    if not count:
        return math.nan, math.nan, math.nan
    every = np.arange(count)
    if count < 2:
        return rho(every), math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.quantile([rho(draw) for draw in draws], [LEVEL / 2, 1 - LEVEL / 2])
    return rho(every), float(low), float(high)
