"""Keys change when a result could, and only then; what is damaged on disk is made anew or refused."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SEARCH, build
from tokenizers import normalizers
from transformers import AutoTokenizer

import kedit
from kedit import KeditError
from kedit.data.corpus import SEQUENCE
from kedit.data.facts import bundled
from kedit.editors import kind_of, make_hparams, mend, training
from kedit.editors.mend import MEND
from kedit.editors.second_moments import SecondMoments, key_of
from kedit.evaluation import benchmarks
from kedit.model import lm as models
from kedit.model.lm import LM, PICO
from kedit.study.params import Params
from kedit.study.run import units
from kedit.study.trajectory import Line, states_of


def flip(path, where=None):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    bit = random.Random(0).randrange(8 * len(data)) if where is None else where
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# The model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    build("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_same_model_has_the_same_fingerprint_wherever_it_was_saved(lm, tmp_path, tokenizer):
    lm.model.save_pretrained(tmp_path / "one")
    lm.tokenizer.save_pretrained(tmp_path / "one")
    once = kedit.load(str(tmp_path / "one"))
    once.tokenizer(["a", "much longer text"], padding=True)  # leaves its mark in the tokenizer
    once.model.save_pretrained(tmp_path / "two")
    once.tokenizer.save_pretrained(tmp_path / "two")
    assert once.fingerprint == lm.fingerprint == kedit.load(str(tmp_path / "two")).fingerprint


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_another_process(folder):
    code = f"import kedit; print(kedit.load({str(folder)!r}).fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kedit.load(str(folder)).fingerprint


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("llama", "rms_norm_eps", 1e-4),
        ("llama", "hidden_act", "gelu"),
        ("llama", "max_position_embeddings", 64),
        ("mistral", "sliding_window", 32),
        ("gpt2", "layer_norm_epsilon", 1e-3),
        ("gpt2", "scale_attn_weights", False),
        ("gpt_neox", "layer_norm_eps", 1e-3),
        ("gpt_neox", "use_parallel_residual", False),
    ],
)
def test_what_the_configuration_computes_is_in_the_fingerprint(architecture, key, value, tokenizer, tmp_path):
    model = build(architecture, len(tokenizer))
    before = LM(model, tokenizer).fingerprint
    assert getattr(model.config, key) != value
    setattr(model.config, key, value)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert kedit.load(str(tmp_path)).fingerprint != before


@pytest.mark.parametrize("part", ["normalizer", "chat template", "special token", "clean up", "begin"])
def test_all_of_the_tokenizer_is_in_the_fingerprint(part, folder):
    model, before = kedit.load(str(folder)).model, kedit.load(str(folder)).fingerprint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if part == "normalizer":
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif part == "chat template":
        tokenizer.chat_template = "{{ messages }}"
    elif part == "special token":
        tokenizer.add_special_tokens({"sep_token": "Rome"})
    elif part == "clean up":
        tokenizer.clean_up_tokenization_spaces = not tokenizer.clean_up_tokenization_spaces
    assert LM(model, tokenizer, begin=part != "begin").fingerprint != before


def test_a_damaged_converted_model_is_set_aside_and_made_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    made = []

    def convert(_, folder):
        made.append(folder)
        shutil.copytree(PICO / "pico-0.1m", folder)

    monkeypatch.setattr(models, "convert_gguf", convert)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: type("Spec", (), {"origin": str(tmp_path / "x")}))
    (tmp_path / "model.gguf").touch()
    name = "smollm2-135m-instruct"
    whole = kedit.load(name).fingerprint
    assert kedit.load(name).fingerprint == whole
    assert len(made) == 1
    for file in ("model.safetensors", "config.json", "tokenizer.json", "sums"):
        flip(tmp_path / "models" / name / file)
        assert kedit.load(name).fingerprint == whole
        assert f"{name} is damaged" in caplog.text or "sums is damaged" in caplog.text
    assert len(made) == 1 + 4
    assert len(list((tmp_path / "models").glob(f"{name}.damaged*"))) == 4


# What editors depend on ----------------------------------------------------------------------------


def test_no_damage_to_second_moments_or_factors_goes_unnoticed(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(request.text for request in bundled("train")))
    keys = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))

    def solved():
        statistics = SecondMoments(llama, str(text), 4 * SEQUENCE)
        return statistics.moment(1), statistics.solve(1, keys), *statistics.spectrum(1)

    before = solved()
    files = [path for path in (tmp_path / "moments").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["1", "1-cholesky", "1-spectrum"]
    rng = random.Random(0)
    for path in files:
        for _ in range(6):
            flip(path, rng.randrange(8 * path.stat().st_size))
            assert SecondMoments(llama, str(text), 4 * SEQUENCE)._load(path.name) is None
            path.with_name(f"{path.name}.damaged").rename(path)
            for found, expected in zip(solved(), before, strict=True):
                assert torch.equal(found, expected)
            shutil.rmtree(tmp_path / "moments")
            solved()


def test_the_text_is_in_the_key_of_second_moments(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    before = key_of("model", "fingerprint", str(text), 512)
    assert key_of("model", "fingerprint", str(text), 512) == before
    text.write_text("two")
    assert key_of("model", "fingerprint", str(text), 512) != before


@pytest.fixture
def trained(llama, tmp_path, monkeypatch):
    """A small MEND that was trained and committed: hyper-parameters and its file."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mend, "bundled", {split: bundled(split)[:8] for split in ("train", "validation")}.get)
    hparams = mend.Hparams(layers=(2, 3), rank=8, steps=2, lr=1e-3, lr_lr=1e-4, accumulate=2, validate=2)
    artefact = tmp_path / "artefact.tensors"
    monkeypatch.setattr(training, "committed", lambda method, model: artefact)
    MEND.train(llama, hparams, artefact=artefact)
    return hparams, artefact


def test_what_was_trained_is_in_the_key(llama, trained, tmp_path):
    hparams, artefact = trained
    before = MEND(llama, hparams).key()
    assert before == MEND(llama, hparams).key()
    tensors, about = training.load(artefact, "mend")
    training.save(artefact, "mend", tensors, about)
    assert MEND(llama, hparams).key() == before

    tensors["rates"].view(torch.uint8)[0] ^= 1  # trained again, otherwise
    training.save(artefact, "mend", tensors, about)
    assert MEND(llama, hparams).key() != before
    training.save(artefact, "mend", tensors, about | {"settings": "others"})
    assert MEND(llama, hparams).key() == before  # that in the cache
    assert MEND(llama, replace(hparams, accumulate_edits=False)).key() != before


def test_a_damaged_committed_artefact_is_one_sentence(llama, trained):
    hparams, artefact = trained
    flip(artefact)
    with pytest.raises(KeditError, match=r"artefact\.tensors is damaged; get it again .*kedit train mend"):
        MEND(llama, hparams).key()
    assert artefact.exists()


def test_a_damaged_training_is_made_again(llama, trained, tmp_path):
    hparams, artefact = trained
    before = MEND(llama, hparams).key()
    artefact.unlink()
    for name in ("trained", "training"):
        for file in [path for path in (tmp_path / "cache").rglob("*") if path.name in ("trained", name)]:
            flip(file)
        assert MEND(llama, hparams).key() == before


def test_settings_of_a_training_do_not_follow_the_version_of_results(monkeypatch):
    hparams = make_hparams(kind_of("serac"), "smollm2-135m-instruct")
    before = kind_of("serac").settings(hparams), MEND.settings(mend.Hparams(layers=(2,)))
    monkeypatch.setattr("kedit.store.VERSION", 99)
    assert before == (kind_of("serac").settings(hparams), MEND.settings(mend.Hparams(layers=(2,))))
    assert kind_of("serac").settings(replace(hparams, seed=1)) != before[0]
    assert kind_of("serac").settings(replace(hparams, threshold=0.9)) == before[0]  # of the edits alone


# Cells ---------------------------------------------------------------------------------------------

HPARAMS = {"layer": 2, **SEARCH, "steps": 4}


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "edits.json").write_text(
        json.dumps(
            [
                {"subject": subject, "prompt": f"{subject} is in", "target_new": "Rome", "ground_truth": "Paris"}
                | {
                    "rephrase_prompt": f"Where is {subject}? In",
                    "locality_prompt": "X",
                    "locality_ground_truth": "Y",
                    "case_id": 1,
                }
                for subject in ("A place", "Another place")
            ]
        )
    )
    return {
        "models": ["llama"],
        "methods": [{"method": "rome", "variant": "v", "hparams": HPARAMS}],
        "edits": [2],
        "benchmarks": ["mini_mmlu"],
        "measures": ["structure"],
        "limit": 3,
        "edit_set": {"name": "counterfact", "path": str(tmp_path / "edits.json")},
        "statistics": {"text": str(tmp_path / "text.txt"), "tokens": 512},
    }


def keys(grid, fingerprint="model"):
    """What a run must have -> its key, by count of edits and benchmark (None for an edit)."""
    params = Params.make("rq1", "test", grid)
    kind, (method,), (order,) = kind_of("rome"), params.methods, params.orders
    hparams = make_hparams(kind, "llama", method.hparams)
    moments = key_of("llama", fingerprint, params.statistics.text, params.statistics.tokens)
    states = states_of(fingerprint, kind.recipe(hparams, moments), params.requests(order))
    return {
        (unit.count, unit.where.get("benchmark")): unit.key for unit in units(params, "llama", {Line(0, order): states})
    }


def changed(grid, other, fingerprint="model"):
    before, after = keys(grid), keys(other, fingerprint)
    assert keys(grid) == before or other is grid
    return {which for which in before if before[which] != after[which]}


EDITS = {(1, None), (2, None)}
EDITED = EDITS | {(2, "edit"), (2, "mini_mmlu"), (2, "structure")}
UNEDITED = {(0, "edit"), (0, "mini_mmlu"), (0, "structure")}


def test_each_input_changes_the_keys_of_what_depends_on_it(grid, tmp_path, monkeypatch):
    assert changed(grid, grid) == set()
    assert changed(grid, grid, "another model") == EDITED | UNEDITED
    other = [{"method": "rome", "variant": "v", "hparams": HPARAMS | {"steps": 5}}]
    assert changed(grid, grid | {"methods": other}) == EDITED
    assert changed(grid, grid | {"limit": 2}) == {(0, "mini_mmlu"), (2, "mini_mmlu")}
    assert changed(grid, grid | {"orders": [1]}) == EDITED | {(0, "edit")}
    tokens = grid["statistics"] | {"tokens": 1024}
    assert changed(grid, grid | {"statistics": tokens}) == EDITED | {(0, "structure")}

    before = keys(grid), Params.make("rq1", "test", grid).fingerprint()
    (tmp_path / "text.txt").write_text("other text")
    after = keys(grid), Params.make("rq1", "test", grid).fingerprint()
    assert {which for which in before[0] if before[0][which] != after[0][which]} == EDITED | {(0, "structure")}
    assert before[1] != after[1]
    edits = json.loads((tmp_path / "edits.json").read_text())
    edits[1]["target_new"] = "Oslo"
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    last = keys(grid), Params.make("rq1", "test", grid).fingerprint()
    assert {which for which in after[0] if after[0][which] != last[0][which]} == EDITED - {(1, None)} | {(0, "edit")}
    assert after[1] != last[1]


@pytest.mark.parametrize("part", ["item", "template", "function", "lm-eval"])
def test_every_part_of_a_benchmark_is_in_its_fingerprint(part, tmp_path, monkeypatch):
    shutil.copytree(benchmarks.HERE / "safety", tmp_path / "safety")
    shutil.copytree(benchmarks.HERE / "mini", tmp_path / "mini")
    monkeypatch.setattr(benchmarks, "folders", lambda: {name: tmp_path / name for name in ("mini", "safety")})
    cached = [getattr(benchmarks, name) for name in ("suites", "known", "_config", "fingerprint")]

    def fingerprint(name):
        for function in cached:
            function.cache_clear()
        return benchmarks.fingerprint(name)

    try:
        name = "refusal" if part == "function" else "mini_mmlu"
        before = fingerprint(name)
        assert fingerprint(name) == before
        if part == "item":
            items = tmp_path / "mini" / "mini_mmlu.jsonl"
            lines = items.read_text().splitlines()
            items.write_text("\n".join([lines[0].replace("a", "e"), *lines[1:]]))
        elif part == "template":
            file = tmp_path / "mini" / "mini_mmlu.yaml"
            file.write_text(file.read_text().replace("doc_to_text: ", "doc_to_text: '' #"))
        elif part == "function":
            (tmp_path / "safety" / "refusal.py").write_text("changed = True")
        else:
            monkeypatch.setattr(benchmarks, "version", lambda _: "another")
        assert fingerprint(name) != before
    finally:
        for function in cached:
            function.cache_clear()
