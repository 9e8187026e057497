"""Statistics and verdicts on made-up outcomes with a known effect, with none, and at the floor."""

import math

import numpy as np
import pytest

from kedit.analysis import inference, verdicts
from kedit.study.params import Method, Params
from kedit.study.results import Cell, Results

N = 200
SUITE = ["mini_mmlu", "mini_bbh", "mini_gsm8k", "mini_csqa", "mini_triviaqa"]


def grid(kept, benchmarks=SUITE, methods=("rome", "memit"), edits=(0, 10, 30), orders=(0, 1), base=0.9):
    """Results in which ``kept(model, method, benchmark, edits)`` of the right answers stay right.

    Models are the keys of ``base`` (a mapping) or one model; wrong answers stay wrong.
    """
    bases = base if isinstance(base, dict) else {"m": base}
    params = Params.model_construct(
        rq="rq1", name="t", models=list(bases), methods=[Method(method=name) for name in ("control", *methods)],
        edits=list(edits), benchmarks=list(benchmarks), orders=list(orders), measures=[],
    )  # fmt: skip
    cells = []

    def cell(model, method, order, count, benchmark, values):
        items = [{"id": str(i), "value": float(v)} for i, v in enumerate(values)]
        cells.append(Cell(model, method, method and "default", order, count, benchmark, items))

    for model, share in bases.items():
        for benchmark in benchmarks:
            right = np.arange(N) < round(share * N)
            cell(model, None, None, 0, benchmark, right)
            for method in ("control", *methods):
                for order in orders:
                    for count in edits[1:]:
                        stays = 1.0 if method == "control" else kept(model, method, benchmark, count)
                        lost = np.random.default_rng([order, count]).permutation(int(right.sum()))
                        after = right.copy()
                        after[np.flatnonzero(right)[lost[: round((1 - stays) * right.sum())]]] = False
                        cell(model, method, order, count, benchmark, after)
    return inference.abilities(Results(params, cells, [], {}))


def test_share_kept_and_its_interval():
    (ability,) = grid(lambda *_: 0.5, ["mini_gsm8k"], ["rome"])
    assert ability.kept == pytest.approx(
        [1.0, 0.5, 0.5], abs=0.01
    )  # chance is 0: half the right answers, half the share
    low, high = inference.interval(ability.kept_draws[:, -1])
    # 180 right answers of which half are kept, each order losing others: between one and two independent halves
    half = 1.96 * math.sqrt(0.25 / 180)
    assert half / 1.6 < (high - low) / 2 < half * 1.2
    (above,) = grid(lambda *_: 0.5, ["mini_mmlu"], ["rome"])
    assert above.kept[-1] == pytest.approx((0.45 - 0.25) / (0.9 - 0.25), abs=0.01)


def test_more_orders_say_more_only_if_orders_agree():
    draws = {}
    for spread in (0.0, 0.4):
        (ability,) = grid(lambda *_: 0.6, ["mini_gsm8k"], ["rome"], orders=(0, 1, 2, 3))
        ability.values[-1] *= 1 + spread * np.array([-1, -1, 1, 1])[:, None]  # two orders worse, two better
        low, high = inference.interval(ability.kept_draws[:, -1])
        draws[spread] = high - low
    assert draws[0.4] > 2 * draws[0.0]


def test_collapse_point_is_the_first_checkpoint_surely_below():
    falling = {10: 0.9, 30: 0.3, 100: 0.1}
    (ability,) = grid(lambda m, e, b, n: falling[n], ["mini_gsm8k"], ["rome"], edits=(0, 10, 30, 100))
    assert inference.collapse_point(ability) == (30, 30, 30)
    (ability,) = grid(lambda *_: 0.95, ["mini_gsm8k"], ["rome"])
    assert inference.collapse_point(ability) == (math.inf, math.inf, math.inf)
    (ability,) = grid(lambda m, e, b, n: {10: 0.5, 30: 0.2}[n], ["mini_gsm8k"], ["rome"])
    point, low, high = inference.collapse_point(ability)
    assert (point, low, high) == (30, 10, 30)  # at 10 it is on the edge: not surely below


def test_effects_tell_fallen_equal_unclear_and_floor_apart():
    stays = {"mini_mmlu": 0.6, "mini_bbh": 1.0, "mini_gsm8k": 0.95}
    found = grid(lambda m, e, b, n: stays[b], list(stays), ["rome"])
    effect = inference.effects(found).set_index("benchmark").effect
    assert effect.to_dict() == {"mini_mmlu": "fell", "mini_bbh": "equal", "mini_gsm8k": "fell"}
    found = grid(lambda m, e, b, n: 1.0, ["mini_mmlu"], ["rome"], base=0.27)
    assert inference.effects(found).effect.tolist() == ["floor"]


def test_holm_is_over_the_benchmarks_of_a_method():
    """One weak drop stands alone, and does not beside four other benchmarks."""
    change = np.zeros(N)
    change[:6] = -1  # p of 6 losses and no gain: 2 / 2^6 = 0.03
    assert inference.no_change(change) == pytest.approx(2 / 64, abs=0.01)
    for names, fell in (([SUITE[0]], True), (SUITE, False)):
        found = grid(lambda *_: 1.0, names, ["rome"], orders=(0,))
        found[0].values[-1, 0, :6] = 0
        assert ("fell" in inference.effects(found).effect.tolist()) is fell


@pytest.mark.parametrize(("stays", "word"), [(0.5, "supported"), (1.0, "not supported")])
def test_rq1(stays, word):
    assert verdicts.number_of_edits(grid(lambda *_: stays)).word == word


def test_rq1_tells_methods_apart_and_knows_the_floor():
    mixed = verdicts.number_of_edits(grid(lambda m, method, b, n: 0.5 if method == "rome" else 1.0))
    assert mixed.word == "supported"
    assert "by some methods" in mixed.claim
    assert verdicts.number_of_edits(grid(lambda *_: 0.5, SUITE[:2], base=0.22)).word == "inconclusive"


@pytest.mark.parametrize(
    ("base", "tuned", "start", "word"),
    [
        (0.5, 0.8, 0.9, "supported"),
        (0.8, 0.5, 0.9, "not supported"),
        (0.7, 0.7, 0.9, "inconclusive"),
        (0.5, 0.8, 0.25, "inconclusive"),
    ],
)
def test_rq2(base, tuned, start, word):
    names = ["mini_mmlu", "mini_bbh"]
    found = grid(lambda m, *_: {"b": base, "t": tuned}[m], names, base={"b": start, "t": start})
    assert verdicts.instruction_tuning(found, "b", "t").word == word


@pytest.mark.parametrize(
    ("slope", "start", "word"),
    [(0.2, 0.9, "supported"), (-0.2, 0.9, "not supported"), (0.0, 0.9, "inconclusive"), (0.2, 0.25, "inconclusive")],
)
def test_rq3(slope, start, word):
    sizes = {"a": 1e5, "b": 1e6, "c": 1e7}
    found = grid(
        lambda m, *_: 0.6 + slope * (math.log10(sizes[m]) - 6),
        ["mini_mmlu", "mini_bbh"],
        base=dict.fromkeys(sizes, start),
    )
    assert verdicts.model_scale(found, sizes).word == word


def test_the_slope_is_per_tenfold_size():
    sizes = {"a": 1e5, "b": 1e6, "c": 1e7}
    found = grid(lambda m, *_: 0.6 + 0.2 * (math.log10(sizes[m]) - 6), ["mini_gsm8k"], ["rome"], base=dict.fromkeys(sizes, 0.9))  # fmt: skip
    assert inference.trend(found, sizes).slope[0].value == pytest.approx(0.2, abs=0.01)


@pytest.mark.slow
def test_rq4():
    alike = {"mini_gsm8k": 0.5, "mini_triviaqa": 0.5}
    chance = {"mini_mmlu": 0.25, "mini_bbh": 0.25, "mini_csqa": 0.2}
    for name, level in chance.items():  # half of what is above chance, for every aspect
        alike[name] = (level + 0.5 * (0.9 - level)) / 0.9
    same = grid(lambda m, e, b, n: alike[b], methods=["rome", "memit", "pmet"], orders=(0, 1, 2))
    for ability in same:  # many items, so that equality can be shown
        ability.values = np.tile(ability.values, 4)
        ability.base = np.tile(ability.base, 4)
    assert verdicts.ability_aspects(same).word == "supported"
    apart = grid(lambda m, e, b, n: 0.3 if b == "mini_gsm8k" else 0.95)
    verdict = verdicts.ability_aspects(apart)
    assert verdict.word == "not supported"
    assert "arithmetic" in verdict.because.partition("Furthest apart:")[2]
    assert verdicts.ability_aspects(grid(lambda *_: 1.0)).word == "inconclusive"


@pytest.mark.parametrize(
    ("stays", "start", "word"),
    [(0.6, 0.9, "supported"), (1.0, 0.9, "not supported"), (0.6, 0.5, "inconclusive")],
)
def test_rq5(stays, start, word):
    assert verdicts.safety(grid(lambda *_: stays, ["mini_toxigen"], base=start)).word == word
