from conftest import HPARAMS

import kedit
from kedit.data.requests import EditRequest
from kedit.evaluation.success import measure, outcomes, says

REQUEST = EditRequest(
    "The capital city of {}",
    "France",
    "Rome",
    "Paris",
    paraphrases=("In truth the capital city of France",),
    neighbours=(("The capital city of Spain", "Paris"), ("The capital city of Peru", "Paris")),
    id="france",
)


def test_says_is_whole_words_at_the_start():
    assert says(" Rome.", "Rome")
    assert says(' "rome", she said', " Rome")
    assert not says(" Romeo", "Rome")
    assert not says(" not Rome", "Rome")
    assert says(" São Paulo is", "São Paulo")


def test_an_edit_shows_in_reliability_and_not_in_the_control(lm, statistics):
    from conftest import CONTEXTS

    before = measure(lm, [REQUEST])
    assert outcomes(before, before)["locality"] == [
        {"id": "france", "value": 1.0, "base": 1.0} for i in before if i["kind"] == "locality" and i["true"] > i["new"]
    ]
    control = kedit.editor("control", lm).apply(REQUEST)
    assert measure(lm, [REQUEST]) == before
    control.undo()
    editor = kedit.editor("rome", lm, hparams=HPARAMS["rome"], statistics=statistics(lm), contexts=CONTEXTS)
    editor.apply(REQUEST)
    after = outcomes(measure(lm, [REQUEST]), before)
    assert [item["value"] for item in after["reliability"]] == [1.0]
    assert [item["value"] for item in after["reliability_generated"]] == [1.0]
    assert len(after["generalisation"]) == 1


def test_locality_counts_only_what_was_right_before():
    def item(kind, new, true, said):
        return {"id": "a", "kind": kind, "new": new, "true": true, "says": said}

    before = [item("locality", -2, -1, "true"), item("locality", -1, -2, "other"), item("reliability", -3, -1, "true")]
    after = [item("locality", -1, -2, "new"), item("locality", -2, -1, "true"), item("reliability", -1, -3, "new")]
    found = outcomes(after, before)
    assert [i["value"] for i in found["locality"]] == [0.0]
    assert [i["value"] for i in found["locality_generated"]] == [0.0]
    assert [(i["value"], i["base"]) for i in found["reliability"]] == [(1.0, 0.0)]
