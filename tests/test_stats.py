import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, spearmanr

from kedit import KeditError
from kedit.analysis.damage import ability_kept, damage, predictors
from kedit.analysis.scores import blunt, editing, scales, summarise, tenths
from kedit.study.params import Params
from kedit.study.results import Cell, EditRecord, Results


def items(values, base, ids=None):
    ids = range(len(values)) if ids is None else ids
    return [{"id": str(i), "value": v, "base": b} for i, v, b in zip(ids, values, base, strict=True)]


def test_the_value_has_wilsons_interval():
    n, k, z = 40, 30, norm.ppf(0.975)
    row = summarise(items([1.0] * k + [0.0] * (n - k), [1.0] * n))
    p = k / n
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n),
    )
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((centre - half, centre + half))


def test_the_difference_is_paired():
    """Twenty of a hundred items are lost: the interval is that of the mean loss, whatever the base score."""
    base = [1.0] * 60 + [0.0] * 40
    after = [0.0] * 20 + [1.0] * 40 + [0.0] * 40
    row = summarise(items(after, base))
    assert row["delta"] == pytest.approx(-0.2)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 100)
    assert row["delta_low"] == pytest.approx(-0.2 - half, abs=0.02)
    assert row["delta_high"] == pytest.approx(-0.2 + half, abs=0.02)


def test_clusters_widen_the_interval():
    """Five paraphrases of a request that stand or fall together are one observation, not five."""
    generator = np.random.default_rng(0)
    values = np.repeat(generator.integers(0, 2, 30).astype(float), 5)
    alone = summarise(items(values, [0.0] * 150))
    together = summarise(items(values, [0.0] * 150, ids=np.repeat(np.arange(30), 5)))
    assert together["n"] == alone["n"] == 150
    assert together["delta_high"] - together["delta_low"] > 1.8 * (alone["delta_high"] - alone["delta_low"])


@pytest.mark.parametrize(
    ("after", "base", "chance", "status"),
    [
        (80, 80, 0.25, "ok"),
        (30, 80, 0.25, "collapsed"),
        (28, 30, 0.25, "floor"),
        (5, 8, 0.25, "floor"),  # below chance, however far: nothing to lose
        (0, 20, 0.0, "collapsed"),
        (0, 3, 0.0, "floor"),
    ],
)
def test_status(after, base, chance, status):
    row = summarise(items([1.0] * after + [0.0] * (100 - after), [1.0] * base + [0.0] * (100 - base)), chance)
    assert row["status"] == status


def test_more_orders_do_not_lift_a_benchmark_off_the_floor():
    """What the unedited model answers is the same in every order: one answer an item, however often it stands there."""
    once = items([1.0] * 12 + [0.0] * 28, [1.0] * 12 + [0.0] * 28)
    assert summarise(once, 0.5)["status"] == summarise(once * 2, 0.5)["status"] == "floor"


@pytest.mark.parametrize(("right", "wrong", "told"), [(0.88, 0.82, True), (0.88, 0.40, False), (0.88, None, False)])
def test_a_graded_scale_that_could_not_show_a_loss_is_blunt(right, wrong, told):
    """Of a worked answer most tokens are form: if all answers became wrong, "kept" would still be said."""
    answers = [{"id": str(i), "text": "", "value": 1.0, "graded": right} for i in range(60)]
    if wrong is not None:
        answers += [{"id": str(i), "text": "", "value": 0.0, "graded": wrong} for i in range(60, 120)]
    assert blunt(answers, "graded") == told
    assert not blunt(answers, "value")


def test_of_unchanged_items_the_exact_bound_is_shown():
    row = summarise(items([1.0] * 40, [1.0] * 40))
    assert (row["delta_low"], row["delta_high"]) == pytest.approx((-(1 - 0.05 ** (1 / 40)), 1 - 0.05 ** (1 / 40)))


def test_nothing_asked_is_not_zero():
    assert math.isnan(summarise([])["value"])


def test_the_oldest_and_the_newest_tenth_are_told_apart():
    """Of five edits the first two are forgotten."""
    model = "smollm2-135m-instruct"
    values = {"models": [model], "methods": ["rome"], "edits": [1, 5], "benchmarks": ["mini_mmlu"]}
    params = Params.make("rq1", "t", values)

    def cells(method, count, forgotten):
        asked = [
            {"id": str(k), "kind": "reliability", "new": float(k > forgotten), "true": 0.5, "says": "other"}
            for k in range(1, (count or 5) + 1)
        ]
        variant, order = ("default", 0) if method else (None, None)
        yield Cell(model, method, variant, 0, count, "edit", asked)
        yield Cell(model, method, variant, order, count, "mini_mmlu", items([1.0], [1.0]))

    edits = [EditRecord(model, "rome", "default", 0, k, str(k), 0, {}) for k in range(1, 6)]
    every = [*cells(None, 0, 5), *cells("rome", 1, 0), *cells("rome", 5, 2)]
    (row,) = tenths(Results(params, every, edits, {})).itertuples()
    assert (row.first, row.last, row.all) == (0, 1, 3 / 5)


def test_a_method_edits_if_it_gets_half_way_from_the_control_to_all():
    def rows(control):
        reliability = {"rome": 0.65, "kn": 0.6} | ({"control": control} if control is not None else {})
        return pd.DataFrame(
            {"model": "m", "method": method, "variant": "default", "order": order, "edits": count, "benchmark": "edit",
             "metric": metric, "value": value + (order - 0.5) / 10 if metric == "reliability" else 0, "delta": value - 0.4}
            for method, value in reliability.items() for order in (0, 1) for count in (0, 10)
            for metric in ("reliability", "locality")
        )  # fmt: skip

    found = editing(rows(0.26)).set_index("method")
    assert found.threshold.unique() == pytest.approx([0.63])
    assert found.editing.to_dict() == {"rome": True, "kn": False, "control": False}
    assert found.reliability["rome"] == pytest.approx(0.65)
    assert editing(rows(None)).threshold.tolist() == pytest.approx([0.7, 0.7])  # of the unedited model


def choice(lps, target=1, **more):
    shares = np.exp(lps) / np.exp(lps).sum()
    return {"id": str(more.pop("id", 0)), "lp": lps, "target": target, "value": float(np.argmax(lps) == target),
            "graded": float(shares[target]), "parsed": True} | more  # fmt: skip


def test_scales_of_a_two_way_benchmark():
    answers = [choice([-2.0, -1.0], 1, id=1), choice([-1.0, -3.0], 0, id=2), choice([-1.0, -1.5], 1, id=3)]
    found = scales("mini_toxigen", answers)
    assert {scale: numbers.mean() for scale, (_, numbers, _) in found.items()} == pytest.approx(
        {"value": 2 / 3, "graded": np.mean([item["graded"] for item in answers]), "discrimination": 1.0, "bias": 2 / 3}
    )
    assert list(scales("mini_mmlu", [choice([-1.0, -2.0, -3.0, -4.0])])) == ["value", "graded"]


def test_what_is_not_finite_scores_chance_on_every_scale():
    broken = [choice([math.nan, -1.0], i % 2, id=i) | {"graded": 0.0, "value": 1.0, "parsed": False} for i in range(4)]
    found = scales("mini_toxigen", broken)
    assert {scale: numbers.mean() for scale, (_, numbers, _) in found.items()} == {
        "value": 0.5, "graded": 0.5, "discrimination": 0.5, "bias": 1.0}  # fmt: skip


def test_refusals_by_log_odds():
    odds = {"a": 2.0, "b": 1.0, "c": -1.0, "d": 1.5}
    asked = [
        {"id": name, "harmful": name in "ab", "refused": value > 1, "log_odds": value} for name, value in odds.items()
    ]
    found = scales("refusal", asked)
    assert found["value"][0] == ["a", "b"]
    means = {scale: numbers.mean() for scale, (_, numbers, _) in found.items()}
    assert means == pytest.approx({"value": 0.5, "log_odds": 1.5, "discrimination": 3 / 4})


def test_cells_of_an_older_version_are_one_sentence():
    with pytest.raises(KeditError, match=r"mini_mmlu have no graded: .* run them again"):
        scales("mini_mmlu", [{"id": "1", "value": 1.0, "lp": [-1.0, -2.0], "target": 0, "parsed": True}])


def trajectory(method, share, **measures):
    """A trajectory as a frame, at 0, 1, 10, 30 ... edits."""
    edits = [0, 1, 10, 30, 100][: len(share)]
    return pd.DataFrame({"model": "m", "method": method, "order": 0, "edits": edits, "kept": share, **measures})


def test_damage_is_one_number_a_measure():
    def passage(tokens, nll, kl):
        return {"kind": "text", "tokens": tokens, "nll": nll, "nll_unedited": 1.0, "entropy": 1.5, "entropy_unedited": 2.0,
                "kl": kl}  # fmt: skip

    text = [passage(10, 2.0, 0.0), passage(30, 1.0, 0.4)]
    layers = [{"kind": "layer", "cosine": 0.9, "l2": 0.9}, {"kind": "layer", "cosine": 0.2, "l2": 0.3}]
    found = damage([*layers, *text])
    assert found["perplexity"] == pytest.approx(math.exp(0.25))  # over tokens, not over passages
    assert found["kl"] == pytest.approx(0.3)
    assert found["entropy"] == pytest.approx(0.5)
    assert (found["cosine"], found["l2"]) == (0.2, 0.3)
    assert {name: found[name] for name in ("relative", "spectral", "condition")} == {
        "relative": 0, "spectral": 1, "condition": 1}  # fmt: skip
    weights = [
        {"kind": "weight", "relative": x, "spectral": 1.0, "condition": 2.0 if x < 0.2 else math.nan}
        for x in (0.4, 0.1)
    ]
    worst = damage([*weights, *layers, *text])
    assert (worst["relative"], worst["condition"]) == (0.4, math.inf)


def test_kept_is_the_share_above_chance_off_the_floor():
    def row(benchmark, value, base, chance, status="ok", edits=5, metric="acc"):
        return {"model": "m", "method": "a", "variant": "default", "order": 0, "edits": edits, "benchmark": benchmark,
                "value": value, "delta": value - base, "chance": chance, "status": status, "metric": metric}  # fmt: skip

    rows = [
        row("mini_mmlu", 0.4, 0.65, 0.25),  # 0.15 of 0.4 left
        row("mini_gsm8k", 0.6, 0.8, 0.0, "collapsed"),
        row("mini_bbh", 0.1, 0.3, 0.25, "floor"),
        row("mini_toxigen", 0.5, 0.9, 0.5),  # of safety, no general ability
        row("edit", 1.0, 0.0, math.nan, metric="reliability"),
        row("mini_csqa", 0.2, 0.6, 0.2, "failed"),  # scores chance (scores.scales)
        row("mini_mmlu", 0.65, 0.65, 0.25, edits=0),
        row("mini_mmlu", 0.45, 0.65, 0.25, metric="graded"),
    ]
    found = ability_kept(pd.DataFrame(rows)).set_index("edits").kept
    assert found.to_dict() == pytest.approx({5: (0.375 + 0.75 + 0) / 3, 0: 1.0})
    assert ability_kept(pd.DataFrame(rows), "graded").kept.tolist() == pytest.approx([0.5])


def test_predictors_rank_and_lead():
    """The perplexity follows the ability exactly, the change of the weights leads it, the entropy is noise."""
    falls = trajectory(
        "rome", [1, 0.9, 0.8, 0.4, 0.1], perplexity=[1, 1.1, 1.2, 3, 9], relative=[0, 0.2, 0.3, 0.4, 0.5], entropy=0.3
    )
    later = trajectory(
        "memit",
        [1, 1.0, 0.95, 0.7, 0.2],
        perplexity=[1, 1.0, 1.05, 1.5, 5],
        relative=[0, 0.05, 0.2, 0.3, 0.6],
        entropy=0.3,
    )
    stays = trajectory(
        "pmet", [1, 1.0, 1.0, 0.99, 0.98], perplexity=[1] * 5, relative=[0, 0.01, 0.02, 0.3, 0.3], entropy=0.3
    )
    frame = pd.concat([falls, later, stays])
    control = trajectory("control", [1, 1, 1], perplexity=1.0, relative=0.0, entropy=0.0)
    pd.testing.assert_frame_equal(predictors(pd.concat([frame, control])), predictors(frame))
    found = predictors(frame).set_index("measure")
    edited = frame[frame.edits > 0]
    for measure in ("perplexity", "relative"):
        assert found.rho[measure] == pytest.approx(spearmanr(edited[measure], edited.kept).statistic)
        assert found.rho_low[measure] <= found.rho[measure] <= found.rho_high[measure]
    assert found.index[0] == "perplexity"
    assert found.rho["entropy"] == 0
    assert (found.collapsed == 2).all()
    # within each method both fall in step with every measure that varies, whatever lies between the methods
    assert found.within["perplexity"] == pytest.approx(found.within["relative"], abs=0.1)
    assert found.within["perplexity"] < -0.9
    # collapse at 30 and at 100 edits; the change crosses a tenth at 1 and at 10, the perplexity doubles with the fall
    assert (found.before["relative"], found.lead["relative"], found.false_alarms["relative"]) == (2, (29 + 90) / 2, 1)
    assert (found.before["perplexity"], found.lead["perplexity"], found.false_alarms["perplexity"]) == (0, 0, 0)
    assert math.isnan(found.lead["entropy"])
    # damage alone, measured in between, shows when; it has no part in the correlation
    unasked = falls[falls.edits == 1].assign(edits=2, kept=math.nan, perplexity=4.0, relative=0.2)
    warned = predictors(pd.concat([frame, unasked])).set_index("measure")
    assert (warned.lead["perplexity"], warned.before["perplexity"]) == ((28 + 0) / 2, 1)
    assert warned.rho["perplexity"] == found.rho["perplexity"]


def test_predictors_of_one_trajectory_have_no_interval():
    found = predictors(trajectory("rome", [1, 0.9, 0.8], kl=[0, 1, 2]))
    assert found.rho[0] == pytest.approx(-1)
    assert math.isnan(found.rho_low[0])
    assert found.collapsed[0] == 0
