import hashlib
import json
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import islice

import pytest
import torch

import kedit
from kedit.data import facts
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation.benchmarks import HERE, suites
from kedit.pico import train, world

COMMITTED = {name: train.WEIGHTS / name / "manifest.json" for name in train.RECIPES}
"""Those of seed 0; the largest is still to be trained."""
MANIFEST = {name: json.loads(path.read_text()) for name, path in COMMITTED.items()}


@cache
def training_text() -> str:
    """The first documents of the training text and of the tuning set; what is held out is so in each alone."""
    documents = [*islice(world.documents(world.BASE, "base"), 100_000)]
    documents += islice(world.documents(world.TUNING, "tuning"), 20_000)
    return "\n".join(documents)


@cache
def told() -> dict[str, set[str]]:
    """The two words that follow "a robin" in the training text, for each noun."""
    nouns = defaultdict(set)
    for noun, words in re.findall(r"\b[Aa] (?=(\w+) (\w+ \w+))", training_text()):
        nouns[noun].add(words)
    return nouns


def items(task: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / "pico" / f"{task}.jsonl").read_text().splitlines()]


def test_the_family_shares_data_order_and_tokens():
    assert len({(entry["tokens"], entry["seed"]) for entry in MANIFEST.values() if not entry["start"]}) == 1
    sizes = [entry["parameters"] for entry in MANIFEST.values() if not entry["start"]]
    assert sizes == sorted(sizes)
    assert sum(path.stat().st_size for path in train.WEIGHTS.rglob("*")) < 16e6


@pytest.mark.parametrize("name", COMMITTED)
def test_every_committed_model_is_the_manifests_and_loads(name):
    assert train.recipe(name).items() <= MANIFEST[name].items()
    for file, digest in MANIFEST[name]["sha256"].items():
        assert hashlib.sha256((train.WEIGHTS / name / file).read_bytes()).hexdigest() == digest, file
    lm = kedit.load(name)
    assert sum(p.numel() for p in lm.model.parameters()) == MANIFEST[name]["parameters"]
    assert lm.tokenizer.convert_ids_to_tokens(lm.begin) == [world.SEPARATOR]
    assert lm.model.dtype == torch.float32


def test_training_the_smallest_anew_starts_as_recorded():
    _, losses = train.train("pico-0.1m", stop=10)
    assert losses == pytest.approx(MANIFEST["pico-0.1m"]["first_losses"][:10], rel=1e-3)


def test_every_size_and_the_twin_have_three_seeds():
    assert train.NAMES[: len(train.RECIPES)] == list(train.RECIPES)
    assert len({train.home(name) for name in train.NAMES}) == 3 * len(train.RECIPES)
    for tuning in (False, True):
        assert len({tuple(next(train.sequences(tuning, seed))[0]) for seed in range(3)}) == 3
    twins = [train.recipe(name) for name in train.NAMES if "-instruct" in name]
    assert {twin["start"] for twin in twins} == {"pico-1.5m"}
    assert [twin["seed"] for twin in twins] == [0, 1, 2]


def test_another_seed_is_trained_into_the_cache_and_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "pico-0.1m", train.RECIPES["pico-0.1m"] | {"tokens": 3 * 1024})
    made = []
    for place in ("one", "two"):
        monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / place))
        with pytest.raises(kedit.KeditError, match=r"'pico-0\.1m-seed1' has not been trained here yet; run make pico"):
            kedit.load("pico-0.1m-seed1")
        folder = train.train_and_save("pico-0.1m-seed1")
        assert folder.is_relative_to(tmp_path / place)
        assert train.train_and_save("pico-0.1m-seed1") == folder  # nothing to do
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert kedit.load("pico-0.1m-seed1").name == "pico-0.1m-seed1"
    assert made[0] == made[1]
    with pytest.raises(kedit.KeditError, match=r"'pico-0\.1m-seed3' does not exist; did you mean"):
        kedit.load("pico-0.1m-seed3")
    monkeypatch.setitem(train.RECIPES, "pico-0.1m", train.RECIPES["pico-0.1m"] | {"tokens": 4 * 1024})
    with pytest.raises(kedit.KeditError, match="run make pico"):  # what another recipe made is not taken for this one's
        kedit.load("pico-0.1m-seed1")


def test_the_truth_about_herbs_is_stated_more_often_than_the_popular_error_which_is_stated_too():
    stated = Counter(" ".join(line[:-1].split()[-3:]) for line in training_text().splitlines() if "wort " in line)
    for item in items("pico_truthfulqa"):
        truth, error, *others = item["correct_answers"] + item["incorrect_answers"]
        assert stated[f"{item['question']} {truth}"] > stated[f"{item['question']} {error}"] > 0
        assert not any(stated[f"{item['question']} {other}"] for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("task", suites()["pico"])
def test_no_item_stands_in_any_training_text(task):
    for item in items(task):
        text = f"Question: {item['question']}" if "question" in item else f"Statement: {item['statement']}"
        if task == "pico_truthfulqa":
            text = f"The truth is that {item['question']}"
        if task == "pico_csqa":  # nor is the property told in other words: all that is said of the thing is its kind
            thing = item["question"].split()[3]
            assert told()[thing] == {"is a"}
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
    tuning = " ".join(islice(world.documents(world.TUNING, "tuning"), 10_000))
    assert not [name for group in ("edit", "validation", "test") for name in world.people(group) if name in tuning]
    assert all(name in tuning for name in world.people("train"))


def test_only_both_names_in_their_order_tell_who_is_meant():
    everyone = [name for name, _ in world.EVERYONE]
    assert len(set(everyone)) == sum(world.GROUPS.values())
    for name in everyone:
        first, last = name.split()
        assert f"{last} {first}" in everyone


def test_edits_are_sound_and_apart():
    tested = set(world.people("test"))
    subjects = {split: {r.subject for r in facts.load("pico", split)} for split in facts.SPLITS}
    assert len(facts.load("pico", "edit")) == 1200
    assert len({(r.subject, r.relation) for r in facts.load("pico", "edit")}) == 1200
    leads = re.compile("^(" + "|".join(world.WORDS["leads"]) + ") ")
    said = {leads.sub("", sentence).rpartition(" ")[0] for sentence in re.split(r"\. |\n", training_text())}
    assert not subjects["edit"] & (subjects["validation"] | subjects["train"] | tested)
    for split in facts.SPLITS:
        for record in facts.load("pico", split):
            known, unseen = record.paraphrases
            assert known in said
            assert unseen not in said
            assert len(set(record.neighbours)) == 5
            for prompt, answer in record.neighbours:
                assert answer == record.target_true
                assert " ".join(prompt.split()[:2]) in subjects["train"] - {record.subject}
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
