"""kedit against a second derivation: numpy in float64, written from the specification alone (derivation/README.md).

The editors are given its model, tokens and second moments, to the bit; they compute in float32.
"""

import dataclasses
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from conftest import REQUEST
from derivation import derive
from transformers import LlamaConfig, LlamaForCausalLM

import kedit
from kedit.editors import mend, pmet, value_search
from kedit.editors.ft import FTL, FTM
from kedit.editors.grace import GRACE
from kedit.editors.kn import attributions
from kedit.editors.protocol import Editor
from kedit.editors.second_moments import SecondMoments
from kedit.editors.training import ScoredText
from kedit.editors.value_search import Objective, descend
from kedit.model.forward import LookupText, activations
from kedit.model.journal import Edit
from kedit.model.lm import LM

STORED = dict(np.load(Path(derive.__file__).with_name("derivation.npz")))
NEAR = 2e-5
"""Of a search and all that is made of it; 5e-6 is reached."""


def ids(name: str, request: str = "A") -> list[int]:
    return STORED[f"in_{request}_{name}"].astype(int).tolist()


def rows(request: str = "A") -> list[LookupText]:
    """The bare prompt and the prompt in two contexts."""
    lookup = {"prompt": "p", "ctx1": "ctx1_p", "ctx2": "ctx2_p"}
    return [LookupText(tuple(ids(name, request)), ids(where, request)[0]) for name, where in lookup.items()]


def near(value: torch.Tensor, name: str) -> bool:
    """Within float32's rounding of what was derived."""
    expected = STORED[f"out_{name}"]
    return np.abs(value.double().numpy() - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.fixture
def derived(tokenizer, monkeypatch) -> LM:
    """The model of the derivation; editors read its ids for prompt and target."""
    vocabulary, d, m, layers, heads, kv = STORED["in_config"].astype(int).tolist()
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=m, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = {name[2:]: torch.tensor(value).float() for name, value in STORED.items() if name.startswith("w.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    monkeypatch.setattr(Editor, "prompt_ids", lambda self, request: ids("prompt"))
    monkeypatch.setattr(Editor, "target_ids", lambda self, request: ids("new"))
    return LM(model, tokenizer, "derived")


def test_the_derivation_gives_what_is_stored():
    outputs = derive.run(STORED)
    assert outputs.keys() == {name for name in STORED if name.startswith("out_")}
    for name, value in outputs.items():
        assert np.allclose(value, STORED[name], rtol=1e-9, atol=1e-12), name


def test_the_model_is_that_of_the_derivation_to_the_bit(derived):
    for name, tensor in derived.model.named_parameters():
        assert np.array_equal(tensor.detach().double().numpy(), STORED[f"w.{name}"]), name
    for table, name in zip(
        derived.model.model.rotary_emb(torch.zeros(1), torch.arange(len(STORED["in_rope_cos"]))[None]),
        ("in_rope_cos", "in_rope_sin"),
        strict=True,
    ):
        assert np.array_equal(table[0].double().numpy(), STORED[name]), name


def test_logits_and_keys(derived):
    assert near(derived.model(torch.tensor([ids("prompt")])).logits[0], "base_logits_A")
    assert near(activations(derived, rows(), [1], "key")[1], "base_keys_A_l1")


LOCATING = {
    "rome": {"layer": 1},
    "r-rome": {"layer": 1},
    "memit": {"layers": [1, 2], "mom2_weight": 0.7},
    "pmet": {"layers": [1, 2], "mom2_weight": 0.7},
    "alphaedit": {"layers": [1, 2], "null_space_share": 0.4, "l2": 0.5},
}
SEARCH = {"steps": 8, "lr": 0.5, "weight_decay": 1e-3, "clamp_norm_factor": 4.0, "kl_factor": 0.0625}


def locating(method: str, lm: LM, monkeypatch, **changes) -> tuple[Editor, dict[str, list]]:
    """An editor that is given the derivation's rows by a request's id, and what its searches go through: a step each."""
    moments = {layer: torch.tensor(STORED[f"in_moment{layer}"]) for layer in range(4)}
    hparams = LOCATING[method] | SEARCH | changes
    editor = kedit.editor(method, lm, hparams=hparams, statistics=SecondMoments(lm, moments=moments), contexts=["{}"])
    trace: dict[str, list] = {"loss": [], "delta": [], "nll": [], "kl": [], "hit": []}

    def objective(request, texts, inside):
        kl_text = LookupText(tuple(ids("kl", request.id)), ids("kl_p", request.id)[0])
        made = Objective(lm, texts, kl_text, ids("new", request.id), editor.hparams.layers[-1], inside)

        def losses(hidden):
            nll, kl = Objective.losses(made, hidden)
            for name, value in (("nll", nll.item()), ("kl", kl.item()), ("hit", made.likeliest)):
                trace[name].append(value)
            return nll, kl

        made.losses = losses
        return made

    def watched(variables, loss_now, *rest):
        def loss():
            trace["delta"].append(torch.cat([one.detach() for one in variables]).numpy().copy())
            return loss_now()

        found = descend(variables, loss, *rest)
        trace["loss"] += found
        return found

    monkeypatch.setattr(editor, "_texts", lambda request: rows(request.id))
    monkeypatch.setattr(editor, "_objective", objective)
    for module in (value_search, pmet):
        monkeypatch.setattr(module, "descend", watched)
    return editor, trace


def off(value, name: str) -> float:
    """The largest difference from what was derived, as a share of its largest number."""
    expected = STORED[f"out_{name}"]
    return share(np.asarray(value, float).reshape(expected.shape), expected)


def share(value: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest number."""
    return float(np.abs(value - expected).max() / (np.abs(expected).max() or 1.0))


@pytest.mark.parametrize(
    ("method", "name", "requests"),
    [("rome", "rome", "A"), ("r-rome", "rrome", "A"), ("memit", "memit", "A"), ("pmet", "pmet", "A"),
     ("alphaedit", "alpha_edit", "AB")],
)  # fmt: skip
def test_whole_edits(derived, monkeypatch, method, name, requests):
    """Every step of the search, the value it finds, the update made of it, and what the edited model says.

    Of a second edit as well: keys in the edited model, earlier edits' keys held.
    """
    layers, worst = LOCATING[method].get("layers", [1]), {}
    for number, request in enumerate(requests, 1):
        editor, trace = locating(method, derived, monkeypatch)
        one = f"{name}{number if len(requests) > 1 else ''}"
        site = activations(derived, rows(request)[:1], [layers[-1]], getattr(editor, "site", "value"))[layers[-1]][0]
        edit = editor.apply(dataclasses.replace(REQUEST, id=request))
        for part in ("loss", "nll", "kl", "delta", "hit"):
            if f"out_{(stored := f'{one}_trace_{part}')}" in STORED:
                worst[stored] = off(trace[part], stored)
        value = site.numpy() + trace["delta"][-1][: len(site)]
        worst[f"{one} value"] = off(value, f"{one}_v" if layers == [1] else f"{one}_Z")
        for change, layer in zip(edit.changes, layers, strict=False):
            update = (change.left.double() @ change.right.double().T).numpy()
            if layers == [1]:
                expected = STORED[f"out_{one}_delta"]
            else:
                expected = STORED[f"out_{one}_left{layer}"] @ STORED[f"out_{one}_rightT{layer}"].T
            worst[f"{one} update {layer}"] = share(update, expected)
        for which in ("new", "true"):
            target = ids(which, request)
            logits = derived.model(torch.tensor([[*ids("prompt", request), *target[:-1]]])).logits[0]
            said = logits[len(ids("prompt", request)) - 1 :].log_softmax(-1)[range(len(target)), target]
            worst[f"{one} {which}"] = off(said.detach().numpy(), f"{one}_logp_{which}_{request}")
    assert {what: value for what, value in worst.items() if not value < NEAR} == {}


@pytest.mark.parametrize(
    ("method", "name", "changes"),
    [
        ("rome", "rome_clamp075", {"clamp_norm_factor": 0.75}),
        ("rome", "easy_rome", {"layer": 2, "steps": 24, "kl_factor": 0.0}),  # ends when the loss is small enough
        ("pmet", "easy_pmet", {}),  # the target's weight falls to a tenth and comes back
        ("pmet", "easy_pmet_klstop", {"kl_factor": 0.002}),  # ends when the target is the likeliest everywhere
    ],
)
def test_how_a_search_ends_and_is_held(derived, monkeypatch, method, name, changes):
    editor, trace = locating(method, derived, monkeypatch, **changes)
    layer, request = editor.hparams.layers[-1], "C" if "easy" in name else "A"
    inits = [activations(derived, rows(request)[:1], [layer], at)[layer][0] for at in ("value", "attention")]
    editor._search(dataclasses.replace(REQUEST, id=request), rows(request), inits[0], Edit(method, request))
    traces = name if "easy" in name else f"{name}_trace"
    for part in ("loss", "nll", "kl", "hit"):
        if f"out_{(stored := f'{traces}_{part}')}" in STORED:
            assert off(trace[part], stored) < NEAR, part
    values = torch.cat(inits).numpy()[: len(trace["delta"][-1])] + trace["delta"][-1]
    assert off(values, f"{name}_z" if "easy" in name else f"{name}_v") < NEAR


def test_attributions_of_neurons(derived):
    assert near(attributions(derived, ids("prompt"), ids("true")[0], 20), "kn1_scores")


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    ("rule", "name"), [("authors", "cols_authors"), ("t-2a", "step_easyedit"), ("2t-2a", "step_22")]
)
def test_what_kn_writes(derived, monkeypatch, tokens, rule, name):
    """The very neurons, and for each what its column gains; nothing else changes."""
    monkeypatch.setattr(Editor, "target_ids", lambda self, request: ids("new")[:tokens])
    monkeypatch.setattr(derived, "encode", lambda text: ids("true")[:tokens])
    before = plain.weights(derived, range(4))
    hparams = {} if rule == "authors" else {"rule": rule}
    kedit.editor("kn", derived, hparams={"points": 20, **hparams}).apply(REQUEST)
    neurons = STORED[f"out_kn{tokens}_neurons"].astype(int)
    columns = np.broadcast_to(STORED[f"out_kn{tokens}_{name}"], (len(neurons), derived.model.config.hidden_size))
    expected = {layer: torch.zeros_like(weight) for layer, weight in before.items()}
    for (layer, neuron), column in zip(neurons, columns, strict=True):
        expected[layer][:, neuron] = torch.tensor(column)
    for layer, weight in plain.weights(derived, range(4)).items():
        assert (weight - before[layer] - expected[layer]).abs().max() < 2e-5 * np.abs(columns).max()


@pytest.mark.parametrize(("kind", "name"), [(FTM, "ftm"), (FTL, "ftl")])
def test_fine_tuning(derived, kind, name):
    hparams = {"layer": 2, "steps": 5, "lr": 5e-4, "stop": 0.0}
    edit = kedit.editor(kind.name, derived, hparams=hparams).apply(REQUEST)
    assert near(edit.changes[0].delta, f"{name}_delta")


def test_the_value_of_grace(derived, monkeypatch):
    start = torch.tensor(STORED["in_grace_value"]).float()
    monkeypatch.setattr(GRACE, "_start", lambda self, output: start.clone())
    edit = kedit.editor("grace", derived, hparams={"layer": 2, "steps": 10, "lr": 1.0}).apply(REQUEST)
    values = edit.changes[0].values
    assert near(values["key"], "grace_key")
    expected = STORED["out_grace_values"][-1]
    assert np.abs(values["value"].double().numpy() - expected).max() < 2e-4 * np.abs(expected).max()


def test_the_updates_of_mend(derived):
    """The factors of the gradient, and what given networks, moments and rates make of them."""
    hparams = mend.Hparams(layers=(3,), rank=6)
    upper = mend.UpperBlocks(derived, hparams.layers)
    network = mend.HyperNetwork(upper.modules, hparams)
    given = {"rates": STORED["in_mend_rates"]}
    for shape, size in (("wide", "48x32"), ("narrow", "32x48")):
        value = {name.removeprefix(f"in_mend_{shape}_"): v for name, v in STORED.items() if f"_mend_{shape}_" in name}
        deviation = np.concatenate([value["sd_x"], value["sd_g"]])
        given[f"transforms.{size}.count"] = np.array(2.0)
        given[f"transforms.{size}.mean"] = np.concatenate([value["mu_x"], value["mu_g"]])
        given[f"transforms.{size}.squares"] = deviation**2
        for block in range(2):
            names = {"u": "U", "v": "V", "bias": "b", "scale": "scale", "shift": "shift"}
            given |= {f"transforms.{size}.layers.{block}.{n}": value[f"{theirs}{block}"] for n, theirs in names.items()}
    network.load_state_dict({name: torch.tensor(value) for name, value in given.items()})
    factors, _ = upper.factors([ScoredText((*ids("prompt"), *ids("new")), len(ids("prompt")))])
    with torch.no_grad():
        updates = network(factors)
    for name, (x, g), (right, left) in zip(("gate", "up", "down"), factors, updates, strict=True):
        live = (g[0] != 0).any(-1)
        assert near(x[0, live], f"mend_{name}_x")
        assert near(g[0, live], f"mend_{name}_g")
        assert near(left[0].T @ right[0], f"mend_{name}_delta")
