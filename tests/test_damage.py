"""Damage against dense float64 derivations, and exactly none where nothing was edited."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import CONTEXTS, HPARAMS, REQUEST

import kedit
from kedit import KeditError
from kedit.data.corpus import sequences
from kedit.evaluation.damage import PROMPT, effective_rank, held_out, measure, singular_values
from kedit.model.anatomy import Anatomy, matrix
from kedit.model.journal import LowRank
from kedit.model.memory import Memory, Route
from kedit.model.scoring import loglikelihoods


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The arguments of ``measure`` for the tiny models."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    words = ["Rome", "Paris", "London", "the", "a", "city", "country", "capital", "is", "of", "in", "was", "by"]
    path.write_text(" ".join(rng.choice(words, 6000)))
    return {"text": str(path), "passages": 3, "skip": 0}


def by(items, kind):
    return [item for item in items if item["kind"] == kind]


def rank_one(lm, layer, seed=0):
    """Add a rank-one matrix to a down projection, through the journal; returns it as (out, in), float64."""
    generator = torch.Generator().manual_seed(seed)
    down = lm.anatomy.down(layer)
    left, right = (torch.randn(size, 1, generator=generator) for size in matrix(down).shape)
    with lm.journal.recording("test", "x") as edit:
        edit.write(LowRank(lm.anatomy.name(down), left, right))
    return (left.double() @ right.double().T).numpy()


def assert_whole(items):
    """No damage at all, to the bit."""
    for item in by(items, "layer"):
        assert item["cosine"] == item["l2"] == 0
    for item in by(items, "text"):
        assert (item["kl"], item["nll"], item["entropy"]) == (0, item["nll_unedited"], item["entropy_unedited"])


def test_weights_of_a_rank_one_edit(lm, text):
    before = matrix(lm.anatomy.down(1)).double().numpy().copy()
    change = rank_one(lm, 1)
    (item,) = by(measure(lm, **text), "weight")
    svd = lambda weight: np.linalg.svd(weight, compute_uv=False)  # noqa: E731
    was, now = svd(before), svd(before + change)
    assert item["id"] == lm.anatomy.name(lm.anatomy.down(1))
    assert item["relative"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(before), rel=1e-5)
    assert item["spectral"] == pytest.approx(now[0] / was[0], rel=1e-5)
    assert item["spectral_change"] == pytest.approx(svd(change)[0] / was[0], rel=1e-5)
    assert item["condition"] == pytest.approx(now[0] / now[-1] * was[-1] / was[0], rel=1e-4)
    assert item["effective_rank"] == pytest.approx(1, abs=1e-5)


def test_condition_numbers_of_a_matrix_blown_up():
    """Beyond what a Gram matrix resolves."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator)).Q for _ in range(2))
    values = torch.logspace(8, -2, 8, dtype=torch.float64)
    assert singular_values(left * values @ right).tolist() == pytest.approx(values.tolist(), rel=1e-4)


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(4)) == 0
    assert math.isnan(effective_rank(singular_values(torch.full((2, 3), math.inf))))


def test_states_and_answers_against_a_plain_forward(lm, text):
    """The same numbers from two whole models in float64, token by token."""
    old = copy.deepcopy(lm.model).double()
    rank_one(lm, 2)
    new = copy.deepcopy(lm.model).double()
    items = measure(lm, **text)
    passages = held_out(lm, **text)
    cosine, l2 = [], []
    for ids, item in zip(passages, by(items, "text"), strict=True):
        inputs = torch.tensor([ids])
        seen = [[], []]
        with torch.no_grad():
            for model, states in zip((old, new), seen, strict=True):
                handles = [
                    block.register_forward_hook(lambda _, __, out, states=states: states.append(out[0]))
                    for block in Anatomy(model).blocks
                ]
                p = model(inputs).logits[0].softmax(-1)
                states.append(p)
                for handle in handles:
                    handle.remove()
        p, q = seen[0].pop(), seen[1].pop()
        nll, entropy, kl = 0.0, 0.0, 0.0
        for place in range(PROMPT, len(ids)):
            nll -= math.log(q[place - 1, ids[place]])
            entropy -= sum(x * math.log(x) for x in q[place - 1].tolist() if x > 0)
            kl += sum(
                x * math.log(x / y) for x, y in zip(p[place - 1].tolist(), q[place - 1].tolist(), strict=True) if x
            )
        count = len(ids) - PROMPT
        assert item["tokens"] == count
        found = (item["nll"], item["entropy"], item["kl"])
        assert found == pytest.approx((nll / count, entropy / count, kl / count), rel=1e-3, abs=1e-4)
        for a, b in zip(*seen, strict=True):
            a, b = a[1:], b[1:]  # without the begin token
            cosine.append((1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean())
            l2.append(((a - b).norm(dim=-1) / a.norm(dim=-1)).mean())
    layers = by(items, "layer")
    assert [i["cosine"] for i in layers] == pytest.approx(torch.stack(cosine).view(3, -1).mean(0).tolist(), abs=1e-5)
    assert [i["l2"] for i in layers] == pytest.approx(torch.stack(l2).view(3, -1).mean(0).tolist(), abs=1e-4)
    assert layers[0]["l2"] == layers[1]["l2"] == 0 < layers[2]["l2"]  # below the edit nothing moves


def test_no_edit_is_no_damage_to_the_bit(lm, text):
    assert_whole(items := measure(lm, **text))
    assert not by(items, "weight")
    kedit.editor("control", lm).apply(REQUEST)
    assert measure(lm, **text) == items
    rank_one(lm, 2)
    weight = lm.anatomy.down(2).weight.clone()
    damaged = measure(lm, **text)
    assert damaged == measure(lm, **text) != items
    assert torch.equal(lm.anatomy.down(2).weight, weight)  # measuring leaves the edited model as it was
    lm.journal.edits[-1].undo()
    assert measure(lm, **text) == items


def test_every_matrix_an_editor_wrote_is_measured(llama, statistics, text):
    editor = kedit.editor("memit", llama, hparams=HPARAMS["memit"], statistics=statistics(llama), contexts=CONTEXTS)
    edit = editor.apply(REQUEST)
    items = by(measure(llama, **text), "weight")
    assert [item["id"] for item in items] == [llama.anatomy.name(llama.anatomy.down(layer)) for layer in (1, 2)]
    assert all(item["relative"] > 0 for item in items)
    edit.undo()
    assert not by(measure(llama, **text), "weight")


def test_a_memory_out_of_scope_does_no_damage(lm, text):
    kedit.editor("grace", lm, hparams=HPARAMS["grace"]).apply(REQUEST)
    assert lm.memories["grace"].entries
    items = measure(lm, **text)
    assert not by(items, "weight")
    assert_whole(items)


def test_a_memory_in_scope_is_read_as_scoring_reads_it(llama, text):
    """One passage goes to another text, one to a mixture with it, one stays: likelihoods as kedit's reading has them."""
    passages = held_out(llama, **text)
    prompts = [tuple(ids[:PROMPT]) for ids in passages]
    other = (*llama.begin, *llama.encode(" Rome is in London."), *prompts[0][1:])
    taken = {prompts[0]: Route(llama, other), prompts[1]: Route(llama, other, 0.3)}

    class Diverting(Memory):
        def routes(self, asked):
            return [taken.get(prompt) for prompt in asked]

    llama.journal.attach("diverting", memory := Diverting())
    memory.add({})
    items = measure(llama, **text)
    said = loglikelihoods(llama, [(ids[:PROMPT], ids[PROMPT:]) for ids in passages])
    found = by(items, "text")
    assert [-item["nll"] * item["tokens"] for item in found] == pytest.approx([total for total, _ in said], rel=1e-4)
    assert [item["routed"] for item in found] == [True, True, False]
    assert found[0]["kl"] > found[1]["kl"] > found[2]["kl"] == 0
    assert not by(items, "weight")
    assert all(item["l2"] == 0 for item in by(items, "layer"))  # the model's own states are left alone


def test_a_codebook_in_scope_damages_the_states_above_it(lm, text):
    """GRACE writes into the model's states at one prompt's end; the weights stay whole, and so do other prompts."""
    from kedit.editors.grace import Codebook
    from kedit.model.forward import LookupText, activations

    prompt = tuple(held_out(lm, **text)[1][:PROMPT])
    key = activations(lm, [LookupText(prompt, PROMPT - 1)], [2], "key")[2][0]
    lm.journal.attach("grace", book := Codebook(lm, 2))
    book.add(
        {"place": 0, "key": key, "epsilon": 1e-3 * key.norm().item(), "label": [1], "value": torch.full((32,), 9.0)}
    )
    items = measure(lm, **text)
    assert not by(items, "weight")
    assert [item["l2"] > 0 for item in by(items, "layer")] == [False, False, True, True]
    assert [item["kl"] > 0 for item in by(items, "text")] == [False, True, False]


def test_passages_are_not_those_of_the_second_moments(llama, text):
    used = {tuple(ids[:64]) for ids in sequences(llama, text["text"], 2048)}
    passages = {tuple(ids) for ids in held_out(llama, text["text"], 2048, 3)}
    assert len(passages) == 3
    assert not used & passages
    with pytest.raises(KeditError, match="fewer than"):
        held_out(llama, text["text"], 2048, 300)
