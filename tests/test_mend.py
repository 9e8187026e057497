"""MEND: factors against dense gradients, low-rank against dense functional weights, accumulation, resumption."""

import random
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import REQUEST

from kedit import KeditError
from kedit.data.facts import bundled
from kedit.data.requests import EditRequest
from kedit.editors import kind_of, make_hparams, mend, training
from kedit.editors.mend import MEND, Hparams, HyperNetwork, UpperBlocks
from kedit.editors.protocol import committed
from kedit.editors.training import ScoredText
from kedit.model.anatomy import matrix
from kedit.model.journal import Edit, LowRank

HPARAMS = Hparams(layers=(2, 3), rank=8, steps=6, lr=1e-3, lr_lr=1e-4, accumulate=4, validate=2, edit_lr=1e-3)


@pytest.fixture(autouse=True)
def few_validations(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    splits = {split: bundled(split)[:24] for split in ("train", "validation")}
    monkeypatch.setattr(mend, "bundled", splits.get)


def drawn(lm, count=3):
    rng = random.Random(0)
    return [mend.draw(lm, bundled("train")[:50], rng) for _ in range(count)]


def ready(lm, hparams=HPARAMS):
    """A network that does something to every row, with moments."""
    upper = UpperBlocks(lm, hparams.layers)
    network = HyperNetwork(upper.modules, hparams)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "rates":
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    network(upper.factors([edit for edit, _, _ in drawn(lm, 8)])[0], observe=True)
    return upper, network


def dense(lm, weights, texts):
    """Log-probabilities of the scored tokens with whole functional weights, every block run, one text at a time."""
    logprobs = []
    for text in texts:
        output = torch.func.functional_call(lm.model, weights, (torch.tensor([text.ids]),), {"use_cache": False})
        logprobs.append(output.logits[0, text.start - 1 : -1].log_softmax(-1))
    return torch.cat(logprobs)


def stored(lm, module, tensor):
    """(out, in) as the module's own parameter stores it."""
    return tensor if matrix(module).shape == module.weight.shape and matrix(module).is_contiguous() else tensor.T


def weight_name(lm, module):
    return lm.anatomy.name(module) + ".weight"


def bits(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(lm, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def test_the_factors_are_the_dense_gradient(lm):
    lm.model.double()
    upper = UpperBlocks(lm, HPARAMS.layers)
    texts = [edit for edit, _, _ in drawn(lm)]
    factors, losses = upper.factors(texts)
    for row, text in enumerate(texts):
        weights = {weight_name(lm, m): m.weight.detach().clone().requires_grad_() for m in upper.modules}
        loss = mend.nll(dense(lm, weights, [text]), [text])
        assert losses[row].item() == pytest.approx(loss.item(), rel=1e-6)
        loss.backward()
        for module, (x, g) in zip(upper.modules, factors, strict=True):
            expected = stored(lm, module, weights[weight_name(lm, module)].grad)
            product = g[row].double().T @ x[row].double()  # logits and factors are float32
            assert (product - expected).norm() < 1e-5 * expected.norm()


def test_the_outer_gradient_is_that_of_dense_functional_weights(lm):
    lm.model.double()
    upper, network = ready(lm)
    edits, outers, untouched = zip(*drawn(lm), strict=True)
    watched = [network.rates, *(t.layers[0].u for t in network.transforms.values())]
    updates = network(upper.factors(edits)[0])
    after = upper.logprobs([*outers, *untouched], updates)
    before = upper.logprobs(untouched)
    asked, now = after.split([len(after) - len(before), len(before)])
    loss = (mend.nll(asked, outers) + mend.divergence(before, now, untouched)).sum()
    gradients = torch.autograd.grad(loss, watched, retain_graph=True)

    total = 0.0
    for row in range(len(edits)):
        weights = {}
        for module, (right, left) in zip(upper.modules, updates, strict=True):
            weights[weight_name(lm, module)] = module.weight + stored(lm, module, (left[row].T @ right[row]).double())
        outer, local = outers[row : row + 1], untouched[row : row + 1]
        total = total + mend.nll(dense(lm, weights, outer), outer).sum()
        total = total + mend.divergence(dense(lm, {}, local), dense(lm, weights, local), local).sum()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(total, watched), strict=True):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


def test_moments_are_those_of_the_rows_so_far_projection_by_projection(llama):
    """Against all rows kept in lists, and moments taken of the lists; before it a network that has seen eight texts."""
    upper, network = ready(llama)
    factors = upper.factors([edit for edit, _, _ in drawn(llama, 3)])[0]
    seen = {}
    for transform, _ in network.uses:  # rows with the moments there are
        width = len(transform.mean)
        deviations = torch.zeros(int(transform.count), width, dtype=torch.float64)
        deviations[0], deviations[1] = (transform.squares / 2).sqrt(), -(transform.squares / 2).sqrt()
        seen[transform] = [*(transform.mean + deviations)]
    expected = [[] for _ in factors]
    for text in range(3):
        for number, ((transform, index), (x, g)) in enumerate(zip(network.uses, factors, strict=True)):
            rows = torch.cat([x[text], g[text]], -1)[(g[text] != 0).any(-1)].double()
            seen[transform] += [*rows]
            every = torch.stack(seen[transform])
            z = ((rows - every.mean(0)) / (every.std(0) + 1e-7)).float()
            for layer in transform.layers:
                z = z + torch.clamp(
                    layer.scale[index] * (z @ (layer.u @ layer.v).T + layer.bias) + layer.shift[index], 0
                )
            right, left = z[:, : x.shape[-1]], z[:, x.shape[-1] :]
            expected[number].append(network.rates[number] * left.T @ right)
    updates = network(factors, observe=True)
    for (right, left), products in zip(updates, expected, strict=True):
        for product, theirs in zip(left.mT @ right, products, strict=True):
            assert (product - theirs).norm() < 1e-4 * theirs.norm()
    assert [int(t.count) for t, _ in network.uses] == [len(seen[t]) for t, _ in network.uses]


@pytest.mark.parametrize("accumulate", [True, False])
def test_edits_accumulate_unless_told_otherwise_and_replay_to_the_bit(lm, accumulate):
    editor = MEND(lm, replace(HPARAMS, accumulate_edits=accumulate))
    editor.network, editor._ready = ready(lm)[1], True
    states, saved, edits = [bits(lm)], [], []
    for subject in ("France", "Spain", "Peru"):
        edits.append(editor.apply(EditRequest("The capital of {} is", subject, "Rome", "Paris", id=subject)))
        saved.append(edits[-1].to_bytes())
        states.append(bits(lm))
    for module in UpperBlocks(lm, HPARAMS.layers).modules:
        counted = edits if accumulate else edits[-1:]
        changes = [
            c for e in counted for c in e.changes if isinstance(c, LowRank) and c.module == lm.anatomy.name(module)
        ]
        assert len(changes) == len(counted)
        expected = sum(stored(lm, module, c.left.double() @ c.right.double().T) for c in changes)
        start = states[0][weight_name(lm, module)].double()
        assert expected.norm() > 1e-3 * start.norm()
        torch.testing.assert_close(module.weight.double(), start + expected, rtol=1e-6, atol=1e-6)

    edits[-1].undo()
    assert same(lm, states[2])
    lm.journal.reset()
    assert same(lm, states[0])
    for data, state in zip(saved, states[1:], strict=True):
        lm.journal.replay(Edit.from_bytes(data))
        assert same(lm, state)


def test_the_first_edit_of_an_untrained_editor_descends(lm):
    editor = MEND(lm, replace(HPARAMS, edit_lr=1e-5))
    upper = UpperBlocks(lm, HPARAMS.layers)
    editor.network, editor._ready = HyperNetwork(upper.modules, editor.hparams), True
    editor.network(upper.factors([edit for edit, _, _ in drawn(lm, 8)])[0], observe=True)
    text = ScoredText.of(lm, REQUEST.text, REQUEST.target_new)
    edit = editor.apply(REQUEST)
    assert mend.nll(UpperBlocks(lm, HPARAMS.layers).logprobs([text]), [text]).item() < edit.info["loss"]


def test_training_killed_and_resumed_is_training_uninterrupted(llama, monkeypatch, tmp_path):
    whole = MEND.train(llama, HPARAMS)
    again = MEND.tensors(llama, HPARAMS)  # from the cache
    objective, calls = mend.objective, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return objective(*args)

    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "killed"))
    monkeypatch.setattr(mend, "objective", killed)
    with pytest.raises(KeyboardInterrupt):
        MEND.train(llama, HPARAMS)
    resumed = MEND.train(llama, HPARAMS)
    assert len(calls) == 4 + 4  # on from the checkpoint after step 2
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, resumed[name])


def test_training_lowers_the_loss_and_its_artefact_is_the_same_each_time(llama, monkeypatch, tmp_path):
    hparams = replace(HPARAMS, steps=25, validate=25, cedit=1.0, lr=1e-2)
    upper, rng = UpperBlocks(llama, hparams.layers), random.Random(1)
    some = [mend.draw(llama, mend.bundled("train"), rng) for _ in range(24)]
    network = HyperNetwork(upper.modules, hparams)
    before = mend.objective(upper, network, some, hparams).item()
    artefact, again = tmp_path / "artefact.tensors", tmp_path / "again.tensors"
    network.load_state_dict(MEND.train(llama, hparams, artefact=artefact))
    assert mend.objective(upper, network, some, hparams).item() < 0.9 * before

    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "empty"))
    MEND.train(llama, hparams, artefact=again)
    assert artefact.read_bytes() == again.read_bytes()
    monkeypatch.setattr(training, "committed", lambda method, model: artefact)
    monkeypatch.setattr(MEND, "train", lambda lm, hparams: "trained anew")
    shutil.rmtree(tmp_path / "empty")
    assert "rates" in MEND.tensors(llama, replace(hparams, accumulate_edits=False))
    assert MEND.tensors(llama, replace(hparams, lr=1.0)) == "trained anew"


def test_the_committed_artefacts_are_those_of_the_settings(smollm2):
    for name in ("mend", "serac"):
        kind = kind_of(name)
        _, identity = training.load(committed(name, smollm2.name), name)
        settings = kind.settings(make_hparams(kind, smollm2.name))
        assert identity == {"model": smollm2.fingerprint, "settings": settings}


def test_a_training_that_diverges_is_one_sentence(llama):
    with pytest.raises(KeditError, match=r"training MEND diverged; lower the rates in params/methods/mend\.yaml"):
        MEND.train(llama, replace(HPARAMS, lr=1e30, clip=1e30))
