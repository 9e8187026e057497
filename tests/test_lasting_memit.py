"""Edits that last, by locating: history, ridge and early stopping on MEMIT and AlphaEdit; ENCORE, NAS, PRUNE."""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace

import plain
import pytest
import torch
from conftest import CONTEXTS, HPARAMS, INNER, REQUEST
from test_editors import bits, make, same

import kedit
from kedit import KeditError
from kedit.analysis import tables
from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.editors import kind_of, make_hparams, nas, prune
from kedit.editors.bounds import LATER, stated
from kedit.editors.history import KeyMemory
from kedit.editors.second_moments import SecondMoments
from kedit.editors.value_search import Objective, search
from kedit.model.forward import activations, lookup_text, lookup_texts
from kedit.model.journal import Edit, EditFailed
from kedit.study import trajectory
from kedit.study.params import Params
from kedit.study.results import EditRecord, Results

FEW = [
    EditRequest("The capital city of {}", subject, "Rome", "Paris", id=subject)
    for subject in ("France", "Peru", "Spain")
]
EYE = torch.eye(INNER, dtype=torch.float64)
ENCORE = HPARAMS["memit"] | {"history": True, "ridge": 0.05, "early": 2}


def updates(edit):
    """The change of each matrix, float64, in order of the layers."""
    return [change.left.double() @ change.right.double().T for change in edit.changes if change.module]


def near(found, expected, tolerance=1e-9):
    return (found - expected).norm() <= tolerance * expected.norm()


# Keys ------------------------------------------------------------------------------------------------

BEFORE = {
    "rome": ({"layer": 2}, "2bf79c05b8bf68d7"),
    "r-rome": ({"layer": 2}, "41319a7071609316"),
    "memit": ({"layers": [1, 2], "mom2_weight": 10.0}, "e26906c5814f9492"),
    "alphaedit": ({"layers": [1, 2]}, "91506b5f3b59d962"),
    "pmet": ({"layers": [1, 2], "mom2_weight": 10.0}, "a3c06c95cdfb7603"),
}
"""Hashes of recipes at commit 6346aaf, before there were switches: edits in a store are known by them."""


@pytest.mark.parametrize("method", BEFORE)
def test_edits_stored_before_there_were_switches_are_still_known(method):
    given, before = BEFORE[method]
    kind = kind_of(method)

    def hashed(more):
        recipe = kind.recipe(make_hparams(kind, "x", given | more), {"hash": "of a text"})
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]

    assert hashed({}) == hashed({"early": None}) == before
    switches = [{"early": 2}]
    switches += [{"history": method != "alphaedit"}] if method in ("memit", "alphaedit", "pmet") else []
    switches += [{"ridge": 1.0}] if method in ("memit", "pmet") else []
    assert len({before, *map(hashed, switches)}) == 1 + len(switches)


def test_a_switch_that_came_later_is_part_of_keys_where_it_is_on_and_only_there():
    @dataclass(frozen=True)
    class Old:
        layers: tuple[int, ...] = (1, 2)

    @dataclass(frozen=True)
    class New(Old):
        switch: float | None = field(default=None, metadata=LATER)
        plain: bool = False

    assert stated(Old()) == {"layers": (1, 2)}
    assert stated(New()) == {"layers": (1, 2), "plain": False}
    assert stated(New(switch=0.0)) == {"layers": (1, 2), "plain": False, "switch": 0.0}


def test_a_variant_with_a_switch_is_another_run_and_the_rest_of_a_grid_is_the_same():
    values = {"models": ["pico-0.1m"], "methods": ["memit"], "edits": [1], "benchmarks": ["pico_mmlu"]}
    on = {"method": "memit", "variant": "history", "hparams": {"history": True}}
    one, two = (Params.make("rq1", "x", values | {"methods": some}) for some in (["memit"], ["memit", on]))
    before, after = one.hparams(), two.hparams()
    assert before.items() <= after.items()
    assert not {"history", "ridge", "early"} & before["memit (default) on pico-0.1m"].keys()
    assert after["memit (history) on pico-0.1m"]["history"] is True


# History and ridge -----------------------------------------------------------------------------------


def mean_key(lm, texts, layer):
    keys = activations(lm, texts, [layer], "key")[layer].double()
    return (keys[0] + keys[1:].mean(0)) / 2


@pytest.mark.parametrize("turns", [[[0], [1], [2]], [[0, 1], [2]]], ids=["one by one", "two and one"])
def test_encores_updates_are_the_dense_normal_equations(lm, statistics, moments, turns):
    """Delta = R K^T (lambda C + S + lambda_n I + K K^T)^-1 (A.1), S of the keys as they were read, not as edited."""
    hparams = ENCORE | {"early": None, "steps": 20}
    editor, layers = make("memit", lm, statistics, **hparams), hparams["layers"]
    held = dict.fromkeys(layers, hparams["ridge"] * EYE)
    for turn in turns:
        requests = [FEW[number] for number in turn]
        texts = [lookup_texts(lm, request, CONTEXTS) for request in requests]

        def states(texts=texts):
            return torch.stack([activations(lm, one[:1], [2], "block")[2][0].double() for one in texts], 1)

        found = []
        for request, one, start in zip(requests, texts, states().T, strict=True):
            objective = Objective(lm, one, lookup_text(lm, "{} is a", request.subject), lm.encode(" Rome"), 2)
            found.append(search(objective, start, editor.hparams)[0].double())
        goal, olds, expected = states() + torch.stack(found, 1), plain.weights(lm, layers), []
        for position, layer in enumerate(layers):
            keys = torch.stack([mean_key(lm, one, layer) for one in texts], 1)
            left = (goal - states()) / (len(layers) - position)
            solved = plain.ridge(moments[layer] + held[layer] / hparams["mom2_weight"], hparams["mom2_weight"], keys)
            expected.append(left @ solved.T)
            plain.matrix(lm.anatomy.down(layer)).copy_(olds[layer] + expected[-1])
            held[layer] = held[layer] + keys @ keys.T
        for layer, old in olds.items():
            plain.matrix(lm.anatomy.down(layer)).copy_(old)
        edit = editor.apply(requests)
        for update, dense in zip(updates(edit), expected, strict=True):
            assert near(update, dense, 1e-4)
    read = torch.stack([entry["keys"] for entry in editor.memory.entries])
    for position, layer in enumerate(layers):
        seen = read[:, position].T @ read[:, position]
        assert near(seen, held[layer] - hparams["ridge"] * EYE, 1e-5)
        edited = torch.stack([mean_key(lm, lookup_texts(lm, one, CONTEXTS), layer) for one in FEW])
        assert (layer == layers[0]) or not near(read[:, position], edited, 1e-3), "as AlphaEdit holds them"


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_a_grown_factor_is_the_dense_solve_after_fifty_edits(method, ridge, llama, statistics, moments):
    changes = {"history": True, "ridge": ridge, "mom2_weight": 1.7} if method == "memit" else {"l2": 0.3 + ridge}
    editor, layer = make(method, llama, statistics, **changes), 2
    generator = torch.Generator().manual_seed(0)
    held = torch.randn(INNER, 50, generator=generator, dtype=torch.float64)
    batch = torch.randn(INNER, 3, generator=generator, dtype=torch.float64)
    for key in held.T:
        editor.memory.add({"keys": torch.stack([torch.zeros(INNER).double(), key])})
        editor._gain(layer, batch)  # grown by a row each time
    if method == "memit":
        dense = plain.ridge(1.7 * moments[layer].double() + ridge * EYE + held @ held.T, 1.0, batch)
    else:
        basis = editor.basis(layer)
        dense = plain.null_space(basis @ basis.T, held @ held.T, editor.hparams.l2, batch)
    assert near(editor._gain(layer, batch), dense)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_sequential_edits_with_a_history_are_one_batch(llama, statistics, ridge):
    """With keys and residuals fixed, n updates in a row give the ridge solution of all at once (OTE = SE)."""
    editor = make("memit", llama, statistics, history=True, ridge=ridge, mom2_weight=0.7)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(INNER, 12, generator=generator, dtype=torch.float64)
    targets = torch.randn(32, 12, generator=generator, dtype=torch.float64)
    at_once = targets @ editor._gain(2, keys).T
    weight = torch.zeros(32, INNER, dtype=torch.float64)
    for turn in torch.arange(12).split(5):
        weight += (targets[:, turn] - weight @ keys[:, turn]) @ editor._gain(2, keys[:, turn]).T
        for key in keys[:, turn].T:
            editor.memory.add({"keys": key.expand(2, -1)})
    assert near(weight, at_once)


def test_the_first_edit_with_a_history_has_the_bits_of_memit(lm, statistics):
    edits = []
    for changes in ({}, {"history": True}):
        edits.append(make("memit", lm, statistics, **changes).apply(REQUEST))
        lm.journal.reset()
    assert all(map(torch.equal, updates(edits[0]), updates(edits[1])))
    assert len(edits[1].changes) == len(edits[0].changes) + 1


def test_alphaedit_without_a_history_forgets_earlier_edits(llama, statistics):
    """Its second edit is what a model edited alike, whose AlphaEdit knows of no edit, gets as its first."""
    forgetful = make("alphaedit", llama, statistics, history=False)
    assert forgetful.memory is None
    first = forgetful.apply(FEW[0])
    second = updates(forgetful.apply(FEW[1]))
    llama.journal.reset()
    editor = make("alphaedit", llama, statistics)
    assert all(map(torch.equal, updates(editor.apply(FEW[0])), updates(first)))
    known = updates(editor.apply(FEW[1]))
    llama.journal.edits[-1].undo()
    editor.memory.clear()
    assert all(map(torch.equal, updates(editor.apply(FEW[1])), second))
    assert not any(near(one, other, 1e-3) for one, other in zip(known, second, strict=True))


@pytest.mark.parametrize("method", ["memit", "pmet", "alphaedit"])
def test_undo_of_the_seventh_of_ten_leaves_the_sum_of_the_others(method, llama, statistics):
    changes = {"steps": 1, "lr": 0.5} | ({"history": True, "ridge": 0.1} if method != "alphaedit" else {})
    editor = make(method, llama, statistics, **changes)
    requests = [EditRequest("The capital city of {}", f"Nr{number}", "Rome", "Paris") for number in range(10)]
    edits = [editor.apply(request) for request in requests]
    saved = [edit.to_bytes() for edit in edits]
    edits[6].undo()
    left = [edit.changes[-1].values["keys"] for edit in edits if edit is not edits[6]]
    assert all(map(torch.equal, [entry["keys"] for entry in editor.memory.entries], left))
    after, probe = bits(llama), torch.ones(INNER, 1, dtype=torch.float64)
    gain = editor._gain(2, probe)
    llama.journal.reset()
    editor = make(method, llama, statistics, **changes)
    for data in saved[:6] + saved[7:]:
        llama.journal.replay(Edit.from_bytes(data))
    assert same(llama, after)
    assert torch.equal(editor._gain(2, probe), gain)


def test_a_ridge_stands_for_a_second_moment_that_is_singular(llama):
    moments = {layer: torch.diag((torch.arange(INNER) > 3).float()) for layer in (1, 2)}
    editor = make("memit", llama, lambda lm: SecondMoments(lm, moments=moments), ridge=0.1, mom2_weight=2.0)
    key = torch.ones(INNER, 1, dtype=torch.float64)
    dense = plain.ridge(2 * moments[2].double() + 0.1 * EYE, 1.0, key)
    assert near(editor._gain(2, key), dense)


def test_the_factor_with_a_ridge_is_kept_beside_that_without(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris and that of Peru is Lima, as everybody knows. " * 40)
    key = torch.ones(INNER, 1)
    one = SecondMoments(llama, str(text), 512)
    dense = torch.linalg.solve(one.moment(1) + 0.5 * EYE, key.double())
    assert near(one.solve(1, key, 0.5), dense)
    assert not near(one.solve(1, key, 0.25), dense, 1e-3)
    names = sorted(path.name for path in (tmp_path / "moments").rglob("*") if path.is_file())
    assert names == ["1", "1-cholesky-0.25", "1-cholesky-0.5"]
    assert torch.equal(SecondMoments(llama, str(text), 512).solve(1, key, 0.5), one.solve(1, key, 0.5))


def test_a_memory_of_keys_is_cleared_with_what_it_has_grown():
    memory, like = KeyMemory(), torch.ones(3, 1, dtype=torch.float64)
    for size in (1.0, 2.0):
        memory.add({"keys": torch.full((1, 3), size, dtype=torch.float64)})
    keys, factor = memory.read(0, lambda key: key, 0.5, like)
    assert near(factor @ factor.T, keys.T @ keys + 0.5 * EYE[:2, :2])
    memory.clear()
    assert [part.shape for part in memory.read(0, lambda key: key, 0.5, like)] == [(3, 0), (0, 0)]


# Early stopping --------------------------------------------------------------------------------------


def hit_by_hand(lm, texts, target, delta):
    """Whether the target is the likeliest after each prefixed text, by the model's own forward."""
    found = []
    for text in texts[1:]:

        def add(_, __, output, place=text.lookup):
            output[:, place] += delta
            return output

        handle = lm.anatomy.down(2).register_forward_hook(add)
        found.append(lm.model(torch.tensor([text.ids])).logits[0, -1].argmax().item() == target)
        handle.remove()
    return all(found)


@pytest.mark.parametrize("early", [1, 2, 4])
def test_a_search_ends_at_so_many_forwards_that_found_the_target_likeliest(llama, statistics, early):
    editor = make("memit", llama, statistics, early=early)
    texts, target = lookup_texts(llama, REQUEST, CONTEXTS), editor.target_ids(REQUEST)
    start, kl_text = activations(llama, texts[:1], [2], "block")[2][0], lookup_text(llama, "{} is a", "France")

    def found(**changes):
        return search(Objective(llama, texts, kl_text, target, 2), start, replace(editor.hparams, **changes))

    delta, losses = found()
    ends = len(losses) - 1
    assert losses == found(early=None)[1][: ends + 1]
    deltas = [torch.zeros(32), *(found(early=None, steps=steps)[0] for steps in range(1, ends + 1))]
    assert torch.equal(deltas[-1], delta)
    hits = [hit_by_hand(llama, texts, target[0], one) for one in deltas]
    assert hits[-1]
    assert sum(hits) == early
    assert editor.apply(REQUEST).info["steps"] == ends < editor.hparams.steps


@pytest.mark.parametrize(
    ("right", "hits"),
    [
        ([[0, 0], [1, 1], [1, 1]], 1),  # the bare prompt does not count
        ([[1, 1], [1, 1], [1, 0]], 0),  # nor do as many tokens as there are texts
        ([[1, 0], [1, 0], [1, 0]], 0),
        ([[1, 1]], 1),  # unless it is alone
        ([[1, 0]], 0),
    ],
)
def test_of_a_target_of_two_tokens_both_must_be_the_likeliest_after_every_prefixed_text(right, hits, llama):
    target, texts = llama.encode(" Rome London"), lookup_texts(llama, REQUEST, CONTEXTS[: len(right)])
    objective = Objective(llama, texts, lookup_text(llama, "{} is a", "France"), target, 2)

    class Says:
        def logits(self, states):
            said = torch.zeros(*states.shape[:-1], 700)
            for row, tokens in enumerate(right) if states.ndim == 3 else ():
                for place, good in enumerate(tokens):
                    said[row, place, target[place] + 1 - good] = 1.0
            return said

    objective.lm = Says()
    for count in (1, 2):
        objective.losses(torch.randn(len(texts) + 1, objective.tail.tail_ids.shape[1], 32))
        assert objective.hits == count * hits
        assert objective.likeliest == all(map(all, right))


def test_pmet_ends_early_too(llama, statistics):
    steps = []
    for early in (1, 4, None):
        steps.append(make("pmet", llama, statistics, early=early, kl_factor=0.0625).apply(REQUEST).info["steps"])
        llama.journal.reset()
    assert steps[0] + 3 <= steps[1] < steps[2]


# ENCORE -----------------------------------------------------------------------------------------------


def test_encore_is_memit_with_its_switches_on(llama, statistics):
    edits = []
    for method in ("memit", "encore"):
        hparams = ENCORE if method == "memit" else {key: ENCORE[key] for key in ENCORE if key != "history"}
        editor = kedit.editor(method, llama, hparams=hparams, statistics=statistics(llama), contexts=CONTEXTS)
        edits.append([updates(editor.apply(FEW[:2])), updates(editor.apply(FEW[2]))])
        llama.journal.reset()
    for one, other in zip(*edits, strict=True):
        assert all(map(torch.equal, one, other))


# NAS --------------------------------------------------------------------------------------------------


@pytest.fixture
def anchored(llama, statistics, tmp_path, monkeypatch):
    """NAS on a tiny model, its anchor taken over few facts; what the search found is in ``found``."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))

    def made(method="nas", base="alphaedit", **changes):
        hparams = HPARAMS[base] | {"sample": 4, "factor": None} | changes
        editor = kedit.editor(method, llama, hparams=hparams, statistics=statistics(llama), contexts=CONTEXTS)
        editor.prepare()
        return editor

    return made


def output(lm, request, layer=2):
    """What the MLP writes at the subject's last token of the bare prompt, by a hook of our own."""
    seen, ids = [], [*lm.begin, *lm.encode(request.text)]
    handle = lm.anatomy.down(layer).register_forward_hook(lambda _, __, output: seen.append(output[0, -1].double()))
    lm.model(torch.tensor([ids]))
    handle.remove()
    return seen[0]


def test_the_anchor_is_the_trimmed_mean_of_norms_of_values_of_the_train_split(llama, anchored, tmp_path):
    editor = anchored(sample=12, trim=0.1, steps=3)
    requests = nas.sampled("llama", editor.hparams)
    train = set(facts.bundled("train"))
    assert len(set(requests)) == 12
    assert train.issuperset(requests)
    norms = []
    for request in requests:
        texts = lookup_texts(llama, request, ["{}"])
        objective = Objective(
            llama, texts, lookup_text(llama, "{} is a", request.subject), editor.target_ids(request), 2
        )
        start = activations(llama, texts, [2], "block")[2][0]
        delta = search(objective, start.double(), editor.hparams)[0]
        norms.append((activations(llama, texts, [2], "value")[2][0].double() + delta).norm().item())
    assert editor.anchor == pytest.approx(sum(sorted(norms)[:-1]) / 11, rel=1e-12)


def test_an_anchor_is_measured_once_on_the_unedited_model_and_kept_sealed(llama, anchored, tmp_path, monkeypatch):
    first = anchored()
    first.apply(REQUEST)
    again = anchored()  # on an edited model
    assert again.anchor == first.anchor
    (file,) = [path for path in (tmp_path / "anchors").rglob("*") if path.is_file()]
    measured = nas.Anchored._norms
    monkeypatch.setattr(nas.Anchored, "_norms", lambda *_: pytest.fail("measured again"))
    assert anchored(trim=0.0, factor=3.0).anchor > 0  # what does not enter the search
    monkeypatch.setattr(nas.Anchored, "_norms", measured)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert anchored().anchor == first.anchor  # damaged, set aside and measured anew, without the edit
    assert len(list(file.parent.glob("*.damaged"))) == 1
    for changes in ({"steps": 7}, {"sample": 5}, {"seed": 1}, {"layers": [1]}, {"early": 1}):
        count = len(list((tmp_path / "anchors").rglob("*")))
        anchored(**changes)
        assert len(list((tmp_path / "anchors").rglob("*"))) > count, changes


def test_what_the_anchor_is_taken_over_is_in_the_key(llama, anchored, monkeypatch):
    editor = anchored()
    key = editor.key()
    assert anchored().key() == key
    assert anchored(seed=1).key()["sampled"] != key["sampled"]
    monkeypatch.setattr(nas.facts, "load", lambda name, split: facts.bundled(split)[:9])
    assert anchored().key()["sampled"] != key["sampled"]


@pytest.mark.parametrize(("method", "base"), [("nas", "alphaedit"), ("nas-memit", "memit")])
def test_an_anchored_value_has_the_anchors_norm_and_at_its_own_norm_the_bases_bits(
    method, base, llama, statistics, anchored
):
    plain_edit = make(base, llama, statistics).apply(REQUEST)
    llama.journal.reset()
    editor, deltas = anchored(method, base), []
    search_of = editor._search
    editor._search = lambda *args: deltas.append(search_of(*args)) or deltas[-1]
    before, start = (
        output(llama, REQUEST),
        activations(llama, [lookup_texts(llama, REQUEST, CONTEXTS)[0]], [2], "block")[2][0],
    )
    edit = editor.apply(REQUEST)
    assert (before + deltas[0]).norm().item() == pytest.approx(editor.anchor, rel=1e-6)
    assert edit.info["value_norm"] != pytest.approx(editor.anchor, rel=1e-3)
    after = activations(llama, [lookup_texts(llama, REQUEST, CONTEXTS)[0]], [2], "block")[2][0].double()
    left = (after - start.double() - deltas[0]).norm() / deltas[0].norm()
    assert left.item() == pytest.approx(edit.info["left"], rel=1e-3)
    llama.journal.reset()
    editor.anchor = edit.info["value_norm"]
    assert all(map(torch.equal, updates(editor.apply(REQUEST)), updates(plain_edit)))


def test_an_edit_that_is_skipped_writes_nothing_and_the_others_of_its_turn_are_made(llama, anchored):
    editor = anchored(factor=1.0)
    sizes = {}
    for request in FEW:
        sizes[request.id] = editor.apply(request).info["value_norm"]
        llama.journal.reset()
    longest = max(sizes, key=sizes.get)
    editor.anchor = sorted(sizes.values())[-2] + 1e-9  # of the three, one is longer
    before = bits(llama)
    (skipped,) = [request for request in FEW if request.id == longest]
    edit = editor.apply(skipped)
    assert edit.info["skipped"] is True
    assert (edit.changes, edit.info["value_norm"]) == ([], sizes[longest])
    assert same(llama, before)
    llama.journal.reset()

    edit = editor.apply(FEW)
    assert [one.get("skipped", False) for one in edit.info["each"]] == [request.id == longest for request in FEW]
    assert [change.right.shape[1] for change in edit.changes if change.module] == [2, 2]
    assert len(editor.memory.entries) == 2
    llama.journal.reset()
    alone = editor.apply([request for request in FEW if request.id != longest])
    assert all(map(torch.equal, updates(edit), updates(alone)))


def test_without_a_fact_that_has_a_value_there_is_one_sentence(anchored, monkeypatch):
    def none(*_):
        raise EditFailed("the loss is nan at step 0")

    monkeypatch.setattr(nas.locate_then_edit.LocateThenEdit, "_search", none)
    with pytest.raises(KeditError, match="NAS found no value for any of 4 facts of the train split"):
        anchored()


def test_mixed_settings_are_those_of_the_method_beneath():
    for kind, base in ((nas.NAS, "alphaedit"), (nas.NASOnMEMIT, "memit")):
        theirs = make_hparams(kind_of(base), "x", {"layers": [1], **({"mom2_weight": 1.0} if base == "memit" else {})})
        mine = make_hparams(kind, "x", {"layers": [1], **({"mom2_weight": 1.0} if base == "memit" else {})})
        assert vars(theirs).items() <= vars(mine).items()


# PRUNE ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.2, 2.718281828459045])
def test_singular_values_above_the_largest_of_the_original_are_their_logarithm(alpha):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(9, 6, generator=generator, dtype=torch.float64))
    values, largest = torch.tensor([200.0, 50.0, 10.0, 9.99, 1.0, 0.0], dtype=torch.float64), 10.0
    found = torch.linalg.svdvals(prune.restrained(left * values @ right.T, largest, alpha))
    expected = [
        math.log(each, alpha) - math.log(largest, alpha) + largest if each >= largest else each for each in values
    ]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-9, atol=1e-9)
    small = left * (values / 100) @ right.T
    assert torch.equal(prune.restrained(small, largest, alpha), small)


@pytest.mark.parametrize("onto", ["original", "edited"])
def test_prune_shows_the_original_and_the_restrained_change_and_puts_the_edited_bits_back(lm, statistics, onto):
    hparams = HPARAMS["memit"] | {"mom2_weight": 1e-6, "onto": onto, "alpha": 3.0}
    editor = kedit.editor("prune", lm, hparams=hparams, statistics=statistics(lm), contexts=CONTEXTS)
    before, unedited = plain.weights(lm, [1, 2]), bits(lm)
    with editor.shown():
        assert same(lm, unedited)
    for request in FEW:
        editor.apply(request)
    edited, state, capped = plain.weights(lm, [1, 2]), bits(lm), 0
    with editor.shown():
        shown = plain.weights(lm, [1, 2])
    assert same(lm, state)
    for layer, old in before.items():
        left, values, right = torch.linalg.svd(edited[layer] - old, full_matrices=False)
        largest = torch.linalg.svdvals(old)[0]
        over = values > largest
        capped += int(over.sum())
        values[over] = (values[over].log() - largest.log()) / math.log(3.0) + largest
        change = left @ torch.diag(values) @ right
        assert near(shown[layer], (old if onto == "original" else edited[layer]) + change, 1e-6)
    assert capped
    with pytest.raises(RuntimeError, match="within"), editor.shown():
        raise RuntimeError("within")
    assert same(lm, state)


def test_what_is_restrained_is_asked_and_never_edited_on(tmp_path, monkeypatch):
    """A checkpoint of a run shows the restrained model; the edits stored are MEMIT's, to the bit."""
    monkeypatch.setenv("KEDIT_RUNS", str(tmp_path))
    hparams = {"steps": 1}
    values = {
        "models": ["pico-0.1m"], "edits": [2], "benchmarks": ["pico_csqa"], "limit": 2,
        "edit_set": {"name": "pico", "split": "edit"}, "statistics": {"text": "pico", "tokens": 4096},
        "methods": [{"method": name, "variant": "v", "hparams": hparams} for name in ("memit", "prune")],
    }  # fmt: skip
    params, seen = Params.make("rq1", "x", values), []

    class Seen(Exception):
        pass

    def ask(self, *_, **__):
        lm = self.lm
        seen.append((plain.weights(lm, [0])[0], [edit.to_bytes() for edit in lm.journal.edits]))
        raise Seen

    monkeypatch.setattr(trajectory.Examiner, "ask", ask)
    monkeypatch.setattr(prune, "restrained", lambda change, *_: change / 2)
    for position in (0, 1):
        with pytest.raises(Seen):
            trajectory.advance(params, "pico-0.1m", trajectory.Line(position, 0), 2, {"pico_csqa": ("ab", "cd")})
    (edited, edits), (shown, others) = seen
    original = plain.weights(kedit.load("pico-0.1m"), [0])[0]
    assert near(shown - original, (edited - original) / 2, 1e-5)
    for one, other in zip(edits, others, strict=True):
        assert all(map(torch.equal, updates(Edit.from_bytes(one)), updates(Edit.from_bytes(other))))


def test_edits_that_were_skipped_are_counted_in_the_table_of_journals_where_there_are_any():
    def table(*infos):
        edits = [EditRecord("m", "nas", "default", 0, n, str(n), 100, info) for n, info in enumerate(infos, 1)]
        return tables.journal_table(Results(None, [], edits, {}, "run"))

    made = {"steps": 3, "relative_change": [0.1], "value_norm": 2.0}
    assert "skipped" not in table(made, made)
    assert table(made, {"steps": 3, "value_norm": 9.0, "skipped": True}, made).loc[
        "NAS", ["edits", "failed", "skipped"]
    ].tolist() == [3, 0, 1]
