"""What a notebook runs is what its parameter file says, whichever way the parameters come in."""

import re
import subprocess
import sys

import nbformat
import papermill.iorw
import pytest
import yaml
from papermill.parameterize import parameterize_notebook

import kedit
from kedit import KeditError
from kedit.__main__ import main, parameter_files
from kedit.analysis.questions import QUESTIONS
from kedit.study import notebook
from kedit.study.notebook import changed, open_run
from kedit.study.params import KEYS, Params
from kedit.study.results import Results

FILES = parameter_files()
OTHER = {
    "models": ["pico-0.1m", "pico-0.4m"],
    "methods": ["control", {"method": "rome", "variant": "lower", "hparams": {"layer": 1}}],
    "edits": [0, 2, 4],
    "benchmarks": ["pico_mmlu", "pico_csqa"],
    "measures": ["structure"],
    "edit_set": {"name": "pico", "split": "validation"},
    "orders": [3, 1],
    "limit": 7,
    "dtype": "bfloat16",
    "statistics": {"text": "pico", "tokens": 4096},
}
"""Every key with a value that is no default."""


def path_of(rq):
    return kedit.ROOT / "notebooks" / f"{QUESTIONS[rq].notebook}.ipynb"


@pytest.fixture
def opened(monkeypatch):
    """The parameters that a notebook opens its run with, when Papermill injects values into it."""
    monkeypatch.setattr(notebook, "results", lambda params, source: Results(params, [], [], {}))

    def run(rq, values):
        executed = parameterize_notebook(papermill.iorw.load_notebook_node(str(path_of(rq))), values)
        cell = {}
        for code in (
            c for c in executed.cells if {"parameters", "injected-parameters"} & set(c.metadata.get("tags", ()))
        ):
            exec(code.source, cell)
        return open_run(rq, cell).params

    return run


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_file_is_what_runs(path, opened):
    """As ``papermill -f`` passes it, as ``papermill -p name`` does, and as ``python -m kedit reproduce`` does."""
    rq, file = path.parent.name, Params.read(path)
    values = yaml.safe_load(path.read_text())
    for given in (values, {"name": path.stem}, {**file.values(), "name": file.name, "source": "run"}):
        params = opened(rq, given)
        assert params == file
        assert params.fingerprint() == file.fingerprint()


@pytest.mark.parametrize("rq", QUESTIONS)
def test_an_opened_notebook_runs_the_default_file(rq, opened):
    assert opened(rq, {}) == Params.find(rq, QUESTIONS[rq].default)


def test_every_key_arrives_as_the_file_says_it(opened):
    default = Params.find("rq1", "smollm2-135m").values()
    assert set(OTHER) == set(KEYS)
    assert not [key for key in KEYS if OTHER[key] == default[key] or OTHER[key] == Params.model_fields[key].default]
    values = yaml.safe_load(yaml.safe_dump(OTHER))
    file = Params.make("rq1", "mine", values)
    assert opened("rq1", {**values, "name": "mine"}).fingerprint() == file.fingerprint()
    assert opened("rq1", values).values() == file.values()


@pytest.mark.parametrize("key", ["edits", "measures", "edit_set", "orders", "limit", "dtype", "statistics", "methods"])
@pytest.mark.parametrize("rq", QUESTIONS)
def test_one_key_given_otherwise_is_a_run_with_a_name_of_its_own(rq, key, opened):
    file = Params.find(rq, QUESTIONS[rq].default)
    value = {
        **OTHER,
        "methods": ["control"],
        "edit_set": {"name": "bundled", "split": "train"},
        "statistics": {"text": "wikipedia-sample", "tokens": 4096},
    }[key]
    value = ["refusal", "structure"] if key == "measures" else value
    params = opened(rq, {key: value})
    assert {**file.values(), key: params.values()[key]} == params.values()
    assert params.values()[key] == changed(file, {key: value}).values()[key] != file.values()[key]
    assert params.name.startswith(f"{file.name}-{key}-")
    assert params.fingerprint() != file.fingerprint()


def test_names_of_their_own():
    file = Params.find("rq1", "smollm2-135m")
    assert changed(file, {}).name == changed(file, {"limit": None, "edits": [30, 10]}).name == "smollm2-135m"
    assert changed(file, {"limit": 6}).name == "smollm2-135m-limit-6"
    assert changed(Params.find("rq1", "smoke"), {"limit": None}).name == "smoke-limit-all"
    assert changed(file, {"edits": [5]}).name == "smollm2-135m-edits-0-5"
    assert changed(file, {"limit": 6, "orders": [0, 1]}).name == "smollm2-135m-orders-0-1-limit-6"
    assert re.fullmatch(r"smollm2-135m-methods-[0-9a-f]{6}", changed(file, {"methods": ["rome"]}).name)


def test_a_run_with_a_name_of_its_own_is_found_again(tmp_path, monkeypatch, opened):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    params = changed(Params.find("rq1", "smoke"), {"limit": 6})
    with pytest.raises(KeditError, match=r"smoke-limit-6\.yaml: there is no such parameter file"):
        Params.find("rq1", params.name)
    params.write()
    assert Params.find("rq1", params.name) == params
    for given in ({"name": params.name}, {**params.values(), "name": params.name}):
        assert opened("rq1", given) == params


def test_wrong_parameters_are_one_sentence(opened):
    with pytest.raises(KeditError, match="there is no such parameter file; there are: five-orders, "):
        opened("rq1", {"name": "nothing"})
    with pytest.raises(KeditError, match="limit is True; it must be a number of items"):
        opened("rq1", {"limit": True})
    with pytest.raises(KeditError, match="source is 'runs'; use committed or run"):
        notebook.folder_of(Params.find("rq1", "smoke"), "runs")


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["rq1"], "params/rq1/smollm2-135m.yaml: 8 trajectories of 30 edits"),
        (["rq1", "smoke"], "params/rq1/smoke.yaml: 2 trajectories of 2 edits"),
        (["rq1/smoke"], "params/rq1/smoke.yaml: "),
        (["rq1", "rq2/pico"], "params/rq2/pico.yaml: "),
        (["params/rq1/smoke.yaml"], "params/rq1/smoke.yaml: "),
        (["rq1", "smoke", "--edits", "0,5", "--limit", "6", "--orders", "0,1"],
         "params/rq1/smoke-edits-0-5-orders-0-1-limit-6.yaml: 4 trajectories of 5 edits"),
    ],
)  # fmt: skip
def test_commands_take_the_names_of_make(words, start, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    monkeypatch.chdir(kedit.ROOT)
    assert main(["plan", *words]) == 0
    assert capsys.readouterr().out.startswith(start)


def test_wrong_names_on_the_command_line_are_one_sentence(capsys):
    for words, sentence in (
        (["rq9"], "question 'rq9' does not exist; did you mean"),
        (["rq1", "smoke", "--edits", "1,x"], "edits holds 'x'; it must be a list of whole numbers"),
        (
            ["rq1", "smoke", "--limit", "none"],
            "limit is 'none'; it must be a number of items from 1 up, or null for all",
        ),
    ):
        assert main(["plan", *words]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ([], "136 cells"),
        (["-p", "name", "smollm2-135m"], "136 cells"),
        (["-f", "params/rq1/smollm2-135m.yaml"], "136 cells"),
    ],
)
def test_papermill_runs_a_notebook_as_it_stands(options, cells, tmp_path):
    """From committed cells, without a model, by Papermill's own command, which knows every parameter."""
    command = [sys.executable, "-m", "papermill", str(path_of("rq1")), str(tmp_path / "out.ipynb"), *options]
    done = subprocess.run(command, cwd=kedit.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unknown parameter" not in done.stderr
    printed = [
        output.get("text", "")
        for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
        for output in cell.get("outputs", ())
    ]
    assert any(text.startswith(cells) for text in printed)
