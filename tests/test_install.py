"""Installing kedit: the wheel, away from its checkout; and what make installs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kedit

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
