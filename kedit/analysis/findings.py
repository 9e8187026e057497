"""The study's findings 4.1 to 4.5: what was claimed, what its numbers support, what our committed runs support.

Its numbers get the same tests as ours as far as they allow: one run, one order of edits, scores without their items. So
methods, models or lines of a table are the unit, and what is said holds for these edits.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from kedit import KeditError
from kedit.analysis import claims, consistency, inference
from kedit.analysis.audit import over_orders
from kedit.analysis.inference import Estimate
from kedit.analysis.published import share_kept
from kedit.analysis.questions import QUESTIONS
from kedit.study.notebook import results
from kedit.study.params import Params
from kedit.study.results import Results

CLAIMED = {
    "rq1": "4.1: A few dozen edits are harmless; more of them destroy general abilities, by most methods, not by all",
    "rq2": "4.2: Instruction-tuned models decline more slowly",
    "rq3": "4.3: Larger models withstand editing better",
    "rq4": "4.4: Different abilities are affected to about the same extent",
    "rq5": "4.5: Even dozens of edits compromise safety",
}


def committed(rq: str) -> Results:
    """The committed run that decides a question (``claims.runs``).

    Raises:
        KeditError: there is none.
    """
    names = claims.runs(rq) or [Params.find(rq, QUESTIONS[rq].default)]
    return results(names[0], "committed")


# What the published numbers support ------------------------------------------------------------------


def _mean(values: Sequence[float]) -> Estimate:
    return over_orders([np.asarray(values, float)])


def _changes(found: pd.DataFrame, tables: str) -> str:
    """How many lines of some tables changed beyond noise, by number of edits."""
    rows = found[(found.check == "edits_change") & found.table.isin([*tables])]
    parts = []
    for band, some in rows.groupby("edits"):
        beyond, inside = ((some.finding == finding).sum() for finding in ("agrees", "does not"))
        parts.append(f"after {band} edits {beyond} of {len(some)} beyond noise, {inside} inside it even uncorrected")
    return f"Lines (a method on a model) whose scores changed: {'; '.join(parts)}."


def _tuning(found: pd.DataFrame) -> str:
    rows, curves = found[found.check == "twins_alike"], share_kept().query("benchmark == 'mean' and edits > 0")
    alike = rows[rows.finding == "does not"]
    each = []
    for base, tuned in consistency.TWINS.items():
        both = curves[curves.model == base].merge(curves[curves.model == tuned], on=["method", "edits"])
        each += list((both.kept_y - both.kept_x).groupby(both.method).mean())
    lines = ", ".join(f"{row.models} {row.methods}" for row in alike.itertuples())
    return (
        f"Share kept, tuned less base, mean over {len(each)} methods and pairs: {_mean(each)}. "
        f"{len(alike)} of {len(rows)} pairs of lines have scores consistent with one model's: {lines or 'none'}."
    )


def _scale(found: pd.DataFrame) -> str:
    curves, parts = share_kept().query("benchmark == 'mean' and edits > 0"), []
    for method, rows in curves[curves.model.str.startswith("Pythia")].groupby("method"):
        rows = rows[rows.edits == rows.edits.max()]
        size = [float(m.rpartition("-")[2][:-1]) * {"M": 1e6, "B": 1e9}[m[-1]] for m in rows.model]
        line = stats.linregress(np.log10(size), rows.kept)
        slope = Estimate(line.slope, line.stderr, len(rows) - 2)
        parts.append(f"{method} {slope} over {len(rows)} models after {rows.edits.iloc[0]} edits")
    floor = found[(found.check == "above_chance") & (found.table == "4")].finding.value_counts()
    chance = f"{floor.get('agrees', 0)} of {floor.sum()} unedited models are surely 0.05 above chance somewhere"
    return f"Change of the share kept per tenfold size: {'; '.join(parts)}. {chance}."


def _aspects(found: pd.DataFrame) -> str:
    rows = share_kept().query("benchmark != 'mean' and edits > 0 and model in ('Llama2-7B', 'Mistral-7B')")
    rows = rows.pivot_table(index=["model", "method"], columns="benchmark", values="kept")
    rows = rows[rows.min(axis=1) < 1 - inference.MARGIN]
    each = [f"{a} - {b} {_mean((rows[a] - rows[b]).dropna())}" for a, b in combinations(rows.columns, 2)]
    return f"Difference of shares kept over {len(rows)} lines that lost something: {'; '.join(each)}."


# The table -------------------------------------------------------------------------------------------


def findings() -> pd.DataFrame:
    """A row a finding: claimed, published, our verdicts with the run they are from, and what could not be tested."""
    found = consistency.consistency()
    theirs = {
        "rq1": _changes(found, "12"),
        "rq2": _tuning(found),
        "rq3": _scale(found),
        "rq4": _aspects(found),
        "rq5": _changes(found, "5"),
    }
    rows = []
    for rq, claim in CLAIMED.items():
        row = {"claimed": claim, "the published numbers": theirs[rq]}
        try:
            run = committed(rq)
            largest = max(inference.sizes(run).values())
            text = " ".join(str(verdict) for verdict, _ in claims.found(run))
            row |= {"our runs": f"{run.params.rq}/{run.params.name}: {text}"}
            row |= {"not tested here": f"models above {largest / 1e6:.3g}M parameters, and the study's benchmarks"}
        except KeditError as error:
            row |= {"our runs": f"Could not be tested here: {error}", "not tested here": "all of it"}
        rows.append(row)
    return pd.DataFrame(rows).set_index("claimed")
