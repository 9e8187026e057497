"""Each editor against a dense derivation in float64, on all four architectures."""

import pytest
import torch
from conftest import CONTEXTS, HPARAMS, REQUEST

import kedit
from kedit import EditRequest, KeditError
from kedit.journal import Edit, EditFailed
from kedit.keys import activations, row, rows
from kedit.models import matrix
from kedit.values import search


def probability(lm, request):
    ids = [*lm.begin, *lm.encode(request.text)]
    target = lm.encode(" " + request.target_new.strip())
    logprobs = lm.model(torch.tensor([[*ids, *target[:-1]]])).logits[0].log_softmax(-1)
    return sum(logprobs[len(ids) - 1 + j, t] for j, t in enumerate(target)).exp().item()


def says_target(lm):
    """Whether the target is the likeliest of all next tokens."""
    logits = lm.model(torch.tensor([[*lm.begin, *lm.encode(REQUEST.text)]])).logits[0, -1]
    return [logits.argmax().item()] == lm.encode(" Rome")


def bits(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(lm, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_the_same_edit_reaches_its_target_everywhere(lm, statistics, method):
    editor = kedit.editor(method, lm, hparams=HPARAMS[method], statistics=statistics(lm), contexts=CONTEXTS)
    before = bits(lm)
    start = probability(lm, REQUEST)
    assert not says_target(lm)
    edit = editor.apply(REQUEST)
    assert says_target(lm)
    assert probability(lm, REQUEST) > 20 * start
    changed = {name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, before[name])}
    layers = [HPARAMS["rome"]["layer"]] if method == "rome" else HPARAMS["memit"]["layers"]
    assert changed == {lm.anatomy.name(lm.anatomy.down(layer)) + ".weight" for layer in layers}
    edit.undo()
    assert same(lm, before)


def test_rome_is_the_closed_form(lm, statistics, moments):
    """W' k = v* exactly, and the update is (v* - W k) (C^-1 kbar)^T / (k . C^-1 kbar) (ROME eq. 2)."""
    editor = kedit.editor("rome", lm, hparams=HPARAMS["rome"], statistics=statistics(lm), contexts=CONTEXTS)
    texts = rows(lm, REQUEST, CONTEXTS)
    down = lm.anatomy.down(2)
    old = matrix(down).double().clone()
    keys = activations(lm, texts, [2], "key")[2].double()
    output = activations(lm, texts[:1], [2], "value")[2][0]
    target = lm.encode(" Rome")
    delta = search(lm, texts, row(lm, "{} is a", "France"), target, output, editor.hparams.search).delta.double()
    turned = torch.linalg.inv(moments[2].double()) @ keys.mean(0)
    expected = torch.outer(delta, turned) / (keys[0] @ turned)

    edit = editor.apply(REQUEST)
    update = matrix(down).double() - old
    assert (update - expected).norm() < 1e-5 * expected.norm()
    after = activations(lm, texts[:1], [2], "value")[2][0].double()
    assert (after - (output.double() + delta)).norm() < 1e-4 * (output.double() + delta).norm()
    own = torch.linalg.inv(moments[2].double()) @ keys[0]
    ratio = (own @ keys[0] / own.norm()) / (turned @ keys[0] / turned.norm())
    assert edit.info["amplification"] == pytest.approx(ratio.item(), rel=1e-6)


def test_memit_is_the_normal_equations(lm, statistics, moments):
    """Layer by layer, Delta = R K^T (lambda C + K K^T)^-1 with R an equal share of what is left."""
    hparams = HPARAMS["memit"]
    editor = kedit.editor("memit", lm, hparams=hparams, statistics=statistics(lm), contexts=CONTEXTS)
    texts = rows(lm, REQUEST, CONTEXTS)
    layers, last = hparams["layers"], hparams["layers"][-1]
    start = activations(lm, texts[:1], [last], "block")[last][0].double()
    found = search(lm, texts, row(lm, "{} is a", "France"), lm.encode(" Rome"), start, editor.hparams.search)
    goal = start + found.delta.double()
    olds = {layer: matrix(lm.anatomy.down(layer)).double().clone() for layer in layers}
    expected = {}
    for position, layer in enumerate(layers):
        keys = activations(lm, texts, [layer], "key")[layer].double()
        key = (keys[0] + keys[1:].mean(0)) / 2
        left = goal - activations(lm, texts[:1], [last], "block")[last][0].double()
        system = hparams["weight"] * moments[layer].double() + torch.outer(key, key)
        expected[layer] = torch.outer(left / (len(layers) - position), torch.linalg.solve(system, key))
        matrix(lm.anatomy.down(layer)).copy_(olds[layer] + expected[layer])
    for layer in layers:
        matrix(lm.anatomy.down(layer)).copy_(olds[layer])

    editor.apply(REQUEST)
    for layer in layers:
        update = matrix(lm.anatomy.down(layer)).double() - olds[layer]
        assert (update - expected[layer]).norm() < 1e-4 * expected[layer].norm()


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_sequential_edits_replay_and_undo_to_the_bit(lm, statistics, method):
    editor = kedit.editor(method, lm, hparams=HPARAMS[method], statistics=statistics(lm), contexts=CONTEXTS)
    states, saved = [bits(lm)], []
    for subject in ("France", "Spain", "Peru"):
        saved.append(editor.apply(EditRequest("The capital of {} is", subject, "Rome", "Paris", id=subject)).to_bytes())
        states.append(bits(lm))
    with pytest.raises(ValueError, match="last edit"):
        lm.journal.edits[0].undo()
    lm.journal.edits[-1].undo()
    assert same(lm, states[2])
    lm.journal.reset()
    assert same(lm, states[0])
    for data, state in zip(saved, states[1:], strict=True):
        lm.journal.replay(Edit.from_bytes(data))
        assert same(lm, state)
    assert [edit.request for edit in lm.journal.edits] == ["France", "Spain", "Peru"]
    assert max(map(len, saved)) < 20_000  # vectors, not matrices


def test_the_control_changes_nothing_and_is_journalled(llama):
    before = bits(llama)
    edit = kedit.editor("control", llama).apply(REQUEST)
    assert same(llama, before)
    assert llama.journal.edits == [edit]
    edit.undo()
    assert not llama.journal.edits


def test_a_failed_edit_leaves_the_model_as_it_was(llama, statistics, monkeypatch):
    editor = kedit.editor("memit", llama, hparams=HPARAMS["memit"], statistics=statistics(llama), contexts=CONTEXTS)
    editor.prepare()
    before, calls = bits(llama), []

    def second_layer_fails(layer, keys):
        calls.append(layer)
        return type(editor)._gain(editor, layer, keys) * (float("nan") if len(calls) > 1 else 1)

    monkeypatch.setattr(editor, "_gain", second_layer_fails)
    with pytest.raises(EditFailed, match="not finite"):
        editor.apply(REQUEST)
    assert len(calls) == 2
    assert same(llama, before)
    assert not llama.journal.edits


@pytest.mark.parametrize(
    ("name", "hparams", "sentence"),
    [
        ("roem", None, "does not exist; use one of"),
        ("rome", None, "no block for model 'llama'"),
        ("rome", {"layer": 1, "clmap": 2}, "did you mean 'clamp'"),
        ("rome", {"clamp": 2.0}, "layer"),
    ],
)
def test_wrong_names_and_keys_are_one_sentence(llama, name, hparams, sentence):
    with pytest.raises(KeditError, match=sentence):
        kedit.editor(name, llama, hparams=hparams)


def test_a_subject_at_the_start_is_not_amplified(smollm2):
    """Without a begin token this edit's update is several times too large (methods of Fall of ROME)."""
    editor = kedit.editor("rome", smollm2, hparams={"steps": 2, "contexts": [[5, 2]]})
    with_begin = editor.apply(EditRequest("{} is in the continent of", "Egypt", "Asia", "Africa"))
    with_begin.undo()
    bare = type(smollm2)(smollm2.model, smollm2.tokenizer, smollm2.name, begin=False)
    editor = kedit.editor("rome", bare, hparams={"steps": 2}, statistics=editor.statistics, contexts=editor.contexts)
    without = editor.apply(EditRequest("{} is in the continent of", "Egypt", "Asia", "Africa"))
    without.undo()
    assert with_begin.info["amplification"] < 2 < without.info["amplification"]
