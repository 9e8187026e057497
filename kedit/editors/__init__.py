"""Editors: one file a method, one small protocol, one registry.

An editor is made for a model. ``prepare()`` does what may be slow and can be cached (statistics,
training); ``apply(request)`` edits the model in place and returns what changed. Code around editors
never asks which one it holds. To add a method: write a file here, add its line to ``EDITORS`` (another
package adds an entry point of the group ``kedit.editors``), and give it hyper-parameters in
``params/methods/<name>.yaml``.
"""

import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import cache
from math import log
from typing import Any

import yaml
from transformers import PreTrainedConfig

import kedit
from kedit import KeditError
from kedit.editors.protocol import Contexts, Editor
from kedit.editors.second_moments import SecondMoments
from kedit.model import shapes
from kedit.model.lm import LM
from kedit.model.shapes import config_of
from kedit.registry import checked, load_object, registered, remedy, unknown

logger = logging.getLogger(__name__)

EDITORS = {
    "control": "kedit.editors.control:Control",
    "rome": "kedit.editors.rome:ROME",
    "r-rome": "kedit.editors.r_rome:RROME",
    "memit": "kedit.editors.memit:MEMIT",
    "alphaedit": "kedit.editors.alphaedit:AlphaEdit",
    "encore": "kedit.editors.encore:ENCORE",
    "nas": "kedit.editors.nas:NAS",
    "nas-memit": "kedit.editors.nas:NASOnMEMIT",
    "prune": "kedit.editors.prune:PRUNE",
    "pmet": "kedit.editors.pmet:PMET",
    "kn": "kedit.editors.kn:KN",
    "mend": "kedit.editors.mend:MEND",
    "ft-l": "kedit.editors.ft:FTL",
    "ft-m": "kedit.editors.ft:FTM",
    "grace": "kedit.editors.grace:GRACE",
    "serac": "kedit.editors.serac:SERAC",
    "ike": "kedit.editors.ike:IKE",
    "rag": "kedit.editors.rag:RAG",
    "ultraedit": "kedit.editors.ultraedit:UltraEdit",
    "locft": "kedit.editors.locft:LocFT",
}


def known() -> dict[str, str]:
    """Every method's name, and its class as ``module:Class``."""
    return registered("editors", EDITORS)


@cache
def kind_of(name: str) -> type[Editor]:
    """The editor class of a method.

    Raises:
        KeditError: unknown method.
    """
    if name not in (editors := known()):
        raise unknown("method", name, editors)
    return load_object(editors[name])


@cache
def _blocks(method: str) -> list[dict[str, Any]]:
    path = kedit.ROOT / "params" / "methods" / f"{method}.yaml"
    return yaml.safe_load(path.read_text())["blocks"] if path.exists() else []


@cache
def _borrowed(method: str, model: str, form: tuple[Any, ...]) -> dict[str, Any]:
    """Hyper-parameters for a model that the method's file does not name: those of the most alike that it does.

    Of the same architecture if there is one, then the nearest in depth and width. The last layer keeps its relative
    depth, (layer + 1) / layers, the others stay below it: for a model of the same shape they are the same.
    """
    architecture, layers, d, *_ = form

    def away(other: tuple[Any, ...]) -> tuple[bool, bool, float]:
        return other != form, other[0] != architecture, abs(log(other[1] / layers)) + abs(log(other[2] / d))

    listed = [(name, block["hparams"]) for block in _blocks(method) for name in block["models"]]
    forms = [(shapes.form(config), *rest) for rest in listed if (config := config_of(rest[0]))]
    theirs, name, values = min(forms, key=lambda entry: away(entry[0]))
    if old := values.get("layers") or [values[key] for key in ("layer",) if key in values]:
        last = min(max(round((old[-1] + 1) * layers / theirs[1]) - 1, 0), layers - 1)
        first = min(max(last - len(old) + 1, min(old[0], 1)), last)
        values = values | ({"layers": [*range(first, last + 1)]} if "layers" in values else {"layer": last})
    how = "the nearest listed, at the same relative depth" if away(theirs)[0] else "the same architecture and shape"
    logger.info("hyper-parameters of %s for %s: those for %s, %s: %s", method, model, name, how, values)
    return values


def make_hparams(
    kind: type[Editor], model: str, given: Mapping[str, Any] | None = None, config: PreTrainedConfig | None = None
) -> Any:
    """A method's hyper-parameters for a model: those of ``params/methods``, single values replaced by ``given``.

    For a model that the method's file does not name they are those of the most alike (``_borrowed``), unless what is
    given is complete.

    Args:
        config: of the model; by default what is found under its name.

    Raises:
        KeditError: nothing is known of the model, an unknown or a missing key, or a value that is out of bounds.
    """
    blocks = _blocks(kind.name)
    values = next((block["hparams"] for block in blocks if model in block["models"]), None)
    needed = {field.name for field in fields(kind.Hparams) if field.default is MISSING}
    if values is None and blocks and not (given and needed <= given.keys()):
        if (config := config or config_of(model)) is None:
            raise KeditError(
                f"params/methods/{kind.name}.yaml has no block for model {model!r}, whose configuration is not on this "
                "machine; add one, load the model once, or pass hparams=... yourself."
            )
        values = _borrowed(kind.name, model, shapes.form(config))
    values, names = {**(values or {}), **(given or {})}, [field.name for field in fields(kind.Hparams)]
    for key in sorted(values.keys() - names):
        hint = remedy(get_close_matches(key, names, 1), names)
        raise KeditError(f"hyper-parameters of {kind.name}: unknown key {key!r}; {hint}")
    try:
        return kind.Hparams(**checked(kind.Hparams, values))
    except (TypeError, ValueError) as error:
        raise KeditError(f"hyper-parameters of {kind.name}: {error}.") from error


def check_layers(kind: type[Editor], hparams: Any, layers: int) -> None:
    """Whether a model with so many layers has those that a method is to edit.

    Raises:
        KeditError: it has not.
    """
    asked = getattr(hparams, "layers", (getattr(hparams, "layer", 0),))
    if max(asked) >= layers:
        raise KeditError(
            f"hyper-parameters of {kind.name}: layer {max(asked)} does not exist; the model has 0 to {layers - 1}."
        )


def editor(
    name: str, lm: LM, *, hparams: Mapping[str, Any] | None = None, statistics: SecondMoments | None = None,
    contexts: Contexts = None,
) -> Editor:  # fmt: skip
    """An editor by name; whatever is not passed in comes from ``params/methods/<name>.yaml``.

    Raises:
        KeditError: unknown method; hyper-parameters unknown, missing or out of bounds; a layer that the model has not.
    """
    kind = kind_of(name)
    given = make_hparams(kind, lm.name, hparams, lm.model.config)
    check_layers(kind, given, lm.layers)
    return kind(lm, given, statistics, contexts)
