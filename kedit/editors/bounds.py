"""Bounds of hyper-parameters, as types of the fields of ``Hparams``; ``make_hparams`` keeps them."""

from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if any(lower >= upper for lower, upper in pairwise(layers)):
        raise ValueError("layers must ascend")
    return layers


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
"""A seed; the number of a layer, whose upper bound is the model's (``kedit.editors.check_layers``)."""
Layers = Annotated[tuple[Natural, ...], Field(min_length=1), AfterValidator(_ascending)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
