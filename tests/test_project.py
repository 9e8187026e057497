"""The project around the package: pins, notebooks, licences of use, a run without network."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import kedit
from kedit.__main__ import main
from kedit.analysis import claims, report, scores
from kedit.analysis.questions import QUESTIONS
from kedit.study.notebook import folder_of
from kedit.study.params import Params
from kedit.study.results import Results

NOTEBOOKS = sorted((kedit.ROOT / "notebooks").glob("*.ipynb"))


def pins(lines):
    found = [line.strip().split("==") for line in lines if "==" in line and not line.lstrip().startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_every_requirement_is_pinned_once():
    text = (kedit.ROOT / "requirements.txt").read_text()
    own, needed = (pins(part.splitlines()) for part in text.split("# needed by the above"))
    assert own["torch"] == "2.13.0"
    every = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[^=]+", line) for line in every)
    assert not own.keys() & needed.keys()


def test_what_the_package_imports_is_pinned_by_name():
    own = pins((kedit.ROOT / "requirements.txt").read_text().split("# needed by the above")[0].splitlines())
    names = {"yaml": "pyyaml", "lm_eval": "lm-eval", "huggingface_hub": "huggingface-hub", "traitlets": "ipykernel"}
    names |= {"jupyter_client": "ipykernel", "jinja2": "lm-eval"}  # whose they are
    for path in (kedit.ROOT / "kedit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in {m.split(".")[0] for m in modules} - sys.stdlib_module_names - {"kedit"}:
                assert names.get(module, module) in own, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_with_outputs(path):
    if path.stem == "audit":
        pytest.skip("its run is not committed yet")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


@pytest.mark.slow
def test_committed_references_redraw_to_the_committed_table():
    """The table, to the byte, is what the committed cells say."""
    references = sorted((kedit.ROOT / "figures").glob("*/*/cells.jsonl.gz"))
    assert references
    for cells in references:
        if cells.parent.name == "smoke":
            continue
        params = Params.read(kedit.ROOT / "params" / cells.parent.parent.name / f"{cells.parent.name}.yaml")
        table = scores.table(Results.load(params, cells.parent))
        text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        assert text == (cells.parent / "table.csv").read_text()


def without_network() -> list[str]:
    """Prefix that runs a command in a network namespace without any interface up."""
    prefix = [shutil.which("unshare") or "", "--net"]
    works = prefix[0] and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    return prefix if works else []


@pytest.mark.slow
def test_smoke_runs_without_any_network(tmp_path):
    """The smoke run, model conversion included, and its notebook, with no interface to reach anything by."""
    prefix = without_network()
    if not prefix:
        pytest.skip("this user may not make a network namespace")
    environment = {"PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin", "HOME": str(tmp_path)}
    environment |= {"KEDIT_RUNS": str(tmp_path / "runs")}
    command = [*prefix, sys.executable, "-m", "kedit", "reproduce", "rq1", "smoke"]
    done = subprocess.run(command, cwd=kedit.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "rq1" / "smoke"
    for name in ("figure.png", "figure.pdf", "table.csv", "cells.jsonl.gz", "manifest.json"):
        assert (folder / name).exists()
        assert f"/{name}" in done.stdout
    edits = Results.load(Params.read(kedit.ROOT / "params/rq1/smoke.yaml"), folder).edits
    assert [edit.number for edit in edits if edit.method == "rome"] == [1, 2]
    assert all(edit.info["amplification"] < 2 for edit in edits if edit.method == "rome")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["", "items", "weights"])
def test_a_run_cannot_be_its_own_reference(wrong, tmp_path, monkeypatch, capsys):
    """Drawn by the notebook's own call and then verified, a run that differs is found out, and figures/ is untouched."""
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    params = Params.find("rq4", "smollm2-135m")
    committed, mine = folder_of(params, "committed"), folder_of(params, "run")
    before = {path: path.read_bytes() for path in committed.iterdir()}
    results = Results.load(params, committed)
    if wrong == "items":
        for item in next(cell for cell in results.cells if cell.edits and cell.benchmark == "mini_mmlu").items:
            item["value"] = 1 - item["value"]
    if wrong == "weights":
        results.manifest["models"][params.models[0]]["fingerprint"] = "of-halved-weights"
    results.save(mine)
    report.figures(Results.load(params, mine, "run"))
    assert {path: path.read_bytes() for path in committed.iterdir()} == before
    assert main(["verify", "rq4"]) == (2 if wrong else 0)
    said = capsys.readouterr()
    sentence = {"": "to the byte", "items": "rows differ from the committed", "weights": "its weights differ"}[wrong]
    assert sentence in said.out + said.err


@pytest.mark.slow
def test_the_report_holds_every_question_fetches_nothing_and_every_link_leads_somewhere(tmp_path):
    index, *pages = report.html(tmp_path)
    assert [page.stem for page in pages] == [*(question.notebook for question in QUESTIONS.values()), "one_edit"]
    for page in (index, *pages):
        text = page.read_text()
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", text)
        links = [link for link in re.findall(r'href="([^"#]+)', text) if not link.startswith(("http", "data:"))]
        assert not [link for link in links if not (tmp_path / link).is_file()]
        assert links or page != index
        assert all(re.findall(r'<img [^>]*?alt="([^"]*)"', text))
        assert report.UNSAID not in text
    text = index.read_text()
    # the audit's run is not committed yet, so it has no figure there
    assert all(f'href="{page.name}"' in text for page in pages if page.stem != "audit")
    assert all(f">make {rq}" in text for rq in claims.WHAT)
    assert "Should I edit?" in text
    assert (
        len(re.findall(r"<td>-?\d\.\d\d \[[^<]+\]</td>", text)) >= 4 * 6
    )  # of six methods, what one gets and what it costs
    alts = re.findall(r'<img [^>]*alt="([^"]+)"', text)
    assert len(alts) >= len(claims.WHAT)
    assert all(re.search(r"[.] *$", alt) for alt in alts)
    assert text.count("<figcaption>") == len(alts)


@pytest.mark.slow
def test_the_five_lines_edit_and_undo_to_the_exact_bits():
    """Those of the README, which are those of the package's docstring."""
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", (kedit.ROOT / "README.md").read_text(), re.DOTALL)
    shown = dedent("\n".join(line for line in kedit.__doc__.splitlines() if line.startswith("    ")))
    assert ast.unparse(ast.parse(shown)) == ast.unparse(ast.parse(code))
    names: dict = {}
    *before, apply, undo = [ast.unparse(statement) for statement in ast.parse(code).body]
    exec("\n".join(before), names)
    weights = names["lm"].model.state_dict()
    old = {name: weight.clone() for name, weight in weights.items()}
    exec(apply, names)
    assert [name for name in old if not torch.equal(weights[name], old[name])] == [
        "model.layers.3.mlp.down_proj.weight"
    ]
    exec(undo, names)
    assert all(torch.equal(weights[name], old[name]) for name in old)
