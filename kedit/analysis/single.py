"""Single edits, each undone before the next: the README's table of methods, and scans of hyper-parameters.

Scans use the validation split, the table the edit split. Every finished record is in the store, so
both can be interrupted, and a table whose methods did not change costs nothing to make again.
"""

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import pandas as pd
import yaml

import kedit
from kedit import KeditError
from kedit.analysis.plots import label_of
from kedit.analysis.scores import summarise
from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.editors import EDITORS, editor, kind_of
from kedit.evaluation.success import METRICS, measure, outcomes
from kedit.model.journal import EditFailed
from kedit.store import Store, digest, runs_folder
from kedit.workers import default_workers, pool

log = logging.getLogger(__name__)

MODEL = "smollm2-135m-instruct"
TIMED = 5
"""Edits made afresh for the table's seconds, whenever it is made: stored ones were timed on a machine then in use."""


def single_edits(
    lm, name: str, requests: Sequence[EditRequest], hparams: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Edit, measure and undo, one request after another.

    Yields:
        for each request the journal's ``info``, the journal's size in ``bytes``, and what
        ``success.measure`` found ``before`` and ``after`` the edit.
    """
    from tqdm import tqdm

    store = Store(runs_folder() / "store")
    method = editor(name, lm, hparams=hparams)
    recipe = method.key()
    for request in tqdm(requests, desc=name, mininterval=5):
        start = digest("edit", lm.fingerprint, request.key())
        if (before := store.get_json(start)) is None:
            before = measure(lm, [request])
            store.put_json(start, before)
        key = digest("single", lm.fingerprint, recipe, request.key())
        if (found := store.get_json(key)) is None:
            try:
                edit = method.apply(request)
                found = {"info": edit.info, "bytes": len(edit.to_bytes()), "after": measure(lm, [request])}
                edit.undo()
            except EditFailed as error:
                found = {"info": {"failed": str(error)}, "bytes": 0, "after": before}
            store.put_json(key, found)
        yield {**found, "before": before}


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Success metrics over single edits, each ``stats.summarise``d, and the median seconds and bytes an edit."""

    found: dict[str, list] = {}
    for record in records:
        for metric, items in outcomes(record["after"], record["before"]).items():
            found.setdefault(metric, []).extend(items)
    seconds = [record["info"]["seconds"] for record in records if "seconds" in record["info"]]
    return {
        **{metric: summarise(items) for metric, items in found.items()},
        "seconds": median(seconds) if seconds else float("nan"),
        "bytes": median(record["bytes"] for record in records),
        "failed": sum("failed" in record["info"] for record in records),
    }


def _interval(row: Mapping[str, float]) -> str:
    return "-" if pd.isna(row["value"]) else f"{row['value']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"


def seconds_an_edit(lm, name: str, requests: Sequence[EditRequest]) -> float:
    """Median time of edits made and undone now, preparation apart."""

    method = editor(name, lm)
    method.prepare()
    times = []
    for request in requests:
        start = time.perf_counter()
        edit = method.apply(request)
        times.append(time.perf_counter() - start)
        edit.undo()
    return median(times)


def _method_row(name: str, count: int) -> dict[str, Any]:

    lm = kedit.load(MODEL)
    requests = facts.bundled("edit")[:count]
    numbers = summary(list(single_edits(lm, name, requests)))
    seconds = seconds_an_edit(lm, name, requests[:TIMED])
    metrics = (*METRICS, *(f"{metric}_generated" for metric in METRICS))
    return (
        {"method": label_of(name), "n": len(requests)}
        | {metric.replace("_", ", "): _interval(numbers[metric]) for metric in metrics}
        | {"seconds an edit": f"{seconds:.1f}", "kB an edit": f"{numbers['bytes'] / 1000:.1f}"}
    )


def editing_table(count: int = 100) -> pd.DataFrame:
    """Every method on the first records of the bundled edit split, one method a worker."""

    with pool(default_workers()) as executor:
        return pd.DataFrame(executor.map(_method_row, EDITORS, [count] * len(EDITORS)))


def scan(name: str, settings: Sequence[str], count: int = 20, model: str = MODEL) -> pd.DataFrame:
    """A method on a grid of hyper-parameters, such as ``["layer=[3, 5, 7]", "clamp=[2, 4]"]``.

    Records are those of the validation split: of the bundled set, or of their own for the pico models.

    Raises:
        KeditError: a setting that is not ``name=[values]``.
    """

    kind_of(name)
    grid: dict[str, list] = {}
    for setting in settings:
        key, _, values = setting.partition("=")
        grid[key] = yaml.safe_load(values)
        if not isinstance(grid[key], list):
            raise KeditError(f"scan: {setting!r} is not a list of values; write such as layer=[3,5,7].")
    lm = kedit.load(model)
    requests = facts.load("pico" if model.startswith("pico-") else "bundled", "validation")[:count]
    rows = []
    for values in itertools.product(*grid.values()):
        hparams = dict(zip(grid, values, strict=True))
        numbers = summary(list(single_edits(lm, name, requests, hparams)))
        row = {key: str(value) for key, value in hparams.items()}
        row |= {metric: round(numbers[metric]["value"], 3) for metric in METRICS}
        row |= {"generated": round(numbers["reliability_generated"]["value"], 3)}
        rows.append(row | {"failed": numbers["failed"], "seconds": round(numbers["seconds"], 2)})
        log.info("%s", rows[-1])
    return pd.DataFrame(rows)
