"""Benchmark files from outside, right and wrong: each is asked rightly, or is one sentence before anything is written."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build
from hypothesis import given
from hypothesis import strategies as st
from injected import ANYTHING, cases, damaged, is_sentence, judged, quiet

import kedit.study.run
from kedit.__main__ import main
from kedit.evaluation import benchmarks, harness
from kedit.evaluation.benchmarks import stock
from kedit.model.lm import LM

TASK: dict[str, Any] = {
    "task": "toy",
    "dataset_kwargs": {"file": "suite/toy.jsonl"},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {
        "version": 1.0,
        "benchmark": "sums",
        "metric": "acc",
        "chance": 0.5,
        "aspect": "arithmetic",
        "two_way": False,
        "reading": {"items": 3, "shared": 0, "own": 6, "generated": 0},
    },
}
WRITTEN = TASK | {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": TASK["metadata"] | {"metric": "exact_match", "reference": " {{choices[answer]}}"},
}
ITEMS = [{"id": n, "question": f"{n} + 1 =", "choices": [str(n + 1), "0"], "answer": n % 2} for n in range(3)]


def in_yaml(task: dict) -> bytes:
    written = yaml.safe_dump({key: value for key, value in task.items() if key != "custom_dataset"}, sort_keys=False)
    loads = "" if "custom_dataset" in task else "custom_dataset: !function kedit.evaluation.benchmarks.items\n"
    return (loads + written).encode("utf-8", "surrogatepass")


def in_lines(items: list) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def forget() -> None:
    for function in (*vars(benchmarks).values(), stock.located):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A function that writes the files of a suite from outside, and forgets the ones before."""
    folder = tmp_path_factory.mktemp("outside") / "suite"
    folder.mkdir()
    folders = benchmarks.folders

    def suite(task: bytes, items: bytes | None) -> Path:
        (folder / "toy.yaml").write_bytes(task)
        (folder / "toy.jsonl").unlink(missing_ok=True)
        if items is not None:
            (folder / "toy.jsonl").write_bytes(items)
        forget()
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "folders", lambda: {**folders(), "outside": folder})
        yield suite
    forget()


@pytest.fixture(scope="module")
def lm(tokenizer) -> LM:
    return LM(build("llama", len(tokenizer)), tokenizer, "llama", False)


def asked(lm: LM, lines: bytes | None = None) -> None:
    """Ask the benchmark as a run does; what it made of the items is compared with what their file says."""
    benchmarks.reach("toy")
    benchmarks.fingerprint("toy")
    about, (task,) = benchmarks.metadata("toy"), benchmarks.tasks("toy").values()
    docs, found = list(task.eval_docs), harness.evaluate(lm, "toy")
    assert len(found) == len(docs) > 0
    assert 0 <= about["chance"] < 1
    if lines is not None:
        said = [json.loads(line)["question"] for line in lines.decode().split("\n") if line.strip()]
        assert [task.doc_to_text(doc) for doc in docs] == said
    for item, doc in zip(found, docs, strict=True):
        assert 0 <= item["value"] <= 1
        assert 0 <= item["graded"] <= 1 or "reference" not in about
        if "lp" in item:
            targets = item["target"] if isinstance(item["target"], list) else [item["target"]]
            assert set(targets) <= set(range(len(item["lp"])))
            assert len(item["lp"]) == len(task.doc_to_choice(doc))
            if about["metric"] == "acc":
                best = max(range(len(item["lp"])), key=item["lp"].__getitem__)
                assert item["value"] == (best in targets) or sorted(item["lp"])[-1] - sorted(item["lp"])[-2] < 1e-3


def changed(record: dict, path: tuple, value: Any) -> dict:
    """A record with another value at a path; without the key where the value is ``...``."""
    record = inner = copy.deepcopy(record)
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return record


def test_right_files_are_asked(suite, lm):
    for task in (TASK, WRITTEN):
        suite(in_yaml(task), in_lines(ITEMS))
        with judged("benchmark file: right"):
            asked(lm)
            assert [item["id"] for item in harness.evaluate(lm, "toy")] == ["0", "1", "2"]


PLACES = [
    *((task, (key,)) for task in (TASK, WRITTEN) for key in task if key != "metadata"),
    *((task, ("metadata", key)) for task in (TASK, WRITTEN) for key in task["metadata"]),
    *((TASK, ("metadata", "reading", key)) for key in TASK["metadata"]["reading"]),
    *((TASK, ("metric_list", 0, key)) for key in TASK["metric_list"][0]),
    *((WRITTEN, ("generation_kwargs", key)) for key in WRITTEN["generation_kwargs"]),
]


@given(st.sampled_from(PLACES), st.one_of(ANYTHING, st.just(...)))
@cases(25, 400)
def test_a_value_of_a_task_is_asked_rightly_or_refused(suite, lm, place, value):
    task, path = place
    suite(in_yaml(changed(task, path, value)), in_lines(ITEMS))
    with judged("benchmark file: a value of the task"):
        asked(lm)


@given(st.sampled_from([TASK, WRITTEN]), st.sampled_from(list(ITEMS[0])), st.one_of(ANYTHING, st.just(...)))
@cases(25, 300)
def test_a_value_of_an_item_is_asked_rightly_or_refused(suite, lm, task, key, value):
    lines = in_lines([*ITEMS[:2], changed(ITEMS[2], (key,), value)])
    suite(in_yaml(task), lines)
    with judged("benchmark file: a value of an item"):
        asked(lm, lines)


@given(st.sampled_from([TASK, WRITTEN]), st.data())
@cases(20, 300)
def test_a_damaged_benchmark_is_asked_rightly_or_refused(suite, lm, task, data):
    files = [in_yaml(task), in_lines(ITEMS)]
    which = data.draw(st.sampled_from([0, 1]))
    files[which] = data.draw(damaged(files[which]))
    suite(*files)
    with judged("benchmark file: damaged bytes"):
        asked(lm, files[1] if which else None)


WRONG = {
    "task file not UTF-8": (b"\xff\xfe" + in_yaml(TASK), ITEMS),
    "task file cut off": (in_yaml(TASK)[:150], ITEMS),
    "task file empty": (b"", ITEMS),
    "task file a list": (b"- toy\n", ITEMS),
    "task file includes nothing": (in_yaml(TASK | {"include": "nowhere.yaml"}), ITEMS),
    "task file includes itself": (in_yaml(TASK | {"include": "toy.yaml"}), ITEMS),
    "no metadata": (in_yaml(changed(TASK, ("metadata",), ...)), ITEMS),
    "metadata a text": (in_yaml(TASK | {"metadata": "acc"}), ITEMS),
    "no chance": (in_yaml(changed(TASK, ("metadata", "chance"), ...)), ITEMS),
    "chance a text": (in_yaml(changed(TASK, ("metadata", "chance"), "half")), ITEMS),
    "chance 1": (in_yaml(changed(TASK, ("metadata", "chance"), 1)), ITEMS),
    "no cost of reading": (in_yaml(changed(TASK, ("metadata", "reading", "own"), ...)), ITEMS),
    "another task's name": (in_yaml(TASK | {"task": "other"}), ITEMS),
    "a metric it has not": (in_yaml(changed(TASK, ("metadata", "metric"), "mc1")), ITEMS),
    "an output kedit cannot read": (in_yaml(TASK | {"output_type": "loglikelihood"}), ITEMS),
    "sampled answers": (in_yaml(changed(WRITTEN, ("generation_kwargs", "do_sample"), True)), ITEMS),
    "no file of items": (in_yaml(TASK), None),
    "items not UTF-8": (in_yaml(TASK), b"\xff" + in_lines(ITEMS)),
    "items cut off": (in_yaml(TASK), in_lines(ITEMS)[:-9]),
    "no items": (in_yaml(TASK), b""),
    "items of texts": (in_yaml(TASK), b'"a"\n"b"\n'),
    "an item without a question": (in_yaml(TASK), [changed(ITEMS[0], ("question",), ...), *ITEMS[1:]]),
    "the second without a question": (in_yaml(TASK), [ITEMS[0], changed(ITEMS[1], ("question",), ...), ITEMS[2]]),
    "a question that is null": (in_yaml(TASK), [ITEMS[0], changed(ITEMS[1], ("question",), None), ITEMS[2]]),
    "an answer between choices": (in_yaml(TASK), [ITEMS[0], changed(ITEMS[1], ("answer",), 0.5), ITEMS[2]]),
    "an item without choices": (in_yaml(TASK), [changed(ITEMS[0], ("choices",), ...), *ITEMS[1:]]),
    "an answer that is no choice": (in_yaml(TASK), [changed(ITEMS[0], ("answer",), 2), *ITEMS[1:]]),
    "choices that are numbers": (in_yaml(TASK), [changed(item, ("choices",), [1, 2]) for item in ITEMS]),
    "two items of one id": (in_yaml(TASK), [*ITEMS, ITEMS[0]]),
    "answers written, asked as choices": (in_yaml(changed(TASK, ("output_type",), ...)), ITEMS),
    "no reference": (in_yaml(changed(WRITTEN, ("metadata", "reference"), "{{steps}}")), ITEMS),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_benchmark_is_one_sentence_and_nothing_is_written(suite, tmp_path, monkeypatch, what):
    task, items = WRONG[what]
    suite(task, in_lines(items) if isinstance(items, list) else items)
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(kedit.study.run, "run", lambda *_: pytest.fail("it would run"))
    file = tmp_path / "rq1" / "outside.yaml"
    file.parent.mkdir()
    grid = {"models": ["smollm2-135m-instruct"], "methods": ["control"], "edits": [2], "benchmarks": ["toy"]}
    file.write_text(yaml.safe_dump(grid))
    with judged("benchmark file: known kinds of wrong"), quiet() as seen:
        assert main(["run", str(file)]) == 2
        said = seen.getvalue().splitlines()[-1]
        assert said.startswith("kedit: ")
        assert "suite" in said or "toy" in said
        assert is_sentence(said), said
        assert "Traceback" not in seen.getvalue()
        assert list(tmp_path.rglob("*")) == [file.parent, file]


CARD = "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train.jsonl}\n"
CARD += "  - {split: test, path: main/test.jsonl}\n---\n"
ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(12)]
MIRRORED = {
    "cut off": in_lines(ROWS)[:-9],
    "not UTF-8": in_lines(ROWS).replace(b"What", b"W\xff\xfet"),
    "empty": b"",
    "no JSON": b"<html>",
    "the second without an answer": in_lines([ROWS[0], {"question": "What?"}, *ROWS[2:]]),
    "without answers": in_lines([{"question": row["question"]} for row in ROWS]),
    "answers that are numbers": in_lines([row | {"answer": 5} for row in ROWS]),
    "of two types": in_lines([*ROWS, {"question": ["a"], "answer": {"b": 1}}]),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MIRRORED)
def test_a_wrong_data_set_in_the_mirror_is_one_sentence(lm, tmp_path, monkeypatch, what):
    folder = tmp_path / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "main" / "train.jsonl").write_bytes(in_lines(ROWS))
    (folder / "main" / "test.jsonl").write_bytes(MIRRORED[what])
    monkeypatch.setenv("KEDIT_MIRROR", str(tmp_path))
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    forget()
    with judged("data set in the mirror: known kinds of wrong") as refused:
        benchmarks.fingerprint("gsm8k")
        for task in benchmarks.tasks("gsm8k").values():
            task.config.generation_kwargs["max_gen_toks"] = 2
        harness.evaluate(lm, "gsm8k")
    forget()
    assert refused or what in ("answers that are numbers", "of two types")  # of which datasets makes texts
    assert "gsm8k" in "".join(refused) or not refused
