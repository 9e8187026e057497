"""What a run found: its cells, its edits, its manifest; and their file."""

import gzip
import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit import KeditError
from kedit.store import write_atomic
from kedit.study.params import Params

if TYPE_CHECKING:
    from kedit.evaluation.records import Item

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One checkpoint and one benchmark (or edit success, or another measure): what became of every item.

    The unedited model's outcomes are kept once, with ``method`` and ``variant`` None, and with ``order`` None where
    the order of the edits cannot matter.
    """

    model: str
    method: str | None
    variant: str | None
    order: int | None
    edits: int
    benchmark: str
    items: "list[Item]"


@dataclass(frozen=True)
class EditRecord:
    """One edit of a trajectory: the ``number``-th, of the request with this id; ``bytes``: its size without timings.

    A turn of several requests is one, with all their ids, and the number of its last.
    """

    model: str
    method: str
    variant: str
    order: int
    number: int
    request: str | list[str]
    bytes: int
    info: dict[str, Any]
    """What the editor recorded of it, such as its loss, or why it ``failed``."""

    @property
    def requests(self) -> list[str]:
        """The ids of its requests."""
        return [self.request] if isinstance(self.request, str) else self.request


def failures(edits: Sequence[EditRecord]) -> Counter[str]:
    """How many requests failed, by method."""
    return Counter(edit.method for edit in edits if "failed" in edit.info for _ in edit.requests)


def _sums(cells: bytes, manifest: dict[str, Any]) -> dict[str, str]:
    """By which the two files know each other, and that they are whole."""
    contents = {"cells": cells, "manifest": json.dumps(manifest).encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


@dataclass
class Results:
    """Cells of a run, its edits and its manifest; ``source`` as in a notebook's parameters, committed or run."""

    params: Params
    cells: list[Cell]
    edits: list[EditRecord]
    manifest: dict[str, Any]
    source: str = "committed"

    def save(self, folder: Path) -> list[Path]:
        """Write cells.jsonl.gz and manifest.json; the same results give the same bytes but for times."""
        lines = [{"type": "cell", **vars(cell)} for cell in self.cells]
        for edit in self.edits:
            lines.append({"type": "edit", **vars(edit), **edit.info})
            del lines[-1]["info"]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        manifest = {**self.manifest, "sums": _sums(text, self.manifest)}
        write_atomic(folder / "cells.jsonl.gz", gzip.compress(text, mtime=0))
        write_atomic(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        return [folder / "cells.jsonl.gz", folder / "manifest.json"]

    def tell_failures(self) -> None:
        """Log how many edits failed, by method, if any did."""
        if failed := failures(self.edits):
            parts, every = ", ".join(f"{method} {count}" for method, count in failed.items()), self.edits
            total = sum(len(edit.requests) for edit in every)
            log.warning("%d of %d edits failed and changed nothing: %s", failed.total(), total, parts)

    @classmethod
    def load(cls, params: Params, folder: Path, source: str = "committed") -> "Results":
        """Read what ``save`` wrote.

        Raises:
            KeditError: absent, damaged, or made from other parameters.
        """
        try:
            text = gzip.decompress((folder / "cells.jsonl.gz").read_bytes())
            results = cls(params, [], [], json.loads((folder / "manifest.json").read_text(encoding="utf-8")), source)
            sums = results.manifest.pop("sums", None)  # older ones have none
            if sums and sums != _sums(text, results.manifest):
                raise ValueError("cells and manifest are damaged, or not of one run")
            made_from = results.manifest["params_fingerprint"]
            names = [field.name for field in fields(EditRecord) if field.name != "info"]
            for line in map(json.loads, text.decode().splitlines()):
                if line.pop("type") == "cell":
                    results.cells.append(Cell(**line))
                else:  # what is left of the line is the info
                    results.edits.append(EditRecord(*map(line.pop, names), info=line))
        except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
            raise KeditError(f"{folder} holds no complete results ({error}); run make {params.rq}.") from error
        if made_from != params.fingerprint():
            raise KeditError(f"{folder} was made from other parameters; run make {params.rq} PARAMS={params.name}.")
        return results
