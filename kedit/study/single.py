"""Single edits, each undone before the next: for the README's table of methods and the search for hyper-parameters.

Every finished record is in the store, so both can be interrupted, and a table whose methods did not change costs
nothing to make again.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import pandas as pd
from tqdm import tqdm

from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.editors import editor
from kedit.evaluation import benchmarks
from kedit.evaluation.harness import evaluate
from kedit.evaluation.records import Item
from kedit.evaluation.success import measure, outcomes
from kedit.model.journal import EditFailed
from kedit.model.lm import LM, load
from kedit.store import Store, digest


def single_edits(
    lm: LM, name: str, requests: Sequence[EditRequest], hparams: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Edit, measure and undo, one request after another.

    Yields:
        for each request the journal's ``info``, the journal's size in ``bytes``, and what
        ``success.measure`` gives ``before`` and ``after`` the edit.
    """
    store = Store()
    method = editor(name, lm, hparams=hparams)
    recipe = method.key()
    for request in tqdm(requests, desc=name, mininterval=5):
        start = digest("edit", lm.fingerprint, request.key())
        if (before := store.get_json(start)) is None:
            before = measure(lm, [request])
            store.put_json(start, before)
        key = digest("single", lm.fingerprint, recipe, request.key())
        if (record := store.get_json(key)) is None:
            try:
                edit = method.apply(request)
                with method.shown():
                    record = {"info": edit.info, "bytes": len(edit.to_bytes()), "after": measure(lm, [request])}
                edit.undo()
            except EditFailed as error:
                record = {"info": {"failed": str(error)}, "bytes": 0, "after": before}
            store.put_json(key, record)
        yield {**record, "before": before}


def successes(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Item]]:
    """Outcomes of single edits by success metric."""
    after, before = ([item for record in records for item in record[when]] for when in ("after", "before"))
    return outcomes(after, before)


def costs(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median ``seconds`` and ``bytes`` of single edits, and how many ``failed``."""
    about = pd.DataFrame([{"seconds": None, "failed": None, **record["info"]} for record in records])
    return {
        "seconds": about.seconds.astype(float).median(),
        "bytes": median(record["bytes"] for record in records),
        "failed": int(about.failed.count()),
    }


def measured(model: str, name: str, count: int, timed: int) -> tuple[list[dict[str, Any]], float]:
    """A method's single edits of the first records of the bundled edit split.

    Returns:
        what ``single_edits`` yields, and the median seconds of the first edits, made and undone now, preparation apart.
    """
    lm, requests = load(model), facts.bundled("edit")[:count]
    method, times = editor(name, lm), []
    for request in requests[:timed]:
        edit = method.apply(request)
        times.append(edit.info["seconds"])
        edit.undo()
    return list(single_edits(lm, name, requests)), median(times)


def unedited(model: str, suite: str) -> dict[str, list[float]]:
    """Every item's score on every benchmark of a suite, before any edit."""
    lm = load(model)
    return {name: [item["value"] for item in evaluate(lm, name)] for name in benchmarks.suites()[suite]}
