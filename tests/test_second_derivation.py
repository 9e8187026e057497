"""kedit against a second derivation: numpy in float64, written from the specification alone (derivation/README.md).

The value searches join in once their KL term has the paper's direction; what does not depend on it is compared here.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REQUEST
from derivation import derive
from transformers import LlamaConfig, LlamaForCausalLM

import kedit
from kedit.editors.ft import FTL, FTM
from kedit.editors.grace import GRACE
from kedit.editors.kn import attributions
from kedit.editors.protocol import Editor
from kedit.model.forward import LookupText, activations
from kedit.model.lm import LM

STORED = dict(np.load(Path(derive.__file__).with_name("derivation.npz")))


def ids(name: str) -> list[int]:
    return STORED[f"in_A_{name}"].astype(int).tolist()


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
    texts = [LookupText(tuple(ids(name)), ids(f"{name}_p")[0] if name != "prompt" else ids("p")[0])
             for name in ("prompt", "ctx1", "ctx2")]  # fmt: skip
    assert near(activations(derived, texts, [1], "key")[1], "base_keys_A_l1")


def test_attributions_of_neurons(derived):
    assert near(attributions(derived, ids("prompt"), ids("true")[0], 20), "kn1_scores")


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
