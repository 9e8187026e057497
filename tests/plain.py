"""What kedit computes fast, computed plainly: the oracles of the tests, and the other side of ``make bench``."""

import torch

from kedit.editors.value_search import STOP
from kedit.model.anatomy import matrix
from kedit.model.forward import pad


def search(lm, texts, kl_text, target, layer, init, settings):
    """Every row in full through the whole model at every step, delta put in by a hook on the MLP."""
    full = [[*text.ids, *target[:-1]] for text in texts] + [list(kl_text.ids)]
    places = [text.lookup for text in texts] + [kl_text.lookup]
    ids, mask = pad(full, lm.device)
    delta = torch.zeros_like(init, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.lr)
    before, losses = None, []

    def add(_, __, output):
        shift = torch.zeros_like(output)
        shift[range(len(full)), places] = 1.0
        return output + shift * delta

    for step in range(settings.steps + 1):
        with torch.enable_grad():
            handle = lm.anatomy.down(layer).register_forward_hook(add)
            logprobs = lm.model(ids, attention_mask=mask).logits.log_softmax(-1)
            handle.remove()
            nll = 0.0
            for i, text in enumerate(texts):
                start = len(text.ids) - 1
                nll = nll - sum(logprobs[i, start + j, t] for j, t in enumerate(target)) / len(target)
            now = logprobs[len(texts), kl_text.lookup]
            before = now.detach() if before is None else before
            # ROME eq. 4: KL(edited || original); torch's kl_div(input, target) is KL(target || input)
            kl = torch.nn.functional.kl_div(before, now, log_target=True, reduction="sum")
            loss = nll / len(texts) + settings.kl_factor * kl + settings.weight_decay * delta.norm() / init.norm() ** 2
        losses.append(loss.item())
        if loss < STOP or step == settings.steps:
            return delta.detach(), losses
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            delta *= min(1.0, (settings.clamp_norm_factor * init.norm() / delta.norm()).item())


def left_padded(lm, rows):
    """What a tokenizer with ``padding_side="left"`` gives."""
    return lm.tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding_side="left", return_tensors="pt")


def pmet_counted_from_the_left(lm, texts, kl_text, target, layer, settings):
    """PMET's search in one batch padded on the left, every position counted from the left: z of the MLP (d,), losses."""
    batch = left_padded(lm, [[*text.ids, *target[:-1]] for text in texts] + [kl_text.ids])
    places = [text.lookup for text in texts] + [kl_text.lookup]
    sites, inits, before, losses, factor = [lm.anatomy.down(layer), lm.anatomy.attn_out(layer)], {}, None, [], 1.0
    deltas = [torch.zeros(lm.model.config.hidden_size, requires_grad=True) for _ in sites]
    optimiser = torch.optim.Adam(deltas, lr=settings.lr)

    def add(number):
        def hook(_, __, output):
            inits.setdefault(number, output[0, places[0]].detach().clone())
            shifts = torch.zeros(*output.shape[:2], 1)
            for row, place in enumerate(places):
                shifts[row, place] = 1.0
            return output + shifts * deltas[number]

        return hook

    for step in range(settings.steps + 1):
        with torch.enable_grad():
            handles = [site.register_forward_hook(add(number)) for number, site in enumerate(sites)]
            logprobs = lm.model(**batch).logits.log_softmax(-1)
            for handle in handles:
                handle.remove()
            nll, hit = 0.0, True
            for row, text in enumerate(texts):
                length = len(text.ids) + len(target) - 1
                for place, token in zip(range(length - len(target), length), target, strict=True):
                    nll = nll - logprobs[row, place, token] / len(target) / len(texts)
                    hit &= bool(logprobs[row, place].argmax() == token)
            now = logprobs[-1, kl_text.lookup]
            before = now.detach() if before is None else before
            kl = settings.kl_factor * torch.nn.functional.kl_div(before, now, log_target=True, reduction="sum")
            decay = sum(delta.norm() / inits[number].norm() ** 2 for number, delta in enumerate(deltas))
            loss = factor * nll + kl + settings.weight_decay * decay
        losses.append(loss.item())
        if loss < STOP or step == settings.steps or (hit and kl <= 0.01):
            return inits[0] + deltas[0].detach(), losses
        factor = 0.1 if hit else 1.0
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for number, delta in enumerate(deltas):
                delta *= min(1.0, (settings.clamp_norm_factor * inits[number].norm() / delta.norm()).item())


def ridge(moment, mom2_weight, keys):
    """(mom2_weight C + K K^T)^-1 K with the m x m matrix formed and solved; keys (m, n) -> (m, n)."""
    return torch.linalg.solve(mom2_weight * moment.double() + keys @ keys.T, keys)


def null_space(projection, held, l2, keys):
    """(P (K K^T + M) + L2 I)^-1 P K with m x m matrices that are not symmetric; keys (m, n) -> (m, n)."""
    identity = torch.eye(len(projection), dtype=torch.float64)
    return torch.linalg.solve(projection @ (keys @ keys.T + held) + l2 * identity, projection @ keys)


def attributions(lm, ids, answer, points):
    """KN's integrated gradients, one scaled copy after another through the whole model: (layers, m)."""
    found = []
    for layer in range(lm.layers):
        inner, seen, width = lm.anatomy.inner(layer), {}, matrix(lm.anatomy.down(layer)).shape[1]

        def scale(module, args, output, seen=seen, m=width):
            neurons = (seen["share"] * output[0, -1, :m]).detach().requires_grad_()
            seen["whole"], seen["neurons"] = output[0, -1, :m].detach(), neurons
            return torch.cat([output[:, :-1], torch.cat([neurons, output[0, -1, m:]])[None, None]], 1)

        gradients = []
        for share in torch.linspace(0, 1, points):
            seen["share"] = share
            handle = inner.register_forward_hook(scale)
            with torch.enable_grad():
                said = lm.model(torch.tensor([list(ids)])).logits[0, -1].softmax(-1)[answer]
                gradients.append(torch.autograd.grad(said, seen["neurons"])[0])
            handle.remove()
        found.append(seen["whole"] * torch.stack(gradients).mean(0))
    return torch.stack(found)


def weights(lm, layers):
    """Copies of the second projections, layer -> (d, m) float64."""
    return {layer: matrix(lm.anatomy.down(layer)).double().clone() for layer in layers}
