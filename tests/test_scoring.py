"""Shared readings against reading every text on its own."""

import pytest
import torch
from conftest import ARCHITECTURES

from kedit.model import scoring, tree
from kedit.model.scoring import common_prefix, loglikelihoods, read


def alone(lm, context, continuation):
    logits = lm.model(torch.tensor([[*context, *continuation[:-1]]])).logits[0, len(context) - 1 :].log_softmax(-1)
    said = sum(logits[j, t].item() for j, t in enumerate(continuation))
    return said, logits.argmax(-1).tolist() == list(continuation)


def texts(lm):
    """Contexts with a common beginning, of unequal length; continuations of one and more tokens."""
    shots = "The capital of Spain is London. The capital of "
    contexts = [[*lm.begin, *lm.encode(shots + end)] for end in ("France is", "Peru, it is said, is", "A is")]
    continuations = [lm.encode(text) for text in (" Rome", " Paris and London", " London")]
    return [(context, continuation) for context in contexts for continuation in continuations]


@pytest.mark.parametrize("pack", [384, 30])
def test_loglikelihoods_equal_one_forward_each(lm, pack, monkeypatch):
    monkeypatch.setattr(scoring, "PACK_TOKENS", pack)
    pairs = texts(lm)
    context = pairs[0][0]
    best = lm.model(torch.tensor([context])).logits[0, -1].argmax().item()
    pairs.append((context, [best]))
    found = loglikelihoods(lm, pairs)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        expected, says = alone(lm, context, continuation)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == says
    assert found[-1][1]


@pytest.mark.parametrize("rows", [16, 2])
def test_generation_equals_greedy_decoding(lm, rows, monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_TEXTS", rows)  # with 2, texts wait until others have finished
    prompts = list(dict.fromkeys(tuple(context) for context, _ in texts(lm)))
    stop = {1: 2, 2: 5}  # rows that end early must not disturb the others
    _, found = read(lm, [], prompts, 8, lambda row, tokens: len(tokens) == stop.get(row, 99))
    for row, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        ids = list(prompt)
        for _ in range(stop.get(row, 8)):
            ids.append(lm.model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert tokens == ids[len(prompt) :]


@pytest.mark.slow
def test_texts_that_repeat_themselves_take_fewer_forwards(smollm2, monkeypatch):
    """What transformers generates, of a list, a rhyme that leaves its pattern and one that must stop within a guess."""
    lm, forward, counts = smollm2, scoring.forward, []
    monkeypatch.setattr(scoring, "PACK_TOKENS", 24)  # wrong guesses are cleared away on the way
    monkeypatch.setattr(scoring, "forward", lambda *given: (counts.append(len(given[1])), forward(*given))[1])
    said = [
        "1, 2, 3, 4, 5, 6,",
        "One is red. Two is red. Three is blue. Four is",
        "Old Paris, new Paris, old Paris, new",
    ]
    prompts = [[*lm.begin, *lm.encode(text)] for text in said]
    _, found = read(lm, [], prompts, 32, lambda row, tokens: row == 2 and len(tokens) == 19)
    for row, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        plain = lm.model.generate(
            torch.tensor([prompt]), max_new_tokens=19 if row == 2 else 32, do_sample=False, eos_token_id=0
        )
        assert tokens == plain[0, len(prompt) :].tolist()
    assert len(counts) < 32


@pytest.mark.parametrize("wrong_from", [0, 1, 4, 8])
def test_guesses_change_nothing(lm, wrong_from):
    """Right, partly right, too long and wrong guesses: the same tokens as without."""
    prompts = list(dict.fromkeys(tuple(context) for context, _ in texts(lm)))
    stop = {1: 3}

    def finished(row, tokens):
        return len(tokens) == stop.get(row, 99)

    _, plain = read(lm, [], prompts, 8, finished)
    guesses = {}
    for prompt, tokens in zip(prompts, plain, strict=True):
        guesses[prompt] = [*tokens[:wrong_from], *((token + 1) % 700 for token in tokens[wrong_from:]), 5]
    scores, found = read(lm, texts(lm), prompts, 8, finished, guesses)
    assert found == plain
    assert guesses == dict(zip(prompts, plain, strict=True))
    for (total, greedy), expected in zip(scores, loglikelihoods(lm, texts(lm)), strict=True):
        assert total == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


def test_caches_that_share_a_buffer_do_not_disturb_each_other(lm, monkeypatch):
    """Two ways on from the same tokens, each further than the buffer's room: all as when read anew."""
    monkeypatch.setattr(tree, "SPARE", 4)
    ids = [*lm.begin, *lm.encode("The capital of Spain is London. The capital of France is Rome, it is said.")]

    def go_on(cache, more):
        start = cache.tokens.shape[1] if cache else 0
        return tree.forward(lm, tree.span(more, 0, tree.CONTEXT, start), cache)[1]

    with torch.inference_mode():
        begun = go_on(None, ids[:6])
        ways = [ids, [*ids[:6], *reversed(ids[6:])]]
        caches = [begun, begun]
        for index in range(6, len(ids)):
            caches = [go_on(cache, way[index : index + 1]) for cache, way in zip(caches, ways, strict=True)]
        for cache, way in zip([*caches, begun], [*ways, ids[:6]], strict=True):
            for layer, plain in zip(cache.layers, lm.model(torch.tensor([way])).past_key_values.layers, strict=True):
                torch.testing.assert_close(layer.keys, plain.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(layer.values, plain.values, atol=1e-4, rtol=1e-4)


def test_common_prefix_leaves_a_token():
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 4]]) == [1]
    assert common_prefix([[1, 2], [3]]) == []
    assert common_prefix([[1, 2], [1, 2]]) == [1]


def test_architectures_are_all_covered():
    assert set(ARCHITECTURES) == {"llama", "mistral", "gpt2", "gpt_neox"}
