"""What the parameters of a notebook, or of a command, mean: which run, and its results.

The parameter file is the one source. A notebook's parameter cell gives its ``name``; every key of the file may be
given beside it, in the cell, by ``papermill -p`` or by ``papermill -f <file>``, and changes what the file says.
A run that no file describes gets a name of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedit import ROOT, KeditError
from kedit.store import digest, runs_folder
from kedit.study.params import KEYS, Params
from kedit.study.plan import check
from kedit.study.results import Results
from kedit.study.run import run
from kedit.workers import quiet_libraries


def open_run(rq: str, cell: Mapping[str, Any]) -> Results:
    """The results that a notebook of a question asks for.

    Args:
        cell: the notebook's ``globals()``: ``name`` of a parameter file; ``source``, ``committed`` to read
            figures/, or ``run`` to compute whatever is not there yet; and any key of the file, where ``...`` (or
            none at all) stands for what the file says.

    Raises:
        KeditError: there is no such file, a value is wrong, or there are no results.
    """
    quiet_libraries()
    given = {key: cell[key] for key in KEYS if cell.get(key, ...) is not ...}
    found = results(chosen(rq, cell["name"], given), cell["source"])
    found.tell_failures()
    return found


def run_named(params: Params | str | Path, workers: int | None = None, **given: Any) -> Results:
    """Run a grid from Python (``kedit.run``), or as much of it as is not there yet, into ``runs/<rq>/<name>/``.

    Args:
        params: a parameter file; or its question and name, such as ``rq1/smoke``.
        workers: processes at once; by default one a core. A script that starts them must have its own code below
            ``if __name__ == "__main__":``.
        given: keys of the file to change, such as ``edits=[0, 2]``; the run gets a name of its own.

    Raises:
        KeditError: there is no such file, a value is wrong; what a run may raise.
    """
    if isinstance(params, str) and not params.endswith(".yaml"):
        params = Params.find(*params.partition("/")[::2])
    params = changed(params if isinstance(params, Params) else Params.read(params), given)
    check(params)
    return run(params, workers)


def chosen(rq: str, name: str, given: Mapping[str, Any]) -> Params:
    """The run of a parameter file, some of whose keys may be given otherwise.

    All that a file must say is given by whoever passes a whole file (``papermill -f``): then keys not given are
    the defaults, and the committed file that says the same gives the run its name, whatever ``name`` is.

    Raises:
        KeditError: there is no such file, or a value is wrong.
    """
    if not all(key in given for key, field in Params.model_fields.items() if field.is_required() and key in KEYS):
        return changed(Params.find(rq, name), given)
    whole = Params.make(rq, name, given)
    files = [Params.read(path) for path in sorted((ROOT / "params" / rq).glob("*.yaml"))]
    try:
        files.insert(0, Params.find(rq, name))
    except KeditError:  # a file from elsewhere, with its name
        return whole
    return changed(min(files, key=lambda file: len(_differences(whole, file))), whole.values())


def changed(file: Params, given: Mapping[str, Any]) -> Params:
    """A run with some keys given otherwise, and what differs added to its name.

    Raises:
        KeditError: a value is wrong.
    """
    params = Params.make(file.rq, file.name, {**file.values(), **given})
    name = file.name
    for key, value in _differences(params, file).items():
        text = "all" if value is None else "-".join(map(str, value if isinstance(value, list) else [value]))
        simple = key in ("edits", "orders", "limit", "dtype") and len(text) <= 20
        name += f"-{key}-{text if simple else digest(value)[:6]}"
    return params.model_copy(update={"name": name})


def _differences(params: Params, file: Params) -> dict[str, Any]:
    """What a run says and a file does not."""
    base = file.values()
    return {key: value for key, value in params.values().items() if value != base[key]}


def folder_of(params: Params, source: str) -> Path:
    """Where a run's results are: ``committed`` under figures/, ``run`` among the runs of this machine."""
    if source not in ("committed", "run"):
        raise KeditError(f"source is {source!r}; use committed or run.")
    return (ROOT / "figures" if source == "committed" else runs_folder()) / params.rq / params.name


def results(params: Params, source: str) -> Results:
    """Results of a run: ``committed`` ones, or ``run`` computes whatever is not there yet.

    Raises:
        KeditError: there are none, or they are of other parameters; what a run may raise.
    """
    try:
        return Results.load(params, folder_of(params, source), source)
    except KeditError:
        if source != "run":
            raise
        check(params)
        return run(params)
