"""Bounds of hyper-parameters, as types of the fields of ``Hparams``; ``make_hparams`` keeps them.

And what of hyper-parameters is part of keys: all but switches that came later, where they are off.
"""

from dataclasses import asdict, fields
from itertools import pairwise
from typing import Annotated, Any

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

LATER = {"later": True}
"""Metadata of the field of a switch that came when results were stored already: at its default, by which it must change
no bit of an edit, it is no part of keys (``x: bool = field(default=False, metadata=LATER)``)."""


def stated(hparams: Any) -> dict[str, Any]:
    """Hyper-parameters by name, as they are hashed and written down: without what came ``LATER`` and is off."""
    off = {one.name for one in fields(hparams) if "later" in one.metadata and getattr(hparams, one.name) == one.default}
    return {name: value for name, value in asdict(hparams).items() if name not in off}
