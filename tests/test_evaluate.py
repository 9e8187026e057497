"""The mini suite through kedit's forward passes against lm-eval's own hf model, on the real SmolLM2."""

import math

import pytest
import yaml
from lm_eval import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM

from kedit.analysis import scores as stats
from kedit.evaluation import benchmarks
from kedit.evaluation.harness import evaluate
from kedit.store import cache_folder

LIMIT = 6


@pytest.fixture(scope="module")
def harness(smollm2):
    """lm-eval's hf model as its own command line loads it from the converted folder (README, mini suite)."""
    folder = cache_folder() / "models" / smollm2.name
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, add_bos_token=True)


@pytest.mark.parametrize("name", benchmarks.SUITES["mini"])
def test_same_answers_as_lm_evals_hf_model(smollm2, harness, name):
    found = evaluate(smollm2, name, LIMIT)
    reference = lm_evaluate(
        lm=harness, task_dict=benchmarks.tasks(name), limit=LIMIT, bootstrap_iters=0, verbosity="ERROR"
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


@pytest.mark.parametrize("name", benchmarks.SUITES["mini"])
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
    """make_items.py reproduces the committed bytes."""
    import runpy
    import shutil

    copy = tmp_path / suite
    shutil.copytree(benchmarks.HERE / suite, copy)
    runpy.run_path(str(copy / "make_items.py"), run_name="__main__")
    for path in (benchmarks.HERE / suite).glob("*.jsonl"):
        assert (copy / path.name).read_bytes() == path.read_bytes()


def test_task_files_are_plain_yaml():
    """Any YAML reader can read them (lm-eval's is lenient)."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    for path in benchmarks.HERE.glob("*/*.yaml"):
        assert yaml.load(path.read_text(), Loader)["metadata"]["metric"]


def test_unparsed_output_is_told_from_wrong(smollm2, monkeypatch):
    from kedit.evaluation.harness import SharedPrefixLM

    monkeypatch.setattr(
        SharedPrefixLM,
        "generate_until",
        lambda self, requests, **_: [" no number"] + [" 1 + 1 = 99"] * (len(requests) - 1),
    )
    items = evaluate(smollm2, "mini_gsm8k", 3)
    assert [item["parsed"] for item in items] == [False, True, True]
    assert [item["value"] for item in items] == [0.0, 0.0, 0.0]


def test_off_chance_counts_standard_errors():
    assert stats.off_chance([1.0] * 60 + [0.0] * 40, 0.5) == pytest.approx(0.1 / math.sqrt(0.24 / 100))
    assert abs(stats.off_chance([0.0] * 100, 0.0)) < 3
