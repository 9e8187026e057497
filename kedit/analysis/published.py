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
    path = kedit.PACKAGE / "data" / "published.csv"
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
    name = benchmarks.metadata(benchmark)["benchmark"].removesuffix(" MC1")  # which TruthfulQA's numbers are, not MC2's
    if benchmark not in benchmarks.suites()["paper"]:
        return rows[:0]
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
    rows = _left(rows)
    rows["shown"] = rows.kept.map("{:.2f}".format) + rows.note.where(rows.note == "", "*")
    index = ["model", "method", "edits"]
    table = rows.pivot(index=index, columns="benchmark", values="shown").fillna("-").rename_axis(columns=None)
    return table.reindex(pd.MultiIndex.from_frame(rows[index].drop_duplicates()), columns=rows.benchmark.unique())


def _left(rows: pd.DataFrame) -> pd.DataFrame:
    """The edited rows with ``kept``: score over that of the unedited model."""
    unedited = rows[rows.method == "none"][["model", "benchmark", "score"]]
    rows = rows[rows.method != "none"].merge(
        unedited, how="left", on=["model", "benchmark"], suffixes=("", "_unedited")
    )
    return rows.assign(kept=rows.score / rows.score_unedited)


@cache
def share_kept() -> pd.DataFrame:
    """The study's curves: what each method left of the score of each benchmark of an ability, by number of edits.

    The study reads generated answers, of which a broken model gives none, so its scores fall to 0 and the share kept is
    score over unedited score. TruthfulQA and ToxiGen, read by likelihood, do not fall to 0 and are left out.

    Returns:
        columns model and method (as published and as kedit names them), edits, benchmark (``mean``: over those that
        were published, where none is doubtful), kept, note. Edits 0 stand under each method with 1.
    """
    rows = _left(_every()[_every().table <= 4])
    line = ["model", "method", "edits"]
    sound = rows[~rows.groupby(line).note.transform(lambda notes: (notes != "").any())]
    means = sound.groupby(line, sort=False).kept.mean().reset_index().assign(benchmark="mean", note="")
    rows = pd.concat([rows, means])[[*line, "benchmark", "kept", "note"]]
    starts = rows.drop_duplicates(["model", "method", "benchmark"]).assign(edits=0, kept=1.0, note="")
    return pd.concat([starts, rows]).sort_values(["model", "method", "benchmark", "edits"], ignore_index=True)


def twins_apart() -> pd.DataFrame:
    """How far the study's base and tuned models are apart under each method, in scores and in shares kept.

    Returns:
        a row a base model and method: ``cells`` that both have, the largest difference of two scores (``score``) and of
        two shares kept (``kept``), and ``where`` the latter is. Doubtful cells are left out.
    """
    rows = _every()[(_every().table <= 3) & (_every().note == "")]
    shares = share_kept()[["model", "method", "edits", "benchmark", "kept"]]
    rows = rows.merge(shares, on=["model", "method", "edits", "benchmark"])
    found = []
    for base, tuned in (("Llama2-7B", "Llama2-7B-chat"), ("Mistral-7B", "Mistral-7B-Instruct")):
        both = rows[rows.model == base].merge(rows[rows.model == tuned], on=["method", "edits", "benchmark"])
        both["score"], both["kept"] = (both[f"{name}_y"] - both[f"{name}_x"] for name in ("score", "kept"))
        for method, cells in both.groupby("method", sort=False):
            far = cells.loc[cells.kept.abs().idxmax()]
            where = f"{far.benchmark}, {far.edits} edits: {far.kept_x:.2f} base, {far.kept_y:.2f} tuned"
            found.append((base, method, len(cells), cells.score.abs().max(), abs(far.kept), where))
    return pd.DataFrame(found, columns=["model", "method", "cells", "score", "kept", "where"])
