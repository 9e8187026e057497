"""Editors: one file a method, one small protocol, one registry.

An editor is made for a model. ``prepare()`` does what may be slow and can be cached (statistics,
training); ``apply(request)`` edits the model in place and returns what changed. Code around editors
never asks which one it holds. To add a method: write a file here, add its line to ``EDITORS``, and
give it hyper-parameters in ``params/methods/<name>.yaml``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import yaml

import kedit
from kedit import KeditError
from kedit.editors.protocol import Editor
from kedit.editors.second_moments import SecondMoments
from kedit.model.lm import LM

EDITORS = {
    "control": "kedit.editors.control.Control",
    "rome": "kedit.editors.rome.ROME",
    "r-rome": "kedit.editors.r_rome.RROME",
    "memit": "kedit.editors.memit.MEMIT",
    "alphaedit": "kedit.editors.alphaedit.AlphaEdit",
    "pmet": "kedit.editors.pmet.PMET",
    "kn": "kedit.editors.kn.KN",
    "mend": "kedit.editors.mend.MEND",
    "ft-l": "kedit.editors.ft.FTL",
    "ft-m": "kedit.editors.ft.FTM",
    "grace": "kedit.editors.grace.GRACE",
    "serac": "kedit.editors.serac.SERAC",
    "ike": "kedit.editors.ike.IKE",
}


def hparams_of(method: str, model: str) -> dict[str, Any]:
    """The block of ``params/methods/<method>.yaml`` for a model.

    Raises:
        KeditError: the file has no block that lists the model.
    """
    path = kedit.ROOT / "params" / "methods" / f"{method}.yaml"
    if not path.exists():
        return {}
    for block in yaml.safe_load(path.read_text())["blocks"]:
        if model in block["models"]:
            return block["hparams"]
    raise KeditError(
        f"params/methods/{method}.yaml has no block for model {model!r}; add one, or pass hparams=... yourself."
    )


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass from a mapping, naming misspelt and missing keys.

    Raises:
        KeditError: unknown or missing keys.
    """
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            hint = get_close_matches(key, known, 1)
            advice = f"did you mean {hint[0]!r}?" if hint else f"it knows {', '.join(known)}."
            raise KeditError(f"{where}: unknown key {key!r}; {advice}")
    try:
        return kind(**values)
    except TypeError as error:
        raise KeditError(f"{where}: {error}.") from error


def kind_of(name: str) -> type[Editor]:
    """The editor class of a method.

    Raises:
        KeditError: unknown method.
    """
    if name not in EDITORS:
        raise KeditError(f"method {name!r} does not exist; use one of {', '.join(EDITORS)}.")
    module, _, attribute = EDITORS[name].rpartition(".")
    return getattr(import_module(module), attribute)


def make_hparams(kind: type[Editor], model: str, given: Mapping[str, Any] | None = None) -> Any:
    """A method's hyper-parameters for a model: those of its file, single values replaced by ``given``.

    For a model that the file does not know, ``given`` must be complete.

    Raises:
        KeditError: no block for the model, unknown or missing key.
    """
    try:
        values = hparams_of(kind.name, model)
    except KeditError:
        if not given:
            raise
        values = {}
    return build(kind.Hparams, {**values, **(given or {})}, f"hyper-parameters of {kind.name}")


def editor(
    name: str,
    lm: LM,
    *,
    hparams: Mapping[str, Any] | None = None,
    statistics: SecondMoments | None = None,
    contexts: Sequence[str] | None = None,
) -> Editor:
    """An editor by name; whatever is not passed in comes from ``params/methods/<name>.yaml``.

    Raises:
        KeditError: unknown method, no hyper-parameters for the model, unknown or missing key.
    """
    kind = kind_of(name)
    return kind(lm, make_hparams(kind, lm.name, hparams), statistics, contexts)
