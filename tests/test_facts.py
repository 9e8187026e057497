import json
from pathlib import Path

import pytest

from kedit import KeditError
from kedit.data import facts
from kedit.data.requests import EditRequest

DATA = Path(__file__).parents[2] / "shared" / "data" / "edits"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared edit sets are not beside this checkout")
EVERY = [record for split in facts.SPLITS for record in facts.bundled(split)]


def test_the_bundled_set_is_large_and_split():
    assert len(EVERY) >= 1000
    assert len({record.relation for record in EVERY}) >= 12
    assert len(facts.bundled("edit")) >= 300
    assert len(facts.bundled("validation")) >= 100


def test_no_fact_stands_twice():
    assert len({record.id for record in EVERY}) == len(EVERY)
    assert len({(record.prompt, record.subject) for record in EVERY}) == len(EVERY)


def test_every_bundled_record_is_sound():
    objects = {}
    for record in EVERY:
        objects.setdefault(record.relation, {})[record.subject] = record.target_true
    trained = {record.text for record in facts.bundled("train")}
    for record in EVERY:
        assert record.target_new != record.target_true
        assert record.target_new in objects[record.relation].values()
        assert len(record.paraphrases) >= 2
        assert all(record.subject in paraphrase for paraphrase in record.paraphrases)
        assert all(record.subject in prompt for prompt in record.generation)
        assert record.target_true.lower() not in record.subject.lower()
        assert len(record.neighbours) >= 5
        assert len(set(record.neighbours)) == len(record.neighbours)
        for prompt, answer in record.neighbours:
            assert answer == record.target_true
            head, _, tail = record.prompt.partition("{}")
            subject = prompt.removeprefix(head).removesuffix(tail)
            assert subject != record.subject
            assert objects[record.relation][subject] == record.target_true
            assert prompt in trained  # so no run ever edits a neighbour


def test_the_same_facts_as_questions():
    for plain, question in zip(facts.bundled("edit"), facts.bundled_zsre("edit"), strict=True):
        assert question.prompt.startswith("Question: ")
        assert (question.id, question.target_new) == (plain.id, plain.target_new)
        ((unrelated, answer),) = question.neighbours
        assert answer
        assert plain.subject not in unrelated


def test_orders_are_fixed_and_different():
    records = facts.bundled("edit")
    assert facts.ordered(records, 0) == list(records)
    assert facts.ordered(records, 1) == facts.ordered(records, 1)
    assert facts.ordered(records, 1) != facts.ordered(records, 2)


def nested(**changes):
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "subject": "Ada Byron",
        "target_new": {"str": "French", "id": "Q150"},
        "target_true": {"str": "English", "id": "Q1860"},
        "relation_id": "P103",
    }
    return {
        "case_id": 7,
        "requested_rewrite": rewrite | changes,
        "paraphrase_prompts": ["At home Ada Byron spoke"],
        "neighborhood_prompts": ["The mother tongue of Mary Somerville is"],
        "generation_prompts": ["Ada Byron wrote to her friends in"],
    }


def test_counterfact_in_its_original_schema(tmp_path):
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([nested()]))
    (record,) = facts.load("counterfact", path=path)
    assert record.text == "The mother tongue of Ada Byron is"
    assert (record.target_new, record.target_true, record.id) == ("French", "English", "7")
    assert record.neighbours == (("The mother tongue of Mary Somerville is", "English"),)


@needs_data
def test_counterfact_in_the_flat_schema():
    records = facts.load("counterfact", path=str(DATA / "counterfact-edit-first2000.json"))
    assert len(records) == 2000
    assert all(record.subject in record.text for record in records)
    raw = json.loads((DATA / "counterfact-edit-first2000.json").read_text())
    assert [record.text for record in records] == [r["prompt"] for r in raw]


@needs_data
def test_zsre():
    path = DATA / "zsre_mend_eval_portability_gpt4.json"
    raw = json.loads(path.read_text())
    records = facts.load("zsre", path=str(path))
    assert len(records) == sum(r["alt"].strip() != r["answers"][0].strip() for r in raw)
    assert len(records) > 1000
    assert all(record.neighbours[0][1] for record in records)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (nested(prompt="no place"), "record 1: .*exactly once"),
        (nested(subject=" ", prompt="{} is"), "record 1: subject is empty"),
        ({"case_id": 1}, "record 1: key 'prompt' is missing"),
        ("text", "record 1"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_index(tmp_path, record, sentence):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps([nested(), record]))
    with pytest.raises(KeditError, match=rf"broken\.json, {sentence}"):
        facts.load("counterfact", path=path)


def zsre(alt):
    return {"src": "Who wrote Emma?", "subject": "Emma", "alt": alt, "answers": ["Jane Austen"], "rephrase": "Emma is by?",
            "loc": "nq question: who sang it", "loc_ans": "Cher"}  # fmt: skip


def test_records_without_a_new_object_are_left_out_counted_and_named(tmp_path, caplog):
    """One of them must not cost the other thousand."""
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([zsre("Mary Shelley"), zsre(""), zsre(" Jane Austen"), zsre("Ada"), zsre(" ")]))
    with caplog.at_level("WARNING"):
        records = facts.load("zsre", path=path)
    assert [record.target_new for record in records] == ["Mary Shelley", "Ada"]
    assert f"{path}: left out 3 records whose new object is empty or the old one: [1, 2, 4]" in caplog.text


@needs_data
def test_the_train_records_of_zsre_of_which_one_has_no_new_object(caplog):
    path = DATA / "zsre_mend_train-1k.json"
    unusable = [
        i for i, raw in enumerate(json.loads(path.read_text())) if raw["alt"].strip() in ("", raw["answers"][0])
    ]
    assert 534 in unusable
    with caplog.at_level("WARNING"):
        assert len(facts.load("zsre", path=path)) == 1000 - len(unusable)
    assert f"left out {len(unusable)} records" in caplog.text


@pytest.mark.parametrize(
    "values", [("{} {} is", "a", "b"), ("{} is", " ", "b"), ("{} is", "a", ""), ("{} is", "a", "b", "b")]
)
def test_requests_check_themselves(values):
    with pytest.raises(ValueError, match=r"exactly once|empty|equals"):
        EditRequest(*values)


def test_an_unknown_set_or_split_is_one_sentence():
    with pytest.raises(KeditError, match="edit set 'zsrr' does not exist; did you mean 'zsre'"):
        facts.load("zsrr")
    for name in ("bundled", "bundled-zsre", "pico"):
        with pytest.raises(KeditError, match=f"edit set '{name}': split 'test' does not exist; use one of train"):
            facts.load(name, "test")


def test_a_set_of_another_package_is_a_function_of_the_split(monkeypatch):
    monkeypatch.setitem(facts.SETS, "theirs", "kedit.data.facts:bundled")
    assert facts.at_hand("theirs")
    assert facts.load("theirs", "validation") == facts.bundled("validation")
