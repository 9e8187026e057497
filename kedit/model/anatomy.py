"""Where things are in a model, found from the type of its base model: never from a name or a shape."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import GPT2Model, GPTNeoXModel, LlamaModel, MistralModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kedit import KeditError


@dataclass(frozen=True)
class Layout:
    """Where one architecture keeps its parts: attribute paths below its base model or its block."""

    blocks: str
    up: str
    down: str
    attn_out: str
    gate: str | None = None


_LLAMA = Layout("layers", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "mlp.gate_proj")
LAYOUTS: dict[type[nn.Module], Layout] = {
    LlamaModel: _LLAMA,
    MistralModel: _LLAMA,
    GPT2Model: Layout("h", "mlp.c_fc", "mlp.c_proj", "attn.c_proj"),
    GPTNeoXModel: Layout("layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense"),
}


class Anatomy:
    """The parts of a decoder that editors touch, found from the type of its base model.

    Attributes: ``blocks`` (list of decoder blocks), ``base`` (the model without its head), ``head`` (unembedding).
    """

    def __init__(self, model: PreTrainedModel):
        layout = LAYOUTS.get(type(model.base_model))
        if layout is None:
            known = ", ".join(kind.__name__ for kind in LAYOUTS)
            raise KeditError(
                f"{type(model.base_model).__name__} is an architecture kedit does not know; it knows {known}: "
                "add a line to LAYOUTS in kedit/model/anatomy.py."
            )
        self.layout = layout
        self.base = model.base_model
        self.blocks: nn.ModuleList = model.base_model.get_submodule(layout.blocks)
        self.head: nn.Module = model.get_output_embeddings()
        self._names = {module: name for name, module in model.named_modules()}

    def up(self, layer: int) -> nn.Module:
        """First MLP projection of a block (d -> m)."""
        return self.blocks[layer].get_submodule(self.layout.up)

    def gate(self, layer: int) -> nn.Module | None:
        """Gate of a gated MLP (d -> m), None where the architecture has none."""
        return self.blocks[layer].get_submodule(self.layout.gate) if self.layout.gate else None

    def inner(self, layer: int) -> nn.Module:
        """Where KN looks for neurons: the gate where the MLP has one, else the first projection (d -> m)."""
        return self.gate(layer) or self.up(layer)

    def down(self, layer: int) -> nn.Module:
        """Second MLP projection of a block (m -> d): input is the key, output the value."""
        return self.blocks[layer].get_submodule(self.layout.down)

    def attn_out(self, layer: int) -> nn.Module:
        """Attention output projection of a block."""
        return self.blocks[layer].get_submodule(self.layout.attn_out)

    def name(self, module: nn.Module) -> str:
        """Dotted name of a module within the model, as the journal stores it."""
        return self._names[module]


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
