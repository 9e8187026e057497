"""The plan against hand counts, real configurations, and a real run's store; and the refusals."""

import copy
import dataclasses

import pytest
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig

import kedit
from kedit import KeditError
from kedit.data import facts
from kedit.editors import kind_of, make_hparams
from kedit.evaluation import benchmarks
from kedit.pico.train import RECIPES, configuration
from kedit.store import Store, runs_folder
from kedit.study import plan
from kedit.study.params import Params

FILES = sorted((kedit.ROOT / "params").glob("rq*/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_parameter_file_has_a_plan(path, monkeypatch, tmp_path):
    """Read without data, network or model; every method has hyper-parameters and every model a shape."""
    monkeypatch.delenv("KEDIT_MIRROR", raising=False)
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    params = Params.read(path)
    text = plan.plan(params)
    assert "shape unknown" not in text
    assert len(params.hparams()) == len(params.models) * len(params.methods)
    for model in params.models:
        assert sum(line.startswith(f"{model} ") for line in text.splitlines()) == len(params.methods)
        if plan.known_shapes()[model].gated:
            assert f"Gated, needs access: {params.models[0]}" in text


@pytest.mark.parametrize("method", ["rome", "r-rome", "memit", "alphaedit", "pmet", "kn", "mend", "ft-l", "ft-m",
                                    "grace", "serac", "ike"])  # fmt: skip
@pytest.mark.parametrize("model", [name for name in plan.known_shapes() if not name.startswith("pico-")])
def test_every_method_has_hyper_parameters_for_every_known_model(method, model):
    hparams = make_hparams(kind_of(method), model)
    layers = getattr(hparams, "layers", None) or [getattr(hparams, "layer", 0)]
    assert 0 <= min(layers) <= max(layers) < plan.known_shapes()[model].layers


def test_the_count_of_a_small_grid():
    """By hand: 2 models x 3 methods x 2 orders x 5 edits; at 0 a benchmark once a model, at 2 and 5 every one."""
    params = Params.make("rq1", "x", {
        "models": ["smollm2-135m-instruct", "EleutherAI/pythia-160m"], "methods": ["control", "rome", "memit"],
        "orders": [0, 1], "edits": [0, 2, 5], "benchmarks": ["mini_mmlu", "mini_bbh"],
    })  # fmt: skip
    text = plan.plan(params)
    assert "12 trajectories of 5 edits: 60 edits; 80 cells" in text  # 2 x (3 x 2 x 2 x 3 + 2 + 2)


def test_committed_training_costs_nothing_and_other_training_does():
    grid = {"models": ["smollm2-135m-instruct"], "edits": [0, 1], "benchmarks": ["mini_csqa"]}
    once = [
        plan.plan(Params.make("rq1", "x", {**grid, "methods": [method]})).split("mend ")[1].split("|")[0].split()[-2:]
        for method in ("mend", {"method": "mend", "variant": "longer", "hparams": {"steps": 900}})
    ]
    assert once[0] == ["0", "s"]
    assert once[1] != ["0", "s"]


def test_every_offered_benchmark_says_what_it_reads():
    for name in benchmarks.known():
        assert set(benchmarks.metadata(name)["reading"]) == {"items", "shared", "own", "generated"}


def configurations():
    llama = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    yield "meta-llama/Llama-2-7b-hf", LlamaConfig(**llama, intermediate_size=11008)
    yield "mistralai/Mistral-7B-v0.1", MistralConfig(**llama, intermediate_size=14336, num_key_value_heads=8)
    yield "openai-community/gpt2-xl", GPT2Config(n_embd=1600, n_layer=48, n_head=25)
    yield (
        "smollm2-135m-instruct",
        LlamaConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True),
    )  # fmt: skip
    for size, d, layers, heads, vocabulary in (
        ("160m", 768, 12, 12, 50304), ("410m", 1024, 24, 16, 50304), ("1b", 2048, 16, 8, 50304),
        ("2.8b", 2560, 32, 32, 50304), ("6.9b", 4096, 32, 32, 50432), ("12b", 5120, 36, 40, 50688),
    ):  # fmt: skip
        yield (
            f"EleutherAI/pythia-{size}",
            GPTNeoXConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * d,
                          vocab_size=vocabulary),
        )  # fmt: skip
    for name, recipe in RECIPES.items():
        yield name, configuration(recipe)


@pytest.mark.parametrize(
    ("name", "config"), configurations(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_known_shapes_are_those_of_the_architectures(name, config):
    counted, known = plan.shape_from(config), plan.known_shapes()[name]
    assert dataclasses.replace(counted, window=known.window, gated=known.gated) == known


def test_a_model_outside_the_list_is_known_by_its_configuration(tmp_path):
    MistralConfig(vocab_size=99, hidden_size=8, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                  intermediate_size=20, max_position_embeddings=64).save_pretrained(tmp_path)  # fmt: skip
    grid = {"models": [str(tmp_path)], "methods": ["control"], "edits": [1], "benchmarks": ["mini_mmlu"]}
    params = Params.make("rq1", "x", {**grid, "dtype": "bfloat16"})
    shape = plan.shape_of(params, str(tmp_path))
    assert (shape.d, shape.layers, shape.m, shape.mlp, shape.kv, shape.window, shape.weight) == (8, 3, 20, 3, 4, 64, 2)
    unknown = params.model_copy(update={"models": ["nobody/nothing"]})
    assert "shape unknown: add it to kedit/study/models.yaml" in plan.plan(unknown)


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
    store = Store(runs_folder() / "store")
    results = run(params, store, workers=1)
    results.save(runs_folder() / "rq1" / "x")
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
