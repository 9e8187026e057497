"""Things known by name: kedit's own, and those that other installed packages add.

A package outside this one adds an editor, an edit set or a suite of benchmarks by an entry point of the group
``kedit.editors``, ``kedit.edit_sets`` or ``kedit.suites`` (PyPA's specification of entry points), so worker
processes know it too.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from kedit import KeditError


def registered(group: str, own: Mapping[str, str]) -> dict[str, str]:
    """Name -> ``module:attribute`` of everything in a group; kedit's ``own`` names cannot be taken by others."""
    return {entry.name: entry.value for entry in entry_points(group=f"kedit.{group}")} | dict(own)


def load_object(path: str) -> Any:
    """What ``module:attribute`` names."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def unknown(what: str, name: object, known: Iterable[str]) -> KeditError:
    """The error for a name that does not exist: one sentence, with the nearest name or all of them."""
    known = list(known)
    close = get_close_matches(str(name), known, 1)
    return KeditError(f"{what} {name!r} does not exist; {remedy(close, known)}")


def remedy(close: list[str], known: list[str]) -> str:
    """What to do about a wrong name."""
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}."


@cache
def _types(kind: type) -> dict[str, TypeAdapter]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(kind)}


def checked(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass' fields, each of the type and within the bounds that its annotation says.

    Types are JSON's: lists are tuples, a whole number is a number too, and nothing else stands for another type.

    Raises:
        ValueError: one sentence on the first value that is wrong.
    """
    right = {}
    for name, value in values.items():
        try:
            right[name] = _types(kind)[name].validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            about = error.errors()[0]
            place = "".join(f"[{part}]" for part in about["loc"] if isinstance(part, int))
            wanted = about["msg"].replace("Input", "it", 1)
            raise ValueError(
                f"{name}{place} is {reprlib.repr(about['input'] if place else value)}; {wanted}"
            ) from error
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{name} is {reprlib.repr(value)}, which is neither text, a number nor a list") from error
    return right
