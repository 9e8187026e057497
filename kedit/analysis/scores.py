"""From item-level outcomes to a tidy table: scores, intervals, paired differences, status."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from kedit.editors import kind_of
from kedit.evaluation import benchmarks, success
from kedit.evaluation.records import Item
from kedit.study.results import Results

COLUMNS = [
    "rq", "params", "model", "method", "variant", "edit_set", "order", "edits", "benchmark", "metric", "value",
    "ci_low", "ci_high", "n", "chance", "unparsed", "delta", "delta_low", "delta_high", "status",
]  # fmt: skip
TRAJECTORY = ["model", "method", "variant", "order"]
RESAMPLES = 2000
FLOOR = 3
"""A score is at the floor within so many standard errors of chance."""
COLLAPSED = 0.5
"""A score has collapsed when the upper bound of what it keeps above chance is under this share of what it had."""
AGES = (0, 1, 3, 10, 30, 100, 300, 1000, 3000)
"""Edges of the bins of an edit's age."""


def off_chance(values: Sequence[float] | np.ndarray, chance: float) -> float:
    """How many standard errors a mean lies above chance."""
    n, mean = len(values), float(np.mean(values))
    return (mean - chance) / math.sqrt(max(mean * (1 - mean), 1 / n) / n)


def shown(value: float, low: float = math.nan, high: float = math.nan, sign: str = "") -> str:
    """A number with its interval as text; ``sign`` as in a format, ``-`` for a number that is not one."""
    if math.isnan(value):
        return "-"
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]" if math.isfinite(low) else f"{value:{sign}.2f}"


def bootstrap(data: Sequence[np.ndarray], statistic: Callable[..., Any]) -> tuple[float, float]:
    """95% percentile interval of a statistic of arrays of one length, drawn anew together with replacement."""
    if len(data[0]) < 2:
        return math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nothing differs the interval is degenerate
        interval = stats.bootstrap(
            data, statistic, paired=True, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
    return float(interval.low), float(interval.high)


def summarise(items: Sequence[Item], chance: float | None = None) -> dict[str, Any]:
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
    row["delta_low"], row["delta_high"] = bootstrap(
        (changes, counts), lambda change, count, axis: change.sum(axis) / count.sum(axis)
    )
    if chance is not None:
        base = value - row["delta"]
        unedited = [pairs[0][1] for pairs in clusters.values()]  # the same in every order, and so counted once
        if abs(off_chance(unedited, chance)) < FLOOR:
            row["status"] = "floor"
        elif base > chance and row["ci_high"] - chance < COLLAPSED * (base - chance):
            row["status"] = "collapsed"
    return row


def outcomes(results: Results, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], str, list[Item], list[Item]]]:
    """What every checkpoint of every trajectory answered: (checkpoint, name, items, the unedited model's items).

    Args:
        names: ``edit``, benchmarks or measures of the run.

    Yields:
        the checkpoint as a mapping of ``model``, ``method``, ``variant``, ``order`` and ``edits``; the unedited
        one stands under each method and order of the grid.
    """
    params = results.params
    answers = {(c.model, c.method, c.variant, c.order, c.edits, c.benchmark): c.items for c in results.cells}
    for model, method, order, count, name in product(params.models, params.methods, params.orders, params.edits, names):
        position = (model, method.method, method.variant, order, count)
        checkpoint = dict(zip([*TRAJECTORY, "edits"], position, strict=True))
        before = answers[model, None, None, order if name == "edit" else None, 0, name]
        yield checkpoint, name, answers[*position, name] if count else before, before


def scored(results: Results) -> Iterator[dict[str, Any]]:
    """Every cell split by metric, each item beside what the unedited model did on it.

    Yields:
        one record a checkpoint, benchmark and metric, with ``chance`` and ``items``.
    """
    for checkpoint, benchmark, after, before in outcomes(results, ["edit", *results.params.benchmarks]):
        if benchmark == "edit":
            metrics, chance = success.outcomes(after, before), None
        else:
            about = benchmarks.metadata(benchmark)
            items = [{**item, "base": base["value"]} for item, base in zip(after, before, strict=True)]
            metrics, chance = {about["metric"]: items}, about["chance"]
        for metric, items in metrics.items():
            yield {**checkpoint, "benchmark": benchmark, "metric": metric, "chance": chance, "items": items}


def _row(record: dict[str, Any]) -> dict[str, Any]:
    items = record.pop("items")
    row = {**record, **summarise(items, record["chance"])}
    if record["chance"] is not None and any("lp" in item and not item["parsed"] for item in items):
        row["status"] = "failed"  # log-likelihoods that are not finite: the model is broken, its score is not one
    return row


def table(results: Results) -> pd.DataFrame:
    """The tidy table: one row a checkpoint, benchmark and metric, for each order."""
    params = results.params
    run = {"rq": params.rq, "params": params.name, "edit_set": params.edit_set_name}
    return pd.DataFrame([run | _row(record) for record in scored(results)], columns=COLUMNS)


def curves(results: Results) -> pd.DataFrame:
    """The same with the orders pooled: an item in several orders is one cluster."""
    pooled: dict[tuple, dict[str, Any]] = {}
    for record in scored(results):
        items = record.pop("items")
        del record["order"]
        pooled.setdefault(tuple(record.values()), {**record, "items": []})["items"] += items
    return pd.DataFrame([_row(record) for record in pooled.values()])


def retention(results: Results) -> pd.DataFrame:
    """Is an edit still there after n more? Reliability by age, the number of edits made since.

    Every checkpoint asks about all edits so far, so edit k is seen at age n - k at checkpoint n; an
    edit seen at several ages of one bin is one cluster. Columns: method, after (the bin), value,
    ci_low, ci_high, n.
    """
    number = {(e.model, e.method, e.variant, e.order, e.request): e.number for e in results.edits}
    ages: dict[str, dict[int, list[Item]]] = {}
    for record in scored(results):
        if record["metric"] == "reliability" and record["edits"] and kind_of(record["method"]).edits:
            trajectory = tuple(record[name] for name in TRAJECTORY)
            bins = ages.setdefault(record["method"], {})
            for item in record["items"]:
                age = record["edits"] - number[*trajectory, item["id"]]
                bins.setdefault(max(edge for edge in AGES if edge <= age), []).append(item)
    names = {edge: str(edge) if end == edge + 1 else f"{edge}-{end - 1}" for edge, end in pairwise(AGES)}
    rows = [
        {"method": method, "after": name, **summarise(bins[edge])}
        for method, bins in ages.items()
        for edge, name in names.items()
        if edge in bins
    ]
    return pd.DataFrame(rows, columns=["method", "after", "value", "ci_low", "ci_high", "n"])
