"""The search that skips what delta cannot reach, against the plain one that runs everything."""

import plain
import pytest
import torch
from conftest import CONTEXTS, REQUEST

from kedit.editors.value_search import Objective, Search, search
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
    settings = Search(steps=7, lr=0.3, weight_decay=0.1, clamp_norm_factor=2.0, kl_factor=0.5)
    kl_text = lookup_text(lm, "{} is a", subject)
    expected, expected_losses = plain.search(lm, texts, kl_text, target, 1, init, settings)
    delta, losses = search(Objective(lm, texts, kl_text, target, 1), init, settings)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert (delta - expected).norm() < 1e-4 * expected.norm()
    assert losses[-1] < losses[0]


def test_the_model_is_left_as_it_was(llama):
    blocks = list(llama.anatomy.blocks)
    texts = lookup_texts(llama, REQUEST, CONTEXTS)
    objective = Objective(llama, texts, lookup_text(llama, "{} is a", "France"), llama.encode(" Rome"), 1)
    search(objective, torch.ones(32), Search(steps=1))
    assert list(llama.anatomy.blocks) == blocks
    assert not any(p.requires_grad for p in llama.model.parameters())
