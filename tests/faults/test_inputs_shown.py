"""What a user is told: that edits failed, and that a stopped command goes on where it was."""

import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from injected import judged
from record import record
from synthetic import ABILITIES, both

from kedit.analysis import inference, plots, tables
from kedit.study import notebook
from kedit.study.params import Params
from kedit.study.results import EditRecord, Results

GRID = {"models": ["smollm2-135m-instruct"], "methods": ["control"], "edits": [2], "benchmarks": ["mini_mmlu"]}


def test_a_notebook_tells_how_many_edits_failed(monkeypatch, caplog):
    edits = [EditRecord("m", "rome", "default", 0, n, "x", 1, {"failed": "no bit"} if n > 1 else {}) for n in (1, 2, 3)]
    found = Results(Params.make("rq1", "x", GRID), [], edits, {})
    monkeypatch.setattr(notebook, "results", lambda params, source: found)
    cell = {"name": "smoke", "source": "run"}
    assert notebook.open_run("rq1", cell) is found
    assert "2 of 3 edits failed and changed nothing: rome 2" in caplog.text
    record("failed edits are told")


@pytest.mark.parametrize("rq", ["rq1", "rq2", "rq3", "rq4"])
@pytest.mark.parametrize("base", [0.25, 0.8])
def test_figures_and_tables_hold_two_variants_on_and_off_the_floor(rq, base, monkeypatch):
    models = {"a": 1e5, "a-instruct": 1e5} if rq == "rq2" else {"s": 1e5, "m": 1e6, "l": 1e7}
    abilities = [
        one
        for model in models
        for variant in ("default", "mine")
        for name in ABILITIES
        for one in both(benchmark=name, model=model, variant=variant, kept=0.5, base=base, orders=2)
    ]
    monkeypatch.setattr(inference, "abilities", lambda results: abilities)
    about = {model: {"parameters": count} for model, count in models.items()}
    results = SimpleNamespace(params=SimpleNamespace(edits=[0, 100], models=list(models)), manifest={"models": about})
    with judged("figures on and off the floor"):
        pictures = getattr(plots, rq)(results)
        assert pictures["figure"].alt
        assert len(tables.verdict_table(abilities))


WAITS = """
import runpy, sys, time
from kedit.analysis import questions
class Waits(dict):
    def __iter__(self):
        print("begun", flush=True)
        time.sleep(300)
questions.QUESTIONS = Waits()
sys.argv = ["kedit", "list"]
runpy.run_module("kedit", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_one_line(number):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a job in the background would not
    process = subprocess.Popen([sys.executable, "-c", WAITS], preexec_fn=listens, **pipes)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert said == "kedit: stopped; run the same command again, it goes on where it was.\n"
    assert process.returncode == 128 + number
    record("stopped by a signal")
