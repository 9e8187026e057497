"""kedit against a second derivation: numpy in float64, written from the specification alone (derivation/README.md).

The value searches join in once their KL term has the paper's direction; until then the values found by the derivation
are given to the editors, and what they make of them is compared.
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
from kedit.editors import kind_of, mend
from kedit.editors.ft import FTL, FTM
from kedit.editors.grace import GRACE
from kedit.editors.kn import attributions
from kedit.editors.protocol import Editor
from kedit.editors.second_moments import SecondMoments
from kedit.editors.training import ScoredText
from kedit.model.forward import LookupText, activations
from kedit.model.lm import LM

STORED = dict(np.load(Path(derive.__file__).with_name("derivation.npz")))


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


def test_logits_and_keys(derived):
    assert near(derived.model(torch.tensor([ids("prompt")])).logits[0], "base_logits_A")
    assert near(activations(derived, rows(), [1], "key")[1], "base_keys_A_l1")


@pytest.mark.parametrize(
    ("method", "name", "requests"),
    [("rome", "rome", "A"), ("r-rome", "rrome", "A"), ("memit", "memit", "A"), ("pmet", "pmet", "A"),
     ("alphaedit", "alpha_edit", "AB")],
)  # fmt: skip
def test_updates_from_given_values(derived, monkeypatch, method, name, requests):
    """Keys in the edited model, second moments, the null space, earlier edits' keys, parts of the residual."""
    kind = kind_of(method)
    rank_one = method in ("rome", "r-rome")
    value = {"A": f"out_{name}_v" if rank_one else f"out_{name}_Z"}
    if requests == "AB":
        value = {"A": "out_alpha_edit1_Z", "B": "out_alpha_edit2_Z"}

    def given(self, request, texts, init, edit):
        return torch.tensor(STORED[value[request.id]]).flatten() - init.double()

    monkeypatch.setattr(kind, "_texts", lambda self, request: rows(request.id))
    monkeypatch.setattr(kind, "_search", given)
    moments = {layer: torch.tensor(STORED[f"in_moment{layer}"]) for layer in range(4)}
    hparams = {"layer": 1} if rank_one else {"layers": [1, 2]}
    hparams |= {"memit": {"mom2_weight": 0.7}, "pmet": {"mom2_weight": 0.7}}.get(method, {})
    hparams |= {"null_space_share": 0.4, "l2": 0.5} if method == "alphaedit" else {}
    editor = kedit.editor(
        method, derived, hparams=hparams, statistics=SecondMoments(derived, moments=moments), contexts=["{}"]
    )
    for number, request in enumerate(requests, 1):
        edit = editor.apply(dataclasses.replace(REQUEST, id=request))
        for change, layer in zip(edit.changes, [1] if rank_one else [1, 2], strict=False):
            one = f"out_{name}{number if len(requests) > 1 else ''}"
            if rank_one:
                expected = STORED[f"{one}_delta"]
            else:
                expected = STORED[f"{one}_left{layer}"] @ STORED[f"{one}_rightT{layer}"].T
            update = (change.left.double() @ change.right.double().T).numpy()
            assert np.abs(update - expected).max() < 2e-4 * np.abs(expected).max(), (one, layer)


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
