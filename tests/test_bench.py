"""The bench's table on a tiny model: every part runs, and the two sides of each row agree."""

from dataclasses import replace

import pytest
import torch
from bench import bench, bench_gpu
from conftest import HPARAMS, build
from transformers import AutoModelForCausalLM

import kedit
from kedit.data import facts
from kedit.editors.second_moments import SecondMoments
from kedit.study import plan


@pytest.fixture
def setting(llama, statistics):
    hparams = {**HPARAMS, "alphaedit": {**HPARAMS["alphaedit"], "l2": 1.0}}
    edits = {"rome": 12, "grace": 12}
    requests = facts.bundled("edit")[:4]
    return bench.Setting(llama, statistics(llama), requests, hparams, steps=2, points=2, repeats=2, edits=edits)


@pytest.mark.slow
def test_rows_compare_equal_results(setting):
    old = {name: weight.clone() for name, weight in setting.lm.model.state_dict().items()}
    frame, peak = bench.table(setting, ["search", "solves", "neurons", "flat"])
    assert peak > 0
    assert all(torch.equal(weight, old[name]) for name, weight in setting.lm.model.state_dict().items())
    compared = frame[frame.section != "flat"]
    assert len(compared) == 3 + 2 + 1
    assert (compared.apart < 1e-3).all()
    assert (frame.ratio > 0).all()
    # the plain search computes more: that is counted, not timed
    searches = frame[frame.section == "search"]
    assert (searches.plain_gflop > 2 * searches.fast_gflop).all()
    assert bench.markdown(frame).count("\n") == len(frame) + 1


def test_evaluation_answers_as_the_hf_model(setting, monkeypatch, tmp_path):
    """The same log-likelihoods and texts, so the hf model reads the begin token too."""
    monkeypatch.delenv("KEDIT_MIRROR", raising=False)
    setting.lm.tokenizer.bos_token = "<|endoftext|>"
    setting.lm.tokenizer.save_pretrained(tmp_path)
    setting.lm.tokenizer.name_or_path = str(tmp_path)
    cases = list(bench.evaluations(replace(setting, items={"mmlu": 2, "gsm8k": 2})))
    assert [case.what.split(",")[0] for case in cases] == ["mini_mmlu", "mini_gsm8k"]
    for case in cases:
        plain, fast = case.plain(), case.fast()
        assert len(plain) == len(fast) == 2
        assert bench.differing(plain, fast) == 0
        if not isinstance(plain[0][0], str):
            assert torch.tensor(plain) == pytest.approx(torch.tensor(fast), abs=1e-4)


def test_an_unknown_section_is_one_sentence(setting):
    with pytest.raises(kedit.KeditError, match="section 'speed' does not exist; use one of search"):
        bench.table(setting, ["speed"])


@pytest.mark.slow
def test_the_gpu_bench_measures_a_small_model_here(monkeypatch):
    """The same functions as on a GPU, at a shape that fits; no numbers are asserted."""
    lm = bench_gpu.random_model(build("llama", 700).config, "cpu", torch.bfloat16)
    assert len(lm.tokenizer) == 700
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    statistics = SecondMoments(lm, tokens=2048)
    rows = [
        bench_gpu.edits(lm, method, statistics, 3, **{**HPARAMS[method], **few})
        for method in bench_gpu.METHODS
        for few in [{"steps": 1, "context_lengths": [[2, 2]]} if "kl_factor" in HPARAMS[method] else {}]
    ]
    assert [row["failed"] for row in rows] == [0] * len(bench_gpu.METHODS)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())
    read = bench_gpu.reading(lm, "mini_mmlu", 4)
    assert read["what"] == "mini_mmlu, 4 prompts"
    assert read["tokens"] > 2 * read["tokens_read"]  # exemplars are read once, not four times
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kedit.KeditError, match="needs a CUDA GPU"):
        bench_gpu.bench_gpu()


def test_the_gpu_benchs_model_has_llamas_shape():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(bench_gpu.llama2_7b())
    assert sum(weight.numel() for weight in model.parameters()) == plan.shape_of(bench_gpu.NAME).parameters
