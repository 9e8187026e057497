"""Editors: one file a method, one small protocol, one registry.

An editor is made for a model. ``prepare()`` does what may be slow and can be cached (statistics,
training); ``apply(request)`` edits the model in place and returns what changed. Code around editors
never asks which one it holds. To add a method: write a file here, add its line to ``EDITORS`` (another
package adds an entry point of the group ``kedit.editors``), and give it hyper-parameters in
``params/methods/<name>.yaml``.
"""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from typing import Any

import yaml

import kedit
from kedit import KeditError
from kedit.editors.protocol import Contexts, Editor
from kedit.editors.second_moments import SecondMoments
from kedit.model.lm import LM
from kedit.registry import checked, load_object, registered, remedy, unknown

EDITORS = {
    "control": "kedit.editors.control:Control",
    "rome": "kedit.editors.rome:ROME",
    "r-rome": "kedit.editors.r_rome:RROME",
    "memit": "kedit.editors.memit:MEMIT",
    "alphaedit": "kedit.editors.alphaedit:AlphaEdit",
    "pmet": "kedit.editors.pmet:PMET",
    "kn": "kedit.editors.kn:KN",
    "mend": "kedit.editors.mend:MEND",
    "ft-l": "kedit.editors.ft:FTL",
    "ft-m": "kedit.editors.ft:FTM",
    "grace": "kedit.editors.grace:GRACE",
    "serac": "kedit.editors.serac:SERAC",
    "ike": "kedit.editors.ike:IKE",
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


def make_hparams(kind: type[Editor], model: str, given: Mapping[str, Any] | None = None) -> Any:
    """A method's hyper-parameters for a model: those of ``params/methods``, single values replaced by ``given``.

    For a model that the method's file does not know, ``given`` must be complete.

    Raises:
        KeditError: no block for the model, an unknown or a missing key, or a value that is out of bounds.
    """
    path = kedit.ROOT / "params" / "methods" / f"{kind.name}.yaml"
    blocks = yaml.safe_load(path.read_text())["blocks"] if path.exists() else []
    values = next((block["hparams"] for block in blocks if model in block["models"]), None)
    if values is None and blocks and not given:
        raise KeditError(
            f"params/methods/{path.name} has no block for model {model!r}; add one, or pass hparams=... yourself."
        )
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
    given = make_hparams(kind, lm.name, hparams)
    check_layers(kind, given, lm.layers)
    return kind(lm, given, statistics, contexts)
