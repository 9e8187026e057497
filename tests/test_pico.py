import hashlib
import json
import re
from functools import cache
from itertools import islice

import pytest
import torch

import kedit
from kedit.data import facts
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation.benchmarks import HERE, suites
from kedit.pico import train, world

if not (train.WEIGHTS / "manifest.json").exists():
    pytest.skip("the pico models have not been trained here yet (make pico)", allow_module_level=True)
MANIFEST = json.loads((train.WEIGHTS / "manifest.json").read_text())["models"]


@cache
def training_text() -> str:
    """The documents of the training text and the tuning set, more of them than any model has read."""
    documents = [*islice(world.documents(world.BASE, "base"), 100_000)]
    words = sum(len(document.split()) for document in documents)  # fewer than tokens
    assert words > train.RECIPES["pico-5m"]["tokens"]
    documents += islice(world.documents(world.TUNING, "tuning"), 20_000)
    return "\n".join(documents)


def items(task: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / "pico" / f"{task}.jsonl").read_text().splitlines()]


def test_the_family_shares_data_order_and_tokens():
    assert list(MANIFEST) == list(train.RECIPES)
    assert len({entry["tokens"] for entry in MANIFEST.values() if not entry["start"]}) == 1
    sizes = [entry["parameters"] for entry in MANIFEST.values() if not entry["start"]]
    assert sizes == sorted(sizes)
    assert sum(path.stat().st_size for path in train.WEIGHTS.rglob("*")) < 16e6


@pytest.mark.parametrize("name", train.RECIPES)
def test_every_committed_model_is_the_manifests_and_loads(name):
    for file, digest in MANIFEST[name]["sha256"].items():
        assert hashlib.sha256((train.WEIGHTS / name / file).read_bytes()).hexdigest() == digest, file
    lm = kedit.load(name)
    assert sum(p.numel() for p in lm.model.parameters()) == MANIFEST[name]["parameters"]
    assert lm.tokenizer.convert_ids_to_tokens(lm.begin) == [world.SEPARATOR]
    assert lm.model.dtype == torch.float32


def test_training_the_smallest_anew_starts_as_recorded():
    _, losses = train.train("pico-0.1m", stop=10)
    assert losses == pytest.approx(MANIFEST["pico-0.1m"]["first_losses"][:10], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("task", suites()["pico"])
def test_no_item_stands_in_any_training_text(task):
    for item in items(task):
        text = f"Question: {item['question']}" if "question" in item else f"Statement: {item['statement']}"
        if task == "pico_truthfulqa":
            text = f"The truth is that {item['question']}"
        if task == "pico_csqa":  # nor is the property told in other words: all that is said of the thing is its kind
            thing = item["question"].split()[3]
            assert set(re.findall(rf"\b[Aa] {thing} (\w+ \w+)", training_text())) == {"is a"}
        assert text not in training_text()
        if "steps" in item:
            assert item["steps"] not in training_text()


def test_every_item_has_its_answer_once():
    for task in suites()["pico"]:
        for item in items(task):
            if "choices" in item:
                assert len(set(item["choices"])) == len(item["choices"])
    kinds = [item["choices"][item["answer"]] for item in items("pico_bbh") if item["kind"] == "boolean"]
    assert kinds.count("True") == kinds.count("False")
    for item in items("pico_bbh"):
        asked, right = item["question"], item["choices"][item["answer"]]
        if item["kind"] == "boolean":
            assert str(eval(asked.removesuffix("?"))) == right
        else:
            listed, kind = asked.removesuffix("?").split(". How many are a ")
            assert sum(word in world.KINDS[kind] for word in listed.split(", ")) == int(right)
    for item in items("pico_gsm8k"):
        for step in item["steps"].split(", "):
            left, _, right = step.partition(" = ")
            assert eval(left) == int(right)


def test_the_tuning_set_knows_nothing_of_tested_or_edited_people():
    tuning = set(" ".join(islice(world.documents(world.TUNING, "tuning"), 10_000)).replace("?", " ").split())
    assert not tuning & {name for group in ("edit", "validation", "test") for name in world.people(group)}
    assert tuning & set(world.people("train"))


def test_edits_are_sound_and_apart():
    tested = set(world.people("test"))
    subjects = {split: {r.subject for r in facts.load("pico", split)} for split in facts.SPLITS}
    assert len(facts.load("pico", "edit")) >= 200
    assert not subjects["edit"] & (subjects["validation"] | subjects["train"] | tested)
    for split in facts.SPLITS:
        for record in facts.load("pico", split):
            known, unseen = record.paraphrases
            assert f"{known} " in training_text()
            assert unseen not in training_text()
            assert len(set(record.neighbours)) == 5
            for prompt, answer in record.neighbours:
                assert answer == record.target_true
                assert prompt.split()[0] in subjects["train"] - {record.subject}
    with pytest.raises(kedit.KeditError, match="split 'test' does not exist"):
        facts.load("pico", "test")


def test_second_moments_are_taken_over_the_models_own_world():
    lm = kedit.load("pico-0.1m")
    statistics = SecondMoments(lm)
    assert statistics.text == "pico"
    assert lm.tokenizer.unk_token_id not in lm.encode(world.sample(500))


def test_a_rome_edit_takes_and_undoes_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    lm = kedit.load("pico-1.5m")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    request = facts.load("pico", "validation")[0]

    def says() -> str:
        ids = torch.tensor([[*lm.begin, *lm.encode(request.text)]])
        return lm.tokenizer.decode(lm.model(ids).logits[0, -1].argmax())

    editor = kedit.editor("rome", lm, statistics=SecondMoments(lm, tokens=16_384))
    edit = editor.apply(request)
    assert says() == request.target_new.lower()
    edit.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
