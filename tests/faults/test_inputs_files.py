"""Edit sets, results and model folders, right and wrong: each is read rightly, or is one sentence."""

import copy
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from injected import ANYTHING, cases, damaged, judged

import kedit
from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.model.lm import PICO
from kedit.study.params import Params
from kedit.study.results import Cell, EditRecord, Results

# Edit sets ----------------------------------------------------------------------------------------

RELEASED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Paris"},
        "subject": "France",
    },
    "paraphrase_prompts": ["France has the capital", "Of France, the capital is"],
    "neighborhood_prompts": ["The seat of the Louvre is"],
    "generation_prompts": ["France's capital"],
}
FLAT = {
    "case_id": 7,
    "prompt": "The capital of France is",
    "subject": "France",
    "target_new": "Rome",
    "ground_truth": "Paris",
    "rephrase_prompt": "France has the capital",
    "locality_prompt": "The seat of the Louvre is",
    "locality_ground_truth": "Paris",
}
ZSRE = {
    "src": "What is the capital of France?",
    "subject": "France",
    "alt": "Rome",
    "answers": ["Paris"],
    "rephrase": "Which city is France's capital?",
    "loc": "nq question: who wrote it",
    "loc_ans": "nobody",
}
PLACES = [
    *(("counterfact", RELEASED, ("requested_rewrite", key)) for key in RELEASED["requested_rewrite"]),
    *(("counterfact", RELEASED, (key,)) for key in RELEASED),
    *(("counterfact", FLAT, (key,)) for key in FLAT),
    *(("zsre", ZSRE, (key,)) for key in ZSRE),
]


def typed(request: EditRequest) -> bool:
    """Whether a request holds texts only, which can be written down."""
    pairs = [text for pair in request.neighbours for text in pair]
    several = [request.paraphrases, request.generation]
    assert all(isinstance(texts, tuple) for texts in several)
    one = [request.prompt, request.subject, request.target_new, request.target_true, request.id, request.relation]
    return all(isinstance(text, str) and text.encode() is not None for text in (*one, *pairs, *several[0], *several[1]))


def loaded(folder: Path, name: str, data: bytes) -> tuple[EditRequest, ...]:
    path = folder / "edits.json"
    path.write_bytes(data)
    return facts.load(name, path=path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@given(st.sampled_from(PLACES), ANYTHING)
@cases(40, 400)
def test_a_record_is_read_rightly_or_named(folder, place, value):
    name, record, path = place
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with judged("edit set: a value of a record") as refused:
        requests = loaded(folder, name, json.dumps([record]).encode())
        for request in requests:
            assert typed(request)
            assert request.subject.strip() == request.subject != ""
            assert request.target_new.strip()
            assert request.text.count(request.subject)
            if path[-1] in ("paraphrase_prompts", "rephrase_prompt", "rephrase"):
                assert list(request.paraphrases) == ([value] if isinstance(value, str) else value)
    assert not refused or "record 0" in refused[0]


@given(st.one_of(*(damaged(json.dumps([record] * 2).encode()) for record in (RELEASED, FLAT))))
@cases(15, 200)
def test_a_damaged_edit_set_is_one_sentence(folder, data):
    with judged("edit set: damaged bytes"):
        assert all(map(typed, loaded(folder, "counterfact", data)))


def without(record: dict, *path: str, value=None) -> bytes:
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps([RELEASED, record] if record.keys() == RELEASED.keys() else [FLAT, record]).encode()


@pytest.mark.parametrize(
    "data",
    [
        without(RELEASED, "requested_rewrite", "subject", value="France "),
        without(RELEASED, "requested_rewrite", "subject", value="\udc80"),
        without(RELEASED, "requested_rewrite", "prompt", value="The capital is"),
        without(RELEASED, "requested_rewrite", "prompt"),
        without(RELEASED, "paraphrase_prompts", value={"a": "b"}),
        without(RELEASED, "paraphrase_prompts", value=[["a"]]),
        without(RELEASED, "paraphrase_prompts", value=5),
        without(FLAT, "subject", value="Spain"),
        without(FLAT, "ground_truth", value=["Paris"]),
        b"[" * 100_000,
        b"{}",
        b"\xff",
        b"",
    ],
)
def test_a_wrong_edit_set_is_one_sentence(folder, data):
    with judged("edit set: known kinds of wrong") as refused:
        loaded(folder, "counterfact", data)
    assert refused
    assert "record 1" in refused[0] or "cannot be read" in refused[0] or "must be a JSON list" in refused[0]


@pytest.mark.parametrize("subject", ["France ", " France", "France\u00a0"])
def test_white_space_around_a_subject_costs_a_large_set_that_record_and_no_more(folder, subject, caplog):
    wrong = json.loads(without(RELEASED, "requested_rewrite", "subject", value=subject))[1]
    many = [{**RELEASED, "case_id": number} for number in range(facts.LARGE)]
    many[3] = wrong
    with judged("edit set: white space around a subject"), caplog.at_level("WARNING"):
        requests = loaded(folder, "counterfact", json.dumps(many).encode())
        assert [request.id for request in requests] == [str(n) for n in range(facts.LARGE) if n != 3]
        assert "left out 1 records whose subject has white space around it: [3]" in caplog.text
    with judged("edit set: white space around a subject") as refused:
        loaded(folder, "counterfact", json.dumps(many[:10]).encode())
    assert "record 3: subject" in refused[0]


def test_paraphrases_given_as_a_text_are_one_paraphrase(folder):
    with judged("edit set: known kinds of wrong"):
        requests = loaded(folder, "counterfact", without(RELEASED, "paraphrase_prompts", value="It has"))
        assert requests[1].paraphrases == ("It has",)


# Results ------------------------------------------------------------------------------------------

PARAMS = Params.make(
    "rq1",
    "x",
    {"models": ["smollm2-135m-instruct"], "methods": ["control"], "edits": [2], "benchmarks": ["mini_mmlu"]},
)
MANIFEST = {"params_fingerprint": PARAMS.fingerprint(), "edits": {"failed": 1}}


def results(folder: Path) -> Results:
    items = [{"id": str(n), "value": n % 2, "parsed": True, "lp": [-1.5, -2.25 * n], "target": 0} for n in range(20)]
    cells = [Cell("m", "control", "default", 0, edits, "mini_mmlu", items) for edits in (1, 2)]
    edits = [
        EditRecord("m", "control", "default", 0, n, f"capital/{n}", 40, {"failed": "no bit changed"}) for n in (1, 2)
    ]
    found = Results(PARAMS, cells, edits, MANIFEST)
    found.save(folder)
    return found


@given(st.data())
@cases(25, 400)
def test_damaged_results_are_the_same_or_refused(folder, data):
    right = results(folder / "results")
    name = data.draw(st.sampled_from(["cells.jsonl.gz", "cells.jsonl.gz", "manifest.json"]))
    path = folder / "results" / name
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with judged("results: damaged bytes") as refused:
        read = Results.load(PARAMS, folder / "results")
        assert (read.cells, read.edits) == (right.cells, right.edits)
    assert not refused or "run make rq1" in refused[0]


LINE = {
    "type": "cell",
    "model": "m",
    "method": None,
    "variant": None,
    "order": 0,
    "edits": 0,
    "benchmark": "b",
    "items": [],
}


@pytest.mark.parametrize(
    "line", [[], 5, None, {}, {"type": "cell"}, {**LINE, "more": 1}, {"type": "edit", "model": "m"}]
)
def test_results_of_another_form_are_refused(folder, line):
    results(folder / "results")
    (folder / "results" / "cells.jsonl.gz").write_bytes(gzip.compress(json.dumps(line).encode()))
    with judged("results: known kinds of wrong") as refused:
        Results.load(PARAMS, folder / "results")
    assert refused


@pytest.mark.parametrize("manifest", [b"[]", b"{}", b"null", b"5", b"", b"{", b"\xff", b'{"params_fingerprint": 5}'])
def test_a_manifest_of_another_form_is_refused(folder, manifest):
    results(folder / "results")
    (folder / "results" / "manifest.json").write_bytes(manifest)
    with judged("results: known kinds of wrong") as refused:
        Results.load(PARAMS, folder / "results")
    assert refused


# Model folders --------------------------------------------------------------------------------------

MODEL = PICO / "pico-0.1m"
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def fingerprint():
    return kedit.load(str(MODEL)).fingerprint


@pytest.fixture(scope="module")
def reading():
    """What the model says of a text."""
    return says(kedit.load(str(MODEL)))


def says(lm) -> list[float]:
    return lm.model(torch.tensor([[*lm.begin, *lm.encode("the capital of")]])).logits.flatten().tolist()


def with_file(folder: Path, name: str, data: bytes | None) -> Path:
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(MODEL, model)
    if data is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(data)
    return model


def never_another_in_its_place(model: Path, fingerprint: str, reading: list[float]) -> None:
    lm = kedit.load(str(model))
    assert lm.fingerprint != fingerprint or says(lm) == reading


@given(st.data())
@cases(15, 250)
def test_a_damaged_model_is_refused_or_has_a_fingerprint_of_its_own(folder, fingerprint, reading, data):
    name = data.draw(st.sampled_from(FILES))
    with judged("model folder: damaged bytes"):
        changed = data.draw(damaged((MODEL / name).read_bytes()))
        never_another_in_its_place(with_file(folder, name, changed), fingerprint, reading)


CONFIG = json.loads((MODEL / "config.json").read_text())


@given(st.sampled_from(list(CONFIG)), ANYTHING)
@cases(15, 250)
def test_a_wrong_configuration_is_refused_or_has_a_fingerprint_of_its_own(folder, fingerprint, reading, key, value):
    with judged("model folder: values of the configuration"):
        model = with_file(folder, "config.json", json.dumps({**CONFIG, key: value}).encode())
        never_another_in_its_place(model, fingerprint, reading)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "bert"}'),
        ("tokenizer.json", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"null"),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    ],
)
def test_a_wrong_model_folder_is_one_sentence(folder, name, data):
    with judged("model folder: known kinds of wrong") as refused:
        kedit.load(str(with_file(folder, name, data)))
    assert refused


def test_pickled_weights_are_refused(folder):
    model = with_file(folder, "model.safetensors", None)
    torch.save({"weight": torch.zeros(2)}, model / "pytorch_model.bin")
    with judged("model folder: known kinds of wrong") as refused:
        kedit.load(str(model))
    assert refused
