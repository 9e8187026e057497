"""Second moments, and the texts and context templates that editors start from."""

import hashlib

import pytest
import torch

from kedit import KeditError
from kedit.data.corpus import SEQUENCE, corpus, sequences
from kedit.editors.locate_then_edit import context_templates
from kedit.editors.second_moments import SecondMoments


def test_second_moment_is_the_mean_over_all_tokens(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is a town in the country of France. " * 200)
    statistics = SecondMoments(llama, str(text), 2 * SEQUENCE)
    keys = []
    for ids in sequences(llama, str(text), 2 * SEQUENCE):
        handle = llama.anatomy.down(1).register_forward_hook(lambda _, args, __: keys.append(args[0][0].double()))
        llama.model(torch.tensor([ids]))
        handle.remove()
    keys = torch.cat(keys)
    assert len(keys) == 2 * SEQUENCE
    expected = keys.T @ keys / len(keys)
    assert torch.allclose(statistics.moment(1), expected, rtol=1e-4, atol=1e-5)
    again = SecondMoments(llama, str(text), 2 * SEQUENCE)
    assert torch.equal(again.moment(1), statistics.moment(1))


def test_solve_inverts_the_second_moment(llama, moments):
    statistics = SecondMoments(llama, moments=moments)
    keys = torch.randn(moments[0].shape[0], 3)
    assert torch.allclose(statistics.moment(0) @ statistics.solve(0, keys), keys.double(), atol=1e-8)


def test_what_costs_m_cubed_is_paid_once(llama, tmp_path, monkeypatch):
    """A fresh process finds factor and eigenvectors on disk, and solves to the same bits."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is a town in the country of France. " * 200)
    keys = torch.randn(48, 3)

    def fresh():
        statistics = SecondMoments(llama, str(text), 2 * SEQUENCE)
        moment = statistics.moment(1)
        statistics._moments[1] += 1e-3 * torch.eye(len(moment))  # few tokens, all alike, leave C singular
        return statistics.solve(1, keys), *statistics.spectrum(1)

    first = fresh()
    for name in ("cholesky_ex", "eigh"):
        monkeypatch.setattr(torch.linalg, name, None)
    for found, expected in zip(fresh(), first, strict=True):
        assert torch.equal(found, expected)


def test_too_little_text_is_one_sentence(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(KeditError, match="fewer than"):
        sequences(llama, str(text), 1024)


def test_bundled_text_is_real_and_long_enough():
    articles = corpus("wikipedia-sample")
    assert len(articles) == 107
    assert "Lincoln" in " ".join(articles)
    # second moments and whatever follows from them depend on every byte
    text = hashlib.sha256("\x1e".join(articles).encode()).hexdigest()
    assert text == "64826bc5163460a965d576c4cf93d0f99b22a0ee88c36999db0eac59054e7cd1"


def test_contexts_are_seeded_and_sized(llama):
    templates = context_templates(llama, [(3, 2), (6, 1)], seed=4)
    assert templates[0] == "{}"
    assert len(templates) == 4
    assert all(t.endswith(". {}") and t.count("{") == 1 for t in templates[1:])
    assert templates == context_templates(llama, [(3, 2), (6, 1)], seed=4)
    assert templates != context_templates(llama, [(3, 2), (6, 1)], seed=5)
