"""What a run found: its cells, its edits, its manifest."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit import KeditError
from kedit.store import write_atomic
from kedit.study.params import Params

# Results ------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Cells of a run, its edits and its manifest.

    A cell is one checkpoint x one benchmark: its coordinates and ``items``. What the unedited model
    did is kept once, with method None.
    """

    params: Params
    cells: list[dict[str, Any]]
    edits: list[dict[str, Any]]
    manifest: dict[str, Any]

    def save(self, folder: Path) -> list[Path]:
        """Write cells.jsonl.gz and manifest.json; the same results give the same bytes but for times."""
        lines = "".join(json.dumps(cell, ensure_ascii=False) + "\n" for cell in [*self.cells, *self.edits])
        write_atomic(folder / "cells.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
        write_atomic(folder / "manifest.json", (json.dumps(self.manifest, indent=1) + "\n").encode())
        return [folder / "cells.jsonl.gz", folder / "manifest.json"]

    @classmethod
    def load(cls, params: Params, folder: Path) -> "Results":
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
        records = [json.loads(line) for line in lines]
        return cls(
            params,
            [record for record in records if record["type"] == "cell"],
            [record for record in records if record["type"] == "edit"],
            manifest,
        )
