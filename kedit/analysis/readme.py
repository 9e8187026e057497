"""The tables of README.md and of the pages beside it.

Those of the committed results are computed from them (``claims``); for the others something is measured
(``kedit.study.single``), where the store does not have it yet.
"""

import re
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import pandas as pd

import kedit
from kedit.analysis import claims
from kedit.analysis.claims import markdown
from kedit.analysis.scores import FLOOR, off_chance, shown, summarise
from kedit.editors import kind_of, known
from kedit.evaluation import benchmarks
from kedit.registry import load_object, unknown
from kedit.store import write_atomic
from kedit.study.single import costs, measured, successes, unedited
from kedit.workers import pool

MODEL = "smollm2-135m-instruct"
TIMED = 5
"""Edits made afresh for the table's seconds, whenever it is made: stored ones were timed on a machine then in use."""


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Share of right answers and its standard error."""
    score = sum(values) / len(values)
    return score, sqrt(score * (1 - score) / len(values))


def suite_table() -> pd.DataFrame:
    """The mini suite on the unedited SmolLM2: score, standard error, chance, n, distance from chance."""
    names = ["benchmark", "stands for", "metric", "unedited", "standard error", "chance", "n", "off chance by (SE)", ""]
    rows = []
    for name, values in unedited(MODEL, "mini").items():
        about = benchmarks.metadata(name)
        distance = off_chance(values, about["chance"])
        numbers = [f"{number:.3f}" for number in _mean(values)]
        row = [name, about["benchmark"], about["metric"], *numbers, f"{about['chance']:.2f}", len(values)]
        rows.append([*row, f"{distance:+.1f}", "" if abs(distance) >= FLOOR else "floor"])
    return pd.DataFrame(rows, columns=names)


def pico_table() -> pd.DataFrame:
    """Every pico model on every pico benchmark: score and standard error; * within three of chance (floor)."""
    about = {name: benchmarks.metadata(name) for name in benchmarks.suites()["pico"]}
    rows = [{"benchmark": n, "stands for": a["benchmark"], "chance": f"{a['chance']:.3g}"} for n, a in about.items()]
    for model in load_object("kedit.pico.train:RECIPES"):
        for row, values in zip(rows, unedited(model, "pico").values(), strict=True):
            floor = abs(off_chance(values, about[row["benchmark"]]["chance"])) < FLOOR
            row[model] = "{:.2f} ± {:.2f}".format(*_mean(values)) + " *" * floor
    return pd.DataFrame(rows)


def _method_row(name: str, count: int) -> dict[str, Any]:
    records, seconds = measured(MODEL, name, count, TIMED)
    row = {"method": kind_of(name).label, "n": len(records)}
    metrics = successes(records)
    for metric in sorted(metrics, key=lambda metric: metric.endswith("_generated")):
        about = summarise(metrics[metric])
        row[metric.replace("_", ", ")] = shown(about["value"], about["ci_low"], about["ci_high"])
    return row | {"seconds an edit": f"{seconds:.1f}", "kB an edit": f"{costs(records)['bytes'] / 1000:.1f}"}


def editing_table(count: int = 100) -> pd.DataFrame:
    """Every method on the first records of the bundled edit split, one method a worker."""
    with pool() as (executor, _):
        return pd.DataFrame(executor.map(_method_row, known(), [count] * len(known())))


TABLES: dict[str, Callable[[], pd.DataFrame | str]] = {
    "decision": claims.decision,
    "answers": claims.answers,
    "claims": claims.claims,
    "suite": suite_table,
    "pico": pico_table,
    "editing": editing_table,
}
PAGES = ("README.md", "CLAIMS.md", "kedit/README.md", "params/README.md", "notebooks/README.md")
"""Where a table's markers may stand; it is written into every page that has them."""


def filled(name: str, text: str, table: pd.DataFrame | str) -> str:
    """A page with a table between its markers, if it has them."""
    table = table if isinstance(table, str) else markdown(table)
    place = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
    return re.sub(place, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)


def update_readme(names: Sequence[str]) -> None:
    """Make tables and put them between their markers, in whichever page has these.

    Raises:
        KeditError: there is no such table, or no place for it.
    """
    for name in names:
        if name not in TABLES:
            raise unknown("table", name, TABLES)
        pages = {path: path.read_text() for path in map(kedit.ROOT.joinpath, PAGES)}
        pages = {path: text for path, text in pages.items() if f"<!-- table {name} -->" in text}
        if not pages:
            raise kedit.KeditError(f"no page has a place for the table {name!r}; add its markers to one of {PAGES}.")
        table = TABLES[name]()
        for path, text in pages.items():
            write_atomic(path, filled(name, text, table).encode())
