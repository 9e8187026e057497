"""What a run found: its cells, its edits, its manifest; and their file."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit import KeditError
from kedit.store import write_atomic
from kedit.study.params import Params

if TYPE_CHECKING:
    from kedit.evaluation.records import Item


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

    def as_json(self) -> dict[str, Any]:
        """A line of cells.jsonl.gz."""
        return {"type": "cell", **vars(self)}


@dataclass(frozen=True)
class EditRecord:
    """One edit of a trajectory: the ``number``-th, of the request with this id; its size in the store in ``bytes``."""

    model: str
    method: str
    variant: str
    order: int
    number: int
    request: str
    bytes: int
    info: dict[str, Any]
    """What the editor recorded of it, such as its loss, or why it ``failed``."""

    def as_json(self) -> dict[str, Any]:
        """A line of cells.jsonl.gz, ``info`` flattened."""
        line = {"type": "edit", **vars(self), **self.info}
        del line["info"]
        return line

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "EditRecord":
        """What ``as_json`` made."""
        names = ("model", "method", "variant", "order", "number", "request", "bytes")
        return cls(*(line.pop(name) for name in names), info=line)


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
        lines = [json.dumps(record.as_json(), ensure_ascii=False) + "\n" for record in [*self.cells, *self.edits]]
        write_atomic(folder / "cells.jsonl.gz", gzip.compress("".join(lines).encode(), mtime=0))
        write_atomic(folder / "manifest.json", (json.dumps(self.manifest, indent=1) + "\n").encode())
        return [folder / "cells.jsonl.gz", folder / "manifest.json"]

    @classmethod
    def load(cls, params: Params, folder: Path, source: str = "committed") -> "Results":
        """Read what ``save`` wrote.

        Raises:
            KeditError: absent, damaged, or made from other parameters.
        """
        try:
            lines = gzip.decompress((folder / "cells.jsonl.gz").read_bytes()).decode().splitlines()
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, EOFError, ValueError) as error:
            raise KeditError(f"{folder} holds no complete results ({error}); run make {params.rq}.") from error
        if manifest["params_fingerprint"] != params.fingerprint():
            raise KeditError(f"{folder} was made from other parameters; run make {params.rq} PARAMS={params.name}.")
        results = cls(params, [], [], manifest, source)
        for record in map(json.loads, lines):
            if record.pop("type") == "cell":
                results.cells.append(Cell(**record))
            else:
                results.edits.append(EditRecord.from_json(record))
        return results
