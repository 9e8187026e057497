"""KN: find the neurons that carry a fact by integrated gradients, and rewrite what they write.

Dai et al., "Knowledge Neurons in Pretrained Transformers", 2022. A neuron is one output of the MLP's first
projection (of its gate, where it has one) at the prompt's last token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kedit.data.requests import EditRequest, spaced
from kedit.editors.bounds import Count, NotNegative, Share
from kedit.editors.protocol import Editor
from kedit.editors.space import trying
from kedit.model.anatomy import matrix
from kedit.model.forward import Hook, LookupText, Tail, activations, hooked
from kedit.model.journal import Edit, EditFailed, LowRank
from kedit.model.lm import LM
from kedit.registry import unknown

COPIES = 120
"""Scaled copies run together: several layers' worth, since each alone leaves the machine idle."""
RULES = ("authors", "t-2a", "2t-2a")
"""What a neuron's column gains: the method's rule, and the deviations of other released code."""


@dataclass(frozen=True)
class Hparams:
    """Settings of KN.

    ``points``: of the integral, both ends included. 1 is what the study's settings ran for models of 7B:
    one gradient at zero activation. ``threshold``: neurons above this share of the largest attribution are
    rewritten. ``erase`` and ``write`` are the method's lambda 1 and 2. ``rule``, of what a neuron's column gains:
    "authors", or a deviation of other released code that scales nothing: "t-2a" or "2t-2a" (see ``KN``).
    """

    points: Count = 20
    threshold: Share = 0.2
    erase: NotNegative = 1.0
    write: NotNegative = 8.0
    rule: str = "authors"

    def __post_init__(self):
        if self.rule not in RULES:
            raise unknown("hyper-parameters of kn: rule", self.rule, RULES)


def replacing(rows: slice, states: Tensor) -> Hook:
    """A hook: some rows of the module's output at the first position are replaced."""

    def hook(module, args, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[rows, 0, : states.shape[1]] = states.to(output)  # a gate may be fused with what it multiplies
        return changed

    return hook


def attributions(lm: LM, ids: Sequence[int], answer: int, points: int) -> Tensor:
    """Integrated gradients of p(answer) with respect to each neuron at the last token: (layers, m).

    w * mean over alpha of dp/dw at alpha * w, alpha from 0 to 1 in so many points (eq. 3). What comes
    before the last token and below a neuron's layer does not depend on the neuron, and is read once.
    """
    text = LookupText(tuple(ids), len(ids) - 1)
    layers = range(lm.layers)
    hidden = activations(lm, [text], layers, "hidden")
    group = max(1, COPIES // points)
    tail = Tail(lm, [text], [layer - 1 for layer in layers[::group]])
    alphas = torch.linspace(0, 1, points, device=lm.device) if points > 1 else torch.zeros(1, device=lm.device)
    by_layer: list[Tensor] = []
    for first in layers[::group]:
        members = layers[first : first + group]
        scaled = [(alphas[:, None] * hidden[layer]).requires_grad_() for layer in members]
        hooks = {
            lm.anatomy.inner(layer): replacing(slice(i * points, (i + 1) * points), scaled[i])
            for i, layer in enumerate(members)
        }
        states = tail.states[first - 1].expand(len(members) * points, -1, -1)
        with torch.enable_grad(), hooked(hooks):
            last = tail.run(first - 1, states)[:, 0]
            probabilities = lm.logits(last).softmax(-1)[:, answer]
            gradients = torch.autograd.grad(probabilities.sum(), scaled)
        by_layer += [hidden[layer][0] * gradient.mean(0) for layer, gradient in zip(members, gradients, strict=True)]
    return torch.stack(by_layer)


class KN(Editor):
    """Columns of the second projection lose the embedding of the present answer and gain that of the target.

    With e the input embeddings, t the target's tokens and a the model's own next tokens, as many: the column w of a
    selected neuron gains |w| (write * sum e_t / |e_t| - erase * sum e_a / |e_a|), w as it is before the edit. So the
    authors' released code; the paper (section 4.3) writes the same without the norms, for columns and embeddings of
    one size, and says a for the true object, which is what the model says of the facts edited there.

    Two deviations give all columns one vector: "t-2a" e_t - 2 e_a, or sum e_t - sum e_a where the target has several
    tokens; "2t-2a" 2 sum e_t - 2 sum e_a.
    """

    name = "kn"
    needs = ("down", "neurons")
    style = ("#000000", "X", "-")
    Hparams = Hparams
    space = trying(threshold=(0.1, 0.2, 0.3, 0.5), erase=(0.0, 1.0, 2.0), write=(1.0, 2.0, 4.0, 8.0))

    def _continuation(self, ids: Sequence[int], count: int) -> list[int]:
        """What greedy decoding adds, so many tokens."""
        new: list[int] = []
        for _ in range(count):
            logits = self.lm.model(torch.tensor([[*ids, *new]], device=self.lm.device), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
        return new

    def _direction(self, target: Sequence[int], now: Sequence[int]) -> Tensor:
        """What a column of norm 1 gains, or any column where nothing is scaled: (d,) float64."""
        hp, embedding = self.hparams, self.lm.model.get_input_embeddings().weight
        new, old = (embedding[list(tokens)].double() for tokens in (target, now))
        if hp.rule == "authors":
            new, old = normalize(new) * hp.write, normalize(old) * hp.erase
        elif hp.rule == "2t-2a":
            new, old = 2 * new, 2 * old
        elif len(now) == 1:
            old = 2 * old
        return new.sum(0) - old.sum(0)

    @torch.no_grad()
    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm, hp = self.lm, self.hparams
        prompt, target = self.prompt_ids(request), self.target_ids(request)
        if not request.target_true:
            raise EditFailed("KN attributes the true object, and the request names none")
        true = lm.encode(spaced(request.target_true, request.prompt))
        # Each token of the answer is attributed after what the model itself puts before it.
        answer = self._continuation(prompt, max(len(true) - 1, len(target)))
        scores = torch.stack(
            [attributions(lm, [*prompt, *answer[:i]], token, hp.points) for i, token in enumerate(true)]
        ).mean(0)
        chosen = scores > hp.threshold * scores.max()
        if not chosen.any():
            raise EditFailed("no neuron has a positive attribution")

        direction = self._direction(target, answer[: len(target)])
        sizes = []
        for layer in chosen.any(1).nonzero()[:, 0].tolist():
            down = lm.anatomy.down(layer)
            neurons = chosen[layer].double()
            if hp.rule == "authors":
                neurons *= matrix(down).double().norm(dim=0).to(neurons)
            sizes.append(direction.norm().item() * neurons.norm().item() / matrix(down).norm().item())
            edit.write(LowRank(lm.anatomy.name(down), direction[:, None].clone(), neurons[:, None]))
        edit.info |= {"neurons": int(chosen.sum()), "relative_change": sizes}
