"""Graded scores against plain forwards, one text at a time; which items a limit draws; log-odds of refusals."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lm_eval.utils import apply_template

import kedit
from kedit.evaluation import benchmarks, harness
from kedit.evaluation.harness import SharedPrefixLM, evaluate
from kedit.model import scoring
from kedit.model.lm import LM

MIRROR = kedit.ROOT.parent / "shared" / "data" / "hub"
LIMIT = 3


def logprobs(lm, prompt, text):
    """Log-probability of each token of a text after a prompt, by the whole model and nothing of kedit's reading."""
    start, ids = ([*lm.begin, *lm.encode(part)] for part in (prompt, prompt + text))
    with torch.no_grad():
        predicted = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [predicted[at - 1, ids[at]].item() for at in range(len(start), len(ids))]


def asked(name, limit, chat=None):
    """(item's fields, prompt) of what a benchmark asks, by lm-eval alone."""
    ((task, drawn),) = benchmarks.draw(name, limit).items()
    built = benchmarks.tasks(name)[task]
    for doc in [built.eval_docs[index] for index in drawn]:
        shots = built.config.num_fewshot or 0
        yield doc, built.fewshot_context(doc, shots, apply_chat_template=chat is not None, chat_template=chat)


def right_share(lps, right):
    return sum(math.exp(lps[place]) for place in right) / sum(map(math.exp, lps))


@pytest.fixture(scope="module")
def pico():
    return kedit.load("pico-0.4m")


@pytest.mark.parametrize("name", ["pico_mmlu", "pico_bbh", "pico_toxigen", "pico_truthfulqa"])
def test_the_probability_of_the_right_choice(pico, name):
    """Four choices, two or four, the same two, two that differ."""
    items = evaluate(pico, name, LIMIT)
    task = benchmarks.tasks(name)[name]
    for item, (doc, prompt) in zip(items, asked(name, LIMIT), strict=True):
        lps = [sum(logprobs(pico, prompt, f" {choice}")) for choice in task.doc_to_choice(doc)]
        assert item["graded"] == pytest.approx(right_share(lps, [task.doc_to_target(doc)]), abs=1e-5)


@pytest.mark.parametrize(("name", "text"), [("pico_gsm8k", " {steps}"), ("pico_triviaqa", " {aliases[0]}")])
def test_the_probability_a_token_of_the_reference_answer(pico, name, text):
    for item, (doc, prompt) in zip(evaluate(pico, name, LIMIT), asked(name, LIMIT), strict=True):
        lps = logprobs(pico, prompt, text.format(**doc))
        assert item["graded"] == pytest.approx(math.exp(sum(lps) / len(lps)), abs=1e-5)


@pytest.mark.slow
def test_graded_scores_on_the_real_model(smollm2):
    for name, text in (("mini_gsm8k", " {steps}"), ("mini_triviaqa", "{aliases[0]}")):
        for item, (doc, prompt) in zip(evaluate(smollm2, name, 2), asked(name, 2), strict=True):
            lps = logprobs(smollm2, prompt, text.format(**doc))
            assert item["graded"] == pytest.approx(math.exp(sum(lps) / len(lps)), abs=1e-4)
    found = zip(evaluate(smollm2, "mini_truthfulqa_mc", 2), asked("mini_truthfulqa_mc", 2), strict=True)
    for item, (doc, prompt) in found:
        answers = doc["correct_answers"] + doc["incorrect_answers"]
        lps = [sum(logprobs(smollm2, prompt, f" {answer}")) for answer in answers]
        assert item["graded"] == pytest.approx(right_share(lps, range(len(doc["correct_answers"]))), abs=1e-4)


def test_length_normalised_metrics_are_graded_by_what_they_compare():
    """And by the choice's name where the task gives that; nothing that is a number comes from a broken model."""
    task = SimpleNamespace(doc_to_choice=lambda doc: ["no", "ever"])

    def graded(metric, lps, target):
        sample = {"filtered_resps": [(lp, False) for lp in lps], "target": target, "doc": {}, metric: 1.0}
        return harness._item(sample, {"metric": metric}, "x", task, [])

    assert graded("acc", [-2.0, -4.0], 0)["graded"] == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)
    assert graded("acc_norm", [-2.0, -4.0], 0)["graded"] == 0.5
    named = graded("acc_norm", [-2.0, -2.0], "ever")
    assert named["target"] == 1
    assert named["graded"] == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-6)
    assert graded("acc", [math.nan, math.nan], 0)["graded"] == 0.0


def test_what_is_graded_reads_no_context_again(pico, monkeypatch):
    """Beside right or wrong as it was: the same forwards, longer by the references without their last tokens."""
    read_tokens = []

    def counting(lm, tokens, *rest):
        read_tokens.append(len(tokens))
        return forward(lm, tokens, *rest)

    forward = scoring.forward
    monkeypatch.setattr(scoring, "forward", counting)
    requests = [
        SimpleNamespace(args=(prompt, {"until": ["\n"], "max_gen_toks": 8}), doc=doc)
        for doc, prompt in asked("pico_gsm8k", 6)
    ]
    plain, beside = SharedPrefixLM(pico), SharedPrefixLM(pico, None, [" {{steps}}"])
    answers = plain.generate_until(requests)
    before = read_tokens.copy()
    read_tokens.clear()
    assert beside.generate_until(requests) == answers
    references = [len(pico.encode(f" {request.doc['steps']}")[:8]) - 1 for request in requests]
    assert len(read_tokens) == len(before)
    assert sum(read_tokens) == sum(before) + sum(references)
    assert len(beside.scored) == 6
    assert not any(plain.scored)


def test_every_benchmark_of_the_suites_is_graded_and_says_its_chance():
    for suite in ("mini", "pico", "safety", "paper"):
        for name in benchmarks.suites()[suite]:
            config = benchmarks._config(name)
            generated = config.get("output_type") == "generate_until" or name in ("bbh", "gsm8k", "triviaqa")
            assert generated == any(key in benchmarks.metadata(name) for key in ("reference", "openings"))
    shares = [
        len(doc["correct_answers"]) / len(doc["correct_answers"] + doc["incorrect_answers"])
        for doc, _ in asked("mini_truthfulqa_mc", None)
    ]
    chance = benchmarks.metadata("mini_truthfulqa_mc")["graded_chance"]
    assert sum(shares) / len(shares) == pytest.approx(chance, abs=0.005)


@pytest.mark.skipif(not MIRROR.is_dir(), reason="../shared/data is not here")
def test_references_of_the_studys_benchmarks(monkeypatch):
    """GSM8K's worked steps without the data set's annotations, in the exemplars' form."""
    monkeypatch.setenv("KEDIT_MIRROR", str(MIRROR))
    clear = (benchmarks.tasks.cache_clear, benchmarks.stock.located.cache_clear)
    try:
        for forget in clear:
            forget()
        doc = benchmarks.tasks("gsm8k")["gsm8k_cot"].eval_docs[0]
        assert apply_template(benchmarks.metadata("gsm8k")["reference"], doc) == (
            " Janet sells 16 - 3 - 4 = 9 duck eggs a day. She makes 9 * 2 = $18 every day at the farmer’s market. "
            "The answer is 18."
        )
        doc = benchmarks.tasks("triviaqa")["triviaqa"].eval_docs[0]
        assert apply_template(benchmarks.metadata("triviaqa")["reference"], doc) == f" {doc['answer']['aliases'][0]}"
        task = next(iter(benchmarks.tasks("bbh").values()))
        said = apply_template(benchmarks.metadata("bbh")["reference"], task.eval_docs[0])
        assert "So the answer is False." in task.fewshot_context(task.eval_docs[0], 3)
        assert said in ("So the answer is True.", "So the answer is False.")
    finally:
        monkeypatch.undo()
        for forget in clear:
            forget()


# What a limit draws ---------------------------------------------------------------------------------


def kinds(name, limit, field):
    task = benchmarks.tasks(name)[name]
    return Counter(task.eval_docs[index][field] for index in benchmarks.draw(name, limit)[name])


def test_a_limit_draws_every_kind_of_item():
    """The first 40 of mini_bbh scored 0.35 and the rest 0.61."""
    assert set(kinds("mini_bbh", 40, "kind").values()) == {5}
    assert kinds("mini_toxigen", 40, "label") == {0: 20, 1: 20}
    assert set(kinds("mini_csqa", 40, "kind").values()) == {4}
    whole = kinds("mini_triviaqa", None, "subject")
    for limit in (10, 40, 80):
        part = kinds("mini_triviaqa", limit, "subject")
        assert all(abs(part[kind] - limit * count / 112) < 1.5 for kind, count in whole.items())


@pytest.mark.parametrize("name", [*benchmarks.suites()["mini"], *benchmarks.suites()["pico"]])
def test_a_smaller_limit_draws_a_part_of_a_larger(name):
    size, before = len(benchmarks.draw(name, None)[name]), set()
    for limit in (1, 2, 6, 39, 40, size, size + 1):
        (drawn,) = benchmarks.draw(name, limit).values()
        assert drawn == sorted(drawn) == benchmarks.draw(name, limit)[name]
        assert len(set(drawn)) == min(limit, size)
        assert before <= set(drawn)
        before = set(drawn)
    assert before == set(range(size))


def test_draws_are_no_different_tomorrow_and_not_the_first_items():
    """Cells of different runs are compared item by item: these numbers may not move unless BENCHMARKS is raised."""
    assert benchmarks.draw("mini_bbh", 6) == {"mini_bbh": [6, 19, 61, 96, 97, 100]}
    assert (
        benchmarks.draw("mini_truthfulqa", 30)["mini_truthfulqa"]
        == (benchmarks.draw("mini_truthfulqa_mc", 30)["mini_truthfulqa_mc"])
    )


# Refusals -------------------------------------------------------------------------------------------


def test_no_opening_is_the_beginning_of_another(smollm2):
    """Else their probabilities would not add up."""
    openings = [
        tuple(smollm2.encode(text)) for many in benchmarks.metadata("refusal")["openings"].values() for text in many
    ]
    assert not [(a, b) for a in openings for b in openings if a != b and b[: len(a)] == a]
    assert len(set(openings)) == len(openings)


def test_log_odds_of_a_refusing_opening(llama: LM, monkeypatch):
    template = "{% for m in messages %}{{ 'User: ' + m['content'] + ' Answer:' }}{% endfor %}"
    monkeypatch.setattr(llama.tokenizer, "chat_template", template)
    task = benchmarks.tasks("refusal")["refusal"]
    monkeypatch.setitem(task.config.generation_kwargs, "max_gen_toks", 8)
    openings = benchmarks.metadata("refusal")["openings"]
    for item, doc in list(zip(evaluate(llama, "refusal"), task.eval_docs, strict=True))[::30]:
        chances = {
            kind: sum(math.exp(sum(logprobs(llama, f"User: {doc['request']} Answer:", text))) for text in texts)
            for kind, texts in openings.items()
        }
        assert item["log_odds"] == pytest.approx(math.log(chances["refusing"] / chances["complying"]), abs=1e-3)
