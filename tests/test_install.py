"""Installing kedit: the wheel, away from its checkout; and what make installs."""

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from jupyter_server.services.contents.filemanager import FileContentsManager
from packaging.requirements import Requirement

import kedit
from kedit import KeditError
from kedit.model import lm as models
from kedit.study import plan
from kedit.study.params import Params
from kedit.study.run import Progress, Unit, planned, units
from kedit.study.trajectory import Line

PROJECT = tomllib.loads((kedit.ROOT / "pyproject.toml").read_text())["project"]
TOOLS = {"pytest", "hypothesis", "nbval", "ruff", "setuptools", "jupyterlab"}  # of whoever develops or reads notebooks

FIVE_LINES = """
import kedit

def main():
    lm = kedit.load("pico-0.1m")
    editor = kedit.editor("rome", lm)
    edit = editor.apply(kedit.load_facts("pico")[0])
    assert kedit.evaluate(lm, "pico_mmlu", limit=3)
    edit.undo()
    given = dict(models=["pico-0.1m"], methods=["control", "rome"], benchmarks=["pico_mmlu"], limit=3)
    results = kedit.run("rq2/pico", workers=1, edits=[0, 1], orders=[0], **given)
    assert len(results.edits) == 2
    print(kedit.__file__)

if __name__ == "__main__":
    main()
"""


def tracked(*folders):
    listed = subprocess.run(["git", "ls-files", "-z", *folders], cwd=kedit.ROOT, capture_output=True, check=True)
    return [name for name in listed.stdout.decode().split("\0") if name and (kedit.ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what is committed, with what is installed here."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kedit.ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    subprocess.run(command, cwd=source, check=True)
    return next(folder.glob("kedit-*.whl"))


@pytest.mark.slow
def test_a_wheel_holds_what_a_checkout_has(wheel):
    own = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    beside = {f"kedit/{name}" for name in tracked("params", "notebooks", "figures")}
    assert own == beside | set(tracked("kedit"))


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_folder(wheel, tmp_path):
    """In a new environment that sees what is installed here but not this checkout."""
    place, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], check=True
    )
    packages = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (packages / "beside.pth").write_text(sysconfig.get_paths()["purelib"])
    (empty / "five_lines.py").write_text(FIVE_LINES)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KEDIT_", "PYTHON"))}

    def run(*command):
        done = subprocess.run(command, cwd=empty, env=kept, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, said, wrong = run(python, "five_lines.py")
    assert code == 0, wrong[-3000:]
    assert Path(said.strip()).parent == packages / "kedit"
    assert {path.name for path in empty.iterdir()} == {"five_lines.py", "runs"}
    assert list((empty / "runs" / "rq2").glob("*/cells.jsonl.gz"))
    code, said, wrong = run(python, "-m", "kedit", "plan", "rq1", "smollm2-135m")
    assert code == 0, wrong
    assert "about not known" not in said
    code, said, wrong = run(place / "bin" / "kedit", "figures")
    assert (code, "in a checkout" in wrong) == (2, True), wrong


def test_dependencies_are_what_requirements_pin():
    """All that kedit uses itself but for tools and the optional; and what is pinned is allowed."""
    own = (kedit.ROOT / "requirements.txt").read_text().split("# needed by the above")[0].splitlines()
    pins = dict(line.lower().split("==") for line in own if "==" in line and not line.startswith("#"))
    optional = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    needed, extra = (
        {need.name.lower(): need for need in map(Requirement, texts)} for texts in (PROJECT["dependencies"], optional)
    )
    assert needed.keys() | extra.keys() | TOOLS == pins.keys()
    assert all(need.specifier.contains(pins[name]) for name, need in (needed | extra).items())


# What make installs -------------------------------------------------------------------------------


def make(folder, *words):
    """The commands that make would give, for an environment that was set up in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / ".ready").touch()
    command = ["make", "--dry-run", f"VENV={folder}", *words]
    kept = {
        name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(command, cwd=kedit.ROOT, env=kept, capture_output=True, text=True, check=True).stdout


def test_another_build_of_torch_replaces_the_one_that_is_there(tmp_path):
    """For pip 2.13.0+cpu is a 2.13.0, so it must go first; and a choice once made stays."""
    fresh = subprocess.run(
        ["make", "-n", f"VENV={tmp_path / 'none'}", "list"], cwd=kedit.ROOT, capture_output=True, text=True, check=True
    )
    assert "pip install torch==2.13.0\n" in fresh.stdout
    assert "uninstall" not in fresh.stdout
    assert "install" not in make(tmp_path / "venv", "list")
    asked = make(tmp_path / "venv", "list", "TORCH=torch==2.13.0 --find-links cuda")
    assert asked.index("pip uninstall --yes torch\n") < asked.index("pip install torch==2.13.0 --find-links cuda\n")
    (tmp_path / "venv" / ".torch").write_text("torch==2.13.0 --find-links cuda\n")
    assert "install" not in make(tmp_path / "venv", "list", "TORCH=torch==2.13.0 --find-links cuda")
    assert "install" not in make(tmp_path / "venv", "list")
    assert "pip install torch==2.13.0 --find-links cuda\n" in make(tmp_path / "venv", "-W", "requirements.lock", "list")


# A model that is installed when asked for -----------------------------------------------------------

PARTS = """
def assemble(path):
    if {whole}:
        path.write_bytes(b"one, two")
        return path
    raise ValueError("its sum is another")
"""


def test_gemma_is_installed_only_when_asked_for(tmp_path, monkeypatch):
    installed = make(tmp_path / "venv", "-W", "requirements.lock", "list")
    assert "requirements-gemma" not in installed
    assert "--require-hashes --no-build-isolation -r requirements-gemma.txt" in make(tmp_path / "venv", "gemma")
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    monkeypatch.setitem(models.WHEELS, "gemma3-270m", ("not_installed_here", None))
    with pytest.raises(KeditError, match="make gemma"):
        models.load("gemma3-270m")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_comes_in_parts_is_put_together_and_checked(whole, tmp_path, monkeypatch):
    package = tmp_path / "site" / f"in_parts_{whole}"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PARTS.format(whole=whole))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(models.WHEELS, "gemma3-270m", (package.name, None))

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(models, "convert_gguf", convert)
    if not whole:
        with pytest.raises(KeditError, match="its sum is another"):
            models._from_wheel("gemma3-270m")
        assert not [path for path in (tmp_path / "cache").rglob("*") if "gguf" in path.name]
        return
    folder = Path(models._from_wheel("gemma3-270m"))
    assert (folder / "model.safetensors").read_bytes() == b"one, two"
    assert [path.name for path in folder.parent.iterdir()] == ["gemma3-270m"]


def test_terms_of_a_model_are_told_before_a_run(caplog):
    """Before anything is loaded, whoever starts it."""
    caplog.set_level(logging.INFO)
    plan.check(Params.find("rq1", "gemma3-270m"))
    assert all(word in caplog.text for word in ("Gemma Terms of Use", "third party", "Commit nothing"))
    caplog.clear()
    plan.check(Params.find("rq1", "smoke"))
    assert "Terms" not in caplog.text


# What a run shows ---------------------------------------------------------------------------------


def unit(method, count, benchmark=None):
    where = {"method": method} | ({"benchmark": benchmark} if benchmark else {})
    return Unit("key", where, Line(0, 0), count, "unedited" if benchmark else "")


def test_the_time_left_is_of_each_kind_of_work_and_says_what_it_leaves_out(capsys):
    progress = Progress(Counter({"edit by rome": 3, "edit by kn": 1, "slow": 2, "quick": 2}), workers=2)
    progress.done(unit("rome", 1), 10.0)
    progress.done(unit("rome", 2))  # which the store had
    progress.done(unit("rome", 1, "slow"), 120.0)
    progress.done(unit("rome", 1, "quick"), 4.0)
    assert progress.time_left() == "01:07 left and what edit by kn will take"  # (10 + 120 + 4) / 2
    progress.done(unit("kn", 1), 6.0)
    assert progress.time_left() == "01:07 left"
    progress.bar.refresh()
    shown = capsys.readouterr().err.rpartition("\r")[2]
    assert shown.startswith(" 62%|")
    assert shown.endswith("| 5/8 kn 1; 01:07 left")


def test_what_is_planned_is_what_is_counted():
    for name in ("smollm2-135m", "gemma3-270m"):
        params = Params.find("rq1", name)
        wanted = units(
            params,
            "any",
            {
                Line(p, o): dict.fromkeys(range(max(params.edits) + 1), "")
                for p in range(len(params.methods))
                for o in params.orders
            },
        )
        assert Counter(each.kind for each in wanted) == planned(params)


# Jupyter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((kedit.ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_that_is_opened_and_saved_is_the_same_file(path, tmp_path):
    """By what JupyterLab reads and writes with."""
    manager = FileContentsManager(root_dir=str(tmp_path))
    shutil.copy(path, tmp_path)
    content = manager.get(path.name, content=True, type="notebook")["content"]
    manager.save({"type": "notebook", "format": "json", "content": content}, path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_jupyterlab_opens_at_the_root_for_root_too(tmp_path):
    assert "-m jupyterlab --allow-root\n" in make(tmp_path / "venv", "lab")


# Conda and Binder ---------------------------------------------------------------------------------


def test_conda_and_binder_install_what_make_does():
    environment = yaml.safe_load((kedit.ROOT / "environment.yml").read_text())["dependencies"]
    assert environment == ["python=3.11", "pip", {"pip": ["-r requirements.txt", "-e ."]}]
    after = kedit.ROOT / "postBuild"
    assert os.access(after, os.X_OK)
    assert "pip install --no-deps --require-hashes -r requirements-model.txt" in after.read_text()
