"""A method and a benchmark of another package: installed beside kedit, they are in plan, table and figure."""

import sys
from textwrap import dedent

import pytest
from conftest import build
from matplotlib.text import Text

from kedit.analysis import scores, tables
from kedit.analysis.questions import QUESTIONS
from kedit.evaluation import benchmarks
from kedit.study.params import Params
from kedit.study.plan import plan
from kedit.study.run import run

FILES = {
    "toy.py": '''
        """A method that pushes every prompt's last block the same way, and where the suite lies."""
        from dataclasses import dataclass
        from pathlib import Path

        import torch

        from kedit.editors.protocol import Editor
        from kedit.model.anatomy import matrix
        from kedit.model.journal import LowRank

        SUITE = Path(__file__).parent / "toy_suite"


        class Push(Editor):
            name = "push"
            label = "Push (toy)"
            style = ("#123456", "*", ":")

            @dataclass(frozen=True)
            class Hparams:
                scale: float = 0.1

            def _apply(self, request, edit):
                down = self.lm.anatomy.down(self.lm.layers - 1)
                d, m = matrix(down).shape
                left, right = torch.full((d, 1), self.hparams.scale), torch.ones(m, 1)
                edit.write(LowRank(self.lm.anatomy.name(down), left, right))
        ''',
    "toy_suite/toy_sums.yaml": """
        task: toy_sums
        custom_dataset: !function kedit.evaluation.benchmarks.items
        dataset_kwargs: {file: toy_suite/toy_sums.jsonl}
        test_split: test
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: choices
        doc_to_target: answer
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
        metadata:
          version: 1.0
          benchmark: sums
          metric: acc
          chance: 0.5
          aspect: arithmetic
          reading: {items: 3, shared: 0, own: 6, generated: 0}
        """,
    "toy_suite/toy_sums.jsonl": """
        {"id": 1, "question": "1 + 1 =", "choices": ["2", "3"], "answer": 0}
        {"id": 2, "question": "1 + 2 =", "choices": ["2", "3"], "answer": 1}
        {"id": 3, "question": "2 + 2 =", "choices": ["4", "5"], "answer": 0}
        """,
    "toy-0.1.dist-info/METADATA": """
        Metadata-Version: 2.1
        Name: toy
        Version: 0.1
        """,
    "toy-0.1.dist-info/entry_points.txt": """
        [kedit.editors]
        push = toy:Push
        [kedit.suites]
        toy = toy:SUITE
        """,
}
"""The other package as pip would leave it."""


def forget() -> None:
    """What is remembered of the suites at hand."""
    for function in vars(benchmarks).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The package on the path, for this process and for workers."""
    for name, text in FILES.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip())
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    forget()
    yield
    monkeypatch.undo()
    sys.modules.pop("toy", None)
    forget()


@pytest.mark.slow
def test_a_method_and_a_benchmark_from_outside_are_seen_everywhere(toy, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    build("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    grid = {
        "models": [str(tmp_path / "model")],
        "methods": ["control", "push", {"method": "push", "variant": "hard", "hparams": {"scale": 1.0}}],
        "edits": [2],
        "benchmarks": ["toy_sums"],
    }
    params = Params.make("rq1", "outside", grid)
    page = plan(params)
    assert "push hard" in page
    assert page.count("not timed") == 5  # in both rows on a GPU and on a CPU, and in all
    assert "1 benchmarks" in page
    results = run(params, workers=2)
    table = scores.table(results)
    edited = table[(table.benchmark == "toy_sums") & (table.edits == 2)]
    assert set(zip(edited.method, edited.variant, strict=True)) == {
        ("control", "default"),
        ("push", "default"),
        ("push", "hard"),
    }
    assert (edited.n == 3).all()
    assert (edited.chance == 0.5).all()
    assert any("Push (toy)" in str(row) for row in tables.success_table(results).index)
    # three items of a random model are at the floor, which the figure says; off it the toy is drawn like any other
    assert "at the floor" in QUESTIONS["rq1"].figures(results)["figure"].alt
    texts = {text.get_text() for text in _off_the_floor(results).figure.findobj(Text)}
    assert any("Push (toy)" in text for text in texts)


def _off_the_floor(results):
    for cell in results.cells:
        if cell.benchmark == "toy_sums":
            items = [
                {**item, "value": float(not cell.edits), "graded": 0.9 - 0.6 * bool(cell.edits)} for item in cell.items
            ]
            cell.items[:] = items * 40
    return QUESTIONS["rq1"].figures(results)["figure"]
