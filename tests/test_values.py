"""The search that skips what delta cannot reach, against the plain one that runs everything."""

import plain
import pytest
import torch
from conftest import CONTEXTS, REQUEST

from kedit.editors.value_search import Search, search
from kedit.model.forward import lookup_text, lookup_texts


@pytest.mark.parametrize("subject", ["France", "New York"])
def test_fast_search_equals_the_plain_one(lm, subject):
    from dataclasses import replace

    request = replace(REQUEST, subject=subject)
    texts = lookup_texts(lm, request, CONTEXTS)
    target = lm.encode(" Rome London")
    assert len(target) > 1
    torch.manual_seed(0)
    init = torch.randn(lm.model.config.hidden_size)
    settings = Search(layer=1, steps=8, lr=0.3, decay=0.1, clamp=2.0, kl=0.5)
    kl_text = lookup_text(lm, "{} is a", subject)
    expected, losses = plain.search(lm, texts, kl_text, target, init, settings)
    found = search(lm, texts, kl_text, target, init, settings)
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert (found.delta - expected).norm() < 1e-4 * expected.norm()
    assert losses[-1] < losses[0]


def test_the_model_is_left_as_it_was(llama):
    blocks = list(llama.anatomy.blocks)
    texts = lookup_texts(llama, REQUEST, CONTEXTS)
    search(
        llama, texts, lookup_text(llama, "{} is a", "France"), llama.encode(" Rome"), torch.ones(32), Search(1, steps=2)
    )
    assert list(llama.anatomy.blocks) == blocks
    assert not any(p.requires_grad for p in llama.model.parameters())
