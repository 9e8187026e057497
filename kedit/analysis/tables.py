"""From results to what people see: the files under figures/, the tables in notebooks and README."""

import math
from collections.abc import Sequence

import pandas as pd

from kedit.analysis import plots
from kedit.analysis import scores as stats
from kedit.analysis.inference import Ability, by_aspect, effects
from kedit.study.results import Results

pd.options.display.max_rows = 500  # a notebook's table says something in every row


# Tables for readers --------------------------------------------------------------------------------


def _interval(row: pd.Series, value: str, low: str, high: str, sign: str = "") -> str:
    if pd.isna(row[value]):
        return "-"
    if pd.isna(row[low]):
        return f"{row[value]:{sign}.2f}"
    return f"{row[value]:{sign}.2f} [{row[low]:{sign}.2f}, {row[high]:{sign}.2f}]"


def success_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Edit success of each method at each checkpoint, over all edits so far, with 95% intervals."""
    rows = curves[(curves.benchmark == "edit") & (curves.edits > 0)].copy()
    rows["shown"] = rows.apply(_interval, axis=1, args=("value", "ci_low", "ci_high"))
    order = list(dict.fromkeys(rows.metric))
    return rows.pivot(index=["method", "edits"], columns="metric", values="shown")[order]


def ability_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Benchmark scores of the unedited model and the change at the last checkpoint, with 95% intervals."""
    rows = curves[curves.benchmark != "edit"]
    base = rows[rows.edits == 0].drop_duplicates("benchmark").set_index("benchmark")
    last = rows[rows.edits == rows.edits.max()].copy()
    last["shown"] = last.apply(_interval, axis=1, args=("delta", "delta_low", "delta_high", "+"))
    shown = last.pivot(index="benchmark", columns="method", values="shown")
    shown = shown[list(dict.fromkeys(last.method))].reindex(base.index)
    shown.insert(0, "unedited", base.apply(_interval, axis=1, args=("value", "ci_low", "ci_high")))
    shown.insert(1, "chance", base.chance.map("{:.2f}".format))
    shown.insert(2, "off the floor", base.status.map(lambda status: "no" if status == "floor" else "yes"))
    return shown


def journal_table(results: Results) -> pd.DataFrame:
    """What the journals say of the edits: amplification, size of the change, steps, bytes on disk."""
    edits = pd.DataFrame(results.edits)
    rows = []
    for method, group in edits.groupby("method", sort=False):
        change = group.get("relative_change", pd.Series(dtype=float)).dropna()
        change = change.map(lambda c: max(c) if isinstance(c, list) else c)
        amplification = group.get("amplification", pd.Series(dtype=float)).dropna()
        rows.append(
            {
                "method": method,
                "edits": len(group),
                "failed": int(group.get("failed", pd.Series(dtype=object)).notna().sum()),
                "median steps": group["steps"].median() if "steps" in group else None,
                "median |dW|/|W|": round(change.median(), 3) if len(change) else None,
                "median amplification": round(amplification.median(), 2) if len(amplification) else None,
                "largest amplification": round(amplification.max(), 2) if len(amplification) else None,
                "bytes an edit": int(group["bytes"].median()),
            }
        )
    return pd.DataFrame(rows).set_index("method").astype(object).where(lambda frame: frame.notna(), "-")


def verdict(curves: pd.DataFrame) -> str:
    """One sentence a method, from the statistics: which abilities changed, and whether the edits took."""
    last = curves[curves.edits == curves.edits.max()]
    lines = []
    for method, rows in last.groupby("method", sort=False):
        edit = rows[rows.benchmark == "edit"].set_index("metric")
        ability = rows[(rows.benchmark != "edit") & (rows.status != "floor")]
        down = ability[ability.delta_high < 0].benchmark.tolist()
        up = ability[ability.delta_low > 0].benchmark.tolist()
        collapsed = ability[ability.status == "collapsed"].benchmark.tolist()
        told = (
            f"{plots.label_of(method)}, {int(rows.edits.iloc[0])} edits: reliability {edit.value['reliability']:.2f}, "
            f"locality {edit.value['locality']:.2f}; of {len(ability)} abilities off the floor {len(down)} fell"
        )
        told += f" ({', '.join(down)})" if down else ""
        told += f", {len(collapsed)} of them collapsed" if collapsed else ""
        told += f", {len(up)} rose ({', '.join(up)})" if up else ""
        lines.append(
            told + " (95% intervals of the paired difference exclude 0, not corrected for the number of panels)."
        )
    return "\n".join(lines)


# Tables of the inference ------------------------------------------------------------------------------


def _shown(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if math.isfinite(low) else f"{value:.2f}"


def _count(edits: float) -> str:
    return "-" if math.isnan(edits) else "never" if math.isinf(edits) else f"{edits:.0f}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def effects_table(found: Sequence[Ability]) -> pd.DataFrame:
    """What became of each ability at the last checkpoint (``inference.effects``), to be read."""
    rows = [
        {
            "model": row.model,
            "method": plots.label_of(row.method),
            "benchmark": row.benchmark,
            "unedited": f"{row.base:.2f}",
            f"after {row.edits}": f"{row.score:.2f}",
            "share kept": "-" if row.effect == "floor" else _shown(row.kept, row.kept_low, row.kept_high),
            "p (Holm)": _p(row.p_holm),
            "effect": row.effect,
            "collapse": f"{_count(row.collapse)} [{_count(row.collapse_low)}, {_count(row.collapse_high)}]"
            if row.effect != "floor"
            else "-",
        }
        for row in effects(found).itertuples()
    ]
    frame = pd.DataFrame(rows)
    keys = (["model"] if frame.model.nunique() > 1 else []) + ["method", "benchmark"]
    return frame.drop(columns=["model"] if len(keys) == 2 else []).set_index(keys)


def success_by_model(curves: pd.DataFrame) -> pd.DataFrame:
    """Edit success at the last checkpoint for each model and method."""
    rows = curves[
        (curves.benchmark == "edit") & (curves.edits == curves.edits.max()) & (curves.method != "control")
    ].copy()
    rows["shown"] = rows.apply(_interval, axis=1, args=("value", "ci_low", "ci_high"))
    order = [metric for metric in dict.fromkeys(rows.metric) if not metric.endswith("_generated")]
    return rows.pivot(index=["method", "model"], columns="metric", values="shown")[order]


def contrast_table(table: pd.DataFrame) -> pd.DataFrame:
    """``inference.contrast`` to be read."""
    shown = table.assign(
        method=table.method.map(plots.label_of),
        base=table.one.map(str),
        tuned=table.other.map(str),
        difference=table.difference.map(str),
    )
    shown["p (Holm)"] = table.p_holm.map(_p)
    return shown.set_index(["method", "benchmark"])[["base", "tuned", "difference", "p (Holm)"]]


def floor_table(found: Sequence[Ability]) -> pd.DataFrame:
    """Unedited scores by benchmark and model, with their distance from chance in standard errors."""
    shown: dict[str, dict[str, str]] = {}
    for ability in found:
        distance = stats.off_chance(ability.base, ability.chance)
        mark = " floor" if ability.floor else ""
        shown.setdefault(ability.benchmark, {"chance": f"{ability.chance:.2f}"})[ability.model] = (
            f"{ability.base.mean():.2f} ({distance:+.0f}){mark}"
        )
    return pd.DataFrame(shown).T


def trend_table(table: pd.DataFrame) -> pd.DataFrame:
    """``inference.trend`` to be read: share kept by each size, and the slope a tenfold size."""
    rows = [
        {"method": plots.label_of(row.method)}
        | {model: str(estimate) for model, estimate in row.kept.items()}
        | {"slope": str(row.slope or "-"), "p": _p(row.p), "benchmarks": len(row.benchmarks)}
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows).set_index("method")


def aspect_table(found: Sequence[Ability]) -> pd.DataFrame:
    """Share kept of each aspect under each method at the last checkpoint."""
    methods = list(dict.fromkeys(ability.method for ability in found))
    rows = {
        plots.label_of(method): {
            aspect: str(estimate) for aspect, estimate in by_aspect([a for a in found if a.method == method]).items()
        }
        for method in methods
    }
    return pd.DataFrame(rows).T


def safety_table(measures: pd.DataFrame) -> pd.DataFrame:
    """``safety.over_edits`` to be read: each measure unedited and by method at the last checkpoint."""
    last = measures[measures.edits == measures.edits.max()].copy()
    last["shown"] = last.apply(_interval, axis=1, args=("value", "ci_low", "ci_high"))
    base = measures[measures.edits == 0].drop_duplicates("measure").set_index("measure")
    table = last.pivot(index="measure", columns="method", values="shown")
    table = table.reindex(index=list(dict.fromkeys(last.measure)), columns=list(dict.fromkeys(last.method)))
    table.insert(0, "unedited", base.apply(_interval, axis=1, args=("value", "ci_low", "ci_high")))
    return table


def predictors_table(table: pd.DataFrame) -> pd.DataFrame:
    """``stats.predictors`` to be read."""
    shown = pd.DataFrame({"measure": table.measure})
    shown["rho"] = [_shown(*values) for values in table[["rho", "rho_low", "rho_high"]].to_numpy()]
    shown["alarm at"] = table.threshold
    shown["before"] = [f"{before} of {fallen}" for before, fallen in zip(table.before, table.collapsed, strict=True)]
    shown["lead"] = table.lead.map(lambda lead: "-" if math.isnan(lead) else f"{lead:.0f}")
    shown["false alarms"] = table.false_alarms
    return shown.set_index("measure")


def damage_verdict(table: pd.DataFrame) -> str:
    """One sentence from ``stats.predictors``: which measures go with the loss of ability, and which comes first."""
    claim = "Damage inside goes with the loss of ability"
    with_it = table[table.rho_high < 0]
    if not len(with_it):
        return f"{claim}: INCONCLUSIVE. No measure's rank correlation with the ability kept excludes 0."
    told = ", ".join(f"{row.measure} ({_shown(row.rho, row.rho_low, row.rho_high)})" for row in with_it.itertuples())
    first = with_it.sort_values(["before", "rho"], ascending=[False, True], kind="stable").iloc[0]
    when = (
        f"earliest is {first.measure}, before {first.before} of {first.collapsed} collapses"
        if first.before
        else f"none gives the alarm at a checkpoint before any of the {first.collapsed} collapses"
    )
    rising = f"{len(with_it)} of {len(table)} measures rise as the ability falls"
    return f"{claim}: SUPPORTED. {rising} (rank correlation): {told}; {when}."
