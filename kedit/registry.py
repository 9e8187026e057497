"""Things known by name: kedit's own, and those that other installed packages add.

A package outside this one adds an editor, an edit set or a suite of benchmarks by an entry point of the group
``kedit.editors``, ``kedit.edit_sets`` or ``kedit.suites`` (PyPA's specification of entry points), so worker
processes know it too.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

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
