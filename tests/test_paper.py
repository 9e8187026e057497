"""The paper suite: lm-eval's stock tasks on the real data, against lm-eval's own hf model."""

import pytest
from lm_eval import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM

import kedit
from kedit import KeditError, benchmarks, hub
from kedit.evaluate import evaluate

MIRROR = kedit.ROOT.parent / "shared" / "data" / "hub"
if not MIRROR.is_dir():
    MIRROR = kedit.ROOT.parents[1] / "shared" / "data" / "hub"
needs_data = pytest.mark.skipif(not MIRROR.is_dir(), reason="../shared/data is not here")
TOKENS = 24  # generated at most, so that the test is quick; the tasks say 256 to 1024


def forget():
    for cached in (benchmarks.tasks, benchmarks.fingerprint, benchmarks._located):
        cached.cache_clear()


@pytest.fixture
def mirrored(monkeypatch, tmp_path):
    forget()
    monkeypatch.setenv("KEDIT_MIRROR", str(MIRROR))
    yield
    forget()


@needs_data
@pytest.mark.parametrize("name", benchmarks.SUITES["paper"])
def test_same_answers_as_lm_evals_hf_model(smollm2, mirrored, name):
    limit = 2
    for task in benchmarks.tasks(name).values():
        if task.OUTPUT_TYPE == "generate_until":
            task.config.generation_kwargs["max_gen_toks"] = TOKENS
    found = evaluate(smollm2, name, limit)
    assert len({item["id"] for item in found}) == len(found) == limit
    folder = kedit.CACHE / "models" / smollm2.name
    harness = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, add_bos_token=True)
    about, samples = benchmarks.metadata(name), []
    for task, count in benchmarks.shares(name, limit).items():
        if count:
            reference = lm_evaluate(
                lm=harness,
                task_dict={task: benchmarks.tasks(name)[task]},
                limit=count,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
            found_here = [s for s in reference["samples"][task] if s["filter"] == about.get("filter", s["filter"])]
            samples += sorted(found_here, key=lambda s: s["doc_id"])
    for sample, item in zip(samples, found, strict=True):
        assert item["value"] == pytest.approx(sample[about["metric"]], abs=1e-4 if name == "truthfulqa_mc2" else 0)
        if "lp" in item:
            assert item["lp"] == pytest.approx([lp for lp, _ in sample["filtered_resps"]], abs=5e-4)
        else:
            assert item["text"] == sample["resps"][0][0]


