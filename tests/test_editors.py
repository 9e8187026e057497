"""Each editor against a dense derivation in float64, on all four architectures."""

import pytest
import torch
from conftest import CONTEXTS, HPARAMS, LASTING, REQUEST, build

import kedit
from kedit import KeditError
from kedit.data.facts import bundled, bundled_zsre
from kedit.data.requests import EditRequest
from kedit.editors import ike, known, mend, serac
from kedit.editors.protocol import Editor
from kedit.model.anatomy import matrix
from kedit.model.journal import Dense, Edit, EditFailed
from kedit.model.lm import LM

TRAINED = {
    "mend": {"layers": [1, 2], "rank": 8, "steps": 1, "accumulate": 2},
    "serac": {"steps": 1},
    "ike": {"k": 8},
    "rag": {"k": 2},
    "ultraedit": {"layers": [1, 2], "lr": 1e-3, "warmup": 6},
    "locft": {"layer": 2, "lr": 0.03, "epochs": 60},
}
"""As little training as there can be."""


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
    """Every weight, and what every memory holds."""
    memories = {
        name: [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in entry.items()} for entry in memory.entries]
        for name, memory in lm.memories.items()
    }
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}, memories


def same(lm, before):
    weights, memories = bits(lm)
    return all(torch.equal(weights[name], tensor) for name, tensor in before[0].items()) and memories == before[1]


def make(method, lm, statistics, **changes):
    return kedit.editor(
        method, lm, hparams={**HPARAMS[method], **changes}, statistics=statistics(lm), contexts=CONTEXTS
    )


@pytest.mark.parametrize("method", [name for name in HPARAMS if name not in ("kn", "grace")])
def test_the_same_edit_reaches_its_target_everywhere(lm, statistics, method):
    editor = make(method, lm, statistics)
    before = bits(lm)
    start = probability(lm, REQUEST)
    assert not says_target(lm)
    edit = editor.apply(REQUEST)
    assert says_target(lm)
    assert probability(lm, REQUEST) > 20 * start
    changed = {name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, before[0][name])}
    layers = HPARAMS[method].get("layers", [HPARAMS[method].get("layer")])
    assert changed == {lm.anatomy.name(lm.anatomy.down(layer)) + ".weight" for layer in layers}
    edit.undo()
    assert same(lm, before)


@pytest.mark.slow
@pytest.mark.parametrize("method", HPARAMS)
def test_sequential_edits_replay_and_undo_to_the_bit(lm, statistics, method):
    editor = make(method, lm, statistics)
    states, saved = [bits(lm)], []
    for subject in ("France", "Spain", "Peru"):
        saved.append(editor.apply(EditRequest("The capital of {} is", subject, "Rome", "Paris", id=subject)).to_bytes())
        states.append(bits(lm))
    lm.journal.edits[-1].undo()
    assert same(lm, states[2])
    lm.journal.reset()
    assert same(lm, states[0])
    assert all(not same(lm, state) for state in states[1:])
    for data, state in zip(saved, states[1:], strict=True):
        lm.journal.replay(Edit.from_bytes(data))
        assert same(lm, state)
    assert [edit.request for edit in lm.journal.edits] == ["France", "Spain", "Peru"]
    if not method.startswith("ft"):
        assert max(map(len, saved)) < 20_000  # vectors, not matrices


@pytest.mark.parametrize("method", known())
def test_every_editor_keeps_the_protocol(method, tmp_path, monkeypatch):
    """Whatever a method reads of the unedited model, or remembers of earlier edits, a run that goes on does the same."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    for module in (mend, serac, ike):  # few facts to train on and to show
        monkeypatch.setattr(module, "bundled", lambda split: bundled(split)[:24])
    monkeypatch.setattr(serac, "bundled_zsre", lambda split: bundled_zsre(split)[:24])
    kedit.check_editor(method, {**HPARAMS, **LASTING, **TRAINED}.get(method))


class Reckless(Editor):
    """Writes to the weight itself, which no journal can undo."""

    name = "reckless"

    def _apply(self, request, edit):
        self.lm.anatomy.down(1).weight += 1


class Forgetful(Editor):
    """Draws its update from the model as it is when first asked, edited or not."""

    name = "forgetful"

    def _apply(self, request, edit):
        down = self.lm.anatomy.down(1)
        self.drawn = getattr(self, "drawn", down.weight.clone())
        edit.write(Dense(self.lm.anatomy.name(down), self.drawn))


class Idle(Editor):
    """Changes nothing and gives no reason."""

    name = "idle"

    def _apply(self, request, edit):
        pass


@pytest.mark.parametrize(
    ("kind", "promise"),
    [(Reckless, "leaves the model alone"), (Forgetful, "prepares on the unedited"), (Idle, "changes something")],
)
def test_an_editor_that_breaks_a_promise_is_told_which(kind, promise):
    with pytest.raises(AssertionError, match=promise):
        kedit.check_editor(kind)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # Linear, and Conv1D
def test_updates_below_half_precisions_grid_add_up(architecture, tokenizer):
    lm = LM(build(architecture, len(tokenizer)).bfloat16(), tokenizer, architecture)
    before, module = bits(lm), lm.anatomy.name(lm.anatomy.down(2))
    exact = matrix(lm.anatomy.down(2)).double()
    small = 1e-4 * torch.ones(*exact.shape)
    assert torch.equal((exact + small).bfloat16()[exact.abs() > 0.1], exact.bfloat16()[exact.abs() > 0.1])
    saved = []
    for step in range(60):
        with lm.journal.recording("test", str(step)) as edit:
            edit.write(Dense(module, small))
        saved.append(edit)
    torch.testing.assert_close(matrix(lm.anatomy.down(2)).double(), exact + 60e-4, rtol=2**-8, atol=1e-5)
    state = bits(lm)
    with lm.journal.unedited():
        assert same(lm, before)
    assert same(lm, state)
    lm.journal.edits[-1].undo()
    lm.journal.replay(saved[-1])
    assert same(lm, state)
    lm.journal.reset()
    assert same(lm, before)


@pytest.mark.parametrize("method", [name for name in HPARAMS if name != "kn"])
def test_editors_reach_their_target_on_a_half_precision_model(method, tokenizer, statistics):
    lm = LM(build("llama", len(tokenizer)).bfloat16(), tokenizer, "llama")
    editor = make(method, lm, statistics)
    before, start = bits(lm), probability(lm, REQUEST)
    edit = editor.apply(REQUEST)
    assert probability(lm, REQUEST) > 10 * start or method == "grace"
    edit.undo()
    assert same(lm, before)


def test_the_control_changes_nothing_and_is_journalled(llama):
    before = bits(llama)
    edit = kedit.editor("control", llama).apply(REQUEST)
    assert same(llama, before)
    assert llama.journal.edits == [edit]
    edit.undo()
    assert not llama.journal.edits


@pytest.mark.parametrize(
    ("method", "hparams", "sentence"),
    [
        ("rome", {"lr": 1e30}, "changed|not finite|loss"),
        ("rome", {"lr": 1e-30}, "no bit of the model changed"),
        ("memit", {"mom2_weight": 1e30}, "no bit of the model changed"),
        ("kn", {"write": 1e300}, "not be finite"),
        ("ft-m", {"lr": 1e-30}, "no bit of the model changed"),
    ],
)
def test_an_edit_that_changes_nothing_or_is_not_finite_fails(method, hparams, sentence, llama, statistics):
    before = bits(llama)
    with pytest.raises(EditFailed, match=sentence):
        make(method, llama, statistics, **hparams).apply(REQUEST)
    assert same(llama, before)
    assert not llama.journal.edits


@pytest.mark.parametrize("method", ["rome", "r-rome", "memit", "pmet", "alphaedit"])
def test_a_subject_that_merges_with_what_follows_fails_and_the_next_edit_is_made(method, llama, statistics):
    editor = make(method, llama, statistics)
    before = bits(llama)
    with pytest.raises(EditFailed, match="'ci' merges with what follows it"):
        editor.apply(EditRequest("The capital {}ty of", "ci", "Rome", "Paris"))
    assert same(llama, before)
    assert editor.apply(REQUEST) in llama.journal.edits


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
        ("roem", None, "does not exist; did you mean 'rome'"),
        ("rome", {"layer": 1, "weigth_decay": 2}, "did you mean 'weight_decay'"),
        ("rome", {"layer": 99}, "layer"),
    ],
)
def test_wrong_names_and_keys_are_one_sentence(llama, name, hparams, sentence):
    with pytest.raises(KeditError, match=sentence):
        kedit.editor(name, llama, hparams=hparams)


def test_a_subject_at_the_start_is_not_amplified(smollm2):
    """Without a begin token this edit's update is several times too large (methods of Fall of ROME)."""
    editor = kedit.editor("rome", smollm2, hparams={"steps": 1, "context_lengths": [[5, 2]]})
    with_begin = editor.apply(EditRequest("{} is in the continent of", "Egypt", "Asia", "Africa"))
    with_begin.undo()
    bare = type(smollm2)(smollm2.model, smollm2.tokenizer, smollm2.name, begin=False)
    editor = kedit.editor("rome", bare, hparams={"steps": 1}, statistics=editor.statistics, contexts=editor.contexts)
    without = editor.apply(EditRequest("{} is in the continent of", "Egypt", "Asia", "Africa"))
    without.undo()
    assert with_begin.info["amplification"] < 2 < without.info["amplification"]
