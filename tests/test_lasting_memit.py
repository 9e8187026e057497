"""Edits that last, by locating: history, ridge and early stopping on MEMIT and AlphaEdit; ENCORE, NAS, PRUNE."""

import hashlib
import json
from dataclasses import dataclass, field, replace

import plain
import pytest
import torch
from conftest import CONTEXTS, HPARAMS, INNER, REQUEST
from test_editors import bits, make, same

from kedit.data.requests import EditRequest
from kedit.editors import kind_of, make_hparams
from kedit.editors.bounds import LATER, stated
from kedit.editors.history import KeyMemory
from kedit.editors.second_moments import SecondMoments
from kedit.editors.value_search import Objective, search
from kedit.model.forward import activations, lookup_text, lookup_texts
from kedit.model.journal import Edit
from kedit.study.params import Params

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
