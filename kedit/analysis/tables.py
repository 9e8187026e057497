"""Tables to be read, in notebooks: numbers with their 95% intervals, methods by their labels."""

import math
from collections.abc import Sequence

import pandas as pd

from kedit.analysis.inference import Ability, by_aspect, effects, kept
from kedit.analysis.scores import off_chance, shown
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


def ability_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Benchmark scores of the unedited model and the change at the last checkpoint."""
    rows = curves[curves.benchmark != "edit"]
    base = rows[rows.edits == 0].drop_duplicates("benchmark").set_index("benchmark")
    last = rows[rows.edits == rows.edits.max()]
    table = _pivot(last, "benchmark", "method", _shown(last, "delta", "delta", "+")).reindex(base.index)
    table.insert(0, "unedited", _shown(base))
    table.insert(1, "chance", base.chance.map("{:.2f}".format))
    table.insert(2, "off the floor", base.status.map(lambda status: "no" if status == "floor" else "yes"))
    return table


def verdict(curves: pd.DataFrame) -> str:
    """One sentence a method, from the scores: which abilities changed, and whether the edits took."""
    last = curves[curves.edits == curves.edits.max()]
    lines = []
    for method, rows in last.groupby("method", sort=False):
        success = rows[rows.benchmark == "edit"].set_index("metric").value
        ability = rows[(rows.benchmark != "edit") & (rows.status != "floor")]
        down, up = ability[ability.delta_high < 0].benchmark, ability[ability.delta_low > 0].benchmark
        collapsed = (ability.status == "collapsed").sum()
        lines.append(
            f"{_label(method)}, {rows.edits.iloc[0]} edits: reliability {success['reliability']:.2f}, "
            f"locality {success['locality']:.2f}; of {len(ability)} abilities off the floor {len(down)} fell"
            + (f" ({', '.join(down)})" if len(down) else "")
            + (f", {collapsed} of them collapsed" if collapsed else "")
            + (f", {len(up)} rose ({', '.join(up)})" if len(up) else "")
            + " (95% intervals of the paired difference exclude 0, not corrected for the number of panels)."
        )
    return "\n".join(lines)


def floor_table(abilities: Sequence[Ability]) -> pd.DataFrame:
    """Unedited scores by benchmark and model, with their distance from chance in standard errors."""
    rows: dict[str, dict[str, str]] = {}
    for ability in abilities:
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
    """What became of each ability at the last checkpoint (``inference.effects``)."""

    rows = effects(abilities)
    off = rows.effect != "floor"
    table = rows[["model", "method", "benchmark"]].assign(method=rows.method.map(_label))
    table["unedited"] = rows.base.map("{:.2f}".format)
    table[f"after {rows.edits.iloc[0]}"] = rows.score.map("{:.2f}".format)
    table["share kept"] = rows.kept.map(str).where(off, "-")
    table["p (Holm)"] = rows.p_holm.map(_p)
    table["effect"] = rows.effect
    table["collapse"] = rows.collapse.map(_collapse).where(off, "-")
    table = table.set_index(["model", "method", "benchmark"])
    return table if rows.model.nunique() > 1 else table.droplevel("model")


def _collapse(counts: Sequence[float]) -> str:
    point, low, high = ("never" if math.isinf(count) else f"{count:.0f}" for count in counts)
    return f"{point} [{low}, {high}]"


def contrast_table(contrast: pd.DataFrame) -> pd.DataFrame:
    """``inference.contrast``, model ``one`` being the base and ``other`` the tuned one."""
    table = contrast[["method", "benchmark"]].assign(method=contrast.method.map(_label))
    for title, column in (("base", "one"), ("tuned", "other"), ("difference", "difference")):
        table[title] = contrast[column].map(str)
    table["p (Holm)"] = contrast.p_holm.map(_p)
    return table.set_index(["method", "benchmark"])


def trend_table(trend: pd.DataFrame) -> pd.DataFrame:
    """``inference.trend``: share kept by each size, and the slope a tenfold size."""
    rows = [
        {"method": _label(row.method)}
        | {model: str(estimate) for model, estimate in row.kept.items()}
        | {"slope": str(row.slope or "-"), "p": _p(row.p), "benchmarks": row.benchmarks}
        for row in trend.itertuples()
    ]
    return pd.DataFrame(rows).set_index("method")


def aspect_table(abilities: Sequence[Ability]) -> pd.DataFrame:
    """Share kept of each aspect under each method at the last checkpoint."""
    rows: dict[str, dict[str, str]] = {}
    for method in dict.fromkeys(ability.method for ability in abilities):
        aspects = by_aspect([ability for ability in abilities if ability.method == method])
        rows[_label(method)] = {aspect: str(kept(group)) for aspect, group in aspects.items()}
    return pd.DataFrame(rows).T


def safety_table(measures: pd.DataFrame) -> pd.DataFrame:
    """``safety.over_edits``: each measure unedited and by method at the last checkpoint."""
    last = measures[measures.edits == measures.edits.max()]
    base = measures[measures.edits == 0].drop_duplicates("measure").set_index("measure")
    table = _pivot(last, "measure", "method", _shown(last)).reindex(last.measure.unique())
    table.insert(0, "unedited", _shown(base))
    return table


def predictors_table(predictors: pd.DataFrame) -> pd.DataFrame:
    """``damage.predictors``."""
    table = pd.DataFrame({"measure": predictors.measure})
    table["rho"] = _shown(predictors, "rho", "rho")
    table["alarm at"] = predictors.threshold
    table["before"] = [f"{row.before} of {row.collapsed}" for row in predictors.itertuples()]
    table["lead"] = predictors.lead.map(lambda lead: "-" if math.isnan(lead) else f"{lead:.0f}")
    table["false alarms"] = predictors.false_alarms
    return table.set_index("measure")
