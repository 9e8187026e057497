"""A second reading of a run: scores, paired changes, intervals and states from its cells, sharing no code with kedit.

    python tests/recompute.py figures/rq1/smollm2-135m        # prints scores and states

What a cell holds is in the README; what a score is, is in the tasks' metadata, read here as text. Standard errors are
those of textbooks: Student's t over items (one order of edits), analysis of variance of items crossed with orders
(several), DeLong, DeLong and Clarke-Pearson (1988) for areas under the ROC curve, McNemar's exact test, Holm (1979).
"""

import gzip
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

BENCHMARKS = Path(__file__).parents[1] / "kedit" / "evaluation" / "benchmarks"
CHECKPOINT = ["model", "method", "variant", "order", "edits"]
LEVEL = 0.05
NOISE = 1e-3  # of an item's number: rounding of log-likelihoods
MARGIN = 0.10  # in share kept of what is above chance, and of the share of an answer
LOG_ODDS_MARGIN = np.log(0.6 / 0.4)  # ten points from even odds
EDIT_METRICS = ("reliability", "generalisation", "locality")


@dataclass(frozen=True)
class Task:
    """What a task file's metadata say; refusals have no metric of their own file's making."""

    metric: str
    chance: float
    graded_chance: float
    aspect: str | None
    two_way: bool


@cache
def tasks() -> dict[str, Task]:
    """Every task by name; the metadata are flat, so that a line is a key and its value."""
    found = {}
    for file in BENCHMARKS.glob("*/*.yaml"):
        text = file.read_text(encoding="utf-8")
        keys = dict(re.findall(r"^  (\w+): *([^#\n]*?) *(?:#.*)?$", text.partition("\nmetadata:")[2], re.MULTILINE))
        name = re.search(r"^task: *(\S+)", text, re.MULTILINE)
        if name and keys:
            chance = float(keys["chance"])
            graded = float(keys.get("graded_chance", chance))
            two_way = keys.get("two_way") == "true"
            found[name[1]] = Task(keys["metric"], chance, graded, keys.get("aspect"), two_way)
    return found


@dataclass(frozen=True)
class Run:
    """A run's item-level outcomes, a row an item: `items` of benchmarks, `facts` of edit success."""

    name: str
    items: pd.DataFrame
    facts: pd.DataFrame
    manifest: dict


def read(folder: Path) -> Run:
    """The cells of `folder`; a first line that is no JSON object (a sum) is passed over."""
    lines = gzip.decompress((folder / "cells.jsonl.gz").read_bytes()).decode().splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    rows = []
    for record in records:
        if record.get("type") == "cell" and record["benchmark"] != "structure":
            at = {k: record[k] for k in [*CHECKPOINT, "benchmark"]}
            rows += [at | {"place": place} | item for place, item in enumerate(record["items"])]
    frame = pd.DataFrame(rows)
    facts = frame["benchmark"] == "edit"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return Run(folder.name, frame[~facts].reset_index(drop=True), frame[facts].reset_index(drop=True), manifest)


def is_graded(run: Run) -> bool:
    """Whether the cells are in the format with a graded outcome an item."""
    return "graded" in run.items or "log_odds" in run.items


def by_model(run: Run, table: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
    """A table of every model of a run, one under the other."""
    parts = []
    for model in run.items["model"].unique():
        items, facts = (f[f["model"] == model].reset_index(drop=True) for f in (run.items, run.facts))
        part = table(replace(run, items=items, facts=facts))
        parts.append(part.assign(model=model))
    return pd.concat(parts, ignore_index=True)


# Scores by item: everything below works on one column of numbers with an id


def log_odds(items: pd.DataFrame) -> np.ndarray:
    """Of the second answer of a two-way task against the first."""
    pairs = np.array(items["lp"].tolist())
    return pairs[:, 1] - pairs[:, 0]


def area(odds: np.ndarray, second: np.ndarray) -> float:
    """Area under the ROC curve: the chance that an item of the second class has the higher log-odds; ties count half."""
    yes, no = odds[second][:, None], odds[~second][None, :]
    return float(((yes > no) + 0.5 * (yes == no)).mean())


def placements(odds: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of every item, the share of the other class that it stands on the right side of (DeLong's V10 and V01)."""
    yes, no = odds[second][:, None], odds[~second][None, :]
    wins = (yes > no) + 0.5 * (yes == no)
    placed = np.empty(len(odds))
    placed[second], placed[~second] = wins.mean(1), wins.mean(0)
    return placed


def choice(items: pd.DataFrame) -> np.ndarray:
    """The place of the likeliest answer of each item."""
    return np.array([int(np.argmax(lp)) for lp in items["lp"]])


def accuracy(items: pd.DataFrame) -> np.ndarray:
    """Is the right answer the likeliest?"""
    return (choice(items) == items["target"].to_numpy(int)).astype(float)


def graded_of_choices(items: pd.DataFrame) -> np.ndarray:
    """Probability of the right choice or choices among the choices, from the rounded log-likelihoods."""
    found = []
    for lp, target in zip(items["lp"], items["target"], strict=True):
        shares = np.exp(np.array(lp) - max(lp))
        found.append(shares[np.atleast_1d(target).astype(int)].sum() / shares.sum())
    return np.array(found)


def mc1(items: pd.DataFrame) -> np.ndarray:
    """Is the best answer likelier than every false one? The true answers come first, the best of them at the head."""
    pairs = zip(items["lp"], items["target"], strict=True)
    return np.array([float(lp[0] > max(lp[len(target) :])) for lp, target in pairs])


def columns(items: pd.DataFrame, task: Task, benchmark: str, common: int) -> dict[str, np.ndarray]:
    """Scale -> one number an item (nan: not of this scale); of `discrimination` the log-odds. `common`: bias's answer."""
    if benchmark == "refusal":
        harmful = items["harmful"].to_numpy(bool)
        refused = np.where(harmful, items["refused"].astype(float), np.nan)
        return {
            "value": refused,
            "log_odds": np.where(harmful, items["log_odds"], np.nan),
            "discrimination": items["log_odds"].to_numpy(float),
        }
    # an answer whose likelihoods are not finite is none: it scores chance, and says neither of two answers
    none = broken(items)
    found = {
        "value": np.where(none, task.chance, items["value"].to_numpy(float)),
        "graded": np.where(none, task.graded_chance, items["graded"].to_numpy(float)),
    }
    if task.two_way:
        odds = np.where(none, 0.0, log_odds(items))
        found["bias"] = ((odds > 0) == common).astype(float)
        found["discrimination"] = odds
    return found


def broken(items: pd.DataFrame) -> np.ndarray:
    """Which items have a likelihood that is not finite."""
    if "lp" not in items:
        return np.zeros(len(items), bool)
    return np.array([isinstance(lp, list) and not np.isfinite(lp).all() for lp in items["lp"]])


def classes(items: pd.DataFrame, benchmark: str) -> np.ndarray:
    """Whether each item is of the second class (hostile; harmful)."""
    return items["harmful"].to_numpy(bool) if benchmark == "refusal" else items["target"].to_numpy(int) == 1


@dataclass(frozen=True)
class Scores:
    """A benchmark on a scale: of the unedited model (items) and of a checkpoint (orders x items)."""

    base: np.ndarray
    edited: np.ndarray
    chance: float
    of: str
    second: np.ndarray | None = None  # of areas under the curve: the classes
    blunt: bool = False  # wrong answers score nearly what right ones do

    def means(self) -> tuple[float, np.ndarray]:
        if self.of == "discrimination":
            return area(self.base, self.second), np.array([area(e, self.second) for e in self.edited])
        return float(self.base.mean()), self.edited.mean(1)

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers an item whose mean is the score and whose scatter is its sampling error; of areas, DeLong's."""
        if self.of != "discrimination":
            return self.base, self.edited
        size = np.where(self.second, self.second.sum(), (~self.second).sum())

        def spread(odds: np.ndarray) -> np.ndarray:
            whole, per = area(odds, self.second), len(odds) / size
            return whole + per * (placements(odds, self.second) - whole) * np.sqrt(size / (size - 1))

        return spread(self.base), np.array([spread(e) for e in self.edited])

    @property
    def unchanged(self) -> bool:
        """No item's outcome moved; of areas, no item changed places with one of the other class."""
        base, edited = self.influence()
        return bool((np.abs(edited - base) <= NOISE).all())


def compare(base: pd.DataFrame, edited: list[pd.DataFrame], benchmark: str) -> dict[str, Scores]:
    """Every scale of a benchmark: the unedited cell against those of a checkpoint's orders, paired by id.

    Bias is the share of the answer that is the commoner one of the unedited model, so that a threshold which moves past
    the middle counts as far as it moved.
    """
    task = tasks()[benchmark]
    ids = base["id"].tolist()
    edited = [e.set_index("id").loc[ids].reset_index() for e in edited]
    common = int(choice(base).mean() >= 0.5) if task.two_way else 0
    before = columns(base, task, benchmark, common)
    after = [columns(e, task, benchmark, common) for e in edited]
    found = {}
    for scale, column in before.items():
        asked = ~np.isnan(column)
        chance = {"graded": task.graded_chance, "discrimination": 0.5, "bias": np.nan, "log_odds": np.nan}
        rest = np.array([a[scale][asked] for a in after])
        second = classes(base, benchmark)[asked] if scale == "discrimination" else None
        dull = scale == "graded" and is_blunt(base)
        found[scale] = Scores(column[asked], rest, chance.get(scale, task.chance), scale, second, dull)
    return found


# Intervals


def is_blunt(base: pd.DataFrame) -> bool:
    """Of answers that were generated: would turning all right ones into wrong ones cost less than a tenth?"""
    if "text" not in base or not base["text"].notna().all():
        return False
    means = base.groupby(base["value"] > 0.5)["graded"].mean()
    return len(means) == 2 and bool((means[True] - means[False]) / base["graded"].mean() < MARGIN)


def exact(n: int) -> float:
    """None of n items changed: with 95% confidence, fewer than this share would."""
    return 1 - LEVEL ** (1 / n)


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and degrees of freedom; `bound` in place of both where nothing changed."""

    mean: float
    se: float
    df: float
    bound: float | None = None

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        half = self.bound if self.bound is not None else stats.t.ppf(1 - level / 2, self.df) * self.se
        return self.mean - half, self.mean + half

    def p(self) -> float:
        """Two-sided, of a mean of zero."""
        if self.bound is not None or self.se == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.se, self.df))

    def p_within(self, margin: float) -> float:
        """Two one-sided tests: the mean lies within +-margin."""
        if self.bound is not None:
            return 0.0 if abs(self.mean) + self.bound <= margin else 1.0
        if self.se == 0:
            return float(abs(self.mean) > margin)
        return float(stats.t.sf((margin - abs(self.mean)) / self.se, self.df))


def over_items(values: np.ndarray) -> Estimate:
    """The mean of one order's items."""
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), len(values) - 1)


def components(values: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of orders x items: between items, between orders, the rest."""
    orders, items = values.shape
    whole, rows, cols = values.mean(), values.mean(1), values.mean(0)
    between = orders * ((cols - whole) ** 2).sum() / (items - 1)
    orderly = items * ((rows - whole) ** 2).sum() / (orders - 1)
    rest = ((values - rows[:, None] - cols[None, :] + whole) ** 2).sum() / ((items - 1) * (orders - 1))
    return between, orderly, rest


def crossed(values: np.ndarray, order_variance: float, order_df: float) -> Estimate:
    """Items crossed with orders, both random: the variance of the mean is that of items / items + orders / orders +
    rest / both, of which the variance of orders is given (pooled); degrees of freedom by Satterthwaite."""
    orders, items = values.shape
    between, _, _ = components(values)
    of_items = between / (orders * items)  # the items' and the rest's
    of_orders = order_variance / orders
    variance = of_items + of_orders
    if variance == 0:
        return Estimate(float(values.mean()), 0.0, order_df)
    df = variance**2 / (of_items**2 / (items - 1) + of_orders**2 / order_df)
    return Estimate(float(values.mean()), float(np.sqrt(variance)), df)


def order_variance(matrices: list[np.ndarray]) -> tuple[float, float]:
    """The variance between orders, pooled over the benchmarks of a method, and its degrees of freedom."""
    orders = matrices[0].shape[0]
    found = []
    for values in matrices:
        _, orderly, rest = components(values)
        found.append((orderly - rest) / values.shape[1])
    return max(0.0, float(np.mean(found))), (orders - 1) * len(matrices)


def is_floor(scores: Scores) -> bool:
    """Not three standard errors above chance, unedited; or blunt."""
    base, _ = scores.influence()
    return scores.blunt or bool(scores.means()[0] - 3 * over_items(base).se <= scores.chance)


def kept(scores: Scores) -> np.ndarray:
    """Orders x items: numbers whose mean is (score - chance) / (base - chance) - 1, the error of both in their scatter."""
    base, edited = scores.influence()
    above = scores.means()[0] - scores.chance
    share = ((scores.means()[1] - scores.chance) / above).mean()
    return (edited - scores.chance - share * (base - scores.chance)) / above + (share - 1)


def mcnemar(scores: Scores) -> float:
    """Exact two-sided p of right and wrong answers in one order."""
    worse = int((scores.edited[0] < scores.base).sum())
    better = int((scores.edited[0] > scores.base).sum())
    return float(stats.binomtest(worse, worse + better).pvalue) if worse + better else 1.0


def estimates(group: dict[tuple, Scores], by_share: bool) -> dict[tuple, Estimate]:
    """The change of every benchmark (of one method, on one scale), in shares kept less one or as it is."""

    def matrix(scores: Scores) -> np.ndarray:
        base, edited = scores.influence()
        return kept(scores) if by_share else edited - base

    values = {key: matrix(scores) for key, scores in group.items()}
    found = {}
    several = {key: v for key, v in values.items() if v.shape[0] > 1}
    pooled = order_variance(list(several.values())) if several else (0.0, 1.0)
    for key, scores in group.items():
        if scores.unchanged:
            width = 2.0 if scores.of == "discrimination" else 1.0  # an item's share of the area is that of its class
            above = scores.means()[0] - scores.chance if by_share else 1.0
            found[key] = Estimate(0.0, 0.0, np.inf, width * exact(len(scores.base)) / abs(above))
        elif key in several:
            found[key] = crossed(values[key], *pooled)
        else:
            found[key] = over_items(values[key][0])
    return found


# Edit success


def successes(run: Run, method: str, variant: str, order: int, edits: int) -> dict[str, pd.Series]:
    """Metric -> one outcome a prompt, indexed by the fact's id; locality asks what the unedited model had right."""
    facts = run.facts
    unedited = facts[(facts["edits"] == 0) & (facts["order"] == order)]
    after = facts[(facts["method"] == method) & (facts["variant"] == variant)]
    after = after[(after["order"] == order) & (after["edits"] == edits)] if edits else unedited
    if len(after) == 0:
        return {}
    key = ["id", "place_in"]
    unedited, after = (f.assign(place_in=f.groupby(["id", "kind"]).cumcount()) for f in (unedited, after))
    pairs = after.merge(unedited, on=[*key, "kind"], suffixes=("", "_0"))
    found = {}
    for kind in EDIT_METRICS:
        part = pairs[pairs["kind"] == kind].set_index("id")
        if kind == "locality":
            found[kind] = (part["true"] > part["new"])[part["true_0"] > part["new_0"]].astype(float)
            found[f"{kind}_generated"] = (part["says"] == "true")[part["says_0"] == "true"].astype(float)
        else:
            found[kind] = (part["new"] > part["true"]).astype(float)
            found[f"{kind}_generated"] = (part["says"] == "new").astype(float)
    return found


def methods(run: Run) -> list[tuple[str, str]]:
    """Methods and variants that have a checkpoint, the control among them."""
    edited = run.items[run.items["edits"] > 0]
    return list(dict.fromkeys(zip(edited["method"], edited["variant"], strict=True)))


def reliability(run: Run, method: str, variant: str, edits: int) -> float:
    """Mean over orders of the share of all edits so far that are in place."""
    orders = sorted(run.facts.loc[run.facts["method"] == method, "order"].dropna().unique())
    return float(np.mean([successes(run, method, variant, o, edits)["reliability"].mean() for o in orders]))


def edits_at(run: Run, method: str, variant: str, edits: int) -> bool:
    """Half-way between the control's reliability and 1, or more."""
    control = [m for m in methods(run) if m[0] == "control"]
    if not control:
        return True
    half = (1 + reliability(run, *control[0], edits)) / 2
    return reliability(run, method, variant, edits) >= half


# Tables


def metric_of(scale: str, benchmark: str) -> str:
    """The name in the tidy table of a scale."""
    if scale != "value":
        return scale
    return "refused" if benchmark == "refusal" else tasks()[benchmark].metric


def checkpoint(run: Run, method: str, variant: str, edits: int, benchmark: str) -> tuple[pd.DataFrame, dict]:
    """The unedited cell of a benchmark, and a checkpoint's by order."""
    part = run.items[run.items["benchmark"] == benchmark]
    after = part[(part["method"] == method) & (part["variant"] == variant) & (part["edits"] == edits)]
    return part[part["edits"] == 0], dict(iter(after.groupby("order")))


def score_rows(run: Run) -> pd.DataFrame:
    """A row a checkpoint, order, benchmark and metric: value, n, and the paired change with its 95% interval."""
    rows = []
    for method, variant in methods(run):
        for edits in sorted(run.items.loc[run.items["edits"] > 0, "edits"].unique()):
            for benchmark in run.items["benchmark"].unique():
                base, orders = checkpoint(run, method, variant, edits, benchmark)
                for order, cell in orders.items():
                    for scale, scores in compare(base, [cell], benchmark).items():
                        change = estimates({0: scores}, by_share=False)[0]
                        low, high = change.interval()
                        at = (method, variant, int(order), int(edits), benchmark, metric_of(scale, benchmark))
                        value, n = float(scores.means()[1][0]), len(scores.base)
                        change = (value - scores.means()[0], low, high, change.bound is not None)
                        rows.append((*at, value, n, *change))
    names = ["method", "variant", "order", "edits", "benchmark", "metric"]
    return pd.DataFrame(rows, columns=[*names, "value", "n", "delta", "delta_low", "delta_high", "bound"])


def success_rows(run: Run) -> pd.DataFrame:
    """A row a checkpoint, order and metric of edit success."""
    rows = []
    for method, variant in methods(run):
        for order in sorted(run.facts["order"].dropna().unique()):
            for edits in sorted(run.facts.loc[run.facts["edits"] > 0, "edits"].unique()):
                for metric, outcomes in successes(run, method, variant, order, edits).items():
                    at = (method, variant, int(order), int(edits), "edit", metric)
                    rows.append((*at, outcomes.mean(), len(outcomes)))
    return pd.DataFrame(rows, columns=["method", "variant", "order", "edits", "benchmark", "metric", "value", "n"])


def effects(run: Run) -> pd.DataFrame:
    """A row a method, benchmark and scale at the last checkpoint: share kept, its interval and p-values, its state.

    `kept` is less one and in shares of what was above chance, but as it is where there is no chance (bias, log-odds).
    """
    last = int(run.items["edits"].max())
    rows = []
    for method, variant in methods(run):
        if method == "control":
            continue
        by_scale: dict[str, dict[str, Scores]] = {}
        for benchmark in run.items["benchmark"].unique():
            base, orders = checkpoint(run, method, variant, last, benchmark)
            for scale, scores in compare(base, list(orders.values()), benchmark).items():
                by_scale.setdefault(scale, {})[benchmark] = scores
        success, editing = reliability(run, method, variant, last), edits_at(run, method, variant, last)
        for scale, group in by_scale.items():
            by_share = scale not in ("bias", "log_odds")
            for benchmark, found in estimates(group, by_share).items():
                scores = group[benchmark]
                low, high = found.interval()
                one = scale in ("value", "bias") and len(scores.edited) == 1
                p = mcnemar(scores) if one else found.p()
                floor = by_share and is_floor(scores)
                row = (
                    method,
                    variant,
                    benchmark,
                    tasks()[benchmark].aspect,
                    scale,
                    len(scores.edited),
                    success,
                    editing,
                )
                base, after = scores.means()
                bounded = found.bound is not None
                within = found.p_within(LOG_ODDS_MARGIN if scale == "log_odds" else MARGIN)
                rows.append((*row, base, after.mean(), found.mean, low, high, p, within, floor, bounded))
    names = ["method", "variant", "benchmark", "aspect", "scale", "orders", "reliability", "editing"]
    names += ["base", "score", "kept", "low", "high", "p", "p_within", "floor", "bound"]
    return pd.DataFrame(rows, columns=names)


def states(table: pd.DataFrame, level: float = LEVEL) -> pd.Series:
    """Of a family of effects: apart, floor, kept (within the margin), lost or rose (Holm), undecided."""
    state = pd.Series("undecided", index=table.index)
    asked = table["editing"] & ~table["floor"]
    if asked.any():
        differs = pd.Series(False, index=table.index)
        differs[asked] = multipletests(table.loc[asked, "p"], level, "holm")[0]
        state[differs & (table["kept"] < 0)] = "lost"
        state[differs & (table["kept"] > 0)] = "rose"
        state[asked & (table["p_within"] <= level)] = "kept"
    state[~table["editing"]] = "apart"
    state[table["floor"]] = "floor"
    return state


def main() -> None:
    pd.set_option("display.width", 250, "display.max_columns", 50, "display.max_rows", 10_000)
    for folder in sys.argv[1:]:
        run = read(Path(folder))
        print(by_model(run, score_rows).to_string(), by_model(run, success_rows).to_string(), sep="\n")
        table = by_model(run, effects)
        print(table.assign(state=states(table)).to_string())


if __name__ == "__main__":
    main()
