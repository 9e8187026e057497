"""Lookup indices, activations and tails against whole forwards."""

from pathlib import Path

import pytest
import torch
from conftest import CONTEXTS, REQUEST

from kedit.data import facts
from kedit.model.forward import (
    LookupText,
    Tail,
    activations,
    capture,
    hooked,
    lookup_text,
    lookup_texts,
    skip_blocks,
)
from kedit.model.journal import EditFailed

DATA = Path(__file__).parents[2] / "shared" / "data" / "edits"


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("{} is a country", "France", "{}"),
        ("The capital of {} is", "New York", "Some words before. {}"),
        ("{}'s home is in", "São Paulo", "{}"),
        ("Who wrote {}?", "King Lear", "I. {}"),
    ],
)
def test_subject_position_by_its_text(llama, prompt, subject, template):
    """The tokens up to the position spell the text up to the subject's end; begin token first."""
    found = lookup_text(llama, prompt, subject, template)
    spelled = llama.tokenizer.decode(found.ids[1 : found.lookup + 1])
    text = template.replace("{}", prompt)
    assert spelled == text[: text.index("{}")] + subject
    assert found.ids[0] == llama.begin[0]
    assert found.lookup >= 1
    assert llama.tokenizer.decode(found.ids[1:]) == text.replace("{}", subject)


def test_a_subject_that_merges_with_what_follows_is_an_edit_that_fails(smollm2):
    """A run counts it and goes on (kedit/study/trajectory.py catches EditFailed alone)."""
    with pytest.raises(EditFailed, match="in 'They saw cats there' the subject 'cat' merges"):
        lookup_text(smollm2, "They saw {}s there", "cat")


@pytest.mark.skipif(not DATA.exists(), reason="the shared edit sets are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "file", "merging"),
    [
        ("counterfact", "counterfact-edit-first2000.json", [904]),
        ("zsre", "zsre_mend_eval_portability_gpt4.json",
         [14, 15, 19, 120, 160, 178, 376, 377, 542, 814, 835, 859, 860, 884, 899]),
    ],
)  # fmt: skip
def test_records_whose_subject_merges_with_what_follows(smollm2, name, file, merging):
    """Of the first 1,000; every other record's subject is found, and decodes to its last character."""
    failed = []
    for index, request in enumerate(facts.load(name, path=DATA / file)[:1000]):
        try:
            found = lookup_text(smollm2, request.prompt, request.subject)
        except EditFailed:
            failed.append(index)
            continue
        before = smollm2.tokenizer.decode(found.ids[len(smollm2.begin) : found.lookup + 1])
        assert before == request.prompt.partition("{}")[0] + request.subject
    assert failed == merging


@torch.no_grad()
def test_activations_and_tails_are_those_of_the_whole_forward(lm):
    """Each text read on its own, from its begin token to its end, is the measure."""
    texts = lookup_texts(lm, REQUEST, CONTEXTS)
    longer = [LookupText((*text.ids, *lm.encode(" is" * extra)), text.lookup) for extra, text in enumerate(texts)]
    layers, anatomy = (1, 2), lm.anatomy
    sites = {
        "key": anatomy.down,
        "value": anatomy.down,
        "attention": anatomy.attn_out,
        "hidden": anatomy.inner,
        "block": lambda layer: anatomy.blocks[layer],
    }
    tail = Tail(lm, longer, [-1, *layers])
    finals = {layer: tail.run(layer, states) for layer, states in tail.states.items()}
    for at, site in sites.items():
        found = activations(lm, longer, layers, at)
        for index, text in enumerate(longer):
            with capture(lm, {layer: site(layer) for layer in layers}, inputs=at == "key") as seen:
                last = anatomy.base(torch.tensor([text.ids])).last_hidden_state[0]
            for layer in layers:
                torch.testing.assert_close(found[layer][index], seen[layer][0, text.lookup], rtol=1e-4, atol=1e-4)
            for final in finals.values():
                expected = last[text.lookup :]
                torch.testing.assert_close(final[index, : len(expected)], expected, rtol=1e-3, atol=1e-4)


def test_whatever_is_hung_on_a_model_comes_off_again(llama):
    """Hooks and stand-ins, also after an error."""
    anatomy, blocks = llama.anatomy, list(llama.anatomy.blocks)

    def fail(*_):
        assert anatomy.blocks[0] is not blocks[0]
        raise ValueError("within")

    embedding = anatomy.base.get_input_embeddings()
    with pytest.raises(ValueError, match="within"), hooked({embedding: fail}), skip_blocks(anatomy.blocks, 2):
        llama.model(torch.tensor([[5]]))
    assert list(anatomy.blocks) == blocks
    assert not any(module._forward_hooks for module in llama.model.modules())
