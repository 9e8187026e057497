"""Every method on a tiny random model of every architecture: what it promises, the model says, read plainly.

The plain reading is that of transformers' own class, without anything of kedit's. The table of CONTRIBUTING.md lists
what is tested here.
"""

import math
import re

import plain
import pytest
import torch
from conftest import HPARAMS, INNER, LASTING, LAYERS, WIDTH
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import kedit
from kedit import KeditError
from kedit.data.facts import bundled, bundled_zsre
from kedit.data.requests import EditRequest
from kedit.editors import ike, known, mend, rag, retrieval, serac, ultraedit
from kedit.editors.kn import attributions
from kedit.editors.second_moments import SecondMoments
from kedit.editors.training import ScoredText
from kedit.model import probes
from kedit.model.forward import capture
from kedit.model.lm import LM
from kedit.model.memory import routes
from kedit.model.scoring import read

SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "pad_token_id": None,
}
SHARED = SHAPE | {"num_key_value_heads": 2}
OLD = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_inner": INNER, "n_positions": 2048}
NARROW = {"sliding_window": 8}
FAMILIES = {
    "llama": SHARED | {"tie_word_embeddings": True},
    "mistral": SHARED | NARROW,
    "gpt2": OLD,
    "gpt_neox": SHAPE | {"rotary_pct": 0.25},
    "qwen2": SHARED | NARROW | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": SHARED | {"head_dim": 8},
    "phi3": SHARED | NARROW,
    "smollm3": SHARED,
    "granite": SHARED
    | {"residual_multiplier": 0.3, "logits_scaling": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "olmo2": SHARED,
    "gemma2": SHARED | NARROW | {"head_dim": 8, "final_logit_softcapping": 20.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": SHARED | NARROW | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gptj": OLD | {"rotary_dim": 4},
    "falcon": {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
    | {"ffn_hidden_size": INNER, "multi_query": True, "parallel_attn": True, "bias": True, "alibi": False},
    "starcoder2": SHARED | NARROW,
    "stablelm": SHARED | {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
}
"""The type of a configuration, and its fields; windows are shorter than the texts."""
NAMES = dict(zip(FAMILIES, [
    "Llama", "Mistral", "GPT-2", "GPT-NeoX", "Qwen2", "Qwen3", "Phi3", "SmolLM3", "Granite", "OLMo2", "Gemma2",
    "Gemma3", "GPT-J", "Falcon", "StarCoder2", "StableLM",
], strict=True))  # fmt: skip
INSIDE = ("granite", "olmo2", "gemma2", "gemma3_text")
"""Where what an MLP writes does not arrive in the residual stream as it is."""
REQUEST = EditRequest("The capital city of {}", "France", " Rome", "Paris")
SETTINGS = HPARAMS | LASTING | {
    "alphaedit": HPARAMS["alphaedit"] | {"nullspace_threshold": 2.0},
    "nas": LASTING["nas"] | {"nullspace_threshold": 2.0},
    "mend": {"layers": [1, 2], "rank": 8, "steps": 1, "accumulate": 2},
    "serac": {"steps": 1, "batch": 1, "scope_batch": 4},
    "ike": {"k": 8},
    "rag": {"k": 2},
    "ultraedit": {"layers": [1, 2], "lr": 1e-4, "warmup": 6},
    "locft": {"layer": 2, "lr": 0.03, "epochs": 60},
}  # fmt: skip
METHODS = [name for name in known() if name != "control"]


def build(family, tokenizer, **changes):
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **common, **FAMILIES.get(family, SHARED), **changes)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():  # norms and biases as after training, where they matter
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 0.0 if name.endswith("bias") or "gemma" in family else 1.0, 0.1)
    return model


@pytest.fixture(scope="module")
def encoder():
    return retrieval.Encoder()


@pytest.fixture(autouse=True)
def few_facts(monkeypatch, encoder, tmp_path):
    """Few facts to train on and to show, and one encoder, so that nothing waits for embeddings."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    for module in (mend, serac, ike):
        monkeypatch.setattr(module, "bundled", lambda split: bundled(split)[:8])
    monkeypatch.setattr(serac, "bundled_zsre", lambda split: bundled_zsre(split)[:8])
    for module in (serac, ike, rag):
        monkeypatch.setattr(module, "Encoder", lambda device: encoder)


def apart(lm):
    """Second moments by which no update touches the tokens before the subject's last, which the search does not either."""
    ids = torch.tensor([[*lm.begin, *lm.encode(REQUEST.text)]])
    downs = {layer: lm.anatomy.down(layer) for layer in range(lm.layers)}
    with capture(lm, downs, inputs=True) as keys, torch.no_grad():
        lm.model(ids)
    before = {layer: found[0, :-1] / found[0, :-1].norm() for layer, found in keys.items()}
    return SecondMoments(lm, moments={layer: torch.eye(INNER) + 1e6 * some.T @ some for layer, some in before.items()})


def plainly(model, context, continuation):
    """Log-probability of a continuation by the model's own forward."""
    logits = model(torch.tensor([[*context, *continuation[:-1]]])).logits[0, len(context) - 1 :]
    return logits.float().log_softmax(-1)[range(len(continuation)), list(continuation)].sum().item()


def close(one, other):
    return abs(math.exp(one) - math.exp(other)) < 0.01 and abs(one - other) < 0.05


def promised_by_search(lm, editor):
    """ROME, R-ROME, MEMIT, AlphaEdit: the probability that the search reached; fine-tuning: that of its loss."""
    prompt, target = editor.prompt_ids(REQUEST), editor.target_ids(REQUEST)
    start = plainly(lm.model, prompt, target)
    info = editor.apply(REQUEST).info
    promise = math.log(info["probability"]) if "probability" in info else -info["loss"]
    assert promise > start + 2
    assert close(promise, plainly(lm.model, prompt, target))
    return lm.anatomy


def promised_by_pmet(lm, editor):
    """The output of the last layer's MLP at the subject: what it was, and the delta that was found."""
    found, down, values = [], lm.anatomy.down(2), []
    search = editor._search
    editor._search = lambda *args: found.append(search(*args)) or found[0]
    handle = down.register_forward_hook(lambda _, __, output: values.append(output[0, -1].clone().double()))
    lm.model(torch.tensor([editor.prompt_ids(REQUEST)]))
    editor.apply(REQUEST)
    lm.model(torch.tensor([editor.prompt_ids(REQUEST)]))
    handle.remove()
    assert found[0].norm() > 0.1
    assert (values[-1] - values[0] - found[0]).norm() < 0.01 * found[0].norm()


def promised_by_anchor(lm, editor):
    """NAS: the state that the value of the anchor's norm makes, by the model's own forward."""
    last, texts = editor.hparams.layers[-1], [torch.tensor([editor.prompt_ids(REQUEST)])]
    deltas, states, search = [], [], editor._search
    editor._search = lambda *args: deltas.append(search(*args)) or deltas[-1]
    site = lm.anatomy.blocks[last] if lm.anatomy.direct[last] else lm.anatomy.down(last)
    with capture(lm, {0: site}, inputs=False) as seen:
        lm.model(*texts)
        states.append(seen[0][0, -1].double())
        info = editor.apply(REQUEST).info
        lm.model(*texts)
        states.append(seen[0][0, -1].double())
    assert info["value_norm"] > 0
    if lm.anatomy.direct[last]:
        assert (states[1] - states[0] - deltas[0]).norm() < 0.01 * deltas[0].norm()
    else:
        assert states[1].norm().item() == pytest.approx(editor.anchor, rel=0.01)


def promised_by_kn(lm, editor):
    """Attributions are those of integrating through the whole model; the columns of the chosen neurons move."""
    ids = editor.prompt_ids(REQUEST)
    torch.testing.assert_close(
        attributions(lm, ids, 7, 5), plain.attributions(lm, ids, 7, 5), rtol=1e-3, atol=1e-6 * lm.layers
    )
    assert editor.apply(REQUEST).info["neurons"] > 0


def promised_by_mend(lm, editor):
    """What the model says with the network's update put in by hooks, it says with the update written."""
    editor.prepare()
    text = ScoredText.of(lm, REQUEST.text, REQUEST.target_new)
    upper = mend.UpperBlocks(lm, editor.hparams.layers)
    with torch.no_grad():
        updates = [(1e4 * right, left) for right, left in editor.network(upper.factors([text])[0])]
        promise = -mend.nll(upper.logprobs([text], updates), [text]).item()
        editor.network.rates.mul_(1e4)
    prompt, target = editor.prompt_ids(REQUEST), editor.target_ids(REQUEST)
    start = plainly(lm.model, prompt, target)
    editor.apply(REQUEST)
    assert abs(promise - start) > 0.05
    assert close(promise, plainly(lm.model, prompt, target))


def promised_by_grace(lm, editor):
    """The learned value's loss, when the model answers with its memory; nothing else changes."""
    prompt, target, other = editor.prompt_ids(REQUEST), editor.target_ids(REQUEST), lm.encode("An old tale")
    start, before = plainly(lm.model, prompt, target), read(lm, [(other, target)], [])[0][0][0]
    loss = editor.apply(REQUEST).info["loss"]
    assert -loss > start + 2
    assert close(-loss, read(lm, [(prompt, target)], [])[0][0][0])
    assert read(lm, [(other, target)], [])[0][0][0] == before


def promised_by_memory(lm, editor):
    """SERAC and IKE: what the route's model says, reading the route's text alone."""
    prompt, target = editor.prompt_ids(REQUEST), editor.target_ids(REQUEST)
    editor.apply(REQUEST)
    route = routes(lm, [tuple(prompt)])[tuple(prompt)]
    said = read(lm, [(prompt, target)], [])[0][0][0]
    assert close(said, plainly(route.lm.model, route.ids, target))
    assert abs(said - plainly(lm.model, prompt, target)) > 1e-3
    if editor.name == "serac":  # every norm was trained
        own, trained = serac.norms(lm), serac.norms(editor.reader)
        assert len(own) >= 2 * LAYERS
        assert not any(torch.equal(own[name], weight) for name, weight in trained.items())


def promised_by_ultraedit(lm, editor):
    """The loss is the model's own, with a row for each token of the object; the step lowers it."""
    texts = [editor._text(REQUEST)]
    pairs, loss = ultraedit.read(lm, editor.modules, texts)
    prompt, target = editor.prompt_ids(REQUEST), editor.target_ids(REQUEST)
    assert close(-loss * len(target), plainly(lm.model, prompt, target))
    assert all(len(h) == len(q) == len(target) for h, q in pairs)
    editor.apply(REQUEST)
    assert plainly(lm.model, prompt, target) > -loss * len(target)


def promised_by_locft(lm, editor):
    """The loss of its last epoch is that of the object and the end, before the last step, if that was one."""
    prompt, target = editor.prompt_ids(REQUEST), [*editor.target_ids(REQUEST), lm.tokenizer.eos_token_id]
    start = plainly(lm.model, prompt, target)
    info = editor.apply(REQUEST).info
    assert info["loss_before"] == pytest.approx(-start / len(target), rel=1e-3)
    assert plainly(lm.model, prompt, target) > start + 1
    assert info["loss"] < info["loss_before"] - 0.5


PROMISES = {
    "nas": promised_by_anchor, "nas-memit": promised_by_anchor,
    "pmet": promised_by_pmet, "kn": promised_by_kn, "mend": promised_by_mend, "grace": promised_by_grace,
    "serac": promised_by_memory, "ike": promised_by_memory, "rag": promised_by_memory,
    "ultraedit": promised_by_ultraedit, "locft": promised_by_locft,
}  # fmt: skip
FAST = ("gemma3_text", "phi3", "falcon")
"""What is unlike Llama in some way each; the rest is slow."""


def on(families):
    return [pytest.param(family, marks=[] if family in FAST else pytest.mark.slow) for family in families]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", on(FAMILIES))
def test_what_a_method_promises_the_edited_model_says(family, method, tokenizer):
    lm = LM(build(family, tokenizer), tokenizer, family)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    editor = kedit.editor(method, lm, hparams=SETTINGS[method], statistics=apart(lm), contexts=["{}"])
    PROMISES.get(method, promised_by_search)(lm, editor)
    lm.journal.reset()
    assert all(torch.equal(before[name], weight) for name, weight in lm.model.state_dict().items())


@pytest.mark.parametrize("family", on(FAMILIES))
def test_packed_reading_is_the_models_own(family, tokenizer):
    """Texts longer than the windows, with a common beginning, scored side by side; and generated."""
    lm = LM(build(family, tokenizer), tokenizer, family)
    assert lm.anatomy.direct == [family not in INSIDE] * LAYERS
    assert not lm.anatomy.missing
    texts = ["The capital of France is Paris, of Italy", "The capital of Spain is a city, and"]
    contexts = [[*lm.begin, *lm.encode(text)] for text in texts]
    assert min(map(len, contexts)) > 9
    pairs = [(context, lm.encode(more)) for context in contexts for more in (" Rome and Milan", " London")]
    scores, generated = read(lm, pairs, contexts, limit=6)
    for pair, (score, _) in zip(pairs, scores, strict=True):
        assert score == pytest.approx(plainly(lm.model, *pair), abs=1e-3)
    for context, new in zip(contexts, generated, strict=True):
        ids = list(context)
        while len(ids) < len(context) + 6:
            ids.append(lm.model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert new == ids[len(context) :]


def test_the_table_of_architectures_is_what_is_tested():
    text = (kedit.ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| (in front|direct) \|$", text, re.MULTILINE)
    assert rows == [(name, "in front" if family in INSIDE else "direct") for family, name in NAMES.items()]


# Refusals -------------------------------------------------------------------------------------------


class Louder(LlamaForCausalLM):
    """A model that does something to its logits that no configuration tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


MAMBA = {"hidden_size": WIDTH, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("bert", {}, "BertLMHeadModel, so no method can be used on it: its logits"),
        ("gemma3_text", SHARED | {"use_bidirectional_attention": True}, "Gemma3ForCausalLM.* its tokens see later ones"),
        ("bloom", {"hidden_size": WIDTH, "n_head": 4, "n_layer": 2}, "BloomForCausalLM, so no method can be used"),
        ("gpt_neo", {"hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
         "GPTNeoForCausalLM has .*window_size"),
        ("mamba", MAMBA, "MambaForCausalLM"),
        ("qwen3_next", SHARED | {"num_experts": 2}, "Qwen3NextForCausalLM has layers of .*linear_attention"),
    ],
)  # fmt: skip
def test_what_kedit_would_read_wrong_is_refused_in_one_sentence(family, changes, sentence, tokenizer):
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **(changes or SHARED))
    with pytest.raises(KeditError, match=sentence):
        LM(AutoModelForCausalLM.from_config(config), tokenizer)


def test_logits_that_nobody_tells_of_are_refused(tokenizer):
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SHARED)
    with pytest.raises(KeditError, match="Louder, so no method can be used on it: its logits"):
        LM(Louder(config), tokenizer)


def test_experts_cannot_be_edited_and_can_be_shown_edits(tokenizer):
    """A method that needs what a model lacks says so; the others work."""
    lm = LM(build("mixtral", tokenizer, num_local_experts=2), tokenizer)
    for method in METHODS:
        if method in ("serac", "ike", "rag"):
            promised_by_memory(lm, kedit.editor(method, lm, hparams=SETTINGS[method]))
            lm.journal.reset()
            del lm.memories[method]
            continue
        with pytest.raises(KeditError, match=f"^{method} cannot be used on MixtralForCausalLM: its blocks have no MLP"):
            kedit.editor(method, lm, hparams=SETTINGS[method])


def test_a_model_is_probed_once(tokenizer, monkeypatch):
    model = build("llama", tokenizer)
    first = LM(model, tokenizer)
    monkeypatch.setattr(probes, "_read", lambda lm: pytest.fail("probed again"))
    again = LM(model, tokenizer)
    assert (again.anatomy.orders, again.anatomy.direct) == (first.anatomy.orders, first.anatomy.direct)
