"""Tiny random models of the four architectures, built here; the real SmolLM2 where a test needs it."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import kedit
from kedit.data.facts import bundled
from kedit.data.requests import EditRequest
from kedit.editors.second_moments import SecondMoments
from kedit.model.lm import LM

WIDTH, INNER, LAYERS, HEADS = 32, 48, 4, 4
ARCHITECTURES = ("llama", "mistral", "gpt2", "gpt_neox")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE trained on the bundled prompts: real merges, offsets and leading spaces."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([r.text for r in bundled("train")] + [" Rome Paris London"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def build(architecture: str, vocabulary: int):
    """A small model of the real class; activations are large enough for edits to matter."""
    torch.manual_seed(0)
    common = {"vocab_size": vocabulary, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
    }
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, **shape, num_key_value_heads=2, tie_word_embeddings=True))
    if architecture == "mistral":
        return MistralForCausalLM(MistralConfig(**common, **shape, num_key_value_heads=2, sliding_window=64))
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(**common, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, n_positions=512)
        )
    return GPTNeoXForCausalLM(GPTNeoXConfig(**common, **shape, use_parallel_residual=True, rotary_pct=0.25))


@pytest.fixture(params=ARCHITECTURES)
def lm(request, tokenizer) -> LM:
    return LM(build(request.param, len(tokenizer)), tokenizer, request.param)


@pytest.fixture
def llama(tokenizer) -> LM:
    return LM(build("llama", len(tokenizer)), tokenizer, "llama")


@pytest.fixture
def moments() -> dict[int, torch.Tensor]:
    """Well-conditioned second moments for every layer of the tiny models."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(LAYERS, 400, INNER, generator=generator)
    return {layer: keys[layer].T @ keys[layer] / 400 for layer in range(LAYERS)}


@pytest.fixture
def statistics(moments):
    return lambda lm: SecondMoments(lm, moments=moments)


CONTEXTS = ["{}", "The answer to this is known. {}", "Because. {}"]
# The subject ends the prompt: a random model has no attention head that would carry a fact further.
REQUEST = EditRequest("The capital city of {}", "France", " Rome", "Paris")
SEARCH = {"clamp_norm_factor": 50.0, "lr": 1.0, "steps": 59, "kl_factor": 0.0}
HPARAMS = {
    "rome": {"layer": 2, **SEARCH},
    "r-rome": {"layer": 2, **SEARCH},
    "memit": {"layers": [1, 2], "mom2_weight": 0.001, **SEARCH},
    "alphaedit": {"layers": [1, 2], "null_space_share": 0.9, "l2": 0.01, **SEARCH},
    "pmet": {"layers": [1, 2], "mom2_weight": 0.001, **SEARCH},
    "ft-l": {"layer": 2, "lr": 0.05, "steps": 60},
    "ft-m": {"layer": 2, "lr": 0.05, "steps": 60},
    "kn": {"points": 5},
    "grace": {"layer": 2, "steps": 60, "epsilon": 0.1},
}
"""Settings under which every method reaches its target on every tiny model (KN need not)."""

LASTING = {
    "encore": HPARAMS["memit"] | {"ridge": 1e-4},
    "nas": HPARAMS["alphaedit"] | {"sample": 2, "factor": None},
    "nas-memit": HPARAMS["memit"] | {"sample": 2, "factor": None},
    "prune": HPARAMS["memit"],
}
"""The same of methods that stand on these."""


@pytest.fixture(scope="session")
def smollm2():
    """The real model; tests that edit it must undo."""
    lm = kedit.load("smollm2-135m-instruct")
    _ = lm.fingerprint
    return lm
