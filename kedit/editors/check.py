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
from kedit.editors.protocol import Editor
from kedit.editors.second_moments import SecondMoments
from kedit.model.journal import Edit, EditFailed
from kedit.model.lm import LM

LAYERS, D, M = 4, 32, 48
"""Of the tiny model: blocks, and the outer and inner width of their MLPs."""


def tiny_model() -> LM:
    """A random Llama of four blocks that reads bytes."""
    symbols = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    shape = {"hidden_size": D, "intermediate_size": M, "num_hidden_layers": LAYERS}
    config = LlamaConfig(vocab_size=len(symbols), num_attention_heads=4, initializer_range=0.3, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LM(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=bpe), "tiny")


def _state(lm: LM) -> dict[str, Any]:
    """Every bit of the weights and of the memories."""
    memories = {
        name: json.dumps(memory.entries, default=Tensor.tolist, sort_keys=True) for name, memory in lm.memories.items()
    }
    return {name: tensor.numpy().tobytes() for name, tensor in lm.model.state_dict().items()} | memories


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
    keys = torch.randn(LAYERS, 400, M, generator=torch.Generator().manual_seed(1))
    moments = SecondMoments(lm, moments={layer: some.T @ some / 400 for layer, some in enumerate(keys)})
    assert isinstance(kind.label, str), "an editor has a label"
    assert len(kind.style) == 3, "an editor's style is a colour, a marker and a dash"
    editor, recipe = kind(lm, given, moments), kind.recipe(given, moments.key)
    assert json.loads(json.dumps(recipe))["method"] == kind.name, "an editor's recipe is plain and names the method"
    assert recipe.items() <= editor.key().items(), "an editor's key holds its recipe"

    states, saved = [_state(lm)], []
    for subject in ("France", "Peru", "Spain"):
        request = EditRequest("The capital of {} is", subject, "Rome", "Paris", ("It has",), (("Italy", "Rome"),))
        try:
            edit = editor.apply(request)
        except EditFailed:
            assert _state(lm) == states[-1], "an edit that fails leaves the model alone"
            edit = Edit(kind.name, request.id, info={"failed": True})
            lm.journal.replay(edit)
        states, saved = [*states, _state(lm)], [*saved, edit.to_bytes()]
    assert (states[-1] == states[0]) != kind.edits, "an editor changes something"
    with editor.shown():
        pass
    assert _state(lm) == states[-1], "what a checkpoint shows leaves the edited model alone"
    edit.undo()
    assert _state(lm) == states[-2], "an edit is undone to the bit"
    lm.journal.reset()
    assert _state(lm) == states[0], "all edits are undone to the bit"

    editor = kind(lm, given, moments)  # as in a second process, which goes on where the first was
    for data, state in zip(saved[:-1], states[1:], strict=False):
        lm.journal.replay(Edit.from_bytes(data))
        assert _state(lm) == state, "a saved edit is replayed to the bit"
    if "failed" not in edit.info:
        info = editor.apply(request).info
        assert _state(lm) == states[-1], "an editor made later prepares on the unedited model, and edits alike"
        assert info.keys() == edit.info.keys(), "the same edit has the same info"
