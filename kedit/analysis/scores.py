"""From item-level outcomes to a tidy table: scores, intervals, paired differences, status."""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import proportion_confint

from kedit.evaluation import benchmarks, success
from kedit.study.results import Results

COLUMNS = [
    "rq", "params", "model", "method", "variant", "edit_set", "order", "edits", "benchmark", "metric", "value",
    "ci_low", "ci_high", "n", "chance", "unparsed", "delta", "delta_low", "delta_high", "status",
]  # fmt: skip
RESAMPLES = 2000
COLLAPSED = 0.5
"""A score has collapsed when the upper bound of what it keeps above chance is under this share of what it had."""


def off_chance(values: Sequence[float], chance: float) -> float:
    """How many standard errors a mean lies from chance; the floor is less than three either way."""
    n, mean = len(values), float(np.mean(values))
    return (mean - chance) / math.sqrt(max(mean * (1 - mean), 1 / n) / n)


def summarise(items: Sequence[dict[str, Any]], chance: float | None = None) -> dict[str, Any]:
    """Score of some items, each with ``id``, ``value`` and ``base`` (the unedited model's value).

    Items of one id (paraphrases of one request, one question in several orders) form a cluster. The
    interval of the value is Wilson's with as many trials as clusters, which stays honest at 0 and 1;
    that of the paired difference is a percentile bootstrap over clusters.
    """
    clusters: dict[str, list[tuple[float, float]]] = {}
    for item in items:
        clusters.setdefault(item["id"], []).append((item["value"], item["base"]))
    row = dict.fromkeys(("value", "ci_low", "ci_high", "delta", "delta_low", "delta_high"), math.nan)
    row |= {"n": len(items), "unparsed": sum(not item.get("parsed", True) for item in items), "status": "ok"}
    if not items:
        return row
    counts = np.array([len(pairs) for pairs in clusters.values()], float)
    sums = np.array([sum(value for value, _ in pairs) for pairs in clusters.values()])
    changes = np.array([sum(value - base for value, base in pairs) for pairs in clusters.values()])
    row["value"] = value = sums.sum() / counts.sum()
    row["ci_low"], row["ci_high"] = proportion_confint(value * len(counts), len(counts), method="wilson")
    row["delta"] = changes.sum() / counts.sum()
    row["delta_low"], row["delta_high"] = _bootstrap(changes, counts)
    if chance is not None:
        base = value - row["delta"]
        unedited = [pairs[0][1] for pairs in clusters.values()]  # the same in every order, and so counted once
        if abs(off_chance(unedited, chance)) < 3:
            row["status"] = "floor"
        elif (row["ci_high"] - chance) * np.sign(base - chance) < COLLAPSED * abs(base - chance) and base > chance:
            row["status"] = "collapsed"
    return row


def _bootstrap(changes: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of a ratio of sums, resampling clusters."""
    if len(changes) < 2:
        return math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a difference that is 0 for every item has a degenerate interval
        interval = scipy_stats.bootstrap(
            (changes, counts),
            lambda change, count, axis: change.sum(axis) / count.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(interval.low), float(interval.high)


def scored(results: Results) -> list[dict[str, Any]]:
    """Every cell split by metric, each item beside what the unedited model did on it.

    Returns one record a (model, method, variant, order, edits, benchmark, metric), with ``chance`` and
    ``items``; the unedited checkpoint stands under each method and order of the grid.
    """
    params = results.params
    base: dict[tuple, list[dict]] = {}
    by_place: dict[tuple, list[dict]] = {}
    for cell in results.cells:
        place = (cell["model"], cell["benchmark"], cell["order"])
        if cell["method"] is None:
            base[place] = cell["items"]
        else:
            by_place[(*place, cell["method"], cell["variant"], cell["edits"])] = cell["items"]

    records = []
    for model in params.models:
        for method in params.methods:
            for order in params.orders:
                for count in params.edits:
                    for benchmark in ("edit", *params.benchmarks):
                        before = base[(model, benchmark, order if benchmark == "edit" else None)]
                        after = (
                            by_place[(model, benchmark, order, method.method, method.variant, count)]
                            if count
                            else before
                        )
                        where = {
                            "model": model, "method": method.method, "variant": method.variant,
                            "order": order, "edits": count, "benchmark": benchmark,
                        }  # fmt: skip
                        records += [{**where, **record} for record in _metrics(benchmark, after, before)]
    return records


def _metrics(benchmark: str, after: list[dict], before: list[dict]) -> list[dict[str, Any]]:
    if benchmark == "edit":
        found = success.outcomes(after, before)
        return [{"metric": metric, "chance": None, "items": items} for metric, items in found.items()]
    about = benchmarks.metadata(benchmark)
    items = [{**item, "base": base["value"]} for item, base in zip(after, before, strict=True)]
    return [{"metric": about["metric"], "chance": about["chance"], "items": items}]


def _row(record: dict[str, Any]) -> dict[str, Any]:
    row = {**{k: v for k, v in record.items() if k != "items"}, **summarise(record["items"], record["chance"])}
    if record["chance"] is not None and any(
        "lp" in item and not item["parsed"] for item in record["items"]
    ):  # log-likelihoods that are not finite: the model is broken, its score is not one
        row["status"] = "failed"
    return row


def table(results: Results) -> pd.DataFrame:
    """The tidy table: one row a checkpoint, benchmark and metric, for each order."""
    params = results.params
    rows = [
        {"rq": params.rq, "params": params.name, "edit_set": params.edit_set_name, **_row(record)}
        for record in scored(results)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def curves(results: Results) -> pd.DataFrame:
    """The same with the orders pooled: an item in several orders is one cluster."""
    pooled: dict[tuple, dict[str, Any]] = {}
    names = ("model", "method", "variant", "edits", "benchmark", "metric", "chance")
    for record in scored(results):
        place = tuple(record[name] for name in names)
        entry = pooled.setdefault(place, {**dict(zip(names, place, strict=True)), "items": []})
        entry["items"] += record["items"]
    return pd.DataFrame([_row(record) for record in pooled.values()])


AGES = (0, 1, 3, 10, 30, 100, 300, 1000, 3000)
"""Edges of the bins of an edit's age."""


def retention(results: Results) -> pd.DataFrame:
    """Is an edit still there after n more? Reliability by age, the number of edits made since.

    Every checkpoint asks about all edits so far, so edit k is seen at age n - k at checkpoint n; an
    edit seen at several ages of one bin is one cluster. Columns: method, after (the bin), value,
    ci_low, ci_high, n.
    """
    number = {(e["model"], e["method"], e["variant"], e["order"], e["request"]): e["number"] for e in results.edits}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in scored(results):
        if record["metric"] != "reliability" or record["method"] == "control":
            continue
        place = tuple(record[name] for name in ("model", "method", "variant", "order"))
        for item in record["items"]:
            if record["edits"]:
                age = record["edits"] - number[(*place, item["id"])]
                edge = max(edge for edge in AGES if edge <= age)
                found.setdefault((record["method"], edge), []).append(item)
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        for edge, following in pairwise(AGES):
            if items := found.get((method, edge)):
                name = str(edge) if following == edge + 1 else f"{edge}-{following - 1}"
                row = summarise(items)
                rows.append(
                    {"method": method, "after": name} | {k: row[k] for k in ("value", "ci_low", "ci_high", "n")}
                )
    return pd.DataFrame(rows)


def kept(rows: pd.DataFrame) -> pd.DataFrame:
    """The ability score kept at each checkpoint: 1 all of what the unedited model has above chance, 0 none.

    Args:
        rows: of ``table`` or ``curves``.

    Returns:
        the columns of the place (model, method, variant, order, edits, as far as there) and ``kept``, the mean
        over the benchmarks on which the unedited model is above chance by three standard errors; a
        benchmark that failed has kept nothing.
    """
    place = [name for name in ("model", "method", "variant", "order", "edits") if name in rows]
    rows = rows[(rows.benchmark != "edit") & (rows.status != "floor")].copy()
    base = rows.value - rows.delta
    rows["kept"] = (rows.value - rows.chance) / (base - rows.chance)
    rows.loc[rows.status == "failed", "kept"] = 0.0
    rows = rows[base > rows.chance]
    return rows.groupby(place, sort=False, dropna=False).kept.mean().reset_index()
