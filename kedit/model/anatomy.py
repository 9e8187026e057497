"""Where things are in a model, found from the types of its modules: never from a path or from matrices' shapes.

kedit/model/probes.py then asks the model whether what was found does what it should.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from kedit import KeditError

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as configurations name them: those that see everything, and those with a window."""


WINDOWS = {"sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern"}
"""What configurations say of windows that ``layer_types`` and ``sliding_window`` tell the whole of."""


@dataclass(frozen=True)
class Parts:
    """The projections of one block that editors touch: the MLP's first (the gate before the other), its last, and
    the attention's last; None where a block has none of its own."""

    first: tuple[nn.Module, ...]
    down: nn.Module | None
    attn_out: nn.Module | None


def projections(block: nn.Module) -> list[nn.Module]:
    """Every ``Linear`` and ``Conv1D`` of a block."""
    return [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]


def parts_of(block: nn.Module, order: Sequence[nn.Module]) -> Parts:
    """The projections of a block, told apart by the order in which they run; attention is what takes a mask."""
    mixers = [module for module in block.children() if "attention_mask" in inspect.signature(module.forward).parameters]
    attention = {module for mixer in mixers for module in mixer.modules()}
    mlp, inside = ([module for module in order if (module in attention) == within] for within in (False, True))
    *first, down = mlp if len(mlp) in (2, 3) else [None]
    return Parts(tuple(first), down, inside[-1] if inside else None)


class Anatomy:
    """The parts of a decoder that editors touch.

    Attributes:
        base: the model without its head; ``config`` is its configuration.
        blocks: the decoder blocks.
        head: the unembedding.
        norms: the modules that hold nothing but vectors, by name: normalisation.
        missing: what editors cannot have of this model, and why, by part: ``down``, ``attn_out``, ``neurons`` (as KN
            looks for them) and ``norms``.
        orders: for each block the order in which its projections run, numbered as they stand there; this and what
            follows is known once the model was probed, and until then taken to be simple.
        direct: for each block, whether what ``down`` writes arrives in the residual stream unchanged (else a norm or
            a factor comes after it).
        tuples: whether blocks return tuples, of which the states are the first.

    Raises:
        KeditError: the model has no single stack of blocks, or layers that attend in a way kedit does not know.
    """

    def __init__(self, model: PreTrainedModel):
        self.base: PreTrainedModel = model.get_decoder()
        self.config = self.base.config
        self.architecture = type(model).__name__
        lists = [module for module in self.base.modules() if isinstance(module, nn.ModuleList) and len(module)]
        stacks = [some for some in lists if all(isinstance(block, GradientCheckpointingLayer) for block in some)]
        self.head: nn.Module = model.get_output_embeddings()
        if len(stacks) != 1 or self.head is None:
            raise KeditError(
                f"{self.architecture} is no decoder of one stack of blocks and a head; kedit cannot read it."
            )
        windows = [name.lstrip("_") for name, value in vars(self.config).items() if "window" in name and value]
        if other := (set(self.kinds) - {FULL, SLIDING}) | (set(windows) - WINDOWS):
            raise KeditError(f"{self.architecture} has layers of {', '.join(sorted(other))}, which kedit cannot read.")
        self.blocks: nn.ModuleList = stacks[0]
        self.norms = {
            name: module
            for name, module in model.named_modules()
            if (weights := list(module.parameters(recurse=False))) and all(weight.ndim == 1 for weight in weights)
        }
        self.missing = {} if self.norms else {"norms": "it has no normalisation weights"}
        self.orders = [list(range(len(projections(block)))) for block in self.blocks]
        self.arrange()
        self.direct, self.tuples = [True] * len(self.blocks), False
        self._names = {module: name for name, module in model.named_modules()}

    def arrange(self) -> None:
        """Tell the parts apart by ``orders``."""
        pairs = zip(self.blocks, self.orders, strict=True)
        self._parts = [parts_of(block, [projections(block)[n] for n in order]) for block, order in pairs]
        if any(parts.down is None for parts in self._parts):
            self.missing["down"] = "its blocks have no MLP of two or three projections of their own"
        if any(parts.attn_out is None for parts in self._parts):
            self.missing["attn_out"] = "its blocks have no attention with projections"

    def need(self, part: str, who: str) -> None:
        """Refuse a method, or another user, whose part is missing.

        Raises:
            KeditError: saying who cannot be used on which architecture, and why.
        """
        if part in self.missing:
            raise KeditError(f"{who} cannot be used on {self.architecture}: {self.missing[part]}.")

    def up(self, layer: int) -> nn.Module:
        """First MLP projection of a block (d -> m; 2 m where the gate is fused with it)."""
        return self._parts[layer].first[-1]

    def gate(self, layer: int) -> nn.Module | None:
        """Gate of a gated MLP (d -> m), None where it is no projection of its own."""
        first = self._parts[layer].first
        return first[0] if len(first) > 1 else None

    def inner(self, layer: int) -> nn.Module:
        """Where KN looks for neurons: the gate where the MLP has one, else the first projection.

        The neurons are its first m outputs: in a fused projection, the gate comes first.
        """
        return self.gate(layer) or self.up(layer)

    def down(self, layer: int) -> nn.Module:
        """Second MLP projection of a block (m -> d): input is the key, output the value."""
        self.need("down", "what edits an MLP")
        return self._parts[layer].down

    def attn_out(self, layer: int) -> nn.Module:
        """Attention output projection of a block."""
        return self._parts[layer].attn_out

    def name(self, module: nn.Module) -> str:
        """Dotted name of a module within the model, as the journal stores it."""
        return self._names[module]

    @property
    def kinds(self) -> list[str]:
        """Of each layer how it attends, where the configuration says so."""
        return getattr(self.config, "layer_types", None) or []

    @property
    def reach(self) -> int | None:
        """Tokens that a layer with a window sees, itself included; None where all layers see everything."""
        return None if self.kinds and SLIDING not in self.kinds else getattr(self.config, "sliding_window", None)

    def mask(self, visible: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What is added to the scores of attention (..., tokens, tokens seen); by kind, where layers differ.

        Args:
            visible: which tokens are seen but for windows.
            distance: how far before a token each of them stands.
        """

        def added(seen: Tensor) -> Tensor:
            zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            return zeros.masked_fill(~seen, torch.finfo(dtype).min)

        near = added(visible & (distance < self.reach) if self.reach else visible)
        return {FULL: added(visible), SLIDING: near} if len(set(self.kinds)) > 1 else near

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed final hidden states (..., d) -> float32 logits (..., vocabulary), with the model's scale and cap."""
        logits = self.head(hidden).float().to(hidden.device)
        scale = (getattr(self.config, "logit_scale", None) or 1) / (getattr(self.config, "logits_scaling", None) or 1)
        logits = logits * scale if scale != 1 else logits
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = cap * (logits / cap).tanh()
        return logits


def matrix(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight of a projection (or another of its shape) as (out, in), a view that writes through.

    ``Conv1D`` stores the transpose; decided from the module's type, since a shape cannot tell when
    in == out.
    """
    weight = module.weight if weight is None else weight
    if isinstance(module, Conv1D):
        return weight.T
    if isinstance(module, nn.Linear):
        return weight
    raise TypeError(f"{type(module).__name__} is neither Linear nor Conv1D")
