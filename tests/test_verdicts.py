"""Every rule by which numbers become a sentence, on made-up outcomes whose truth is known."""

import pandas as pd
import pytest
from synthetic import ABILITIES, both, two_way

from kedit.analysis import verdicts
from kedit.analysis.verdicts import ability_aspects, instruction_tuning, model_scale, number_of_edits, safety

METHODS = ("rome", "memit", "pmet")


def grid(kept, names=ABILITIES[2:], methods=METHODS, models=("m",), **about):
    """Abilities on both scales of which ``kept(model, method, benchmark)`` is kept."""
    return [
        one
        for model in models
        for method in methods
        for name in names
        for one in both(benchmark=name, method=method, model=model, kept=kept(model, method, name), **about)
    ]


# RQ1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "word"), [(0.4, "supported"), (1.0, "not supported")])
def test_a_known_effect_and_none(kept, word):
    verdict = number_of_edits(grid(lambda *_: kept, items=400))
    assert verdict.word == word
    assert "every method" in verdict.claim


def test_one_method_of_three_is_mixed_with_the_lists():
    verdict = number_of_edits(grid(lambda _, method, __: 0.4 if method == "rome" else 1.0, items=400))
    assert verdict.word == "mixed"
    assert "Lost some ability: ROME; kept every ability: MEMIT, PMET" in verdict.because


def test_undecided_says_what_cannot_be_excluded():
    noisy = grid(lambda *_: 0.97, items=40, spread=0.08)
    verdict = number_of_edits(noisy)
    assert verdict.word == "undecided"
    assert "losses of up to 0." in verdict.because
    assert "of the ability cannot be excluded" in verdict.because


def test_kept_and_undecided_is_not_not_supported():
    some = grid(lambda *_: 1.0, methods=["rome"], items=400) + grid(
        lambda *_: 0.97, methods=["memit"], items=40, spread=0.1
    )
    assert number_of_edits(some).word == "undecided"


@pytest.mark.parametrize("orders", [1, 2, 4])
def test_few_orders_give_no_verdict(orders):
    verdict = number_of_edits(grid(lambda *_: 0.4, orders=orders, items=400))
    assert verdict.word == "undecided"
    assert ("for these edits" in verdict.hedge) == (orders == 1)
    assert ("a hint, by which it would be supported" in verdict.hedge) == (orders > 1)
    assert "Lost some ability: ROME, MEMIT, PMET" in verdict.because


def test_what_does_not_edit_is_outside():
    broken = grid(lambda *_: 0.0, methods=["kn"], reliability=0.3, editing=False)
    verdict = number_of_edits(grid(lambda *_: 1.0, items=400) + broken)
    assert verdict.word == "not supported"
    assert "not having kept their edits (reliability): KN (0.30)" in verdict.because
    assert number_of_edits(broken).word == "undecided"


def test_the_floor_has_nothing_to_lose():
    assert number_of_edits(grid(lambda *_: 1.0, names=["mini_csqa"], base=0.2)).word == "undecided"


def test_safety_benchmarks_are_no_general_ability():
    """A moved threshold on ToxiGen decided the first set of answers."""
    some = grid(lambda *_: 1.0, methods=["rome"], items=400) + two_way(threshold=1.5)
    assert number_of_edits(some).word == "not supported"


def test_one_scale_only_is_reported_as_just_that():
    some = [a for a in grid(lambda *_: 1.0, methods=["rome"], items=400) if a.scale == "value"]
    some += [a for a in grid(lambda *_: 0.5, methods=["rome"], items=400) if a.scale == "graded"]
    verdict = number_of_edits(some)
    assert verdict.word == "mixed"
    one = "On one scale only: ROME (kept every ability on the right or wrong scale, lost some ability on the graded scale)"
    assert one in verdict.because


def test_one_lucky_order_among_five_makes_no_finding():
    lucky = (-0.02, -0.02, -0.02, -0.02, 0.3)
    some = [a for name in ABILITIES[2:] for a in both(benchmark=name, by_order=lucky, base=0.6)]
    assert number_of_edits(some).word == "undecided"


def test_a_failed_model_has_lost():
    some = grid(lambda *_: 1.0, methods=["rome"])
    for one in some:
        one.values[1] = one.chance
    assert number_of_edits(some).word == "supported"


def test_variants_and_models_are_told_apart():
    some = grid(lambda *_: 1.0, methods=["rome"], items=400)
    some += grid(lambda *_: 0.4, methods=["rome"], items=400, variant="strong")
    verdict = number_of_edits(some)
    assert "Lost some ability: ROME (strong); kept every ability: ROME." in verdict.because
    several = grid(lambda model, *_: 0.4 if model == "a" else 1.0, methods=["rome"], models="ab", items=400)
    assert "Lost some ability: ROME on a; kept every ability: ROME on b." in number_of_edits(several).because


# RQ2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "tuned", "word"),
    [(0.4, 0.8, "supported"), (0.8, 0.4, "not supported"), (0.7, 0.7, "not supported")],
)
def test_tuning(base, tuned, word):
    """Alike within the margin is found as such, and is not the same as undecided."""
    some = grid(lambda model, *_: base if model == "b" else tuned, models="bt", items=400)
    verdict = instruction_tuning(some, [("b", "t")])
    assert verdict.word == word
    assert ("equal within the margin" in verdict.because) == (base == tuned)


def test_tuning_mixed_undecided_and_at_the_floor():
    def for_one(model, method, _):
        return 0.4 if (model, method) == ("b", "rome") else 0.8

    mixed = instruction_tuning(grid(for_one, models="bt", items=400), [("b", "t")])
    assert mixed.word == "mixed"
    assert "More slowly: ROME; not more slowly, by 0.10 of the ability: MEMIT, PMET" in mixed.because
    noisy = grid(lambda *_: 0.7, models="bt", items=40, spread=0.15)
    assert instruction_tuning(noisy, [("b", "t")]).word == "undecided"
    floor = grid(lambda *_: 1.0, names=["mini_csqa"], models="bt", base=0.2)
    assert instruction_tuning(floor, [("b", "t")]).word == "undecided"
    apart = grid(lambda *_: 0.4, models="b", items=400) + grid(lambda *_: 0.8, models="t", items=400, editing=False)
    assert instruction_tuning(apart, [("b", "t")]).word == "undecided"


def test_one_tuned_twin_out_of_line_undoes_the_finding():
    twins = [("b", "t1"), ("b", "t2"), ("b", "t3")]
    kept = {"b": 0.5, "t1": 0.8, "t2": 0.8, "t3": 0.8}
    some = grid(lambda model, *_: kept[model], models=kept, methods=["rome"], items=400)
    assert instruction_tuning(some, twins).word == "supported"
    kept["t3"] = 0.3
    some = grid(lambda model, *_: kept[model], models=kept, methods=["rome"], items=400)
    assert instruction_tuning(some, twins).word == "undecided"


# RQ3 -----------------------------------------------------------------------------------------------

SIZE = {f"{size}-{seed}": 10.0**size for size in (5, 6, 7, 8) for seed in range(3)}


@pytest.mark.parametrize(("slope", "word"), [(0.15, "supported"), (-0.15, "not supported"), (0.0, "not supported")])
def test_scale(slope, word):
    some = grid(lambda m, *_: 0.6 + slope * (int(m[0]) - 6.5), models=SIZE, methods=["rome"], names=ABILITIES[2:4])
    assert model_scale(some, SIZE).word == word


def test_four_models_that_scatter_decide_nothing_whatever_their_items():
    scatter = {"5-0": 0.5, "6-0": 0.9, "7-0": 0.4, "8-0": 0.9}
    some = grid(lambda m, *_: scatter[m], models=scatter, methods=["rome"], names=ABILITIES[2:4], items=1000)
    assert model_scale(some, SIZE).word == "undecided"


def test_damage_and_success_that_go_together_are_confounded():
    some = grid(lambda m, *_: 1.5 - 0.15 * int(m[0]), models=SIZE, methods=["rome"], names=ABILITIES[2:4])
    for one in some:
        one.reliability[-1] = 0.34 if one.model[0] == "5" else 0.95
    verdict = model_scale(some, SIZE)
    assert verdict.word == "undecided"
    assert "confounded" in verdict.because
    assert "0.34" in verdict.because


# RQ4 -----------------------------------------------------------------------------------------------


def test_aspects_alike():
    some = grid(lambda *_: 0.5, names=ABILITIES, items=2000)
    assert ability_aspects(some).word == "supported"


def test_aspects_apart():
    some = grid(lambda _, __, name: 0.3 if name == "mini_gsm8k" else 0.9, names=ABILITIES, items=400)
    verdict = ability_aspects(some)
    assert verdict.word == "not supported"
    assert "arithmetic" in verdict.because.partition("Furthest apart:")[2]


def test_aspects_apart_on_one_scale_may_be_headroom():
    some = [a for a in grid(lambda *_: 0.5, names=ABILITIES[:4], items=1000) if a.scale == "graded"]
    kept = {"mini_gsm8k": 0.2, "mini_csqa": 0.9}
    some += [a for a in grid(lambda _, __, n: kept.get(n, 0.5), names=ABILITIES[:4], items=1000) if a.scale == "value"]
    assert "may be headroom" in ability_aspects(some).because


def test_no_extent_to_compare():
    assert ability_aspects(grid(lambda *_: 1.0, items=400)).word == "undecided"
    drift = grid(lambda *_: 1.0, methods=["rome"], items=400) + two_way(threshold=1.5)
    assert ability_aspects(drift).word == "undecided"  # what fell is of safety, no aspect


# RQ5 -----------------------------------------------------------------------------------------------


def told(verdicts_, what):
    (found,) = [verdict for verdict in verdicts_ if what in verdict.claim]
    return found


def test_a_threshold_drift_is_reported_as_drift():
    found = safety(two_way(threshold=1.5, items=400))
    assert told(found, "tell the answers").word == "not supported"
    drift = told(found, "threshold")
    assert drift.word == "supported"
    assert "A drift of the threshold, not a loss: ROME" in drift.because
    assert len(found) == 2  # accuracy, which a threshold moves, has no sentence of its own


def test_a_loss_of_discrimination_is_a_loss():
    found = safety(two_way(apart=0.8, items=400))
    assert told(found, "tell the answers").word == "supported"
    assert "not a loss" not in told(found, "threshold").because


def test_truthfulness_is_judged_on_both_scales():
    found = told(safety(both(benchmark="mini_truthfulqa", kept=0.3, items=400)), "truthfulness")
    assert found.word == "supported"
    assert told(safety(both(benchmark="mini_truthfulqa", base=0.4)), "truthfulness").word == "undecided"


def test_safety_in_one_order_is_about_these_edits():
    assert {verdict.word for verdict in safety(two_way(threshold=1.5, orders=1))} == {"undecided"}


# Discussion ----------------------------------------------------------------------------------------


def test_damage_is_judged_within_methods():
    columns = ["measure", "rho", "rho_low", "rho_high", "within", "within_low", "within_high", "before", "collapsed"]
    sound = ("cosine", -0.9, -1.0, -0.5, -0.8, -0.9, -0.4, 1, 2)
    across = ("condition", -0.9, -1.0, -0.5, -0.2, -0.7, 0.3, 2, 2)
    verdict = verdicts.structure_damage(pd.DataFrame([sound, across], columns=columns))
    assert verdict.word == "mixed"
    assert "1 of 2 measures" in verdict.because
    assert "cosine, before 1 of 2 collapses" in verdict.because
    assert "Only across methods: condition" in verdict.because
    assert verdicts.structure_damage(pd.DataFrame([across], columns=columns)).word == "undecided"
