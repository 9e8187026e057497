"""The audit's sentences on made-up outcomes whose truth is known, and the decision table's rules."""

import numpy as np
import pandas as pd
import pytest
from synthetic import ABILITIES, both

from kedit.analysis import audit, decision
from kedit.analysis.inference import Estimate
from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.editors import kind_of, make_hparams
from kedit.evaluation import readings
from kedit.study.params import Params
from kedit.study.results import Cell, Results

NO_MOMENTS = ("rome", "no second moments")
GRID = {
    "models": ["m"],
    "methods": ["control"],
    "edits": [0, 100],
    "benchmarks": ["mini_mmlu"],
    "orders": [0, 1, 2, 3, 4],
}


def run(took):
    """Results whose edit success is ``took``: (method, variant) -> share of 40 edits a checkpoint that took."""
    methods = [{"method": method, "variant": variant} for method, variant in took]
    params = Params.make("audit", "made", GRID).model_copy(update={"methods": []})
    params = params.model_copy(update={"methods": [type("M", (), each) for each in methods]})
    cells = [
        Cell("m", method, variant, order, 100, "edit", [
            {"id": str(n), "kind": "reliability", "new": -1.0, "true": -2.0 if n < share * 40 else -0.5,
             "says": "new" if n < share * 40 else "other"} for n in range(40)])
        for (method, variant), share in took.items() for order in range(5)
    ]  # fmt: skip
    return Results(params, cells, [], {})


def paths(published, released, names=("r-rome", "rome")):
    """Abilities of a path as published and one as released, of which so much is kept."""
    lines = ((names[0], "default", published), (names[1], "default" if names[0] != names[1] else names[2], released))
    return [
        a for m, v, k in lines for b in ABILITIES[2:] for a in both(benchmark=b, method=m, variant=v, kept=k, items=400)
    ]


@pytest.mark.parametrize(
    ("published", "released", "word", "says"),
    [
        (0.9, 0.3, "supported", "Consistent with it: ROME"),  # the study's ROME kept 0.03
        (0.9, 0.9, "not supported", "Not: ROME"),
        (0.4, 0.9, "not supported", "Not: ROME"),  # away from the study's curve
        (0.03, 0.03, "does not apply", "As published it keeps what the study's curve does"),
    ],
)
def test_what_a_deviation_accounts_for(published, released, word, says):
    results = run({("r-rome", "default"): 1.0, ("rome", "default"): 1.0})
    found = {
        verdict.claim.partition(":")[0]: verdict for verdict in audit.deviations(results, paths(published, released))
    }
    verdict = found[audit.DEVIATIONS[0].what]
    assert verdict.word == word
    assert says in verdict.because
    assert "The study's Llama2-7B kept 0.03 after 100: " in verdict.because
    others = [v for v in found.values() if v is not verdict]
    assert len(others) == len(audit.DEVIATIONS) - 1
    assert {v.word for v in others} == {"does not apply"}
    assert all("does not have both paths" in v.because for v in others)


def test_edits_that_are_not_in_place_are_told():
    results = run({("mend", "default"): 1.0, ("mend", "last edit only"): 0.025})
    abilities = paths(0.2, 1.0, ("mend", "mend", "last edit only"))
    for a in abilities:
        a.editing = [True, a.variant == "default"]
    verdict = next(v for v in audit.deviations(results, abilities) if v.claim.startswith("MEND"))
    assert verdict.word == "supported"  # it keeps what the study's curve keeps, since it hardly edits
    assert "difference 0.97 [0." in verdict.because
    assert "As released the edits are not in place" in verdict.because


def test_edits_in_place_have_intervals_over_orders():
    assert str(audit.over_orders([np.array([1.0, 0.0, 1.0, 1.0])] * 3)) != "0.75 [0.75, 0.75]"
    sure = audit.over_orders([np.ones(30)])
    assert sure.value == 1
    assert sure.within_interval(0.1)[0] == pytest.approx(0.05 ** (1 / 30), abs=1e-3)  # the exact bound, one-sided at 5%
    apart = audit.over_orders([np.full(20, 1.0), np.full(20, 0.5)])
    assert (apart.value, apart.df) == (0.75, 1)
    assert apart.se == pytest.approx(0.25)


def test_ranks_that_turn_round_are_found_and_those_in_noise_are_not():
    def cells(method, compared, written):
        return [Cell("m", method, "default", order, 100, "readings", [
            {"id": str(n), "kind": form, "new": -1.0, "true": -2.0 if n < compared * 100 else -0.5, "accuracy": 0.5,
             "says": "new" if n < written * 100 else "other"} for form in readings_forms for n in range(100)])
            for order in range(5)]  # fmt: skip

    readings_forms = ("prompt", "question")
    params = Params.make("audit", "made", GRID | {"measures": ["readings"]})
    turned = Results(params, [*cells("rome", 1.0, 0.2), *cells("memit", 0.6, 0.9)], [], {})
    verdict = audit.ranks(turned)
    assert verdict.word == "not supported"
    assert "ROME and MEMIT (prompt, comparison +0.40, written -0.70)" in verdict.because
    alike = Results(params, [*cells("rome", 1.0, 0.9), *cells("memit", 0.6, 0.2)], [], {})
    assert audit.ranks(alike).word == "supported"
    rows = audit.metrics(turned).set_index(["label", "form"])
    assert rows.gap["ROME", "question"].value == pytest.approx(0.8)
    assert rows["token accuracy"]["ROME", "prompt"].value == 0.5


@pytest.mark.parametrize("name", ["pico", "smollm2-135m", "reference"])
def test_paths_of_the_parameter_files_differ_in_the_deviation_alone(name):
    params = Params.find("audit", name)
    given = {(each.method, each.variant): each.hparams for each in params.methods}
    pairs = [d for d in audit.DEVIATIONS if {d.published, d.released} <= given.keys()]
    assert len(pairs) == len(audit.DEVIATIONS) - (name == "pico")  # MEND has no networks for pico
    assert len(params.orders) == 5
    for d in pairs:
        one, other = (
            vars(make_hparams(kind_of(path[0]), params.models[0], given[path])) for path in (d.published, d.released)
        )
        differ = {key for key in one if one[key] != other[key]}
        assert differ == {*given[d.published], *given[d.released]}, d.what


def test_forms_of_a_question_and_where_a_text_stops(llama):
    bundled, pico = facts.bundled("edit")[0], facts.load("pico", "edit")[0]
    assert readings.forms(bundled)["question"].endswith("? Answer:")
    assert bundled.subject in readings.forms(bundled)["question"]
    assert readings.forms(pico)["question"] == pico.generation[0]
    request = EditRequest("The capital of {} is", "France", "Rome", "Paris", id="f")
    assert list(readings.forms(request)) == ["prompt"]
    assert readings.said_in("Rome, not St. Paul", request) == "new"
    assert readings.said_in("Rome, formerly Paris", request) == "other"
    assert readings.said_in("Paris", request) == "true"
    assert readings.STOP.split("St. Louis is big. Rome")[0] == "St. Louis is big"
    (item,) = readings.measure(llama, [request])
    assert set(item) == {"id", "kind", "new", "true", "accuracy", "text", "says"}
    assert 0 <= item["accuracy"] <= 1


def test_token_accuracy_counts_each_token_with_those_before_it_given(llama):
    request = EditRequest("The capital of {} is", "France", "Rome and Paris London", "Paris", id="f")
    ids, target = llama.encode(request.text), llama.encode(" Rome and Paris London")
    import torch

    logits = llama.model(torch.tensor([[*llama.begin, *ids, *target]])).logits[0]
    best = logits[len(llama.begin) + len(ids) - 1 : -1].argmax(-1).tolist()
    (item,) = readings.measure(llama, [request])
    assert item["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(best, target, strict=True)]))


# Which editor? ---------------------------------------------------------------------------------------


def method(label, success=1.0, kept=1.0, editing=True, follows=True, se=0.01):
    written = [np.array([success > (n + 0.5) / 40 for n in range(40)], float)] * 5
    share = Estimate(kept, se, 50, 1.0)
    return {"label": label, "edits": 10, "orders": 5, "written": written, "success": audit.over_orders(written),
            "locality": audit.over_orders(written), "value": share, "graded": share, "seconds": 1.0, "bytes": 1000,
            "saved": True, "needs": "nothing", "editing": editing, "follows": follows,
            "generalisation": audit.over_orders(written)}  # fmt: skip


def test_what_to_use_and_why_not_the_others():
    rows = [method("A"), method("B", success=0.5), method("C", kept=0.6), method("D", editing=False)]
    rows += [method("E", follows=False), method("F", kept=0.95, se=0.1)]
    said = decision.sentence(pd.DataFrame(rows))
    assert said.startswith("After 10 edits: use A (1.00 of the edits written")
    assert "As harmless, but fewer edits take: B." in said
    assert "A loss of a tenth of the abilities cannot be excluded: C, F." in said
    assert "Did not keep their edits: D." in said
    assert "very words of the edit only: E." in said
    assert "no method is shown" in decision.sentence(pd.DataFrame(rows[2:]))
    one = decision.sentence(pd.DataFrame([method("A") | {"orders": 1}]))
    assert one.startswith("After 10 edits (orders: 1, a hint only): use A")
    assert "A" in decision.shown_table(pd.DataFrame(rows)).index.get_level_values("method")


@pytest.mark.parametrize(
    ("name", "weights"), [("rome", True), ("alphaedit", True), ("mend", True), ("grace", False), ("serac", False)]
)
def test_what_can_be_saved_is_told_by_the_class(name, weights):
    assert decision.ordinary(kind_of(name)) == weights
    needs = decision.beforehand(kind_of(name), "smollm2-135m-instruct", 98304)
    assert ("second moments" in needs) == (name in ("rome", "alphaedit"))
    assert ("training" in needs) == (name in ("mend", "serac"))
