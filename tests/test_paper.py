"""The paper suite: lm-eval's stock tasks on the real data, against lm-eval's own hf model."""

import pytest
from lm_eval import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM

import kedit
from kedit import KeditError
from kedit.data import hub
from kedit.evaluation import benchmarks
from kedit.evaluation.benchmarks import stock
from kedit.evaluation.harness import SharedPrefixLM, evaluate
from kedit.store import cache_folder

MIRROR = kedit.ROOT.parent / "shared" / "data" / "hub"
needs_data = pytest.mark.skipif(not MIRROR.is_dir(), reason="../shared/data is not here")
TOKENS = 8  # generated at most, so that the test is quick; the tasks say 256 to 1024


def forget():
    for cached in (benchmarks.tasks, benchmarks.fingerprint, stock.located):
        cached.cache_clear()


@pytest.fixture
def mirrored(monkeypatch):
    forget()
    monkeypatch.setenv("KEDIT_MIRROR", str(MIRROR))
    yield
    forget()


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", benchmarks.suites()["paper"])
def test_same_answers_as_lm_evals_hf_model(smollm2, mirrored, name):
    limit = 3 if name in ("triviaqa", "toxigen") else 1
    for task in benchmarks.tasks(name).values():
        if task.OUTPUT_TYPE == "generate_until":
            task.config.generation_kwargs["max_gen_toks"] = TOKENS
    found = evaluate(smollm2, name, limit)
    assert len({item["id"] for item in found}) == len(found) == limit
    folder = cache_folder() / "models" / smollm2.name
    harness = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, add_bos_token=True)
    about, samples = benchmarks.metadata(name), []
    for task, drawn in benchmarks.draw(name, limit).items():
        if drawn:
            reference = lm_evaluate(
                lm=harness,
                task_dict={task: benchmarks.tasks(name)[task]},
                samples={task: drawn},
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


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(("name", "tasks", "items"), [("mmlu", 57, 14042), ("bbh", 27, 6511)])
def test_a_limit_is_shared_out_over_the_tasks_of_a_benchmark(mirrored, name, tasks, items):
    sizes = {task: len(drawn) for task, drawn in benchmarks.draw(name, None).items()}
    assert (len(sizes), sum(sizes.values())) == (tasks, items)
    for limit in (1, 10, 200, items + 1):
        parts = {task: len(drawn) for task, drawn in benchmarks.draw(name, limit).items()}
        assert sum(parts.values()) == min(limit, items)
        assert all(abs(parts[task] - size * min(limit, items) / items) < 1.5 for task, size in sizes.items())


@pytest.mark.slow
@needs_data
def test_the_studys_shots_are_in_the_prompts(mirrored):
    """Counted in the text itself: exemplars before the question."""
    for name, marks, shots in (
        ("mmlu", "Answer:", 5),
        ("bbh", "A: Let's think step by step.", 3),
        ("gsm8k", "\nA:", 8),
        ("csqa", "Answer:", 7),
        ("triviaqa", "Answer:", 0),
        ("toxigen", "Statement:", 0),
    ):
        task = next(iter(benchmarks.tasks(name).values()))
        task.build_all_requests(limit=1, rank=0, world_size=1)
        assert task.instances[0].args[0].count(marks) == shots + 1, name


@needs_data
def test_toxigen_without_a_test_split_uses_train_and_says_so(mirrored, caplog):
    task = benchmarks.tasks("toxigen")["toxigen"]
    assert task.config.test_split == "train"
    assert "its train split is used" in caplog.text


@needs_data
def test_the_fingerprint_is_that_of_the_data(mirrored, monkeypatch, tmp_path):
    """The same data elsewhere are the same benchmark; other data another."""
    import shutil

    before = benchmarks.fingerprint("toxigen")
    shutil.copytree(MIRROR / "skg" / "toxigen-data", tmp_path / "skg" / "toxigen-data", copy_function=shutil.copyfile)
    monkeypatch.setenv("KEDIT_MIRROR", str(tmp_path))
    forget()
    assert benchmarks.fingerprint("toxigen") == before
    (file,) = (tmp_path / "skg" / "toxigen-data" / "annotated").iterdir()
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    forget()
    assert benchmarks.fingerprint("toxigen") != before


def test_a_mirror_without_the_data_is_one_sentence(monkeypatch, tmp_path):
    forget()
    monkeypatch.setenv("KEDIT_MIRROR", str(tmp_path))
    with pytest.raises(KeditError, match=r"KEDIT_MIRROR has no data set cais/mmlu; put it there, or unset"):
        benchmarks.tasks("mmlu")
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    with pytest.raises(
        KeditError, match=r"data set openai/gsm8k cannot be read .*gsm8k_cot needs it: put it into KEDIT_MIRROR"
    ):
        benchmarks.tasks("gsm8k")
    monkeypatch.setenv("KEDIT_MIRROR", str(tmp_path / "nowhere"))
    with pytest.raises(KeditError, match=r"KEDIT_MIRROR is .*nowhere.*no folder"):
        hub.mirror()
    forget()


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    import httpx

    forget()
    monkeypatch.delenv("KEDIT_MIRROR", raising=False)

    def refuse(*_, **__):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(KeditError, match=r"cais/mmlu is not here and the hub is out of reach .*set KEDIT_MIRROR"):
        benchmarks.tasks("mmlu")
    forget()


def test_long_prompts_are_cut_at_the_left_as_lm_eval_cuts_them(llama):
    """A window of 16 tokens: the same scores and the same text as lm-eval's own model."""
    from types import SimpleNamespace

    ours = SharedPrefixLM(llama)
    theirs = HFLM(pretrained=llama.model, tokenizer=llama.tokenizer, backend="causal", batch_size=1, max_length=16)
    ours._max_length = 16
    ids = llama.encode("The capital of France is Paris, and the movie was directed by the writer of the country.")
    pairs = [(("", ""), [*ids, *ids], ids[:2]), (("", ""), ids[:5], ids[5:9])]
    expected = theirs._loglikelihood_tokens(pairs, disable_tqdm=True)
    for (value, greedy), (other, said) in zip(ours._loglikelihood_tokens(pairs), expected, strict=True):
        assert value == pytest.approx(other, abs=1e-4)
        assert greedy == said
    text = llama.tokenizer.decode([*ids, *ids])
    request = SimpleNamespace(args=(text, {"until": ["~"], "max_gen_toks": 6, "do_sample": False}))
    assert ours.generate_until([request]) == theirs.generate_until([request], disable_tqdm=True)
