"""The published numbers of the study that kedit reproduces, to be drawn and tabulated beside ours.

Facts read from its tables (kedit/data/README.md says how); ``note`` marks cells that are doubtful, as published.
"""

import re
from functools import cache

import pandas as pd

import kedit
from kedit.evaluation import benchmarks
from kedit.registry import unknown


@cache
def _every() -> pd.DataFrame:
    path = kedit.ROOT / "kedit" / "data" / "published.csv"
    return pd.read_csv(path, dtype={"note": str}, converters={"method": str.lower}, keep_default_na=False)


def _plain(model: str) -> str:
    """What meta-llama/Llama-2-7b-hf and the tables' Llama2-7B have in common."""
    return re.sub(r"-hf$|-v0\.1$|\W", "", model.rpartition("/")[-1].lower())


def published(model: str, benchmark: str) -> pd.DataFrame:
    """Published scores of a model on a benchmark, both named as in a parameter file.

    Args:
        model: for example ``meta-llama/Llama-2-7b-hf``.
        benchmark: for example ``mmlu``; a mini benchmark, being another one, has no published scores.

    Returns:
        columns ``table, model, method, edits, benchmark, score, note``; methods as kedit names them, ``none``
        for the unedited model. Empty where nothing was published.
    """
    rows = _every()
    if benchmark not in benchmarks.suites()["paper"]:
        return rows[:0]
    name = benchmarks.metadata(benchmark)["benchmark"].partition(" ")[0]  # TruthfulQA MC1
    return rows[(rows.model.map(_plain) == _plain(model)) & (rows.benchmark == name)].reset_index(drop=True)


def decline(tables: list[int], models: list[str] | None = None) -> pd.DataFrame:
    """Side table of published tables: what each method left of the unedited score, by number of edits.

    Args:
        tables: numbers of the study's tables (1 GPT2-XL, 2 base, 3 instruction-tuned, 4 Pythia, 5 safety).
        models: as parameter files name them; by default all of those tables.

    Returns:
        index (model, method, edits), one column a benchmark: score over the unedited score, as published,
        so 1 means unharmed and 0 that nothing could be parsed. A cell with a note is followed by ``*``.

    Raises:
        KeditError: a table or model that was not published.
    """
    rows = _every()
    for number in tables:
        if number not in set(rows.table):
            raise unknown("the study's table", number, map(str, sorted(rows.table.unique())))
    for model in models or ():
        if _plain(model) not in set(rows.model.map(_plain)):
            raise unknown("published model", model, rows.model.unique())
    rows = rows[rows.table.isin(tables)]
    if models is not None:
        rows = rows[rows.model.map(_plain).isin(map(_plain, models))]
    unedited, edited = rows[rows.method == "none"], rows[rows.method != "none"]
    rows = edited.merge(unedited, how="left", on=["model", "benchmark"], suffixes=("", "_unedited"))
    rows["shown"] = (rows.score / rows.score_unedited).map("{:.2f}".format) + rows.note.where(rows.note == "", "*")
    index = ["model", "method", "edits"]
    table = rows.pivot(index=index, columns="benchmark", values="shown").fillna("-").rename_axis(columns=None)
    return table.reindex(pd.MultiIndex.from_frame(rows[index].drop_duplicates()), columns=rows.benchmark.unique())
