"""The search that skips what delta cannot reach, against the plain one that runs everything."""

import pytest
import torch
from conftest import CONTEXTS, REQUEST

from kedit.keys import pad, row, rows
from kedit.values import STOP, Search, search


def plain(lm, texts, kl_text, target, init, settings):
    """Every row in full through the whole model at every step, delta put in by a hook on the MLP."""
    full = [[*text.ids, *target[:-1]] for text in texts] + [list(kl_text.ids)]
    places = [text.subject for text in texts] + [kl_text.subject]
    ids, mask = pad(full, lm.device)
    delta = torch.zeros_like(init, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.lr)
    before, losses = None, []

    def add(_, __, output):
        shift = torch.zeros_like(output)
        shift[range(len(full)), places] = 1.0
        return output + shift * delta

    for step in range(settings.steps):
        with torch.enable_grad():
            handle = lm.anatomy.down(settings.layer).register_forward_hook(add)
            logprobs = lm.model(ids, attention_mask=mask).logits.log_softmax(-1)
            handle.remove()
            nll = 0.0
            for i, text in enumerate(texts):
                start = len(text.ids) - 1
                nll = nll - sum(logprobs[i, start + j, t] for j, t in enumerate(target)) / len(target)
            now = logprobs[len(texts), kl_text.subject]
            before = now.detach() if before is None else before
            divergence = torch.nn.functional.kl_div(now, before, log_target=True, reduction="sum")
            loss = nll / len(texts) + settings.kl * divergence + settings.decay * delta.norm() / init.norm() ** 2
        losses.append(loss.item())
        if loss < STOP or step == settings.steps - 1:
            return delta.detach(), losses
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            delta *= min(1.0, (settings.clamp * init.norm() / delta.norm()).item())


@pytest.mark.parametrize("subject", ["France", "New York"])
def test_fast_search_equals_the_plain_one(lm, subject):
    from dataclasses import replace

    request = replace(REQUEST, subject=subject)
    texts = rows(lm, request, CONTEXTS)
    target = lm.encode(" Rome London")
    assert len(target) > 1
    torch.manual_seed(0)
    init = torch.randn(lm.model.config.hidden_size)
    settings = Search(layer=1, steps=8, lr=0.3, decay=0.1, clamp=2.0, kl=0.5)
    kl_text = row(lm, "{} is a", subject)
    expected, losses = plain(lm, texts, kl_text, target, init, settings)
    found = search(lm, texts, kl_text, target, init, settings)
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert (found.delta - expected).norm() < 1e-4 * expected.norm()
    assert losses[-1] < losses[0]


def test_the_model_is_left_as_it_was(llama):
    blocks = list(llama.anatomy.blocks)
    texts = rows(llama, REQUEST, CONTEXTS)
    search(llama, texts, row(llama, "{} is a", "France"), llama.encode(" Rome"), torch.ones(32), Search(1, steps=2))
    assert list(llama.anatomy.blocks) == blocks
    assert not any(p.requires_grad for p in llama.model.parameters())
