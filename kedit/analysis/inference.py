"""What the scores say of methods: shares kept, contrasts and trends, with intervals that cover items and orders.

What is estimated is a mean over draws of the facts and their order, so orders are random, like items, and the two are
crossed: every order answers the same items. With O orders and I items the variance of a mean is

    s_order^2 / O + (s_item^2 + s_rest^2 / O) / I,

the second term being the variance of the items' means over orders, by I; the first is the variance between the orders'
means less what items alone would make of it (the usual sums of squares of a two-way table). Few orders say little of
s_order, so it is pooled over the abilities of a method, or over methods where these are few; an ability whose own
orders differ more keeps its own. Intervals are Student's, with Satterthwaite's degrees of freedom. With one order they
cover items only, and what is said holds for these edits.

Mostly the share *kept* is compared: the score above chance over what the unedited model had above chance, to first
order in both.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from kedit.analysis.scores import (
    LEVEL,
    LINE,
    MARGIN,
    NOISE,
    answers,
    asked,
    at_floor,
    blunt,
    editing,
    scales,
    shown,
    table,
    unseen,
)
from kedit.editors import kind_of
from kedit.evaluation import benchmarks
from kedit.study.params import Params
from kedit.study.results import Results

SCALES = ("value", "graded")
"""Right or wrong, and graded: the two that stand side by side."""
LOGIT_MARGIN = math.log((0.5 + MARGIN) / (0.5 - MARGIN))
"""The same on a scale of log-odds: what moves even odds by as much."""
MANY = 1000.0
"""Degrees of freedom where nothing varies."""
FEW = 5
"""With fewer orders there is no verdict."""
ENOUGH = 10
"""With fewer degrees of freedom a variance between orders is pooled over methods as well."""


@dataclass
class Ability:
    """One benchmark on one scale along one method's trajectories on one model.

    Attributes:
        scale: as ``scores.scales`` names them.
        edits: checkpoints, the first being 0.
        values: (checkpoints, orders, items); the unedited model's under 0.
        chance: nan where a scale has none: then changes are compared, not shares kept.
        reliability: (checkpoints,) over all edits so far.
        editing: (checkpoints,) whether the method edits (``scores.editing``).
        line: model, method and variant.
        label: the method as printed, with its variant.
        aspect: of ability, that the benchmark shows; None for those of safety.
        base: (items,) the unedited model's.
        share: whether there is a share to be kept: a chance that scores can be above.
        blunt: whether the scale could not show a loss (``scores.blunt``).
        floor: whether there is nothing above chance to be lost, or no loss could be seen.
        unit: what the unedited model has above chance; 1 where changes are compared.
    """

    model: str
    method: str
    variant: str
    benchmark: str
    scale: str
    edits: list[int]
    values: np.ndarray = field(repr=False)
    chance: float
    reliability: list[float]
    editing: list[bool]
    blunt: bool = False

    def __post_init__(self) -> None:
        self.line, label = (self.model, self.method, self.variant), kind_of(self.method).label
        self.label = label if self.variant == "default" else f"{label} ({self.variant})"
        self.aspect = benchmarks.metadata(self.benchmark).get("aspect")
        self.base, self.share = self.values[0, 0], not math.isnan(self.chance)
        self.floor = self.share and (self.blunt or at_floor(self.base, self.chance))
        self.unit = (float(self.base.mean()) - self.chance or math.nan) if self.share else 1.0

    def kept(self, at: int = -1) -> tuple[float, np.ndarray]:
        """(share kept, or change; (orders, items) how each answer departs from it, in the same unit)."""
        if not self.share:
            change = self.values[at] - self.base
            return float(change.mean()), change - change.mean()
        kept = float((self.values[at].mean() - self.chance) / self.unit)
        return kept, (self.values[at] - self.chance - kept * (self.base - self.chance)) / self.unit

    def unseen(self, at: int) -> float:
        """Variance to allow for what is too rare to be seen, where all items did alike: the exact bound's.

        Alike: none changed, or all are at chance, but for noise that is no answer.
        """
        if (np.abs(self.kept(at)[1]) * abs(self.unit) > NOISE).any():
            return 0.0
        span = {"discrimination": 2.0, "log_odds": float(np.ptp(self.base))}.get(self.scale, 1.0)
        return (unseen(self.values[at].size) * span / self.unit / stats.norm.ppf(1 - LEVEL)) ** 2


def abilities(results: Results) -> list[Ability]:
    """Every benchmark on every scale under every method that changes something; refusals where they were measured."""
    params = results.params
    edits = dict(iter(editing(table(results)).set_index("edits").groupby(LINE)))
    found: dict[tuple, list] = {}
    for at, name, items, before in answers(results, asked(results)):
        if kind_of(at["method"]).edits:
            for scale, (_, numbers, chance) in scales(name, items, before).items():
                key = (*(at[key] for key in LINE), name, scale)
                found.setdefault(key, []).append((numbers, chance, blunt(before, scale)))
    made = []
    for (*line, name, scale), cells in found.items():
        values = np.array([numbers for numbers, *_ in cells]).reshape(len(params.orders), len(params.edits), -1)
        success = edits[tuple(line)].reindex(params.edits)
        works = [True, *success.editing[1:].astype(bool)]
        values = np.ascontiguousarray(values.swapaxes(0, 1))
        (_, chance, dull), reliability = cells[0], list(success.reliability)
        made.append(Ability(*line, name, scale, params.edits, values, chance, reliability, works, dull))
    return made


# Estimates -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and degrees of freedom.

    Attributes:
        null: what it would be without an effect: 1 for a share kept, 0 for a difference.
        by_order: what each order alone says.
        exact: p from an exact test, where there is one.
    """

    value: float
    se: float
    df: float
    null: float = 0.0
    by_order: tuple[float, ...] = ()
    exact: float | None = None

    def within_interval(self, level: float) -> tuple[float, float]:
        """Student's interval, 1 - level wide."""
        half = float(stats.t.ppf(1 - level / 2, self.df)) * self.se
        return self.value - half, self.value + half

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval."""
        return self.within_interval(LEVEL)

    def above(self, bound: float) -> float:
        """p of being ``bound`` or less, one-sided."""
        if self.se == 0:
            return float(self.value <= bound)
        return float(stats.t.sf((self.value - bound) / self.se, self.df))

    @property
    def p(self) -> float:
        """p of no effect, two-sided."""
        tail = self.above(self.null)
        return min(1.0, 2 * min(tail, 1 - tail)) if self.exact is None else self.exact

    def p_unequal(self, margin: float = MARGIN) -> float:
        """p of an effect of ``margin`` or more either way: two one-sided tests (TOST) with the same standard error."""
        return max(self.above(self.null - margin), 1 - self.above(self.null + margin))

    def equal(self, margin: float = MARGIN) -> bool:
        """Whether an effect of ``margin`` or more can be excluded."""
        return self.p_unequal(margin) < LEVEL

    def __str__(self) -> str:
        return shown(self.value, *self.interval)


Terms = Sequence[tuple[float, Ability]]
"""A sum of abilities, each with a weight."""


@dataclass(frozen=True)
class _Parts:
    """Of the variance of a sum of abilities: ``item`` of its mean over orders, ``order`` of the orders' means."""

    by_order: np.ndarray
    item: float
    item_df: float
    order: float
    """Less what items alone would make of it, so that it may be negative."""
    weight: float
    """By which its order component counts in a pool: how precisely its items show it."""


def _two_way(rest: np.ndarray) -> tuple[float, float]:
    """(variance of the items' means, variance of what neither item nor order explains), of (orders, items)."""
    orders, items = rest.shape
    means = rest.mean(0)
    left = rest - means - rest.mean(1, keepdims=True) + rest.mean()
    return float(means.var(ddof=1)), float((left**2).sum()) / max((orders - 1) * (items - 1), 1)


def _parts(terms: Terms, at: int) -> _Parts:
    groups: dict[tuple[str, str], np.ndarray] = {}
    value = allowed = imprecision = 0.0
    for weight, ability in terms:
        kept, rest = ability.kept(at)
        value += weight * kept
        place = ability.benchmark, ability.scale  # the same items: paired
        groups[place] = groups.get(place, 0) + weight * rest
        allowed += weight**2 * ability.unseen(at)
        imprecision += weight**2 / (ability.unit**2 * rest.shape[1])
    by_order = value + sum(rest.mean(1) for rest in groups.values())
    counts = np.array([rest.shape[1] for rest in groups.values()])
    item, rest = np.array([_two_way(rest) for rest in groups.values()]).T / counts
    spread = float((item**2 / (counts - 1)).sum())
    order = float(by_order.var(ddof=1) - rest.sum()) if len(by_order) > 1 else 0.0
    item_df = float(item.sum()) ** 2 / spread if spread else MANY
    return _Parts(by_order, float(item.sum()) + allowed, item_df, order, 1 / imprecision)


def _estimate(own: _Parts, pool: Sequence[_Parts], null: float, rank: float = math.inf) -> Estimate:
    """An estimate with the order component of a pool, or its own where that is larger.

    Args:
        rank: how many of the pool are independent at most.
    """
    weights = np.array([part.weight for part in pool])
    order = float(weights @ np.array([part.order for part in pool])) / weights.sum()
    count = len(own.by_order)
    # below 0 it makes up for those that are above by chance
    order = max(order, own.order, -count * own.item / 2) / count
    order_df = max(count - 1, 1) * min(rank, weights.sum() ** 2 / (weights @ weights))
    variance = order + own.item
    spread = order**2 / order_df + own.item**2 / own.item_df
    df = variance**2 / spread if spread else MANY
    if count > 1 and order_df < 3 and spread:  # too few to know even that orders do not differ
        df = min(df, order_df)
    return Estimate(float(own.by_order.mean()), math.sqrt(variance), df, null, tuple(own.by_order))


def _pooled(parts: Sequence[_Parts], fine: Sequence, coarse: Sequence, nulls: Iterable[float]) -> list[Estimate]:
    """Estimates with the order component pooled over those of one ``fine`` key; where few, of one ``coarse`` key."""
    made = []
    for own, near, far, null in zip(parts, fine, coarse, nulls, strict=True):
        pool = [part for part, key in zip(parts, fine, strict=True) if key == near]
        if sum(len(part.by_order) - 1 for part in pool) < ENOUGH:
            pool = [part for part, key in zip(parts, coarse, strict=True) if key == far]
        made.append(_estimate(own, pool, null))
    return made


def holm(p: Sequence[float]) -> np.ndarray:
    """p values corrected for their number by Holm's method (statsmodels' collects all garbage, a second each time)."""
    order, p = np.argsort(p, kind="stable"), np.asarray(p, float)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return corrected


def mcnemar(after: np.ndarray, before: np.ndarray) -> float:
    """Exact p of no change of paired 0/1 outcomes: the sign test of those that changed."""
    lost, won = int((after < before).sum()), int((after > before).sum())
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


# What became of each ability -----------------------------------------------------------------------


def shares_kept(abilities: Sequence[Ability], at: int = -1) -> list[Estimate]:
    """Of each ability at a checkpoint the share kept, or the change where a scale has no chance.

    The order component is pooled over a method's abilities on a scale, those at the floor left out; where few, over
    those of all methods that edit.
    """
    parts = [_parts([(1.0, ability)], at) for ability in abilities]
    fine = [(a.line, a.scale, a.floor) for a in abilities]
    coarse = [(a.model, a.scale) if a.editing[at] and not a.floor else i for i, a in enumerate(abilities)]
    return _pooled(parts, fine, coarse, [float(a.share) for a in abilities])


def effects(abilities: Sequence[Ability], at: int = -1) -> pd.DataFrame:
    """What became of each ability at a checkpoint (the last), by ``shares_kept``.

    p values are corrected by Holm's method over all rows off the floor under methods that edit: what is given is the
    family.

    Returns:
        a row an ability: those of ``LINE``, ``label`` (of several models, with the model), ``benchmark``, ``aspect``,
        ``scale``, ``edits``, ``orders``,
        ``reliability``, ``editing``, ``base``, ``score``, ``kept`` (``Estimate`` of the share, or of the change where
        a scale has no chance), ``p_holm`` and ``state``: ``kept`` (a loss or gain of ``MARGIN`` can be excluded),
        ``lost`` (significant, and not kept), ``rose``, ``undecided``, ``floor``, or ``apart``: the method did not keep
        its edits.
    """
    rows, several = [], len({a.model for a in abilities}) > 1
    for a, kept in zip(abilities, shares_kept(abilities, at), strict=True):
        after = a.values[at]
        if len(after) == 1 and a.scale == "value" and set(np.unique([after[0], a.base])) <= {0.0, 1.0}:
            kept = replace(kept, exact=mcnemar(after[0], a.base))
        state = "floor" if a.floor else "undecided" if a.editing[at] else "apart"
        label = f"{a.label} on {a.model}" if several else a.label
        place = [*a.line, label, a.benchmark, a.aspect, a.scale, a.edits[at], len(after)]
        rows.append([*place, a.reliability[at], a.editing[at], a.base.mean(), after.mean(), kept, kept.p, state])
    names = ["label", "benchmark", "aspect", "scale", "edits", "orders", "reliability", "editing", "base", "score"]
    frame = pd.DataFrame(rows, columns=[*LINE, *names, "kept", "p", "state"])
    open_ = frame.state == "undecided"
    frame["p_holm"] = pd.Series(holm(frame.p[open_]), frame.index[open_], dtype=float)
    margins = [LOGIT_MARGIN if scale == "log_odds" else MARGIN for scale in frame.scale]
    equal = np.array([kept.equal(margin) for kept, margin in zip(frame.kept, margins, strict=True)], bool)
    down = np.array([kept.value < kept.null for kept in frame.kept], bool)
    moved = open_ & (frame.p_holm < LEVEL) & ~equal
    frame["state"] = np.select([open_ & equal, moved & down, moved], ["kept", "lost", "rose"], frame.state)
    return frame.drop(columns="p")


def curves(abilities: Sequence[Ability]) -> pd.DataFrame:
    """``effects`` at every checkpoint but the unedited, for pictures."""
    return pd.concat([effects(abilities, at) for at in range(1, len(abilities[0].edits))], ignore_index=True)


def general(abilities: Iterable[Ability], at: int | None = -1) -> list[Ability]:
    """The abilities of some aspect, off the floor, on the two scales; with ``at``, under methods that edit there."""
    found = [a for a in abilities if a.aspect and a.scale in SCALES and not a.floor]
    return [a for a in found if at is None or a.editing[at]]


def overall(abilities: Sequence[Ability], at: int = -1) -> pd.DataFrame:
    """Mean share kept over the abilities of some aspect that are off the floor, whether a method edits or not.

    Returns:
        a row a model, method, variant and scale: ``label``, ``edits``, ``reliability``, ``editing``, ``benchmarks``
        (how many), ``kept`` (``Estimate``). Where it rests on few, the order component is pooled over methods.
    """
    groups: dict[tuple, list[Ability]] = {}
    for a in general(abilities, None):
        groups.setdefault((*a.line, a.scale), []).append(a)
    parts = [_parts(mean(group), at) for group in groups.values()]
    firsts = [group[0] for group in groups.values()]
    coarse = [(a.model, a.scale) if a.editing[at] else (*a.line, a.scale) for a in firsts]
    found = _pooled(parts, list(groups), coarse, [1.0] * len(parts))
    rows = [
        [*key, a.label, a.edits[at], a.reliability[at], a.editing[at], len(group), kept]
        for (key, group), a, kept in zip(groups.items(), firsts, found, strict=True)
    ]
    return pd.DataFrame(
        rows, columns=[*LINE, "scale", "label", "edits", "reliability", "editing", "benchmarks", "kept"]
    )


def kept(abilities: Sequence[Ability], at: int = -1) -> Estimate:
    """Mean share kept over some abilities of one model and method, by the scatter of its own orders."""
    return _estimate(part := _parts(mean(abilities), at), [part], 1.0)


def apart(one: Sequence[Ability], other: Sequence[Ability], at: int = -1) -> Estimate:
    """Mean share kept over some abilities less that over the same under another method; items and orders paired."""
    return _estimate(part := _parts([*mean(one), *mean(other, -1.0)], at), [part], 0.0)


def mean(group: Sequence[Ability], weight: float = 1.0) -> Terms:
    """The mean of some abilities, times a weight, as terms of a sum."""
    return [(weight / len(group), ability) for ability in group]


# Models compared -----------------------------------------------------------------------------------


def pairs(models: Sequence[str]) -> list[tuple[str, str]]:
    """(base, tuned) models of a run: each tuned one (by its name) with the base model that was named last before it."""
    found, base = [], models[0]
    for model in models:
        if any(word in model.lower() for word in ("instruct", "chat", "tuned")):
            found.append((base, model))
        else:
            base = model
    return found


def contrast(abilities: Sequence[Ability], twins: Sequence[tuple[str, str]], at: int = -1) -> pd.DataFrame:
    """How much more of its abilities does the tuned model keep than its base, under the same edits?

    Mean over twins, benchmarks off the floor for all of them, and orders; with several pairs of twins these are random
    as well. Only methods that edit every model. Holm's family: the rows given back.

    Returns:
        a row a method, variant and scale: ``label``, ``orders``, ``benchmarks`` (how many), ``base``, ``tuned`` and
        ``difference`` (``Estimate``s), ``p_holm``.
    """
    rows = []
    models = {model for twin in twins for model in twin}
    for (method, variant, scale), group in _grouped(abilities, lambda a: (a.method, a.variant, a.scale)).items():
        by_model = _common([a for a in group if a.editing[at]], models)
        if by_model:
            base, tuned = (mean([a for twin in twins for a in by_model[twin[side]]]) for side in (0, 1))
            sides = [_estimate(part := _parts(terms, at), [part], 1.0) for terms in (base, tuned)]
            difference = _over_twins([(by_model[one], by_model[other]) for one, other in twins], at)
            a = group[0]
            names = len(by_model[twins[0][0]])
            rows.append([method, variant, a.label, scale, len(a.values[at]), names, *sides, difference])
    columns = ["method", "variant", "label", "scale", "orders", "benchmarks", "base", "tuned", "difference"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(p_holm=holm([each.p for each in frame.difference]))


def _grouped(abilities: Iterable[Ability], key: Callable[[Ability], tuple]) -> dict[tuple, list[Ability]]:
    groups: dict[tuple, list[Ability]] = {}
    for ability in abilities:
        if ability.aspect and ability.scale in SCALES:
            groups.setdefault(key(ability), []).append(ability)
    return groups


def _common(group: Sequence[Ability], models: Iterable[str]) -> dict[str, list[Ability]]:
    """Model -> its abilities that are off the floor on every model; nothing where there are none."""
    off = [{a.benchmark for a in group if a.model == model and not a.floor} for model in models]
    names = set.intersection(*off)
    return {model: [a for a in group if a.model == model and a.benchmark in names] for model in models if names}


def _over_twins(twins: Sequence[tuple[list[Ability], list[Ability]]], at: int) -> Estimate:
    """Mean difference over pairs of twins, pairs and orders crossed and both random."""
    each = [_parts([*mean(tuned), *mean(base, -1.0)], at) for base, tuned in twins]
    count = len(each)
    whole = _parts([term for base, tuned in twins for term in (*mean(tuned, 1 / count), *mean(base, -1 / count))], at)
    if count == 1:
        return _estimate(whole, [whole], 0.0)
    table = np.array([part.by_order for part in each])
    orders = table.shape[1]
    of_orders, rest = _two_way(table)  # columns are orders
    of_pairs = float(table.mean(1).var(ddof=1)) / count
    of_orders = max(of_orders / orders - rest / table.size, 0.0) if orders > 1 else 0.0
    variance = of_pairs + of_orders + whole.item
    spread = of_pairs**2 / (count - 1) + of_orders**2 / max(orders - 1, 1) + whole.item**2 / whole.item_df
    df = variance**2 / spread if spread else MANY
    return Estimate(float(table.mean()), math.sqrt(variance), df, 0.0, tuple(table.mean(0)))


def sizes(results: Results) -> dict[str, int]:
    """Parameters of each of the run's models, by name."""
    return {model: about["parameters"] for model, about in results.manifest["models"].items()}


def trend(abilities: Sequence[Ability], size: Mapping[str, float], at: int = -1) -> pd.DataFrame:
    """Does the share kept rise with the size of the model (model -> parameters)?

    Models are the unit: the slope of the mean share kept, over benchmarks off the floor on every model, against log10
    of the parameters, by least squares with models - 2 degrees of freedom; seeds of one size are models of their own.

    Returns:
        a row a method, variant and scale: ``label``, ``orders``, ``benchmarks``, ``models``, ``kept`` and
        ``reliability`` (by model), ``slope`` (``Estimate``, a tenfold size), ``p_holm``.
    """
    rows = []
    for (method, variant, scale), group in _grouped(abilities, lambda a: (a.method, a.variant, a.scale)).items():
        present = sorted({a.model for a in group}, key=lambda model: (size[model], model))
        by_model = _common(group, present)
        if len(by_model) > 2:
            shares = {model: kept(some, at) for model, some in by_model.items()}
            x, y = np.log10([size[model] for model in shares]), [share.value for share in shares.values()]
            line = stats.linregress(x, y)
            slope = Estimate(float(line.slope), float(line.stderr), len(shares) - 2)
            success = {model: some[0].reliability[at] for model, some in by_model.items()}
            about = [group[0].label, scale, len(group[0].values[at]), len(by_model[present[0]]), len(shares)]
            rows.append([method, variant, *about, shares, success, slope])
    columns = ["method", "variant", "label", "scale", "orders", "benchmarks", "models", "kept", "reliability", "slope"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(p_holm=holm([each.p for each in frame.slope]))


# Aspects -------------------------------------------------------------------------------------------


def aspects(abilities: Sequence[Ability], at: int = -1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Share kept of each aspect, mean over the given methods, and the differences between aspects.

    Orders and, within a benchmark, items are paired; the order component is pooled over the pairs of aspects. Holm's
    family: all pairs on both scales.

    Returns:
        two tables: ``scale, aspect, kept``; and ``scale, one, other, difference, p_holm`` (``Estimate``s).
    """
    each, differences = [], []
    for scale in SCALES:
        groups: dict[str, list[Ability]] = {}
        for a in general(abilities, at):
            if a.scale == scale:
                groups.setdefault(a.aspect, []).append(a)
        parts = {aspect: _parts(mean(group), at) for aspect, group in groups.items()}
        each += [(scale, aspect, _estimate(part, list(parts.values()), 1.0)) for aspect, part in parts.items()]
        both = list(combinations(groups, 2))
        parts = [_parts([*mean(groups[one]), *mean(groups[other], -1.0)], at) for one, other in both]
        found = [_estimate(part, parts, 0.0, len(groups) - 1) for part in parts]
        differences += [(scale, *names, estimate) for names, estimate in zip(both, found, strict=True)]
    frame = pd.DataFrame(differences, columns=["scale", "one", "other", "difference"])
    frame["p_holm"] = holm([difference.p for difference in frame.difference])
    return pd.DataFrame(each, columns=["scale", "aspect", "kept"]), frame


# Before a run --------------------------------------------------------------------------------------

ALL = "mean"
"""In place of a benchmark: the mean over abilities."""


def components(runs: Iterable[Sequence[Ability]], at: int = -1) -> pd.DataFrame:
    """Variance components of shares kept, mean over the methods that edit, from runs of two orders or more.

    Returns:
        a row a scale and benchmark (``ALL``: the mean over abilities): ``order`` between orders, ``item`` between items
        and ``rest``, of one item in one order.
    """
    rows = []
    for group in (general(run, at) for run in runs if len(run) and run[0].values.shape[1] > 1):
        for a in group:
            item, rest = _two_way(a.kept(at)[1])
            orders = a.values.shape[1]
            rows.append((a.scale, a.benchmark, _parts([(1.0, a)], at).order, item - rest / orders, rest))
        for (*_, scale), some in _grouped(group, lambda a: (*a.line, a.scale)).items():
            rows.append((scale, ALL, _parts(mean(some), at).order, 0.0, 0.0))
    frame = pd.DataFrame(rows, columns=["scale", "benchmark", "order", "item", "rest"])
    return frame.groupby(["scale", "benchmark"], sort=False).mean().clip(lower=0).reset_index()


def detectable(components: pd.DataFrame, params: Params, power: float = 0.8) -> pd.DataFrame:
    """The minimal detectable effect of a grid: the least loss, in share kept, found with a power at the 5% level.

    Args:
        components: as the function of that name gives them; benchmarks that it does not have are left out.

    Returns:
        a row a scale and benchmark of an aspect, and one for the mean over them (``ALL``): ``items``, ``orders``,
        ``effect``. With one order what is found holds for these edits only, and ``effect`` leaves orders out.
    """
    known, rows = components.set_index(["scale", "benchmark"]), []
    orders, methods = len(params.orders), sum(kind_of(each.method).edits for each in params.methods)
    for scale in SCALES:
        sampled = {}
        for name in params.benchmarks:
            if (scale, name) in known.index:
                items = min(count := benchmarks.metadata(name)["reading"]["items"], params.limit or count)
                part = known.loc[(scale, name)]
                sampled[name] = items, part["order"], (part["item"] + part["rest"] / orders) / items
        if sampled:
            mean_item = sum(item for *_, item in sampled.values()) / len(sampled) ** 2
            sampled[ALL] = sum(items for items, *_ in sampled.values()), known.loc[(scale, ALL), "order"], mean_item
        for name, (items, order, item) in sampled.items():
            df = (orders - 1) * (methods if name == ALL else len(sampled) - 1) if orders > 1 else items - 1
            error = math.sqrt(item + (order / orders if orders > 1 else 0.0))
            effect = float(stats.t.ppf(1 - LEVEL / 2, df) + stats.t.ppf(power, df)) * error
            rows.append((scale, name, items, orders, effect))
    return pd.DataFrame(rows, columns=["scale", "benchmark", "items", "orders", "effect"])
