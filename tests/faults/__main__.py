"""``make faults``: inject every fault in full number, and write the table of what came of them to README.md."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
HEAD = """# Faults

Injected by `make faults` into tiny runs of every phase (`tiny.py`) and into everything that kedit reads. A case is
*handled* if it ends in the results of an undisturbed run, to the byte, in a refusal that is counted, or in one sentence
that says what to do, with nothing half-written, no process left and no finished work done again. It is *lost or wrong*
if it ends in other results, a traceback, or a run that cannot go on. Two cores; `make test` injects a sample.

That a notebook runs what its parameter file says is `tests/test_notebooks.py`.

"""


def main() -> int:
    """Exit code: 0 if nothing was lost or wrong."""
    sys.path.insert(0, str(FOLDER))
    from record import table

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.jsonl"
        path.touch()
        os.environ.update(KEDIT_FAULTS="full", KEDIT_FAULTS_RECORD=str(path))
        code = pytest.main([str(FOLDER), "-p", "no:cacheprovider"])
        (FOLDER / "README.md").write_text(HEAD + table(path))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
