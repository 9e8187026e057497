"""What the scores say: changes, collapse points, equivalence, contrasts and trends, with their intervals.

Intervals rest on one bootstrap. Items and orders of the edits are drawn anew with replacement, the same draw
for every method, checkpoint and model that answered the same items, so any difference of two numbers has a
paired interval. Single changes are tested by sign flips (difference) and two one-sided t-tests (equivalence).
What is compared is mostly the share *kept*: the score above chance over what the unedited model had above chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from zlib import crc32

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired
from threadpoolctl import threadpool_limits

from kedit.analysis.scores import COLLAPSED, FLOOR, RESAMPLES, off_chance, outcomes, shown
from kedit.editors import kind_of
from kedit.evaluation import benchmarks
from kedit.study.results import Results

LEVEL = 0.05
EDITED = slice(1, None)
"""All checkpoints but the unedited one."""
MARGIN = 0.10
"""Scores within this of the unedited model's, or shares kept within this of one another, count as equal.

Ten points: about what separates neighbouring model sizes on the study's benchmarks, and the smallest
margin that forty to a hundred items can confirm.
"""


@dataclass
class Ability:
    """One benchmark along one method's trajectories on one model.

    Attributes:
        edits: checkpoints, the first being 0.
        values: (checkpoints, orders, items); the unedited model's under 0.
    """

    model: str
    method: str
    variant: str
    benchmark: str
    edits: list[int]
    values: np.ndarray = field(repr=False)

    def __post_init__(self):
        self.chance = benchmarks.metadata(self.benchmark)["chance"]
        self.base = self.values[0, 0]

    @property
    def floor(self) -> bool:
        """Whether the unedited model is not clearly above chance: nothing can be lost."""
        return off_chance(self.base, self.chance) < FLOOR

    @property
    def kept(self) -> np.ndarray:
        """(checkpoints,) share of the score above chance that is kept."""
        return self._share(self.values.mean((1, 2)), self.base.mean())

    @cached_property
    def kept_draws(self) -> np.ndarray:
        """(draws, checkpoints) the same for each draw; that of the unedited model is on the same items."""
        _, orders, items = self.values.shape
        of_items = _weights(items, self.benchmark)
        with threadpool_limits(1):  # the same bits whatever the number of cores: BLAS sums in another order on several
            means = np.einsum("ri,eoi->reo", of_items, self.values, optimize=True)
            scores = np.einsum("reo,ro->re", means, _weights(orders, "orders"))
            return self._share(scores, (of_items @ self.base)[:, None])

    def _share(self, score: np.ndarray, base: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (score - self.chance) / (base - self.chance)

    @property
    def change(self) -> np.ndarray:
        """(items,) change of each item at the last checkpoint, mean over orders."""
        return self.values[-1].mean(0) - self.base


def _weights(count: int, what: str) -> np.ndarray:
    """(draws, count) weights of a bootstrap of some things, always the same for the same things."""
    generator = np.random.default_rng([crc32(what.encode()), count])
    return generator.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def abilities(results: Results) -> list[Ability]:
    """Every benchmark under every method that edits.

    Where refusals were measured they are an ability too: the share of harmful requests refused.
    """
    params = results.params
    names = [*params.benchmarks, *(name for name in params.measures if name == "refusal")]
    answers: dict[tuple, list[list[float]]] = {}
    for at, name, items, _ in outcomes(results, names):
        if kind_of(at["method"]).edits:
            if name == "refusal":
                values = [float(item["refused"]) for item in items if item["harmful"]]
            else:
                values = [item.get("value", math.nan) for item in items]
            answers.setdefault((at["model"], at["method"], at["variant"], name), []).append(values)
    shape = (len(params.orders), len(params.edits), -1)
    return [
        Ability(*key, params.edits, np.array(values, float).reshape(shape).swapaxes(0, 1).copy())
        for key, values in answers.items()
    ]


# One ability ---------------------------------------------------------------------------------------


def interval(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of draws, (1 - level) wide."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, [level / 2, 1 - level / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> np.ndarray:
    """p values corrected for their number by Holm's method."""
    return multipletests(p, LEVEL, method="holm")[1]


def no_change(change: np.ndarray) -> float:
    """p of no mean change, by flipping the signs of the items' changes at random (paired, two-sided)."""
    if not change.any():
        return 1.0
    rng = np.random.default_rng(0)
    test = stats.permutation_test((change,), np.mean, permutation_type="samples", n_resamples=9999, rng=rng)
    return float(test.pvalue)


def unequal(change: np.ndarray, margin: float = MARGIN) -> float:
    """p of a mean change of ``margin`` or more either way: two one-sided paired t-tests (TOST)."""
    if np.ptp(change) == 0:  # the same change for every item
        return float(abs(change[0]) >= margin)
    return float(ttost_paired(change, np.zeros_like(change), -margin, margin)[0])


def collapse_point(ability: Ability, share: float = COLLAPSED) -> tuple[float, float, float]:
    """(edits, low, high): the first checkpoint that keeps surely less than ``share`` of the ability.

    The point is where the upper end of the 95% interval of the share kept is below; the interval is
    that of the first checkpoint below over draws. Infinite where it did not happen.
    """
    draws = ability.kept_draws
    counts = [*ability.edits, math.inf]

    def first(below: np.ndarray) -> np.ndarray:
        return np.where(below.any(-1), below.argmax(-1), len(counts) - 1)

    surely = np.array([interval(draws[:, at])[1] < share for at in range(draws.shape[1])])
    low, high = np.quantile(first(draws < share), [LEVEL / 2, 1 - LEVEL / 2], method="higher")
    return counts[int(first(surely))], counts[low], counts[high]


def effects(abilities: Sequence[Ability]) -> pd.DataFrame:
    """What became of each ability at the last checkpoint.

    p values are corrected by Holm's method over the benchmarks of one method on one model that are off
    the floor. Column ``effect``: ``fell`` or ``rose`` (significant), ``equal`` (within ``MARGIN``, by
    TOST, and not significant), ``unclear``, or ``floor``.
    """
    columns = ["model", "method", "variant", "benchmark", "edits", "base", "score", "delta"]
    rows = [
        (a.model, a.method, a.variant, a.benchmark, a.edits[-1], a.base.mean(), a.values[-1].mean(), a.change.mean())
        for a in abilities
    ]
    frame = pd.DataFrame(rows, columns=columns)
    frame["p"] = [no_change(ability.change) for ability in abilities]
    frame["p_unequal"] = [unequal(ability.change) for ability in abilities]
    frame["kept"] = [kept([ability]) for ability in abilities]
    frame["collapse"] = [collapse_point(ability) for ability in abilities]
    floor = np.array([ability.floor for ability in abilities])
    frame["p_holm"] = frame[~floor].groupby(["model", "method", "variant"]).p.transform(holm)
    moved = frame.p_holm < LEVEL
    cases = [floor, moved & (frame.delta < 0), moved & (frame.delta > 0), frame.p_unequal < LEVEL]
    frame["effect"] = np.select(cases, ["floor", "fell", "rose", "equal"], "unclear")
    return frame


# Several abilities together ------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap draws."""

    value: float
    draws: np.ndarray = field(repr=False)

    @property
    def interval(self) -> tuple[float, float]:
        """95% percentile interval."""
        return interval(self.draws)

    @property
    def p(self) -> float:
        """Two-sided bootstrap p of being 0."""
        draws = self.draws[np.isfinite(self.draws)]
        if not len(draws):
            return math.nan
        tail = min((draws <= 0).mean(), (draws >= 0).mean())
        return float(min(1.0, 2 * max(tail, 1 / len(draws))))

    def within(self, margin: float = MARGIN) -> bool:
        """Whether it is equal to 0 within the margin: the 90% interval lies inside (TOST at 5%)."""
        low, high = interval(self.draws, 2 * LEVEL)
        return -margin < low and high < margin

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference, paired draw by draw."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    def __str__(self) -> str:
        return shown(self.value, *self.interval)


def kept(abilities: Sequence[Ability], at: int | slice = -1) -> Estimate:
    """Mean share kept over abilities, at one checkpoint (the last) or over several."""
    at = at if isinstance(at, slice) else [at]
    return Estimate(
        float(np.mean([ability.kept[at].mean() for ability in abilities])),
        np.mean([ability.kept_draws[:, at].mean(1) for ability in abilities], axis=0),
    )


def _by_method(abilities: Sequence[Ability]) -> dict[tuple[str, str], dict[str, dict[str, Ability]]]:
    """(method, variant) -> benchmark -> model -> ability."""
    groups: dict[tuple[str, str], dict[str, dict[str, Ability]]] = {}
    for ability in abilities:
        group = groups.setdefault((ability.method, ability.variant), {})
        group.setdefault(ability.benchmark, {})[ability.model] = ability
    return groups


def contrast(abilities: Sequence[Ability], one: str, other: str) -> pd.DataFrame:
    """How much more of each ability does model ``other`` keep than model ``one``, under the same edits?

    Means over all checkpoints, so it is the rate of decline that counts, not only its end. One row a
    method and benchmark that is off the floor for both, and one a method with all of these pooled
    (benchmark "all"). Columns: method, variant, benchmark, one, other, difference (``Estimate``), p,
    p_holm (over the benchmarks of a method).
    """
    rows = []
    for (method, variant), by_benchmark in _by_method(abilities).items():
        pairs = {name: [(by_model[one], by_model[other])] for name, by_model in by_benchmark.items()}
        pairs = {name: pair for name, pair in pairs.items() if not any(ability.floor for ability in pair[0])}
        for name, group in (pairs | {"all": list(chain(*pairs.values()))}).items():
            if group:
                a, b = (kept(side, EDITED) for side in zip(*group, strict=True))
                rows.append((method, variant, name, a, b, b - a, (b - a).p))
    frame = pd.DataFrame(rows, columns=["method", "variant", "benchmark", "one", "other", "difference", "p"])
    of_method = frame[frame.benchmark != "all"].groupby(["method", "variant"])
    return frame.assign(p_holm=of_method.p.transform(holm).reindex(frame.index).fillna(frame.p))


def sizes(results: Results) -> dict[str, int]:
    """Parameters of each of the run's models, by name."""
    return {model: about["parameters"] for model, about in results.manifest["models"].items()}


def trend(abilities: Sequence[Ability], size: Mapping[str, float]) -> pd.DataFrame:
    """Does the share kept rise with the size of the model (model -> parameters)? One row a method.

    The slope is that of the mean share kept, over all checkpoints and over the benchmarks that are off
    the floor for every model, against log10 of the parameters (least squares over models). Columns:
    method, variant, benchmarks (how many), kept (model -> ``Estimate``), slope (``Estimate``, per tenfold size; None
    without common benchmarks), p.
    """
    rows = []
    models = sorted(dict.fromkeys(a.model for a in abilities), key=size.__getitem__)
    x = np.log10([size[model] for model in models])
    x = x - x.mean()
    for (method, variant), by_benchmark in _by_method(abilities).items():
        common = [of for of in by_benchmark.values() if not any(ability.floor for ability in of.values())]
        by_size = {model: kept([of[model] for of in common], EDITED) for model in models if common}
        slope = None
        if len(by_size) > 1:
            values = np.array([estimate.value for estimate in by_size.values()])
            draws = np.array([estimate.draws for estimate in by_size.values()])
            slope = Estimate(float(x @ values / (x @ x)), x @ draws / (x @ x))
        rows.append((method, variant, len(common), by_size, slope, slope.p if slope else math.nan))
    return pd.DataFrame(rows, columns=["method", "variant", "benchmarks", "kept", "slope", "p"])


def by_aspect(abilities: Sequence[Ability]) -> dict[str, list[Ability]]:
    """Abilities off the floor by the aspect of ability that their benchmark shows; those of safety show none."""
    groups: dict[str, list[Ability]] = {}
    for ability in abilities:
        aspect = benchmarks.metadata(ability.benchmark).get("aspect")
        if aspect and not ability.floor:
            groups.setdefault(aspect, []).append(ability)
    return groups
