import shutil

import pytest
import torch
from conftest import INNER, WIDTH
from safetensors.torch import load_file, save
from transformers import BertConfig, BertLMHeadModel
from transformers.pytorch_utils import Conv1D

import kedit
from kedit import KeditError
from kedit.model.anatomy import matrix
from kedit.model.lm import LM, PICO, begin_token


def test_anatomy_finds_every_part(lm):
    for layer in range(lm.layers):
        assert matrix(lm.anatomy.down(layer)).shape == (WIDTH, INNER)
        assert matrix(lm.anatomy.up(layer)).shape == (INNER, WIDTH)
        assert matrix(lm.anatomy.attn_out(layer)).shape == (WIDTH, WIDTH)
    ids = torch.tensor([[*lm.begin, 5, 6]])
    hidden = lm.anatomy.base(ids).last_hidden_state
    assert torch.equal(lm.logits(hidden), lm.model(ids).logits)


def test_a_square_projection_is_read_by_its_type():
    """A shape cannot tell Conv1D from Linear when in == out; both must compute W k."""
    k = torch.randn(6)
    for module in (Conv1D(6, 6), torch.nn.Linear(6, 6, bias=False)):
        module.requires_grad_(False)
        assert torch.allclose(matrix(module) @ k, module(k), atol=1e-6)
        matrix(module)[0, 1] += 1.0
        assert torch.allclose(matrix(module) @ k, module(k), atol=1e-6)


def test_unknown_architecture_is_refused_in_one_sentence(tokenizer):
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(KeditError, match=r"cannot read BertLMHeadModel"):
        LM(BertLMHeadModel(config), tokenizer)


def test_every_text_begins_with_the_separator(lm):
    assert lm.tokenizer.convert_ids_to_tokens(lm.begin) == ["<|endoftext|>"]
    assert begin_token(lm.tokenizer) == lm.begin[0]


def test_fingerprint_follows_the_weights(llama):
    before = llama.fingerprint
    other = LM(llama.model, llama.tokenizer)
    matrix(other.anatomy.down(0))[0, 0] += 1e-3
    assert LM(llama.model, llama.tokenizer).fingerprint != before
    assert LM(llama.model, llama.tokenizer, begin=False).fingerprint != other.fingerprint


def test_a_saved_folder_loads_without_network(llama, tmp_path):
    llama.model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    assert kedit.load(str(tmp_path)).fingerprint == llama.fingerprint


def test_a_missing_model_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeditError, match="could not be loaded"):
        kedit.load(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("missing", r"has 1 missing tensor\(s\), the first .*dense\.bias"),
        ("unexpected", r"has 1 unexpected tensor\(s\), the first extra"),
        ("not finite", r"has 1 not finite tensor\(s\), the first .*dense\.bias"),
        ("mismatched", "could not be loaded"),
        ("truncated", "could not be loaded"),
    ],
)
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(damage, sentence, tmp_path):
    shutil.copytree(PICO / "pico-0.1m", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    bias = next(name for name in tensors if name.endswith("attention.dense.bias"))
    if damage == "missing":
        del tensors[bias]
    elif damage == "unexpected":
        tensors["extra"] = torch.zeros(2)
    elif damage == "not finite":
        tensors[bias][0] = torch.nan
    elif damage == "mismatched":
        tensors[bias] = tensors[bias][:1].clone()
    data = save(tensors, {"format": "pt"})
    path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    with pytest.raises(KeditError, match=sentence):
        kedit.load(str(tmp_path / "model"))


def test_smollm2_knows_facts(smollm2):
    """The dequantised model is the real one: it completes well-known facts."""
    for prompt, answer in {
        "The capital of France is": " Paris",
        "The capital of Germany is": " Berlin",
        "Egypt is located in the continent of": " Africa",
    }.items():
        logits = smollm2.model(torch.tensor([[*smollm2.begin, *smollm2.encode(prompt)]])).logits[0, -1]
        assert smollm2.tokenizer.decode(logits.argmax()) == answer
