import pytest

import kedit
from kedit.analysis.published import decline, published, share_kept, twins_apart


@pytest.mark.parametrize(
    ("model", "benchmark", "method", "edits", "score"),
    [  # looked up by hand in the study's tables
        ("meta-llama/Llama-2-7b-hf", "mmlu", "rome", 50, 0.2701),
        ("meta-llama/Llama-2-7b-hf", "gsm8k", "mend", 1000, 0.16),
        ("mistralai/Mistral-7B-v0.1", "csqa", "memit", 100, 0.3178),
        ("meta-llama/Llama-2-7b-chat-hf", "bbh", "none", 0, 0.3997),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mmlu", "rome", 100, 0.1884),
    ],
)
def test_known_numbers(model, benchmark, method, edits, score):
    rows = published(model, benchmark)
    assert rows[(rows.method == method) & (rows.edits == edits)].score.tolist() == [score]


def test_what_was_not_published_is_empty():
    for model, benchmark in (
        ("smollm2-135m-instruct", "mmlu"),
        ("meta-llama/Llama-2-7b-hf", "triviaqa"),
        ("meta-llama/Llama-2-7b-hf", "mini_mmlu"),
        ("meta-llama/Llama-2-7b-hf", "truthfulqa_mc2"),  # what was published is MC1
    ):
        rows = published(model, benchmark)
        assert rows.empty
        assert {"method", "edits", "score"} <= set(rows.columns)


def test_all_that_was_read_is_reachable():
    names = ("mmlu", "bbh", "gsm8k", "csqa", "truthfulqa", "toxigen")
    models = ["openai-community/gpt2-xl", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"]
    models += ["mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"]
    models += [f"EleutherAI/pythia-{size}" for size in ("160m", "410m", "1b", "2.8b", "6.9b", "12b")]
    count = sum(len(published(model, name)) for model in models for name in names)
    assert count == 930


def test_decline_is_the_share_of_the_unedited_score():
    table = decline([2], ["meta-llama/Llama-2-7b-hf"])
    assert table.loc[("Llama2-7B", "rome", 50), "MMLU"] == f"{0.2701 / 0.4587:.2f}"
    assert table.loc[("Llama2-7B", "grace", 20), "GSM8K"].endswith("*")  # likely a misprint
    assert set(table.columns) == {"MMLU", "GSM8K", "BBH", "CommonsenseQA"}
    assert set(decline([5]).columns) == {"TruthfulQA", "ToxiGen"}
    with pytest.raises(kedit.KeditError, match="table 9 does not exist"):
        decline([9])
    with pytest.raises(kedit.KeditError, match="published model"):
        decline([2], ["smollm2-135m-instruct"])


def test_shares_kept_are_those_of_every_model():
    curves = share_kept().set_index(["model", "method", "edits", "benchmark"]).kept
    assert curves["Mistral-7B", "rome", 50, "MMLU"] == pytest.approx(0.3864 / 0.6233)
    assert curves["Mistral-7B-Instruct", "rome", 50, "MMLU"] == pytest.approx(0.77, abs=0.005)
    assert curves["Llama2-7B", "pmet", 0, "mean"] == 1
    assert curves["Llama2-7B", "pmet", 1000, "mean"] > 0.92  # no later collapse
    assert curves["Llama2-7B", "memit", 1000, "mean"] == 0
    assert len({model for model, *_ in curves.index}) == 11
    assert ("Llama2-7B", "grace", 20, "mean") not in curves.index  # one of the four is doubtful


def test_base_and_tuned_agree_on_llama_only():
    found = twins_apart().set_index(["model", "method"])
    assert found.score["Llama2-7B"][["rome", "pmet"]].max() < 0.004
    assert found.score["Mistral-7B", "rome"] == pytest.approx(0.19, abs=0.005)
    assert found.kept["Mistral-7B", "memit"] > 0.4
