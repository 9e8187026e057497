"""What is estimated and claimed, on made-up outcomes whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.formula.api import ols
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from synthetic import ABILITIES, ability, both, two_way

from kedit.analysis import inference
from kedit.analysis.inference import Estimate, effects, shares_kept
from kedit.analysis.safety import gives, placements
from kedit.analysis.scores import unseen
from kedit.study.params import Method, Params

# One estimate --------------------------------------------------------------------------------------


def test_the_area_is_a_mean_over_items():
    """Mean and spread of the placements are the area and DeLong's variance, each by its own definition."""
    rng = np.random.default_rng(0)
    positive = rng.random(60) < 0.4
    odds = np.round(rng.normal(0, 1, 60) + positive, 1)  # with ties
    placed = placements(odds, positive)
    assert placed.mean() == pytest.approx(roc_auc_score(positive, odds))
    wins = (odds[positive][:, None] > odds[~positive]) + 0.5 * (odds[positive][:, None] == odds[~positive])
    delong = wins.mean(1).var() / positive.sum() + wins.mean(0).var() / (~positive).sum()
    assert placed.var() / 60 == pytest.approx(delong)


def test_the_commoner_answer_is_that_of_the_unedited_model():
    """A threshold that moves past the middle is a move, though as many answers are alike as before."""
    odds = np.array([1.0, 2.0, -1.0])
    assert gives(odds, odds).tolist() == [1, 1, 0]
    assert gives(-odds, -odds).tolist() == [1, 1, 0]
    assert gives(-odds, odds).mean() == pytest.approx(1 / 3)
    assert gives(-np.ones(4), np.ones(4)).mean() == 0


def test_the_components_are_those_of_a_two_way_table():
    """Against the sums of squares of statsmodels' analysis of variance of the same table."""
    a = ability(kept=0.7, spread=0.05, orders=4, items=30, scale="graded")
    share, rest = a.kept()
    assert share == pytest.approx((a.values[1].mean() - 0.25) / (a.values[0].mean() - 0.25))
    rows = [(o, i, rest[o, i]) for o in range(4) for i in range(30)]
    frame = pd.DataFrame(rows, columns=["order", "item", "y"])
    from statsmodels.stats.anova import anova_lm

    squares = anova_lm(ols("y ~ C(order) + C(item)", frame).fit())["mean_sq"]
    order = (squares["C(order)"] - squares["Residual"]) / 30
    (estimate,) = shares_kept([a])
    assert estimate.se**2 == pytest.approx(order / 4 + squares["C(item)"] / 120)
    assert estimate.by_order == pytest.approx((a.values[1].mean(1) - 0.25) / (a.values[0].mean() - 0.25))


def test_one_order_covers_items_only():
    (estimate,) = shares_kept([a := ability(kept=0.8, orders=1, scale="graded")])
    changes = (a.values[1, 0] - 0.25 - estimate.value * (a.base - 0.25)) / (a.base.mean() - 0.25)
    assert estimate.se == pytest.approx(stats.sem(changes))
    assert estimate.df == pytest.approx(119)


def test_orders_that_differ_widen_the_interval_also_where_others_agree():
    calm = [ability(name, kept=0.8, scale="graded") for name in ABILITIES[:4]]
    wild = ability(ABILITIES[4], kept=0.8, by_order=(-0.2, -0.1, 0, 0.1, 0.2), scale="graded")
    *_, estimate = shares_kept([*calm, wild])
    (alone,) = shares_kept([wild])
    assert estimate.se == pytest.approx(alone.se)  # its own component, not the diluted one


def test_unchanged_items_have_the_exact_bound():
    """40 items of which none changed exclude a loss of more than 7 points, not every loss."""
    a = ability(items=40, orders=1)
    a.values = np.stack([a.values[0], a.values[0]])
    (estimate,) = shares_kept([a])
    assert unseen(40) == pytest.approx(0.0722, abs=1e-4)
    low, high = estimate.within_interval(0.10)
    assert (1 - low) * a.unit == pytest.approx(unseen(40), rel=0.01)
    assert high - 1 == pytest.approx(1 - low)
    assert not estimate.equal()


def test_mcnemar_is_exact():
    for lost, won in ((6, 0), (9, 2), (3, 3)):
        before = np.array([1.0] * (lost + 5) + [0.0] * (won + 5))
        after = before.copy()
        after[:lost], after[lost + 5 : lost + 5 + won] = 0, 1
        theirs = statsmodels_mcnemar([[5, lost], [won, 5]], exact=True).pvalue
        assert inference.mcnemar(after, before) == pytest.approx(theirs)
    assert inference.mcnemar(before, before) == 1


def test_holm_is_statsmodels():
    for count in (0, 1, 5, 40):
        p = np.random.default_rng(count).random(count).round(1) / 10  # with ties
        theirs = multipletests(p, method="holm")[1] if count else []
        assert inference.holm(p) == pytest.approx(theirs)


def test_p_and_equivalence_use_the_same_standard_error():
    estimate = Estimate(0.95, 0.02, 7, null=1.0)
    assert estimate.p == pytest.approx(2 * stats.t.sf(2.5, 7))
    assert estimate.p_unequal(0.1) == pytest.approx(stats.t.sf(2.5, 7))
    assert estimate.equal() == (estimate.within_interval(0.10)[0] > 0.9) is True
    assert Estimate(0.0, 0.0, 1000, null=1.0).p == 0


# Coverage and false claims by simulation -----------------------------------------------------------


def coverage(scale, orders, items, spread, runs, names=ABILITIES, kept=0.7):
    """Share of nominal 95% intervals that hold the share kept, over runs and abilities."""
    hits = []
    for seed in range(runs):
        many = [ability(n, kept=kept, orders=orders, items=items, spread=spread, seed=seed, scale=scale) for n in names]
        hits += [low <= kept <= high for low, high in (each.interval for each in shares_kept(many))]
    return np.mean(hits)


def test_coverage_in_short():
    """A quick look: with intervals over items alone it would be 0.6 to 0.75 here."""
    for orders in (2, 5):
        assert 0.90 <= coverage("graded", orders, 120, 0.05, 40) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["value", "graded"])
@pytest.mark.parametrize("orders", [2, 5])
@pytest.mark.parametrize("items", [40, 120])
def test_coverage(scale, orders, items):
    found = [coverage(scale, orders, items, spread, 300) for spread in (0.0, 0.03, 0.08)]
    assert all(0.925 <= share <= 0.98 for share in found), found  # 0.93 to 0.97, and what 300 runs leave open
    assert 0.93 <= np.mean(found) <= 0.97


def false_claims(orders, spread, runs, items=120):
    """Share of runs in which something is called lost, or kept, where 0 and just the margin are lost."""
    lost, kept = [], []
    for seed in range(runs):
        about = {"orders": orders, "spread": spread, "seed": seed, "items": items}
        none = [one for n in ABILITIES for m in ("rome", "memit") for one in both(benchmark=n, method=m, **about)]
        lost.append((effects(none).state == "lost").any())
        margin = [ability(ABILITIES[2], kept=0.9, scale="graded", **about)]
        kept.append((effects(margin).state == "kept").any())
    return np.mean(lost), np.mean(kept)


@pytest.mark.slow
@pytest.mark.parametrize(("orders", "spread"), [(1, 0.0), (2, 0.0), (2, 0.05), (5, 0.0), (5, 0.05)])
def test_false_claims(orders, spread):
    """Of twenty abilities of which nothing is lost, some is called lost in a twentieth of the runs at most."""
    lost, kept = false_claims(orders, spread, 150)
    assert lost <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 150)
    assert kept <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 150)


# States --------------------------------------------------------------------------------------------


def states(abilities):
    return dict(zip([(a.benchmark, a.scale) for a in abilities], effects(abilities).state, strict=True))


def test_states_of_a_known_effect_of_none_and_of_the_floor():
    found = states([
        ability("mini_mmlu", kept=0.5, scale="graded"), ability("mini_bbh", scale="graded"),
        ability("mini_csqa", base=0.2), ability("mini_gsm8k", kept=1.2, base=0.6, scale="graded"),
    ])  # fmt: skip
    assert list(found.values()) == ["lost", "kept", "floor", "rose"]


def test_a_small_loss_that_is_sure_is_kept_within_the_margin():
    (row,) = effects([ability(kept=0.96, scale="graded", items=2000)]).itertuples()
    assert row.kept.p < 0.001
    assert row.state == "kept"


def test_one_lucky_order_among_five_decides_nothing():
    """Four orders lose little, one gains much: neither a rise nor that all is kept."""
    found = states([ability("mini_gsm8k", by_order=(-0.02, -0.02, -0.02, -0.02, 0.3), scale="graded")])
    assert found == {("mini_gsm8k", "graded"): "undecided"}


def test_a_failed_model_has_lost_its_ability():
    """Likelihoods that are not finite score chance (``scores.scales``): all is lost, and never has anything risen."""
    a = ability("mini_mmlu")
    a.values[1] = a.chance
    below = ability("mini_truthfulqa", base=0.3)  # under chance when unedited, so that chance would be more
    below.values[1] = below.chance
    rows = effects([a, below])
    assert rows.state.tolist() == ["lost", "floor"]
    assert rows.kept[0].value == 0


def test_holm_is_over_the_abilities_of_the_methods_that_edit():
    apart = [ability(name, kept=0.5, method="kn", editing=False) for name in ABILITIES]
    rows = effects([ability("mini_mmlu", kept=0.9, scale="graded"), *apart])
    assert rows.state.tolist()[1:] == ["apart"] * 5
    assert rows.p_holm[0] == rows.kept[0].p
    assert rows.p_holm[1:].isna().all()


def test_few_orders_are_pooled_over_methods_that_edit():
    """One ability in two orders has one degree of freedom of its own; those of other methods lend it theirs."""
    (alone,) = shares_kept([one := ability("mini_mmlu", spread=0.05, orders=2, scale="graded")])
    others = [
        ability("mini_mmlu", spread=0.05, orders=2, method=m, scale="graded")
        for m in ("memit", "pmet", "ft-l", "grace")
    ]
    together = shares_kept([one, *others])[0]
    assert together.df > alone.df


def test_a_threshold_drift_is_no_loss_of_discrimination():
    value, _, discrimination, bias = effects(two_way(threshold=1.2)).itertuples()
    assert value.score < value.base - 0.05
    assert discrimination.state == "kept"
    assert bias.state in ("rose", "lost")
    *_, discrimination, bias = effects(two_way(apart=0.8)).itertuples()
    assert discrimination.state == "lost"
    assert bias.state not in ("rose", "lost")


# Several abilities ---------------------------------------------------------------------------------


def test_variants_of_a_method_and_several_models_stand_side_by_side():
    grid = [
        one for model in "ab" for variant in ("default", "strong") for name in ABILITIES[:2]
        for one in both(benchmark=name, model=model, variant=variant)
    ]  # fmt: skip
    assert len(effects(grid)) == 16
    rows = inference.overall(grid)
    assert rows.label.tolist() == ["ROME", "ROME", "ROME (strong)", "ROME (strong)"] * 2
    assert len(inference.contrast(grid, [("a", "b")])) == 4


def test_a_mean_over_abilities_that_share_their_orders_is_as_uncertain_as_its_orders():
    by_order = (-0.1, -0.05, 0.0, 0.05, 0.1)
    alike = [ability(n, by_order=by_order, scale="graded", base=0.7) for n in ("mini_gsm8k", "mini_triviaqa")]
    mean = inference.kept(alike)
    assert mean.se == pytest.approx(np.std(by_order, ddof=1) / math.sqrt(5) / 0.7, rel=0.15)


def test_twins_are_paired_item_by_item_and_order_by_order():
    """What orders and items do to both twins alike is no part of the difference."""
    rng = np.random.default_rng(0)
    one = ability("mini_gsm8k", scale="graded", base=0.7)
    common = one.base + rng.normal(0, 0.1, 5)[:, None] + rng.normal(0, 0.2, 120)
    values = [np.stack([one.values[0], after]) for after in (common, common - 0.1 * one.base.mean())]
    one, other = (replace(one, model=model, values=each) for model, each in zip("ab", values, strict=True))
    (row,) = inference.contrast([one, other], [("a", "b")]).itertuples()
    assert row.difference.value == pytest.approx(-0.1, abs=0.005)
    assert row.difference.se < 0.02 < row.base.se


def test_several_pairs_of_twins_are_random_too():
    apart = {"t1": 0.95, "t2": 0.75, "t3": 0.55}
    grid = [ability("mini_gsm8k", model="b", kept=0.7, scale="graded")]
    grid += [ability("mini_gsm8k", model=m, kept=kept, scale="graded") for m, kept in apart.items()]
    (row,) = inference.contrast(grid, [("b", m) for m in apart]).itertuples()
    assert row.difference.value == pytest.approx(0.05, abs=0.04)
    assert row.difference.se > np.std(list(apart.values()), ddof=1) / math.sqrt(3) * 0.8
    assert row.difference.df < 4


def test_pairs_by_name():
    assert inference.pairs(["p", "p-instruct", "p-instruct-2"]) == [("p", "p-instruct"), ("p", "p-instruct-2")]
    assert inference.pairs(["x-7b-hf", "x-7b-chat-hf", "y", "y-Instruct"]) == [
        ("x-7b-hf", "x-7b-chat-hf"),
        ("y", "y-Instruct"),
    ]


def test_the_slope_has_models_as_its_unit():
    size = {"a": 1e5, "b": 1e6, "c": 1e7, "d": 1e8}
    kept = {"a": 0.5, "b": 0.75, "c": 0.65, "d": 0.9}
    grid = [ability("mini_gsm8k", model=m, kept=kept[m], scale="graded") for m in size]
    (row,) = inference.trend(grid, size).itertuples()
    shares = [inference.kept([a]).value for a in grid]
    line = stats.linregress(range(4), shares)
    assert (row.slope.value, row.slope.se, row.slope.df) == pytest.approx((line.slope, line.stderr, 2))
    assert row.slope.p == pytest.approx(line.pvalue)


# Before a run --------------------------------------------------------------------------------------


def test_the_detectable_effect_is_detected_as_often_as_it_says():
    """At the effect that is said to be found in 80% of runs it is: components from some runs, power from others."""
    names = ABILITIES[:3]
    runs = [[ability(n, spread=0.04, seed=s, scale="graded", base=0.7) for n in names] for s in range(30)]
    params = Params.model_construct(
        benchmarks=list(names), orders=list(range(5)), limit=120, methods=[Method(method="rome")]
    )
    found = inference.detectable(inference.components(runs), params).set_index("benchmark").effect
    assert found[inference.ALL] < found["mini_mmlu"]
    hits = []
    for seed in range(100, 220):
        kept = 1 - found["mini_gsm8k"]
        many = [
            ability(n, kept=kept if n == "mini_gsm8k" else 1, spread=0.04, seed=seed, scale="graded", base=0.7)
            for n in names
        ]
        hits.append(shares_kept(many)[2].p < 0.05)
    assert 0.65 <= np.mean(hits) <= 0.92


def test_more_orders_and_items_detect_less():
    runs = [[ability(n, spread=0.04, seed=s, scale="graded") for n in ABILITIES] for s in range(5)]
    components = inference.components(runs)

    def effect(orders, limit):
        params = Params.model_construct(
            benchmarks=list(ABILITIES), orders=list(range(orders)), limit=limit, methods=[Method(method="rome")]
        )
        return inference.detectable(components, params).effect.iloc[-1]

    assert effect(5, None) < effect(2, None)
    assert effect(5, None) < effect(5, 20)
