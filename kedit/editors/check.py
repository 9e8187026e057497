"""Does an editor keep the protocol? ``kedit.check_editor``, in the manner of scikit-learn's ``check_estimator``."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kedit.data.requests import EditRequest
from kedit.editors import kind_of, make_hparams
from kedit.editors.cost import Cost, Shape
from kedit.editors.protocol import Editor
from kedit.editors.second_moments import SecondMoments
from kedit.model.journal import Edit, EditFailed
from kedit.model.lm import LM

WIDTH, INNER, LAYERS = 32, 48, 4
SHAPE = Shape(WIDTH, LAYERS, INNER, 3, WIDTH, 257, 50_000, 512)


def tiny_model() -> LM:
    """A random Llama of four blocks that reads bytes."""
    symbols = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(symbols), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, initializer_range=0.3, max_position_embeddings=SHAPE.window,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return LM(model, PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=symbols[0]), "tiny")


def _state(lm: LM) -> dict[str, Any]:
    """Every bit of the weights and of the memories."""
    entries = {f"memory {name}": list(memory.entries) for name, memory in lm.memories.items()}
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()} | entries


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _require(held: bool, promise: str) -> None:
    if not held:
        raise AssertionError(f"an editor must {promise}")


def check_editor(kind: str | type[Editor], hparams: Mapping[str, Any] | None = None) -> None:
    """Edit a tiny random model three times, undo, replay and go on, and compare every bit.

    Args:
        kind: an editor's class, or the name of a registered one.
        hparams: for a Llama of 4 blocks, 32 wide; may be left out if the method has defaults for everything.

    Raises:
        AssertionError: which promise of the protocol is broken.
    """
    kind = kind_of(kind) if isinstance(kind, str) else kind
    lm = tiny_model()
    given = make_hparams(kind, lm.name, hparams)
    keys = torch.randn(LAYERS, 400, INNER, generator=torch.Generator().manual_seed(1))
    moments = SecondMoments(lm, moments={layer: some.T @ some / 400 for layer, some in enumerate(keys)})
    _require(isinstance(kind.label, str) and len(kind.style) == 3, "have a label, and a style of three")
    _require(isinstance(kind.cost(SHAPE, given, 1000), Cost), "know its cost")
    recipe = kind.recipe(given, moments.key)
    _require(json.loads(json.dumps(recipe))["method"] == kind.name, "have a recipe that JSON can hold")

    editor = kind(lm, given, moments)
    _require(editor.key() == recipe, "have its recipe as key")
    states, saved, infos = [_state(lm)], [], []
    for subject in ("France", "Peru", "Spain"):
        request = EditRequest(
            "The capital of {} is", subject, "Rome", "Paris", id=subject,
            paraphrases=(f"{subject} has the capital",), neighbours=(("The capital of Italy is", "Rome"),),
        )  # fmt: skip
        try:
            edit = editor.apply(request)
        except EditFailed:
            _require(_same(_state(lm), states[-1]), "leave the model alone where it fails")
            edit = Edit(kind.name, subject, info={"failed": True})
            lm.journal.replay(edit)
        changed = not _same(_state(lm), states[-1])
        _require(changed == (kind.edits and not {"failed", "skipped"} & set(edit.info)), "change something, or say why")
        states, saved, infos = [*states, _state(lm)], [*saved, edit.to_bytes()], [*infos, edit.info]
    lm.journal.edits[-1].undo()
    _require(_same(_state(lm), states[-2]), "undo to the bit")
    lm.journal.reset()
    _require(_same(_state(lm), states[0]), "undo everything to the bit")

    editor = kind(lm, given, moments)  # a second process, which goes on where the first was
    for data, state in zip(saved[:-1], states[1:], strict=False):
        lm.journal.replay(Edit.from_bytes(data))
        _require(_same(_state(lm), state), "replay a saved edit to the bit")
    if "failed" not in infos[-1]:
        again = editor.apply(request)
        _require(_same(_state(lm), states[-1]), "make the same edit where a run goes on: prepare on the unedited model")
        _require({**again.info, "seconds": 0} == {**infos[-1], "seconds": 0}, "tell the same of the same edit")
