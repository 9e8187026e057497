import pytest
import torch
from conftest import CONTEXTS, REQUEST

from kedit import KeditError
from kedit.data.corpus import SEQUENCE, sequences
from kedit.editors.contexts import context_templates
from kedit.editors.second_moments import SecondMoments
from kedit.model.forward import activations, lookup_text, lookup_texts


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


def test_a_subject_that_merges_with_what_follows_is_refused(smollm2):
    with pytest.raises(KeditError, match="merges"):
        lookup_text(smollm2, "They saw {}s there", "cat")


def test_activations_are_those_of_the_whole_forward(lm):
    texts = lookup_texts(lm, REQUEST, CONTEXTS)
    for at in ("key", "value", "block"):
        found = activations(lm, texts, [1, 2], at)
        for layer in (1, 2):
            for index, text in enumerate(texts):
                seen = {}
                module = lm.anatomy.blocks[layer] if at == "block" else lm.anatomy.down(layer)
                handle = module.register_forward_hook(
                    lambda _, args, output, at=at, seen=seen: seen.update(x=args[0] if at == "key" else output)
                )
                lm.model(torch.tensor([list(text.ids)]))
                handle.remove()
                assert torch.allclose(found[layer][index], seen["x"][0, text.lookup], rtol=1e-4, atol=1e-4)


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
    from kedit.data.corpus import corpus

    articles = corpus("wikipedia-sample")
    assert len(articles) > 100
    assert sum(map(len, articles)) > 2_500_000
    assert "Lincoln" in " ".join(articles)


def test_contexts_are_seeded_and_sized(llama):
    templates = context_templates(llama, [(3, 2), (6, 1)], seed=4)
    assert templates[0] == "{}"
    assert len(templates) == 4
    assert all(t.endswith(". {}") and t.count("{") == 1 for t in templates[1:])
    assert templates == context_templates(llama, [(3, 2), (6, 1)], seed=4)
    assert templates != context_templates(llama, [(3, 2), (6, 1)], seed=5)
