"""Tables to be read, in notebooks: numbers with their 95% intervals, methods by their labels."""

import math
from collections.abc import Sequence

import pandas as pd

from kedit.analysis.inference import Ability, aspects, effects
from kedit.analysis.scores import LINE, off_chance, shown
from kedit.editors import kind_of
from kedit.study.results import Results

pd.options.display.max_rows = 500  # a notebook's table says something in every row


def _shown(rows: pd.DataFrame, name: str = "value", interval: str = "ci", sign: str = "") -> pd.Series:
    """Each row's number with its interval."""
    numbers = rows[[name, f"{interval}_low", f"{interval}_high"]].to_numpy(float)
    return pd.Series([shown(*three, sign) for three in numbers], rows.index)


def _pivot(rows: pd.DataFrame, index: str | list[str], columns: str, text: pd.Series) -> pd.DataFrame:
    """The text of each row, by ``index`` and ``columns``; columns in the order of the rows."""
    table = rows.assign(shown=text).pivot(index=index, columns=columns, values="shown")
    return table[list(dict.fromkeys(rows[columns]))]


def _label(method: str) -> str:
    return kind_of(method).label


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


# Scores --------------------------------------------------------------------------------------------


def success_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Edit success of each method at each checkpoint, over all edits so far."""
    rows = curves[(curves.benchmark == "edit") & (curves.edits > 0)]
    return _pivot(rows, ["method", "edits"], "metric", _shown(rows))


def success_by_model(curves: pd.DataFrame) -> pd.DataFrame:
    """Edit success, teacher-forced, at the last checkpoint for each model and method that edits."""
    rows = curves[(curves.benchmark == "edit") & (curves.edits == curves.edits.max())]
    rows = rows[rows.method.map(lambda method: kind_of(method).edits) & ~rows.metric.str.endswith("_generated")]
    return _pivot(rows, ["method", "model"], "metric", _shown(rows))


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
    edits = pd.DataFrame([{"method": e.method, "bytes": e.bytes, **e.info} for e in results.edits])
    edits = edits.reindex(columns=["method", "bytes", "failed", "steps", "relative_change", "amplification"])
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
    table = edits.groupby("method", sort=False).agg(**columns).astype({"bytes an edit": int})
    table = table.round(dict.fromkeys(columns, 2) | {"median |dW|/|W|": 3})
    return table.astype(object).where(table.notna(), "-")


# What follows from them ----------------------------------------------------------------------------


def effects_table(abilities: Sequence[Ability]) -> pd.DataFrame:
    """What became of each ability at the last checkpoint (``inference.effects``): share kept and state by scale."""
    rows = effects(abilities)
    text = rows.kept.map(str).where(rows.state != "floor", "-") + " " + rows.state
    table = rows.assign(text=text).pivot(index=[*LINE, "benchmark"], columns="scale", values="text").fillna("-")
    return table.reindex(pd.MultiIndex.from_frame(rows[[*LINE, "benchmark"]].drop_duplicates()))


def contrast_table(contrast: pd.DataFrame) -> pd.DataFrame:
    """``inference.contrast``."""
    table = contrast[["label", "scale", "benchmarks", "orders"]].copy()
    for column in ("base", "tuned", "difference"):
        table[column] = contrast[column].map(str)
    table["p (Holm)"] = contrast.p_holm.map(_p)
    return table.set_index(["label", "scale"])


def trend_table(trend: pd.DataFrame) -> pd.DataFrame:
    """``inference.trend``: share kept and reliability by model, and the slope a tenfold size."""
    rows = [
        {"method": row.label, "scale": row.scale}
        | {model: f"{each} (reliability {row.reliability[model]:.2f})" for model, each in row.kept.items()}
        | {"slope": str(row.slope), "p (Holm)": _p(row.p_holm), "benchmarks": row.benchmarks}
        for row in trend.itertuples()
    ]
    return pd.DataFrame(rows)


def aspect_table(abilities: Sequence[Ability]) -> pd.DataFrame:
    """Share kept of each aspect under each method at the last checkpoint (``inference.aspects``)."""
    rows = []
    for label in dict.fromkeys(a.label for a in abilities):
        each, _ = aspects([a for a in abilities if a.label == label])
        rows.append(each.assign(method=label, kept=each.kept.map(str)))
    table = pd.concat(rows)
    return table.pivot(index=["method", "scale"], columns="aspect", values="kept").fillna("-")


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
