"""Each weight editor against a dense derivation in float64, on all four architectures."""

import plain
import pytest
import torch
from conftest import CONTEXTS, HPARAMS, REQUEST
from plain import weights

import kedit
from kedit import KeditError
from kedit.data.requests import EditRequest
from kedit.editors.kn import attributions
from kedit.editors.pmet import adding
from kedit.editors.value_search import Objective, search
from kedit.model.anatomy import matrix
from kedit.model.forward import activations, capture, hooked, lookup_text, lookup_texts


def delta_of(editor, texts, init, subject="France"):
    """What the value search finds for " Rome", (d,) float64."""
    lm, hparams = editor.lm, editor.hparams
    kl_text = lookup_text(lm, "{} is a", subject)
    return search(Objective(lm, texts, kl_text, lm.encode(" Rome"), hparams.layers[-1]), init, hparams)[0].double()


def close(found, expected, tolerance=1e-4):
    return (found - expected).norm() < tolerance * expected.norm()


def test_rome_is_the_closed_form(lm, statistics, moments):
    """W' k = v* exactly, and the update is (v* - W k) (C^-1 kbar)^T / (k . C^-1 kbar) (ROME eq. 2)."""
    editor = kedit.editor("rome", lm, hparams=HPARAMS["rome"], statistics=statistics(lm), contexts=CONTEXTS)
    texts = lookup_texts(lm, REQUEST, CONTEXTS)
    down = lm.anatomy.down(2)
    old = matrix(down).double().clone()
    keys = activations(lm, texts, [2], "key")[2].double()
    output = activations(lm, texts[:1], [2], "value")[2][0]
    delta = delta_of(editor, texts, output)
    turned = torch.linalg.inv(moments[2].double()) @ keys.mean(0)
    expected = torch.outer(delta, turned) / (keys[0] @ turned)

    edit = editor.apply(REQUEST)
    update = matrix(down).double() - old
    assert (update - expected).norm() < 1e-5 * expected.norm()
    after = activations(lm, texts[:1], [2], "value")[2][0].double()
    assert (after - (output.double() + delta)).norm() < 1e-4 * (output.double() + delta).norm()
    own = torch.linalg.inv(moments[2].double()) @ keys[0]
    ratio = (own @ keys[0] / own.norm()) / (turned @ keys[0] / turned.norm())
    assert edit.info["amplification"] == pytest.approx(ratio.item(), rel=1e-6)


def test_memit_is_the_normal_equations(lm, statistics, moments):
    """Layer by layer, Delta = R K^T (lambda C + K K^T)^-1 with R an equal share of what is left."""
    hparams = HPARAMS["memit"]
    editor = kedit.editor("memit", lm, hparams=hparams, statistics=statistics(lm), contexts=CONTEXTS)
    texts = lookup_texts(lm, REQUEST, CONTEXTS)
    layers, last = hparams["layers"], hparams["layers"][-1]
    start = activations(lm, texts[:1], [last], "block")[last][0].double()
    goal = start + delta_of(editor, texts, start)
    olds = {layer: matrix(lm.anatomy.down(layer)).double().clone() for layer in layers}
    expected = {}
    for position, layer in enumerate(layers):
        keys = activations(lm, texts, [layer], "key")[layer].double()
        key = (keys[0] + keys[1:].mean(0)) / 2
        left = goal - activations(lm, texts[:1], [last], "block")[last][0].double()
        solved = plain.ridge(moments[layer], hparams["mom2_weight"], key[:, None])
        expected[layer] = (left / (len(layers) - position))[:, None] @ solved.T
        matrix(lm.anatomy.down(layer)).copy_(olds[layer] + expected[layer])
    for layer in layers:
        matrix(lm.anatomy.down(layer)).copy_(olds[layer])

    editor.apply(REQUEST)
    for layer in layers:
        update = matrix(lm.anatomy.down(layer)).double() - olds[layer]
        assert (update - expected[layer]).norm() < 1e-4 * expected[layer].norm()


def test_r_rome_maps_the_averaged_key(lm, statistics, moments):
    """With one key throughout, Delta = (v* - W kbar) (C^-1 kbar)^T / (kbar^T C^-1 kbar)."""
    editor = kedit.editor("r-rome", lm, hparams=HPARAMS["r-rome"], statistics=statistics(lm), contexts=CONTEXTS)
    texts = lookup_texts(lm, REQUEST, CONTEXTS)
    old = weights(lm, [2])[2]
    key = activations(lm, texts, [2], "key")[2].double().mean(0)
    outputs = activations(lm, texts, [2], "value")[2]
    left = outputs[0].double() + delta_of(editor, texts, outputs[0]) - outputs.double().mean(0)
    turned = torch.linalg.inv(moments[2].double()) @ key
    edit = editor.apply(REQUEST)
    assert close(weights(lm, [2])[2] - old, torch.outer(left, turned) / (key @ turned))
    assert edit.info["amplification"] == pytest.approx(1)


def mean_key(lm, texts, layer):
    keys = activations(lm, texts, [layer], "key")[layer].double()
    return (keys[0] + keys[1:].mean(0)) / 2


def test_alphaedit_is_the_projected_system(lm, statistics, moments):
    """Three edits in a row: X solves (P (K K^T + M) + L2 I) X = P K R^T with dense, unsymmetric matrices."""
    hparams = HPARAMS["alphaedit"]
    editor = kedit.editor("alphaedit", lm, hparams=hparams, statistics=statistics(lm), contexts=CONTEXTS)
    projections = {}
    for layer in hparams["layers"]:
        values, vectors = torch.linalg.eigh(moments[layer].double())
        small = values.cumsum(0) <= hparams["null_space_share"] * values.sum()
        assert 0 < small.sum() < len(values)
        projections[layer] = vectors[:, small] @ vectors[:, small].T
    held = dict.fromkeys(hparams["layers"], 0.0)
    identity = torch.eye(len(projections[1]), dtype=torch.float64)
    for subject in ("France", "Peru", "Spain"):
        request = EditRequest("The capital city of {}", subject, "Rome", "Paris")
        texts = lookup_texts(lm, request, CONTEXTS)
        start = activations(lm, texts[:1], [2], "block")[2][0].double()
        goal, olds = start + delta_of(editor, texts, start, subject), weights(lm, hparams["layers"])
        for position, layer in enumerate(hparams["layers"]):
            key, projection = mean_key(lm, texts, layer), projections[layer]
            left = (goal - activations(lm, texts[:1], [2], "block")[2][0].double()) / (2 - position)
            solved = plain.null_space(projection, held[layer], hparams["l2"], key[:, None])
            matrix(lm.anatomy.down(layer)).copy_(olds[layer] + left[:, None] @ solved.T)
        expected = weights(lm, hparams["layers"])
        for layer, old in olds.items():
            matrix(lm.anatomy.down(layer)).copy_(old)
        editor.apply(request)
        for layer, old in olds.items():
            update = weights(lm, [layer])[layer] - old
            assert close(update, expected[layer] - old, 1e-3)
            # keys of ordinary text, outside the null space, are mapped as before
            assert (update @ (identity - projections[layer])).norm() < 1e-4 * update.norm()
            key = mean_key(lm, texts, layer)
            held[layer] = held[layer] + torch.outer(key, key)


def test_pmet_is_the_normal_equations_of_the_mlp_alone(lm, statistics, moments):
    """Given z, layers take 1 / sqrt(layers to come) of what the last MLP's output lacks."""
    hparams = HPARAMS["pmet"]
    editor = kedit.editor("pmet", lm, hparams=hparams, statistics=statistics(lm), contexts=CONTEXTS)
    texts = lookup_texts(lm, REQUEST, CONTEXTS)
    olds, deltas = weights(lm, hparams["layers"]), []
    unheard = editor._search
    editor._search = lambda *args: deltas.append(unheard(*args)) or deltas[-1]
    edit = editor.apply(REQUEST)
    news = weights(lm, hparams["layers"])
    edit.undo()
    goal = activations(lm, texts[:1], [2], "value")[2][0].double() + deltas[0]
    for position, layer in enumerate(hparams["layers"]):
        key = mean_key(lm, texts, layer)
        left = goal - activations(lm, texts[:1], [2], "value")[2][0].double()
        solved = plain.ridge(moments[layer], hparams["mom2_weight"], key[:, None])
        expected = (left / (2 - position) ** 0.5)[:, None] @ solved.T
        assert close(news[layer] - olds[layer], expected)
        matrix(lm.anatomy.down(layer)).copy_(olds[layer] + expected)


def test_pmet_counted_from_the_left_in_batches_padded_on_the_left(lm, statistics, moments):
    """Search, keys and update of the released code with really padded batches; what is left of z is read without."""
    request = EditRequest("The capital city of {} is", "France", "Rome London", "Paris")
    hparams = HPARAMS["pmet"] | {"steps": 7, "kl_factor": 0.0625, "lr": 0.5, "left_padding": True}
    editor = kedit.editor("pmet", lm, hparams=hparams, statistics=statistics(lm), contexts=CONTEXTS)
    texts, target = lookup_texts(lm, request, CONTEXTS), editor.target_ids(request)
    assert len({len(text.ids) for text in texts}) == 3
    lm.model.set_attn_implementation("eager")
    assert len(target) > 1
    kl_text = lookup_text(lm, "{} is a", "France")
    z, losses = plain.pmet_counted_from_the_left(lm, texts, kl_text, target, 2, editor.hparams)
    olds = weights(lm, [1, 2])
    lm.model.set_attn_implementation("sdpa")
    edit = editor.apply(request)
    assert lm.model.config._attn_implementation == "sdpa"
    lm.model.set_attn_implementation("eager")
    news = weights(lm, [1, 2])
    assert edit.info["loss"] == pytest.approx(losses[-1], rel=1e-3)
    edit.undo()
    for position, layer in enumerate((1, 2)):
        with capture(lm, {0: lm.anatomy.down(layer)}, inputs=True) as seen:
            lm.model(**plain.left_padded(lm, [text.ids for text in texts]))
        keys = torch.stack([seen[0][row, text.lookup].double() for row, text in enumerate(texts)])
        left = z.double() - activations(lm, texts[:1], [2], "value")[2][0].double()
        solved = plain.ridge(moments[layer], hparams["mom2_weight"], ((keys[0] + keys[1:].mean(0)) / 2)[:, None])
        expected = (left / (2 - position) ** 0.5)[:, None] @ solved.T
        assert close(news[layer] - olds[layer], expected, 2e-3)
        matrix(lm.anatomy.down(layer)).copy_(olds[layer] + expected)


def test_pmet_moves_both_sublayers(lm):
    """Shifts of attention and MLP put into the tail equal the same shifts in the whole model."""
    texts = lookup_texts(lm, REQUEST, CONTEXTS)
    torch.manual_seed(0)
    deltas = [torch.randn(32) for _ in range(2)]
    sites = (lm.anatomy.down(2), lm.anatomy.attn_out(2))
    objective = Objective(lm, texts, lookup_text(lm, "{} is a", "France"), lm.encode(" Rome"), 1)
    with hooked({site: adding(delta) for site, delta in zip(sites, deltas, strict=True)}):
        objective.losses(objective.tail.run(1, objective.tail.states[1]))

    def add(place, delta):
        def hook(module, args, output):
            output = output.clone()
            output[:, place] += delta
            return output

        return hook

    for index, text in enumerate(texts):
        with hooked({site: add(text.lookup, delta) for site, delta in zip(sites, deltas, strict=True)}):
            logits = lm.model(torch.tensor([text.ids])).logits[0, -1]
        assert objective.logprobs[index, 0].item() == pytest.approx(
            logits.log_softmax(-1)[lm.encode(" Rome")[0]].item(), abs=1e-4
        )


@pytest.mark.parametrize("method", ["ft-l", "ft-m"])
def test_fine_tuning_is_adam_on_one_matrix(lm, method):
    """Against torch's own optimiser on the live weight, the whole model in every step."""
    request = EditRequest("The capital city of {}", "France", "Rome London", "Paris")
    prompt, target = [*lm.begin, *lm.encode(request.text)], lm.encode(" Rome London")
    assert len(target) > 1
    weight = lm.anatomy.down(2).weight
    old = weight.detach().clone()
    places = [len(prompt) - 1] * len(target)
    if method == "ft-m":
        places = [len(prompt) - 1 + i for i in range(len(target))]
    weight.requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=0.01)
    for _ in range(5):
        with torch.enable_grad():
            logprobs = lm.model(torch.tensor([[*prompt, *target[:-1]]])).logits[0].log_softmax(-1)
            loss = -sum(logprobs[place, token] for place, token in zip(places, target, strict=True)) / len(target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    weight.requires_grad_(False)
    expected = weight.detach().clone() - old
    weight.copy_(old)
    kedit.editor(method, lm, hparams={"layer": 2, "lr": 0.01, "steps": 5, "stop": 0.0}).apply(request)
    # Adam turns gradients of the size of rounding into steps of full size, so compare in norm
    assert close(weight - old, expected, 0.02)


def test_kn_attributions_sum_to_the_difference_of_probabilities(lm):
    """Completeness of integrated gradients, layer by layer, and the gradient against autograd's."""
    ids, answer, steps = [*lm.begin, *lm.encode("The capital city of France")], lm.encode(" Rome")[0], 400
    found = attributions(lm, ids, answer, steps)

    def said(layer, share):
        def scale(module, args, output):
            output = output.clone()
            output[:, -1] *= share
            return output

        handle = lm.anatomy.inner(layer).register_forward_hook(scale)
        probability = lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[answer].item()
        handle.remove()
        return probability

    for layer in range(lm.layers):
        whole = said(layer, 1.0) - said(layer, 0.0)
        assert found[layer].sum().item() == pytest.approx(whole, abs=0.02 * abs(whole) + 1e-6)
    assert found.abs().max() > 0


def test_kn_copies_run_together_equal_one_by_one(lm, monkeypatch):
    ids, answer = [*lm.begin, *lm.encode("The capital city of France")], lm.encode(" Rome")[0]
    expected = plain.attributions(lm, ids, answer, 4)
    for copies in (120, 8):  # all layers in one batch, and two layers in each
        monkeypatch.setattr("kedit.editors.kn.COPIES", copies)
        assert close(attributions(lm, ids, answer, 4), expected)


@pytest.mark.parametrize("rule", ["authors", "t-2a", "2t-2a"])
def test_kn_writes_embeddings_into_the_chosen_columns(lm, rule):
    prompt, old = [*lm.begin, *lm.encode(REQUEST.text)], weights(lm, range(lm.layers))
    now = int(lm.model(torch.tensor([prompt])).logits[0, -1].argmax())
    scores = attributions(lm, prompt, lm.encode(" Paris")[0], 5)
    chosen = scores > 0.2 * scores.max()
    edit = kedit.editor("kn", lm, hparams={**HPARAMS["kn"], "rule": rule}).apply(REQUEST)
    assert edit.info["neurons"] == chosen.sum()
    new, said = lm.model.get_input_embeddings().weight.double()[[lm.encode(" Rome")[0], now]]
    for layer, weight in weights(lm, range(lm.layers)).items():
        for neuron in range(weight.shape[1]):
            size = old[layer][:, neuron].norm()
            gain = {
                "authors": size * (8 * new / new.norm() - said / said.norm()),
                "t-2a": new - 2 * said,
                "2t-2a": 2 * new - 2 * said,
            }[rule]
            expected = old[layer][:, neuron] + gain * chosen[layer, neuron]
            assert (weight[:, neuron] - expected).norm() < 1e-5 * (size + gain.norm())


def test_a_rule_that_kn_does_not_have(llama):
    with pytest.raises(KeditError, match=r"hyper-parameters of kn: rule 'author'.*'authors'"):
        kedit.editor("kn", llama, hparams={**HPARAMS["kn"], "rule": "author"})
