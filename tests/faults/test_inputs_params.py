"""Parameter files, right and wrong: each runs, or is one sentence with exit code 2, and nothing is written."""

import math
from copy import deepcopy
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from injected import ANYTHING, cases, damaged, is_sentence, judged, quiet

import kedit.study.run
from kedit.__main__ import main
from kedit.data import facts
from kedit.study import notebook
from kedit.study.params import Params

GRID: dict[str, Any] = {
    "models": ["smollm2-135m-instruct"],
    "methods": ["control", {"method": "rome", "variant": "mine", "hparams": {"layer": 2}}],
    "edits": [0, 2],
    "orders": [0, 1],
    "benchmarks": ["mini_mmlu"],
    "measures": [],
    "limit": 4,
    "dtype": "float32",
    "edit_set": {"name": "bundled", "split": "edit"},
    "statistics": {"text": "wikipedia-sample", "tokens": 1024},
}
WHOLE = len(facts.bundled("edit"))


def whole_number(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def number(value: Any, above: float, least: bool = False) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and (value >= above if least else value > above)


def listed(value: Any, right, least: int = 1) -> bool:
    """Whether it is a list of such values, each once."""
    if not isinstance(value, list) or len(value) < least or not all(map(right, value)):
        return False
    return len(set(value)) == len(value)


RIGHT = {
    "models": lambda v: listed(v, lambda m: isinstance(m, str) and m and "\ud800" not in m),
    "methods": lambda v: listed(v, lambda m: isinstance(m, str) and m in ("rome", "control")),
    "edits": lambda v: listed(v, lambda n: whole_number(n, 0) and n <= WHOLE),
    "orders": lambda v: listed(v, lambda n: whole_number(n, 0)),
    "benchmarks": lambda v: v == GRID["benchmarks"],
    "measures": lambda v: v == [],
    "limit": lambda v: v is None or whole_number(v, 1),
    "dtype": lambda v: v in ("float32", "bfloat16") and isinstance(v, str),
    "edit_set": lambda v: v == GRID["edit_set"],
    "statistics": lambda v: v == {},
}
"""What is right of what ``ANYTHING`` can give, in words of its own."""
HPARAMS = {
    "layer": lambda v: whole_number(v, 0) and v < 30,
    "steps": lambda v: whole_number(v, 1),
    "lr": lambda v: number(v, 0),
    "weight_decay": lambda v: number(v, 0, True),
    "clamp_norm_factor": lambda v: number(v, 0),
    "kl_factor": lambda v: number(v, 0, True),
    "covariance": lambda v: type(v) is bool,
    "seed": lambda v: whole_number(v, 0),
    "context_lengths": lambda v: v == [],
}


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """A function that runs a parameter file of some bytes, up to where a run begins: what it said, None if it would run."""
    top = tmp_path_factory.mktemp("inputs")
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_RUNS", str(top / "runs"))
        patch.setattr(kedit.study.run, "run", lambda params, *_: begun.append(params))

        def tried(data: bytes, path: str = "rq1/wrong.yaml", *more: str) -> str | None:
            file = top / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            before, begun[:] = sorted(top.rglob("*")), []
            with quiet() as seen:
                code = main(["run", str(file), *more])
            assert sorted(top.rglob("*")) == before, "something was written"
            if begun:
                assert code == 0
                return None
            assert code == 2
            assert seen.getvalue().startswith("kedit: ")
            assert is_sentence(seen.getvalue()), seen.getvalue()
            return seen.getvalue()

        yield tried


def text(values: Any) -> bytes:
    return yaml.safe_dump(values, allow_unicode=False).encode("utf-8", "surrogatepass")


@given(st.sampled_from(list(RIGHT)), ANYTHING)
@cases(40, 600)
def test_a_value_is_taken_or_refused(tried, key, value):
    with judged("parameter file: values of any type"):
        assert (tried(text({**GRID, key: value})) is None) == RIGHT[key](value), value


@given(st.sampled_from(list(HPARAMS)), ANYTHING)
@cases(30, 400)
def test_a_hyper_parameter_is_taken_or_refused(tried, key, value):
    grid = deepcopy(GRID)
    grid["methods"][1]["hparams"][key] = value
    with judged("parameter file: hyper-parameters"):
        assert (tried(text(grid)) is None) == HPARAMS[key](value), value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("points", value) for value in (0, -1, 2.5, True, "20", None)),
        *(("threshold", value) for value in (-0.1, 1.5, "0.2", [0.2])),
        *((key, value) for key in ("erase", "write") for value in (-1, math.inf, math.nan, "8", False)),
        ("rule", "mine"),
    ],
)
def test_a_wrong_number_of_kn_is_one_sentence(tried, key, value):
    methods = [{"method": "kn", "variant": "mine", "hparams": {key: value}}]
    with judged("parameter file: hyper-parameters"):
        assert key in tried(text({**GRID, "methods": methods}))


@given(damaged(text(GRID)))
@cases(20, 300)
def test_a_damaged_file_never_ends_in_a_traceback(tried, data):
    with judged("parameter file: damaged bytes"):
        tried(data)


TEXT = text(GRID).decode()
WRONG_TEXTS = {
    "not UTF-8": b"\xff\xfe" + text(GRID),
    "Latin-1": TEXT.replace("mine", "m\xefne").encode("latin-1"),
    "empty": b"",
    "a list": b"- a\n- b\n",
    "a text": b"rome",
    "a key twice": text(GRID) + b"limit: 5\n",
    "a key twice within": b"edit_set: {name: bundled, name: zsre}\n"
    + text({k: v for k, v in GRID.items() if k != "edit_set"}),
    "nested beyond reason": b"models: " + b"[" * 3000 + b"]" * 3000,
    "holding itself": TEXT.replace("layer: 2", "layer: &a [*a]").encode(),
    "a tag": TEXT.replace("limit: 4", "limit: !!python/object/apply:os.getcwd []").encode(),
    "a date": TEXT.replace("limit: 4", "limit: 2020-01-01").encode(),
    "tabs": b"\tmodels: [x]",
    "no value": TEXT.replace("limit: 4", "limit: *nowhere").encode(),
    "hparams a list": TEXT.replace("layer: 2", "- layer").encode(),
    "hparams a text": text({**GRID, "methods": [{"method": "rome", "variant": "x", "hparams": "layer"}]}),
    "layer 99": TEXT.replace("layer: 2", "layer: 99").encode(),
    "steps 0": TEXT.replace("layer: 2", "steps: 0").encode(),
    "a method twice": text({**GRID, "methods": ["rome", "rome"]}),
    "a variant twice": text(
        {**GRID, "methods": [{"method": "rome", "variant": "a", "hparams": {"layer": n}} for n in (1, 2)]}
    ),
    "measures null": text({**GRID, "measures": None}),
    "limit true": text({**GRID, "limit": True}),
}


@pytest.mark.parametrize("what", WRONG_TEXTS)
def test_a_wrong_file_is_one_sentence(tried, what):
    with judged("parameter file: known kinds of wrong"):
        assert tried(WRONG_TEXTS[what]) is not None


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("question/name.yaml", ()),
        ("name.yaml", ()),
        ("rq1/two words.yaml", ()),
        ("rq1/right.yaml", ("--workers", "-1")),
        ("rq1/right.yaml", ("--workers", "0")),
        ("rq1/right.yaml", ("--limit", "-1")),
        ("rq1/right.yaml", ("--edits", "1,,2")),
    ],
)
def test_a_wrong_place_or_option_is_one_sentence(tried, path, more):
    with judged("command line: names, places, options"):
        assert tried(text(GRID), path, *more) is not None


@pytest.mark.parametrize("name", ["../../x", "..", "/tmp/x", "", "rq1/../../x", "a b", "\0"])
def test_a_name_never_leads_out_of_the_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(notebook, "run", lambda params: pytest.fail(f"{params.name} would run"))
    cell = {"name": name, "source": "run", **GRID}
    with judged("command line: names, places, options") as refused:
        notebook.open_run("rq1", cell)
    assert refused
    with judged("command line: names, places, options"), quiet():
        assert main(["run", "rq1", name or "."]) == 2
    assert not list(tmp_path.iterdir())


def test_a_number_written_as_in_yaml_1_2_is_a_number(tried, tmp_path):
    (tmp_path / "rq1").mkdir()
    path = tmp_path / "rq1" / "x.yaml"
    path.write_text(TEXT.replace("layer: 2", "lr: 5e-1"))
    with judged("parameter file: known kinds of wrong"):
        assert Params.read(path).methods[1].hparams == {"lr": 0.5}


def test_a_layer_beyond_the_models_is_refused_before_a_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(notebook, "run", lambda params: pytest.fail("it would run"))
    methods = [{"method": "memit", "variant": "deep", "hparams": {"layers": [3, 30]}}]
    with judged("parameter file: known kinds of wrong") as refused:
        notebook.open_run("rq1", {**GRID, "name": "x", "source": "run", "methods": methods})
    assert "layer 30 does not exist; the model has 0 to 29" in refused[0]
    assert not list(tmp_path.iterdir())
