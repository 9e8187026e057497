"""From item-level outcomes to a tidy table: scores on every scale, intervals, paired differences, status.

Each question is scored on two scales with the same chance: right or wrong (``value``, the study's metric), and
``graded`` (0 to 1: the probability given to the right answer). Where there are two answers to all questions of a
benchmark, two more tell a lost ability from a moved threshold: ``discrimination`` (area under the ROC curve) and
``bias`` (share of the unedited model's commoner answer). Refusals have ``log_odds``, in nats, for a graded scale. What
a broken model leaves without a finite likelihood scores chance, and counts as lost.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from kedit import KeditError
from kedit.analysis.safety import gives, placements
from kedit.editors import kind_of
from kedit.evaluation import benchmarks, success
from kedit.evaluation.records import Item
from kedit.study.results import Results

COLUMNS = [
    "rq", "params", "model", "method", "variant", "edit_set", "order", "edits", "benchmark", "metric", "value",
    "ci_low", "ci_high", "n", "chance", "unparsed", "delta", "delta_low", "delta_high", "status",
]  # fmt: skip
LINE = ["model", "method", "variant"]
"""What a curve is of."""
TRAJECTORY = [*LINE, "order"]
LEVEL = 0.05
FLOOR = 3
"""A score is at the floor unless it is so many standard errors above chance."""
MARGIN = 0.10
"""Abilities of which so much of what was above chance is lost or gained, or less, count as kept."""
NOISE = 1e-3
"""Changes of an item's number up to this are none: rounding of log-likelihoods makes such."""
COLLAPSED = 0.5
"""A score has collapsed when the upper bound of what it keeps above chance is under this share of what it had."""


def off_chance(values: Sequence[float] | np.ndarray, chance: float) -> float:
    """How many standard errors a mean lies above chance; the least of the errors is that of one right answer."""
    return float((np.mean(values) - chance) / math.sqrt(max(np.var(values), 1 / len(values)) / len(values)))


def at_floor(values: Sequence[float] | np.ndarray, chance: float) -> bool:
    """Whether what the unedited model answers is not clearly above chance, so that nothing can be lost."""
    return off_chance(values, chance) < FLOOR


def blunt(items: Sequence[Item], scale: str) -> bool:
    """Whether a scale could not show a loss: answers that are wrong score nearly what right ones do.

    So where a worked answer is scored and most of its tokens are its form. If turning every right answer into a wrong
    one would cost less than the margin, all of it could be lost and the ability count as kept.

    Args:
        items: of the unedited model.
    """
    if scale != "graded" or "text" not in items[0]:
        return False
    score, right = (np.array([float(item[key]) for item in items]) for key in ("graded", "value"))
    if right.min() > 0 or right.max() < 1:
        return False
    return bool(score[right == 1].mean() - score[right == 0].mean() < MARGIN * score.mean())


def unseen(n: int, level: float = LEVEL) -> float:
    """The largest share of items that change of which ``n`` would show none with probability ``level`` (exact)."""
    return 1 - level ** (1 / n)


def shown(value: float, low: float = math.nan, high: float = math.nan, sign: str = "") -> str:
    """A number with its interval as text; ``sign`` as in a format, ``-`` for a number that is not one."""
    if math.isnan(value):
        return "-"
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]" if math.isfinite(low) else f"{value:{sign}.2f}"


# Scales --------------------------------------------------------------------------------------------


def broken(item: Item) -> bool:
    """Whether the model's likelihoods are not finite, so that its answer is none."""
    return not np.isfinite([*item.get("lp", ()), item.get("graded", 0.0), item.get("log_odds", 0.0)]).all()


def scales(
    name: str, items: Sequence[Item], before: Sequence[Item] | None = None
) -> dict[str, tuple[list[str], np.ndarray, float]]:
    """Numbers of a benchmark's items on each scale that it has, whose mean is the score.

    Args:
        before: the unedited model's answers, whose commoner one the bias is the share of; else those of ``items``.

    Returns:
        scale -> ids of its items, their numbers (items,), and chance: nan where there is none to be above.

    Raises:
        KeditError: the items are of an older version, without the graded scale.
    """
    about, ids = benchmarks.metadata(name), [item["id"] for item in items]
    lost = np.array([broken(item) for item in items])

    def numbers(key: str, otherwise: float) -> np.ndarray:
        try:
            return np.where(lost, otherwise, [float(item[key]) for item in items])
        except KeyError as error:
            raise KeditError(f"items of {name} have no {key}: they are of an older version; run them again.") from error

    chance = about["chance"]
    if "harmful" in items[0]:
        positive = np.array([item["harmful"] for item in items])
        asked, odds = [item["id"] for item in items if item["harmful"]], numbers("log_odds", 0.0)
        found = {
            "value": (asked, numbers("refused", 0.0)[positive], chance),
            "log_odds": (asked, odds[positive], math.nan),
        }
    else:
        found = {"value": (ids, numbers("value", chance), chance)}
        if "text" not in items[0] or "reference" in about:
            guess = about.get("graded_chance", chance)
            found["graded"] = ids, numbers("graded", guess), guess
        if not about.get("two_way"):
            return found
        odds, usual = (
            np.array([0.0 if broken(item) else item["lp"][1] - item["lp"][0] for item in some])
            for some in (items, before or items)
        )
        positive = np.array([item["target"] == 1 for item in items])
        found["bias"] = ids, gives(odds, usual), math.nan
    if 0 < positive.sum() < len(positive):
        found["discrimination"] = ids, placements(odds, positive), 0.5
    return found


def answers(results: Results, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], str, list[Item], list[Item]]]:
    """What every checkpoint of every trajectory answered: (checkpoint, name, items, the unedited model's items).

    Args:
        names: ``edit``, benchmarks or measures of the run.

    Yields:
        the checkpoint as a mapping of ``model``, ``method``, ``variant``, ``order`` and ``edits``; the unedited
        one stands under each method and order of the grid.
    """
    params = results.params
    found = {(c.model, c.method, c.variant, c.order, c.edits, c.benchmark): c.items for c in results.cells}
    for model, method, order, count, name in product(params.models, params.methods, params.orders, params.edits, names):
        position = (model, method.method, method.variant, order, count)
        checkpoint = dict(zip([*TRAJECTORY, "edits"], position, strict=True))
        before = found[model, None, None, order if name == "edit" else None, 0, name]
        yield checkpoint, name, found[*position, name] if count else before, before


def asked(results: Results) -> list[str]:
    """Benchmarks of a run, and refusals where they were measured."""
    return [*results.params.benchmarks, *(name for name in results.params.measures if name == "refusal")]


# The table -----------------------------------------------------------------------------------------


def summarise(items: Sequence[Item], chance: float = math.nan) -> dict[str, Any]:
    """Score of some items, each with ``id``, ``value`` and ``base`` (the unedited model's value).

    Items of one id (paraphrases of one request) form a cluster. The interval of a score of nothing but 0 and 1 is
    Wilson's with as many trials as clusters, which stays honest at 0 and 1; all others, the paired difference's among
    them, are t intervals over clusters; where no item changed, the difference's is the exact bound (``unseen``).
    """
    row = dict.fromkeys(("value", "ci_low", "ci_high", "delta", "delta_low", "delta_high"), math.nan)
    row |= {"n": len(items), "unparsed": sum(not item.get("parsed", True) for item in items), "status": "ok"}
    if not items:
        return row
    _, cluster = np.unique([item["id"] for item in items], return_inverse=True)
    value, base = (np.array([item[key] for item in items], float) for key in ("value", "base"))
    counts = np.bincount(cluster)
    half = {}
    for key, numbers in (("value", value), ("delta", value - base)):
        row[key] = mean = float(numbers.mean())
        spread = np.bincount(cluster, numbers - mean)  # of a ratio, to first order
        error = math.sqrt((spread**2).sum() * len(counts) / max(len(counts) - 1, 1)) / len(items)
        half[key] = stats.t.ppf(1 - LEVEL / 2, len(counts) - 1) * error if len(counts) > 1 else math.nan
    if (np.abs(value - base) <= NOISE).all():
        half["delta"] = unseen(len(counts))
    row["ci_low"], row["ci_high"] = row["value"] - half["value"], row["value"] + half["value"]
    if set(value) <= {0.0, 1.0}:
        row["ci_low"], row["ci_high"] = proportion_confint(row["value"] * len(counts), len(counts), method="wilson")
    row["delta_low"], row["delta_high"] = row["delta"] - half["delta"], row["delta"] + half["delta"]
    if not math.isnan(chance):
        if at_floor(base, chance):
            row["status"] = "floor"
        elif row["ci_high"] - chance < COLLAPSED * (base.mean() - chance):
            row["status"] = "collapsed"
    return row


def _cells(results: Results) -> Iterator[tuple[dict[str, Any], list[Item]]]:
    """Every cell by metric: what it is, with ``chance`` and whether it ``failed``, and its items beside their base."""
    for checkpoint, name, after, before in answers(results, ["edit", *asked(results)]):
        about: dict[str, Any] = {**checkpoint, "benchmark": name, "chance": math.nan, "failed": False, "blunt": False}
        if name == "edit":
            for metric, items in success.outcomes(after, before).items():
                yield about | {"metric": metric}, items
            continue
        was, about["failed"] = scales(name, before), any(broken(item) for item in after)
        metric = "refused" if name == "refusal" else benchmarks.metadata(name)["metric"]
        parsed = {item["id"]: item.get("parsed", True) for item in after}
        for scale, (ids, numbers, chance) in scales(name, after, before).items():
            rows = zip(ids, numbers, was[scale][1], strict=True)
            items = [Item(id=place, value=value, base=base, parsed=parsed[place]) for place, value, base in rows]
            about["blunt"] = blunt(before, scale)
            yield about | {"metric": metric if scale == "value" else scale, "chance": chance}, items


def _row(about: dict[str, Any], items: Sequence[Item]) -> dict[str, Any]:
    row = about | summarise(items, about["chance"])
    if about["blunt"]:
        row["status"] = "floor"
    return row | {"status": "failed"} if about["failed"] else row


def table(results: Results) -> pd.DataFrame:
    """The tidy table: one row a checkpoint, benchmark and metric, for each order.

    The metric ``value`` goes by the name that the benchmark gives it (``acc``, ``exact_match``; ``refused``).
    """
    run = {"rq": results.params.rq, "params": results.params.name, "edit_set": results.params.edit_set_name}
    return pd.DataFrame([run | _row(about, items) for about, items in _cells(results)], columns=COLUMNS)


def curves(results: Results) -> pd.DataFrame:
    """The same with the orders pooled: an item in several orders is one cluster, and intervals cover items only."""
    pooled: dict[tuple, tuple[dict[str, Any], list[Item]]] = {}
    for about, items in _cells(results):
        key = tuple(about[name] for name in (*LINE, "edits", "benchmark", "metric"))
        first, some = pooled.setdefault(key, (about, []))
        first["failed"] |= about["failed"]
        some.extend(items)
    return pd.DataFrame([_row(about, items) for about, items in pooled.values()]).drop(
        columns=["order", "failed", "blunt"]
    )


# Did the edits happen? -----------------------------------------------------------------------------


def editing(rows: pd.DataFrame) -> pd.DataFrame:
    """Which methods edit, at each checkpoint: reliability over all edits so far, mean over orders, against a threshold.

    The threshold is half-way between the control's reliability (without a control: the unedited model's) and 1.

    Args:
        rows: of ``table``.

    Returns:
        a row a model, method, variant and checkpoint with edits; columns ``reliability``, ``threshold``, ``editing``.
    """
    rows = rows[(rows.metric == "reliability") & (rows.edits > 0)]
    control = rows[~rows.method.map(lambda method: kind_of(method).edits)].groupby(["model", "edits"]).value.mean()
    rows = rows.assign(reliability=rows.value, unedited=rows.value - rows.delta)
    found = rows.groupby([*LINE, "edits"], sort=False)[["reliability", "unedited"]].mean().reset_index()
    without = [control.get((row.model, row.edits), row.unedited) for row in found.itertuples()]
    found["threshold"] = (1 + np.array(without)) / 2
    return found.assign(editing=found.reliability >= found.threshold).drop(columns="unedited")


def _aged(results: Results) -> Iterator[tuple[tuple, int, Item]]:
    """(model, method and variant; edits made since; item) of every edit asked about at every checkpoint."""
    number = {(e.model, e.method, e.variant, e.order, name): e.number for e in results.edits for name in e.requests}
    for at, _, after, before in answers(results, ["edit"]):
        if at["edits"] and kind_of(at["method"]).edits:
            *line, order = (at[name] for name in TRAJECTORY)
            for item in success.outcomes(after, before)["reliability"]:
                yield tuple(line), at["edits"], at["edits"] - number[*line, order, item["id"]], item


def tenths(results: Results) -> pd.DataFrame:
    """Reliability at the last checkpoint of the first and of the last tenth of the edits made, beside that of all.

    Columns: model, method, variant, edits, first, last, all.
    """
    count, parts = results.params.edits[-1], {}
    for line, edits, age, item in _aged(results):
        if edits == count:
            where = [True, age >= count - max(count // 10, 1), age < max(count // 10, 1)]
            parts.setdefault(line, []).append([item["value"] if here else math.nan for here in where])
    rows = [(*line, count, *np.nanmean(values, axis=0)) for line, values in parts.items()]
    return pd.DataFrame(rows, columns=[*LINE, "edits", "all", "first", "last"])
