"""``make faults``: inject every fault in full number, and write the table of what came of them to README.md.

``python tests/faults test_disk.py ...`` injects those of some files again. The table is of the last run of each file,
and is written once every file has run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
HEAD = """# Faults

Injected by `make faults` into tiny runs of every phase (`tiny.py`) and into everything that kedit reads. A case is
*handled* if it ends in the results of an undisturbed run, to the byte, in a refusal that is counted, or in one sentence
that says what to do, with nothing half-written, no process left and no finished work done again. It is *lost or wrong*
if it ends in other results, a traceback, or a run that cannot go on. Two cores; `make test` injects a sample.

Where each promise is tested, here or in `tests/`:

| promise | tests |
| --- | --- |
| a run is compared with what is committed, never with itself | `test_project.py`: its own reference |
| no derived file is believed that is damaged or another's | `test_damage_files.py`, `test_store.py`, `test_keys.py` |
| weights that are missing, left over or not finite are refused | `test_models.py`: a checkpoint that does not fill the model |
| whatever changes a result changes its key | `test_keys.py` |
| an edit that changes nothing or is not finite fails, is counted and shown | `test_editors.py`, `test_inputs_shown.py` |
| a notebook runs what its parameter file says | `test_notebooks.py` |
| what is damaged is computed again | `test_resume.py`, `test_damage_files.py` |
| runs at once share the work; folders and addresses mean what they say | `test_together.py`, `test_resume.py`, `test_store.py` |
| a disk that refuses is one sentence, and the run goes on | `test_disk.py`, `test_resume.py`, `test_store.py` |
| variants, floors and windows crash nothing | `test_inputs_shown.py`, `test_inputs_params.py`, `test_inputs_edits.py` |
| wrong files are one sentence, exit code 2, and nothing is written | `test_inputs_*.py` |
| a stop is one line | `test_inputs_shown.py`, `test_kills.py`, `test_whole.py` |
| nothing of the machine is written, no port is opened | `test_security.py`, `test_whole.py` |

"""


def main(names: list[str]) -> int:
    """Exit code: 0 if nothing was lost or wrong.

    Args:
        names: of the test files to run; all if there are none.
    """
    every = {path.name for path in FOLDER.glob("test_*.py")}
    path = ROOT / "runs" / "faults.jsonl"
    path.parent.mkdir(exist_ok=True)
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    earlier = [note for note in earlier if note["part"] in every - set(names or every)]
    path.write_text("".join(json.dumps(note) + "\n" for note in earlier))
    head = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    os.environ.update(KEDIT_FAULTS="full", KEDIT_FAULTS_RECORD=str(path), KEDIT_FAULTS_COMMIT=commit)
    sys.path.insert(0, str(FOLDER))
    from record import table  # which reads the environment

    code = pytest.main([*(str(FOLDER / name) for name in names or sorted(every)), "-p", "no:cacheprovider"])
    notes = [json.loads(line) for line in path.read_text().splitlines()]
    if missing := every - {note["part"] for note in notes}:
        print("no table before these have run as well:", *sorted(missing))
    else:
        (FOLDER / "README.md").write_text(HEAD + table(notes))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
