"""What was injected and what came of it: a line of JSON for every case, where ``KEDIT_FAULTS_RECORD`` says."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from hypothesis import currently_in_test_context

FULL = os.environ.get("KEDIT_FAULTS") == "full"
"""Whether as many faults are injected as `make faults` counts, or the few of `make test`."""


def record(fault_class: str, wrong: Sequence[str] = ()) -> None:
    """Note a case; nothing happens unless the environment names a file.

    Args:
        fault_class: such as "SIGKILL during edits" or "parameter file: wrong type".
        wrong: what was lost, came out otherwise in silence, or ended in a traceback; nothing if the case was handled:
            the right result, a counted refusal, or one sentence.
    """
    if path := os.environ.get("KEDIT_FAULTS_RECORD"):
        part = os.environ["PYTEST_CURRENT_TEST"].partition("::")[0].rpartition("/")[2]
        note = {"class": fault_class, "wrong": list(wrong), "part": part}
        note |= {"drawn": currently_in_test_context(), "commit": os.environ.get("KEDIT_FAULTS_COMMIT")}
        with Path(path).open("a") as file:  # one short write: whole lines, whichever process appends
            file.write(json.dumps(note) + "\n")


def table(notes: list[dict]) -> str:
    """The Markdown table of what was recorded: one row a class, in the order of first mention; where it comes from."""
    sums: dict[str, list[int]] = {}
    for note in notes:
        row = sums.setdefault(note["class"], [0, 0])
        row[bool(note["wrong"])] += 1
    rows = [(name, handled + wrong, handled, wrong) for name, (handled, wrong) in sums.items()]
    rows.append(("**all**", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    head = "| fault class | injected | handled | lost or wrong |\n| --- | --- | --- | --- |\n"
    rest = "".join(f"| {name} | {injected} | {handled} | {wrong} |\n" for name, injected, handled, wrong in rows)
    drawn = sum(note["drawn"] for note in notes)
    commits = {note["part"]: note["commit"] for note in notes}
    where = ", ".join(f"`{part}` at {commit}" for part, commit in sorted(commits.items()))
    return f"{head}{rest}\n{drawn:,} of them were drawn by hypothesis. Last run: {where}.\n"
