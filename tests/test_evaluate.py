"""The mini suite through kedit's forward passes against lm-eval's own hf model, on the real SmolLM2."""

import json
import math
import runpy
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from lm_eval import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM

from kedit.analysis import scores as stats
from kedit.evaluation import benchmarks
from kedit.evaluation.harness import SharedPrefixLM, evaluate
from kedit.store import cache_folder

LIMIT = 6
FOLDER = None


@pytest.fixture(scope="module")
def harness(smollm2):
    """lm-eval's hf model as its own command line loads it from the converted folder (README, mini suite)."""
    folder = cache_folder() / "models" / smollm2.name
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, add_bos_token=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmarks.suites()["mini"])
def test_same_answers_as_lm_evals_hf_model(smollm2, harness, name):
    found = evaluate(smollm2, name, LIMIT)
    reference = lm_evaluate(
        lm=harness,
        task_dict=benchmarks.tasks(name),
        samples=benchmarks.draw(name, LIMIT),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    about = benchmarks.metadata(name)
    samples = [s for s in reference["samples"][name] if s["filter"] == about.get("filter", s["filter"])]
    assert len(samples) == len(found) == LIMIT
    for sample, item in zip(sorted(samples, key=lambda s: s["doc_id"]), found, strict=True):
        assert item["value"] == sample[about["metric"]]
        if "lp" in item:
            assert item["lp"] == pytest.approx([lp for lp, _ in sample["filtered_resps"]], abs=2e-4)
        else:
            assert item["text"] == sample["resps"][0][0]


@pytest.mark.parametrize("name", benchmarks.suites()["mini"])
def test_items_are_many_unique_and_balanced(name):
    task, about = benchmarks.tasks(name)[name], benchmarks.metadata(name)
    docs = list(task.test_docs())
    assert len(docs) >= 100
    assert len({str(doc["id"]) for doc in docs}) == len(docs)
    assert len({doc["statement" if name == "mini_toxigen" else "question"] for doc in docs}) == len(docs)
    if about["metric"] == "acc":
        count = round(1 / about["chance"])
        for doc in docs:
            assert len(set(task.doc_to_choice(doc))) == count
        places = [task.doc_to_target(doc) for doc in docs]
        assert all(abs(places.count(place) / len(docs) - 1 / count) < 0.05 for place in range(count))


@pytest.mark.parametrize("suite", ["mini", "pico"])
def test_generated_items_are_those_of_the_generator(suite, tmp_path):
    """They reproduce the committed bytes."""
    copy = shutil.copytree(benchmarks.HERE / suite, tmp_path / suite)
    runpy.run_path(str(Path(__file__).parent / "bench" / f"make_{suite}_items.py"))["main"](copy)
    for path in (benchmarks.HERE / suite).glob("*.jsonl"):
        assert (copy / path.name).read_bytes() == path.read_bytes()


def test_task_files_are_plain_yaml_and_say_what_they_cost():
    """Any YAML reader can read them (lm-eval's is lenient)."""
    for name in benchmarks.known():
        about = benchmarks.metadata(name)
        assert about["metric"]
        assert set(about["reading"]) == {"items", "shared", "own", "generated"}
        if name.startswith(("mini", "pico")) or name == "refusal":
            (task,) = benchmarks.tasks(name).values()
            assert about["reading"]["items"] == len(task.eval_docs)


def test_a_suite_of_another_package_is_a_folder(tmp_path, monkeypatch):
    """An entry point names it; its tasks are lm-eval's in every way, and their fingerprint is that of their files."""
    tests = {"question": "The sky is", "choices": ["blue", "green"], "answer": 0, "id": "sky"}
    (tmp_path / "colours.jsonl").write_text(json.dumps(tests))
    task = (benchmarks.HERE / "mini" / "mini_bbh.yaml").read_text().replace("include: _mini_yaml", "test_split: test")
    task = task.replace("mini/mini_bbh.jsonl}", f"{tmp_path}/colours.jsonl}}").replace(
        "task: mini_bbh", "task: colours"
    )
    loader = "custom_dataset: !function kedit.evaluation.benchmarks.items"
    (tmp_path / "colours.yaml").write_text(f"{loader}\n{task}")
    entry = EntryPoint("theirs", f"{__name__}:FOLDER", "kedit.suites")
    monkeypatch.setattr("kedit.registry.entry_points", lambda group: [entry] if group == "kedit.suites" else [])
    monkeypatch.setattr(f"{__name__}.FOLDER", tmp_path)
    forget = [getattr(benchmarks, n).cache_clear for n in ("suites", "known", "_config", "fingerprint", "tasks")]
    try:
        for clear in forget:
            clear()
        assert benchmarks.suites()["theirs"] == {"colours": tmp_path / "colours.yaml"}
        assert benchmarks.draw("colours", None) == {"colours": [0]}
        before = benchmarks.fingerprint("colours")
        (tmp_path / "colours.jsonl").write_text(json.dumps(tests | {"id": "sea"}))
        benchmarks.fingerprint.cache_clear()
        assert benchmarks.fingerprint("colours") != before
    finally:
        monkeypatch.undo()
        for clear in forget:
            clear()


def test_unparsed_output_is_told_from_wrong(smollm2, monkeypatch):
    def answer(self, requests, **_):
        self.scored += [[(-1.0, 2)]] * len(requests)
        return [" no number"] + [" 1 + 1 = 99"] * (len(requests) - 1)

    monkeypatch.setattr(SharedPrefixLM, "generate_until", answer)
    items = evaluate(smollm2, "mini_gsm8k", 3)
    assert [item["parsed"] for item in items] == [False, True, True]
    assert [item["value"] for item in items] == [0.0, 0.0, 0.0]


def test_off_chance_counts_standard_errors():
    assert stats.off_chance([1.0] * 60 + [0.0] * 40, 0.5) == pytest.approx(0.1 / math.sqrt(0.24 / 100))
    assert abs(stats.off_chance([0.0] * 100, 0.0)) < 3
