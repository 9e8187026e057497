"""Shapes of models, and which are alike, from their configurations: no weights are read and nothing is fetched."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kedit.model.anatomy import Anatomy, matrix
from kedit.model.lm import PICO


@dataclass(frozen=True)
class Shape:
    """Of a model: its parameters, its blocks, and the outer and inner width of their MLPs (0 if they have none)."""

    parameters: int
    layers: int
    d: int
    m: int


_BLOCKS = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())
KNOWN = {name: block for block in _BLOCKS for name in block["names"]}
"""Model -> what models.yaml says of it: its configuration, and whether it is gated."""


@cache
def config_of(model: str) -> PreTrainedConfig | None:
    """A model's configuration, if it is at hand: in a folder, in the hub's cache or in models.yaml."""
    plain = PICO / model.partition("-seed")[0]  # seeds of the pico family have one shape
    try:
        return AutoConfig.from_pretrained(plain if plain.is_dir() else model, local_files_only=True)
    except Exception:  # whatever transformers stumbles over in files from outside; loading the model will say it
        return AutoConfig.for_model(**KNOWN[model]["config"]) if model in KNOWN else None


def form(config: PreTrainedConfig) -> tuple[Any, ...]:
    """Architecture, depth, width and inner width, as far as a configuration says: models that agree in it are alike."""
    fields = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "n_inner", "ffn_hidden_size")
    return tuple(getattr(config, field, None) for field in fields)


@cache
def shape_of(model: str) -> Shape | None:
    """A model's shape, if its configuration is at hand.

    Raises:
        KeditError: an architecture that kedit cannot read.
    """
    if (config := config_of(model)) is None:
        return None
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    except Exception:  # as in config_of
        return None
    anatomy = Anatomy(empty)
    widths = (config.hidden_size, 0) if "down" in anatomy.missing else matrix(anatomy.down(0)).shape
    return Shape(sum(weight.numel() for weight in empty.parameters()), len(anatomy.blocks), *widths)
