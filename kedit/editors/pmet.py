"""PMET: MEMIT whose search moves attention and MLP apart, and which writes only the MLP's part.

Li et al., "PMET: Precise Model Editing in a Transformer", 2024; methods section 3. The outputs of the
last layer's two sub-layers are optimised together; the attention's share is then thrown away, so that the
MLP is not made to carry what attention did. That is also why a single edit takes less well than MEMIT's.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kedit.data.requests import EditRequest
from kedit.editors import memit
from kedit.editors.value_search import STOP, Objective, project
from kedit.model.forward import LookupText, activations
from kedit.model.journal import Edit, EditFailed


@dataclass(frozen=True)
class Hparams(memit.Hparams):
    """Settings of PMET.

    ``left_padding`` is off; on, it emulates released code that counts positions from the left in
    batches padded on the left, so that every row but the longest is read and edited some tokens early.
    """

    left_padding: bool = False


@contextmanager
def _adding(deltas: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Within the block, the modules' outputs gain a vector at the first position of every row."""

    def hook(delta: Tensor):
        def add(module, args, output):
            return torch.cat([output[:, :1] + delta.to(output), output[:, 1:]], 1)

        return add

    with ExitStack() as stack:
        for module, delta in deltas.items():
            stack.callback(module.register_forward_hook(hook(delta)).remove)
        yield


class PMET(memit.MEMIT):
    """Per layer: W gains (z - h) / sqrt(layers to come) times MEMIT's K^T (lambda C + K K^T)^-1 (eq. 9-14)."""

    name = "pmet"
    style = ("#56b4e9", "p", "-")
    Hparams = Hparams
    site = "value"  # the MLP's output in the last edited layer

    def _texts(self, request: EditRequest) -> list[LookupText]:
        texts = super()._texts(request)
        if not self.hparams.left_padding:
            return texts
        # Position p of a row that starts with k pads is the row's token p - k.
        longest = max(len(text.ids) for text in texts)
        return [LookupText(text.ids, max(0, text.lookup - (longest - len(text.ids)))) for text in texts]

    def _share(self, left: Tensor, layers: int) -> Tensor:
        return left / layers**0.5

    def _search(
        self, texts: Sequence[LookupText], kl_text: LookupText, target: Sequence[int], start: Tensor, edit: Edit
    ) -> Tensor:
        """Adam over both sub-layers' deltas; once the target is said everywhere, its weight drops to a tenth."""
        lm, settings = self.lm, self.hparams.search
        layer = settings.layer
        objective = Objective(lm, texts, kl_text, target, layer - 1)
        states = objective.tail.states[layer - 1]
        attention = activations(lm, texts[:1], [layer], "attention")[layer][0]
        norms = [start.float().norm(), attention.float().norm()]
        deltas = [torch.zeros_like(init, dtype=torch.float32, requires_grad=True) for init in (start, attention)]
        sites = (lm.anatomy.down(layer), lm.anatomy.attn_out(layer))
        optimiser = torch.optim.Adam(deltas, lr=settings.lr)
        weight = 1.0
        for step in range(settings.steps):
            with torch.enable_grad(), _adding(dict(zip(sites, deltas, strict=True))):
                said, divergence, everywhere = objective.terms(objective.tail.run(layer - 1, states))
                decay = sum(d.norm() / n**2 for d, n in zip(deltas, norms, strict=True))
                unchanged = settings.kl * divergence
                loss = -weight * said.mean(1).mean() + unchanged + settings.decay * decay
            if not torch.isfinite(loss):
                raise EditFailed(f"the loss of the value search is {loss.item()} at step {step}")
            if loss.item() < STOP or (everywhere and unchanged.item() <= 0.01) or step == settings.steps - 1:
                break
            weight = 0.1 if everywhere else 1.0
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for delta, norm in zip(deltas, norms, strict=True):
                    project(delta, settings.clamp * norm)
        probability = said.detach().sum(1).exp().mean().item()
        edit.info |= {"steps": step + 1, "loss": loss.item(), "probability": probability}
        return deltas[0].detach().double()
