"""Tables to be read, in notebooks: numbers with their 95% intervals, methods by their labels."""

import math
from collections.abc import Sequence

import pandas as pd

from kedit.analysis import inference, scores, verdicts
from kedit.analysis.inference import Ability
from kedit.analysis.scores import LINE, off_chance, shown
from kedit.analysis.verdicts import NAMES, Verdict
from kedit.editors import kind_of
from kedit.study.results import Results

pd.options.display.max_rows = 500  # a notebook's table says something in every row
pd.options.display.max_colwidth = None


def _shown(rows: pd.DataFrame, name: str = "value", interval: str = "ci") -> list[str]:
    """Each row's number with its interval."""
    return [shown(*three) for three in rows[[name, f"{interval}_low", f"{interval}_high"]].to_numpy(float)]


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _wide(rows: pd.DataFrame, index: list[str], columns: str, text: Sequence[str]) -> pd.DataFrame:
    """The text of each row, by ``index`` and ``columns``, both in the order of the rows."""
    table = rows.assign(text=text).pivot(index=index, columns=columns, values="text").fillna("-")
    order = rows.set_index(index).index.drop_duplicates()
    return table.reindex(order, columns=rows[columns].drop_duplicates())


# Did the edits happen? -----------------------------------------------------------------------------


def success_table(results: Results) -> pd.DataFrame:
    """Edit success over all edits made, by model and method; reliability of the first and the last tenth of them."""
    curves = scores.curves(results)
    rows = curves[(curves.benchmark == "edit") & (curves.edits == curves.edits.max())]
    table = _wide(rows, LINE, "metric", _shown(rows)).reset_index()
    works = scores.editing(scores.table(results)).query("edits == edits.max()")
    for part in (works[[*LINE, "threshold", "editing"]], scores.tenths(results)[[*LINE, "first", "last"]]):
        table = table.merge(part, how="left", on=LINE)
    numbers = {name: table[name].map(shown) for name in ("first", "last", "threshold")}
    names = {"first": "first tenth", "last": "last tenth", "editing": "keeps its edits"}
    table = table.assign(**numbers, editing=table.editing.map({True: "yes", False: "no"})).rename(columns=names)
    return table.assign(method=table.method.map(lambda method: kind_of(method).label)).set_index(LINE)


def floor_table(abilities: Sequence[Ability]) -> pd.DataFrame:
    """Unedited scores by benchmark and model, with their distance from chance in standard errors."""
    rows: dict[str, dict[str, str]] = {}
    for ability in (a for a in abilities if a.scale == "value"):
        distance = off_chance(ability.base, ability.chance)
        rows.setdefault(ability.benchmark, {"chance": f"{ability.chance:.2f}"})[ability.model] = (
            f"{ability.base.mean():.2f} ({distance:+.0f})" + " floor" * ability.floor
        )
    return pd.DataFrame(rows).T


def journal_table(results: Results) -> pd.DataFrame:
    """What the journals say of the edits: amplification, size of the change, steps, bytes on disk."""
    edits = [
        {"method": kind_of(edit.method).label, "bytes": edit.bytes / len(edit.requests), **edit.info, **own}
        for edit in results.edits
        for own in edit.info.get("each", [{}] * len(edit.requests))
    ]
    edits = pd.DataFrame(edits)
    edits = edits.reindex(columns=["method", "bytes", "failed", "skipped", "steps", "relative_change", "amplification"])
    edits["relative_change"] = edits.relative_change.map(lambda each: max(each) if isinstance(each, list) else each)
    columns = {
        "edits": ("method", "size"),
        "failed": ("failed", "count"),
        "median steps": ("steps", "median"),
        "median |dW|/|W|": ("relative_change", "median"),
        "median amplification": ("amplification", "median"),
        "largest amplification": ("amplification", "max"),
        "bytes an edit": ("bytes", "median"),
    }
    if edits.skipped.notna().any():
        columns["skipped"] = ("skipped", "count")
    table = edits.groupby("method", sort=False).agg(**columns).astype({"bytes an edit": int})
    table = table.round(dict.fromkeys(columns, 2) | {"median |dW|/|W|": 3})
    return table.astype(object).where(table.notna(), "-")


# What follows -------------------------------------------------------------------------------------


def _states(rows: pd.DataFrame, index: list[str], columns: str) -> pd.DataFrame:
    """What became of each ability, by method: state and share kept; those at the floor are left out."""
    rows = rows[rows.state != "floor"].assign(scale=rows.scale.map(NAMES.get), method=rows.label)
    rows = rows.assign(method=rows.label.where(rows.editing, rows.label + " (edits not kept)"))
    rows = rows.sort_values("editing", ascending=False, kind="stable")
    text = [f"{row.kept}" if row.state == "apart" else f"{row.state} {row.kept}" for row in rows.itertuples()]
    table = _wide(rows, index, columns, text)
    return table.rename_axis(columns=f"after {rows.edits.iloc[0]} edits, orders: {rows.orders.iloc[0]}")


def verdict_table(abilities: Sequence[Ability]) -> pd.DataFrame:
    """What became of each general ability at the last checkpoint, in the family of ``verdicts.number_of_edits``."""
    some = inference.general(abilities, None)
    return _states(inference.effects(some), ["method", "scale"], "benchmark") if some else pd.DataFrame()


def safety_table(abilities: Sequence[Ability]) -> pd.DataFrame:
    """The same of what is asked about safety, each in the family of its sentence (``verdicts.of_safety``)."""
    rows = pd.concat([inference.effects(group) for group in verdicts.of_safety(abilities).values()], ignore_index=True)
    return _states(rows.assign(what=rows.benchmark + ": " + rows.scale.map(NAMES.get)), ["method"], "what")


def sentences(found: Verdict | Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts, a row each; what the number of orders allows is said once, above."""
    found = [found] if isinstance(found, Verdict) else found
    table = pd.DataFrame([{"claim": each.claim, "verdict": each.word, "why": each.because} for each in found])
    hedge = next((each.hedge for each in found if each.hedge), "")
    return table.set_index("claim").rename_axis(columns=hedge.rstrip())


def contrast_table(contrast: pd.DataFrame) -> pd.DataFrame:
    """``inference.contrast``."""
    table = contrast[["label", "scale", "benchmarks", "orders"]].copy()
    for column in ("base", "tuned", "difference"):
        table[column] = contrast[column].map(str)
    equal = [" equal" * row.difference.equal() for row in contrast.itertuples()]
    table = table.assign(difference=table.difference + equal, scale=table.scale.map(NAMES.get))
    return table.assign(**{"p (Holm)": contrast.p_holm.map(_p)}).set_index(["label", "scale"])


def trend_table(trend: pd.DataFrame) -> pd.DataFrame:
    """``inference.trend``: share kept and reliability by model, and the slope a tenfold size."""
    rows = [
        {"method": row.label, "scale": NAMES[row.scale]}
        | {model: f"{each} (reliability {row.reliability[model]:.2f})" for model, each in row.kept.items()}
        | {"slope": str(row.slope), "p (Holm)": _p(row.p_holm), "benchmarks": row.benchmarks}
        for row in trend.itertuples()
    ]
    return pd.DataFrame(rows).set_index(["method", "scale"]).T if rows else pd.DataFrame()


def predictors_table(predictors: pd.DataFrame) -> pd.DataFrame:
    """``damage.predictors``."""
    table = pd.DataFrame({"measure": predictors.measure})
    table["rho"] = _shown(predictors, "rho", "rho")
    table["within methods"] = _shown(predictors, "within", "within")
    table["alarm at"] = predictors.threshold
    table["before"] = [f"{row.before} of {row.collapsed}" for row in predictors.itertuples()]
    table["lead"] = predictors.lead.map(lambda lead: "-" if math.isnan(lead) else f"{lead:.0f}")
    table["false alarms"] = predictors.false_alarms
    return table.set_index("measure")
