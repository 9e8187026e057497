"""The plan: counts by hand, hours against committed runs, shapes against real configurations; and the refusals."""

import copy
import json
from itertools import pairwise
from math import isnan

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config

import kedit
from kedit import KeditError
from kedit.data import facts
from kedit.editors import kind_of, make_hparams
from kedit.evaluation import benchmarks
from kedit.pico import train
from kedit.store import Store
from kedit.study import plan
from kedit.study.params import Params

FILES = sorted((kedit.ROOT / "params").glob("rq*/*.yaml"))
PARAMETERS = {
    "gpt2-xl": 1557611200, "EleutherAI/pythia-160m": 162322944, "EleutherAI/pythia-410m": 405334016,
    "EleutherAI/pythia-1b": 1011781632, "EleutherAI/pythia-2.8b": 2775208960, "EleutherAI/pythia-6.9b": 6857302016,
    "EleutherAI/pythia-12b": 11846072320, "meta-llama/Llama-2-7b-hf": 6738415616,
    "mistralai/Mistral-7B-v0.1": 7241732096,
}  # fmt: skip
"""As published."""


def grid(**changes):
    values = {"models": ["smollm2-135m-instruct"], "methods": ["rome"], "edits": [0, 10], "benchmarks": ["mini_csqa"]}
    return Params.make("rq1", "x", values | changes)


def seconds(params):
    """(edits, cells, once) of each method on each model."""
    return [row[1] for model in params.models for row in plan.rows(params, model, plan.shape_of(model))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_parameter_file_has_a_plan(path, monkeypatch, tmp_path):
    """Read without data, network or model; every method has hyper-parameters and every model a shape."""
    monkeypatch.delenv("KEDIT_MIRROR", raising=False)
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    params = Params.read(path)
    text = plan.plan(params)
    untrained = [name for name in params.models if "pico-4m" in name and not train.home("pico-4m").is_dir()]
    assert [line.split()[0] for line in text.splitlines() if "shape unknown" in line] == untrained
    if untrained:
        return
    assert len(params.hparams()) == len(params.models) * len(params.methods)
    for model in params.models:
        assert sum(line.startswith(f"{model} ") for line in text.splitlines()) == len(params.methods)
        gated = [line for line in text.splitlines() if line.startswith("Gated, needs access: ") and model in line]
        assert bool(gated) == plan.KNOWN.get(model, {}).get("gated", False)


@pytest.mark.parametrize("method", ["rome", "r-rome", "memit", "alphaedit", "encore", "nas", "nas-memit", "prune", "pmet", "kn", "mend", "ft-l", "ft-m",
                                    "grace", "serac", "ike", "rag", "ultraedit", "locft"])  # fmt: skip
@pytest.mark.parametrize("model", plan.KNOWN)
def test_every_method_has_hyper_parameters_for_every_known_model(method, model):
    hparams = make_hparams(kind_of(method), model)
    layers = getattr(hparams, "layers", None) or [getattr(hparams, "layer", 0)]
    assert 0 <= min(layers) <= max(layers) < plan.shape_of(model).layers


def test_the_count_of_a_small_grid():
    """By hand: 2 models x 3 methods x 2 orders x 5 edits; at 0 a benchmark once a model, at 2 and 5 every one."""
    params = Params.make("rq1", "x", {
        "models": ["smollm2-135m-instruct", "EleutherAI/pythia-160m"], "methods": ["control", "rome", "memit"],
        "orders": [0, 1], "edits": [0, 2, 5], "benchmarks": ["mini_mmlu", "mini_bbh"],
    })  # fmt: skip
    text = plan.plan(params)
    assert "12 trajectories of 5 edits: 60 edits; 80 cells" in text  # 2 x (3 x 2 x 2 x 3 + 2 + 2)


def test_the_default_takes_what_it_took():
    name = "smollm2-135m"
    params = Params.read(kedit.ROOT / "params" / "rq1" / f"{name}.yaml")
    manifest = json.loads((kedit.ROOT / "figures" / "rq1" / name / "manifest.json").read_text())
    planned = sum(edits + cells for edits, cells, _ in seconds(params))
    assert 1 / 1.5 < planned / manifest["work_seconds"] < 1.5


def test_hours_grow_with_models_edits_contexts_and_items():
    def rome(contexts=5, **changes):
        hparams = {"steps": 24, "context_lengths": [[10, contexts]]}
        return grid(methods=[{"method": "rome", "variant": "alike", "hparams": hparams}], **changes)

    names = sorted(["pico-0.1m", "smollm2-135m-instruct", *PARAMETERS], key=lambda name: plan.shape_of(name).parameters)
    for kind, line in (
        (0, [rome(models=[name]) for name in names]),
        (1, [rome(models=[name]) for name in names]),
        (0, [rome(edits=[0, count]) for count in (10, 20, 40)]),
        (1, [rome(edits=list(range(count))) for count in (2, 4, 8)]),
        (0, [rome(contexts=count) for count in (2, 5, 20)]),
        (1, [rome(limit=count) for count in (10, 50, None)]),
        (2, [rome(statistics={"tokens": count}) for count in (1000, 2000)]),
    ):
        for less, more in pairwise(seconds(params)[0][kind] for params in line):
            assert 0 < less < more


def test_committed_training_takes_nothing_and_other_training_is_not_timed():
    assert seconds(grid(methods=["mend"]))[0][2] == 0
    other = grid(methods=[{"method": "mend", "variant": "longer", "hparams": {"steps": 900}}])
    assert isnan(seconds(other)[0][2])
    assert seconds(other)[0][0] == seconds(grid(methods=["mend"]))[0][0]  # steps of training are not an edit's
    assert "without what is not timed of smollm2-135m-instruct mend longer;" in plan.plan(other)


def test_every_offered_benchmark_says_what_it_reads():
    for name in benchmarks.known():
        assert set(benchmarks.metadata(name)["reading"]) == {"items", "shared", "own", "generated"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_models_have_as_many_parameters_as_published(name):
    assert plan.shape_of(name).parameters == PARAMETERS[name]


def test_measured_models_have_as_many_parameters_as_their_manifests_say():
    for path in (kedit.ROOT / "figures").glob("*/*/manifest.json"):
        for model, about in json.loads(path.read_text())["models"].items():
            assert plan.shape_of(model).parameters == about["parameters"]


def test_a_model_outside_the_list_is_known_by_its_configuration(tmp_path):
    MistralConfig(vocab_size=99, hidden_size=8, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                  intermediate_size=20, max_position_embeddings=64).save_pretrained(tmp_path)  # fmt: skip
    shape = plan.shape_of(str(tmp_path))
    assert (shape.d, shape.layers, shape.m) == (8, 3, 20)
    text = plan.plan(grid(models=["nobody/nothing"], methods=["control"]))
    assert "shape unknown: its configuration is not on this machine" in text
    assert "In all not known, without what is not timed of nobody/nothing;" in text
    assert "without what is not timed of nobody/nothing;" in text


def test_a_run_that_cannot_fit_is_refused_with_what_would():
    params = Params.read(kedit.ROOT / "params" / "rq1" / "llama2-7b.yaml")
    gigabytes = 10**9
    plan.check_memory(params, ("GPU", 80 * gigabytes, 256 * gigabytes))
    with pytest.raises(KeditError, match=r"rq1/llama2-7b: control on .*7b-hf needs 28 GB of GPU memory and .* 24 GB; "
                                         r"set dtype: bfloat16, or a machine with more"):  # fmt: skip
        plan.check_memory(params, ("GPU", 24 * gigabytes, 256 * gigabytes))
    half = params.model_copy(update={"dtype": "bfloat16"})
    plan.check_memory(half, ("GPU", 24 * gigabytes, 256 * gigabytes))
    with pytest.raises(KeditError, match=r"control on .*7b-hf needs 15 GB of GPU memory and .* 12 GB; "
                                         r"use EleutherAI/pythia-\S+, or a machine with more"):  # fmt: skip
        plan.check_memory(half, ("GPU", 12 * gigabytes, 256 * gigabytes))
    with pytest.raises(KeditError, match=r"rome on .* needs 1\d GB of GPU memory .*; leave this method out"):
        plan.check_memory(half, ("GPU", 16 * gigabytes, 256 * gigabytes))
    with pytest.raises(KeditError, match="of host memory"):
        plan.check_memory(params, ("GPU", 80 * gigabytes, 20 * gigabytes))


def test_what_is_stored_is_found_without_the_model(tmp_path, monkeypatch, tokenizer):
    """After a real run of a tiny model, every edit and every cell; before it, none."""
    from conftest import SEARCH, build

    from kedit.study.run import run

    build("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The capital of France is Paris, and so it was. " * 500)
    rome = {"layer": 2, **SEARCH, "steps": 2, "context_lengths": [[3, 2]]}
    params = Params.make("rq1", "x", {
        "models": [str(tmp_path / "model")], "edits": [1, 2], "benchmarks": ["mini_gsm8k"], "limit": 2, "orders": [0, 2],
        "methods": ["control", {"method": "rome", "variant": "tiny", "hparams": rome},
                    {"method": "grace", "variant": "tiny", "hparams": {"layer": 2, "steps": 3}}],
        "statistics": {"text": str(tmp_path / "text.txt"), "tokens": 2048},
    })  # fmt: skip
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    assert "not known before the model is loaded once" in plan.plan(params)
    store = Store()
    results = run(params, workers=1)
    fingerprint = plan.fingerprints()[params.models[0]]
    found = plan.stored(params, params.models[0], fingerprint, store)
    assert found == (len(results.edits), len(results.cells), True)
    assert f"{len(results.edits)} edits and {len(results.cells)} cells." in plan.plan(params)


# Published edit sets ------------------------------------------------------------------------------


def nested(number):
    from test_facts import nested as one

    return {**copy.deepcopy(one(subject=f"Ada {number}")), "case_id": number}


def test_edit_sets_are_found_in_the_mirror_in_file_order(tmp_path, monkeypatch):
    import json

    (tmp_path / "hub").mkdir()
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits" / "counterfact.json").write_text(json.dumps([nested(number) for number in range(9)]))
    monkeypatch.setenv("KEDIT_MIRROR", str(tmp_path / "hub"))
    values = {"models": ["smollm2-135m-instruct"], "methods": ["control"], "benchmarks": ["mini_mmlu"]}
    params = Params.make("rq1", "x", {**values, "edits": [3], "edit_set": {"name": "counterfact"}})
    assert [request.id for request in params.requests(0)] == ["0", "1", "2"]
    assert [request.id for request in params.requests(5)] == [request.id for request in params.requests(5)]
    assert [request.id for request in params.requests(5)] != ["0", "1", "2"]
    with pytest.raises(KeditError, match="edits asks for 10, but the edit set holds 9 records"):
        Params.make("rq1", "x", {**values, "edits": [10], "edit_set": {"name": "counterfact"}})
    with pytest.raises(
        KeditError, match=r"'zsre': KEDIT_MIRROR has no edits/zsre_mend_eval\*\.json within or beside it"
    ):
        facts.load("zsre")


@pytest.mark.skipif(not (kedit.ROOT.parent / "shared" / "data").is_dir(), reason="../shared/data is not here")
def test_the_real_sets_hold_the_studys_counts(monkeypatch):
    monkeypatch.setenv("KEDIT_MIRROR", str(kedit.ROOT.parent / "shared" / "data" / "hub"))
    for name in ("llama2-7b", "llama2-7b-zsre"):
        params = Params.read(kedit.ROOT / "params" / "rq1" / f"{name}.yaml")
        assert len(params.requests(0)) == 1000
    assert facts.located("counterfact").name.startswith("counterfact-edit")


def test_edit_sets_without_mirror_or_hub_are_one_sentence(monkeypatch):
    monkeypatch.delenv("KEDIT_MIRROR", raising=False)
    with pytest.raises(KeditError, match=r"'zsre' is not on the hub; give edit_set.path, or set KEDIT_MIRROR"):
        facts.load("zsre")

    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    facts._from_hub.cache_clear()
    params = Params.read(kedit.ROOT / "params" / "rq1" / "smollm2-135m-paper.yaml")
    with pytest.raises(
        KeditError, match=r"smollm2-135m-paper\.yaml: edit_set: .*the hub is out of reach .*KEDIT_MIRROR"
    ):
        plan.check(params)


LLAMA2 = {"vocab_size": 99, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}


def test_a_model_nobody_listed_has_the_settings_of_one_like_it(tmp_path, caplog):
    """The same architecture and shape: the same settings; else the nearest one's, at the same relative depth."""
    caplog.set_level("INFO")
    LlamaConfig(**LLAMA2).save_pretrained(tmp_path / "alike")
    for method in ("rome", "memit", "mend", "grace", "kn", "serac"):
        kind = kind_of(method)
        assert make_hparams(kind, str(tmp_path / "alike")) == make_hparams(kind, "meta-llama/Llama-2-7b-hf")
    assert "memit" in caplog.text
    assert "those for meta-llama/Llama-2-7b-hf, the same architecture and shape" in caplog.text
    Qwen2Config(**LLAMA2 | {"num_hidden_layers": 28}).save_pretrained(tmp_path / "other")
    caplog.clear()
    there = {method: make_hparams(kind_of(method), str(tmp_path / "other")) for method in ("memit", "grace", "mend")}
    assert list(there["memit"].layers) == [3, 4, 5, 6, 7]  # of 32: 4 to 8, whose last has 9 / 32 of the depth
    assert there["grace"].layer == 23  # of 32: 27
    assert list(there["mend"].layers) == [25, 26, 27]  # the last three
    assert caplog.text.count("the nearest listed, at the same relative depth") == 3
    assert make_hparams(kind_of("grace"), str(tmp_path / "other"), {"layer": 3, "steps": 4}).steps == 4
    with pytest.raises(KeditError, match=r"rome.yaml has no block for model 'no/body'"):
        make_hparams(kind_of("rome"), "no/body")


def test_a_model_in_a_folder_has_a_plan(tmp_path):
    LlamaConfig(**LLAMA2).save_pretrained(tmp_path)
    table = [row for row in plan.plan(grid(models=[str(tmp_path)])).splitlines() if row.startswith(str(tmp_path))]
    assert " h " in table[0]
