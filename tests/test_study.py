"""Whole runs on a tiny model: resuming, the table, and wrong parameter files."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from kedit import KeditError
from kedit.__main__ import main, parameter_files
from kedit.analysis import scores as stats
from kedit.study.params import Params
from kedit.study.results import Results
from kedit.study.run import run
from kedit.workers import cluster

TEXT = "The capital of France is Paris, and the movie was directed by the writer of the country. "


@pytest.fixture(scope="module")
def grid(tmp_path_factory, tokenizer):
    """A grid over a tiny model in a folder: parameters as a file would hold them."""
    from conftest import SEARCH, build

    folder = tmp_path_factory.mktemp("grid")
    build("llama", len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT * 300)
    short = {**SEARCH, "steps": 4, "context_lengths": [[3, 2]]}
    return {
        "models": [str(folder / "model")],
        "methods": [
            "control",
            {"method": "rome", "variant": "tiny", "hparams": {"layer": 2, **short}},
            {"method": "memit", "variant": "tiny", "hparams": {"layers": [1, 2], "mom2_weight": 0.01, **short}},
        ],
        "orders": [0, 3],
        "edits": [1, 3],
        "benchmarks": ["mini_mmlu", "mini_gsm8k"],
        "limit": 3,
        "statistics": {"text": str(folder / "text.txt"), "tokens": 2048},
    }


def command(path, runs, *options):
    environment = {**os.environ, "KEDIT_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kedit", "run", str(path), *options], env=environment, stderr=subprocess.PIPE, text=True
    )


def table(path, runs):
    params = Params.read(path)
    return stats.table(Results.load(params, runs / params.rq / params.name)).to_csv(index=False)


@pytest.mark.slow
def test_killed_three_times_gives_the_same_table(grid, tmp_path):
    path = tmp_path / "rq1" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(grid))
    whole = command(path, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()

    store, finished = tmp_path / "broken" / "store", {}
    total = sum(1 for file in (tmp_path / "whole" / "store").rglob("*") if file.is_file())
    moments = sorted(random.Random(time.time_ns()).sample(range(1, total - 3), 3))
    for moment in moments:
        process = command(path, tmp_path / "broken", "--workers", "1")  # by one worker what was done by two
        while process.poll() is None and sum(1 for file in store.rglob("??/*") if file.name[0] != ".") < moment:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # its workers notice and end
        finished |= {file: file.stat().st_mtime_ns for file in store.rglob("??/*") if file.name[0] != "."}
    resumed = command(path, tmp_path / "broken")
    assert resumed.wait() == 0, resumed.stderr.read()
    assert table(path, tmp_path / "broken") == table(path, tmp_path / "whole")
    for file, when in finished.items():  # nothing that was finished was made again
        assert file.stat().st_mtime_ns == when

    again = command(path, tmp_path / "broken")
    assert again.wait() == 0
    assert "nothing was left to compute" in again.stderr.read()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_gives_the_table_of_a_serial_run(grid, tmp_path, monkeypatch):
    from distributed import LocalCluster

    path = tmp_path / "rq1" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(grid))
    serial = command(path, tmp_path / "serial", "--workers", "1")
    assert serial.wait() == 0, serial.stderr.read()

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=40) as processes:
        first, *others = [nanny.process.pid for nanny in processes.workers.values()]
        assert others
        spread = command(path, tmp_path / "spread", "--dask", processes.scheduler_address)
        store = tmp_path / "spread" / "store"
        while spread.poll() is None and sum(1 for file in store.rglob("??/*") if file.name[0] != ".") < 12:
            time.sleep(0.01)
        assert spread.poll() is None
        os.kill(first, signal.SIGKILL)
        assert spread.wait() == 0, spread.stderr.read()
    assert table(path, tmp_path / "spread") == table(path, tmp_path / "serial")
    assert not list((tmp_path / "spread").glob(".seen*"))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://here", "no.such.host.invalid:8786"])
def test_a_scheduler_that_does_not_answer_is_one_sentence_within_seconds(address):
    start = time.monotonic()
    with pytest.raises(KeditError, match="no Dask scheduler answers at"), cluster(address, timeout=2):
        pass
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_the_table_has_every_row_of_the_grid(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    params = Params.make("rq1", "tiny", grid)
    rows = stats.table(run(params))
    assert list(rows.columns) == [
        "rq",
        "params",
        "model",
        "method",
        "variant",
        "edit_set",
        "order",
        "edits",
        "benchmark",
        "metric",
        "value",
        "ci_low",
        "ci_high",
        "n",
        "chance",
        "unparsed",
        "delta",
        "delta_low",
        "delta_high",
        "status",
    ]
    place = ["method", "order", "edits", "benchmark", "metric"]
    edit = [f"{m}{suffix}" for m in ("reliability", "generalisation", "locality") for suffix in ("", "_generated")]
    expected = {
        (method, order, edits, *what)
        for method in ("control", "rome", "memit")
        for order in (0, 3)
        for edits in (0, 1, 3)
        for what in [
            *[("mini_mmlu", "acc"), ("mini_gsm8k", "exact_match"), ("mini_mmlu", "graded"), ("mini_gsm8k", "graded")],
            *(("edit", metric) for metric in edit),
        ]
    }
    assert set(map(tuple, rows[place].to_numpy())) == expected
    assert not rows.duplicated(place).any()
    assert set(rows.status) <= {"ok", "floor", "collapsed", "failed"}
    # the control is the unedited model, to the last item
    control = rows[(rows.method == "control") & (rows.benchmark != "edit")]
    assert (control.delta == 0).all()
    # a reliability row covers all edits so far, and n counts them
    counts = rows[(rows.method == "rome") & (rows.metric == "reliability") & (rows.order == 0)].set_index("edits").n
    assert counts[1] == 1
    assert counts[3] == 3


def change(grid, **values):
    return {**grid, **values}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"methods": ["roem"]}, "method 'roem' does not exist; did you mean 'rome'"),
        ({"benchmarcks": ["mini_mmlu"]}, "key 'benchmarcks' does not exist; did you mean 'benchmarks'"),
        ({"edits": [1, -3]}, "edits holds -3; it must be a list of whole numbers from 0 up"),
        ({"edits": [10_000]}, "edits asks for 10000, but the edit set holds"),
        ({"edit_set": {"name": "counterfacts"}}, "edit set 'counterfacts' does not exist; did you mean 'counterfact'"),
        (
            {"edit_set": {"name": "bundled", "splt": "edit"}},
            "key 'edit_set.splt' does not exist; did you mean 'edit_set.split'",
        ),
        ({"edit_set": {"name": "zsre", "path": "nowhere.json"}}, "nowhere.json cannot be read"),
        ({"benchmarks": ["mini_mlu"]}, "mini_mlu.* does not exist; did you mean 'mini_mmlu'"),
        ({"benchmarks": []}, "benchmarks is .*; it must be a list of names"),
        ({"limit": 0}, "limit is 0; it must be a number of items from 1 up, or null for all"),
        ({"limit": True}, "limit is True; it must be"),
        ({"limit": 6.0}, "limit is 6.0; it must be"),
        ({"edits": [True]}, "edits holds True; it must be"),
        ({"orders": [0, 0]}, "orders is .*; it must be a list of whole numbers from 0 up, each once"),
        ({"methods": ["control", "control"]}, "methods is .*, each method and variant once"),
        (
            {"methods": [{"method": "rome", "hparams": {"layer": 2}}]},
            "methods changes hparams of rome; name the variant",
        ),
        ({"methods": [{"method": "rome", "hparms": {}}]}, "'methods.hparms' does not exist; did you mean"),
        ({"measures": ["strukture"]}, "measure 'strukture' does not exist; did you mean 'structure'"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be float32 or bfloat16"),
        ({"edit_set": {"split": "edit"}}, "key 'edit_set.name' is missing; edit_set must be a mapping of"),
        ({"statistics": {"tokens": "many"}}, "statistics.tokens is 'many'; it must be a whole number from 1 up"),
    ],
)
def test_a_wrong_parameter_file_is_one_sentence(grid, tmp_path, values, sentence, capsys, monkeypatch):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "rq1" / "wrong.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(change(grid, **values)))
    assert main(["run", str(path)]) == 2
    sentence_seen = capsys.readouterr().err.strip()
    assert "\n" not in sentence_seen
    assert sentence_seen.startswith("kedit: ")
    assert "wrong.yaml" in sentence_seen
    assert re.search(sentence, sentence_seen), sentence_seen
    assert not (tmp_path / "runs").exists()


def test_missing_keys_and_files_are_one_sentence(grid, tmp_path, capsys):
    path = tmp_path / "rq1" / "short.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({k: v for k, v in grid.items() if k != "edits"}))
    assert main(["run", str(path)]) == 2
    assert "key 'edits' is missing" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "rq1" / "absent.yaml")]) == 2
    assert "there are: short" in capsys.readouterr().err
    path.write_text("- a\n- b\n")
    with pytest.raises(KeditError, match="mapping"):
        Params.read(path)
    path.write_text("limit: 4\nlimit: 5\n")
    with pytest.raises(KeditError, match="limit stands twice"):
        Params.read(path)


def test_every_committed_parameter_file_is_valid():
    paths = parameter_files()
    assert paths
    for path in paths:
        Params.read(path)
