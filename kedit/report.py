"""From results to what people see: the files under figures/, the tables in notebooks and README."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

import kedit
from kedit import plots, stats
from kedit.single import editing_table
from kedit.store import write_atomic
from kedit.study import Params, Results

# A run's folder ----------------------------------------------------------------------------------


def folder_of(params: Params) -> Path:
    """Where a run's figure, table, cells and manifest go."""
    return kedit.ROOT / "figures" / params.rq / params.name


def publish(results: Results) -> list[Path]:
    """Write the figures (.png, .pdf), table.csv, cells.jsonl.gz and manifest.json of a run."""
    folder = folder_of(results.params)
    table = stats.table(results).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_atomic(folder / "table.csv", table.encode())
    figure = plots.rq1(stats.curves(results), results.params.benchmarks)
    made = plots.save(figure, folder) + plots.save(plots.retention(stats.retention(results)), folder, "retention")
    return [*made, folder / "table.csv", *results.save(folder)]


def redraw() -> list[Path]:
    """Redraw every committed figure and table from its committed cells."""
    made = []
    for cells in sorted((kedit.ROOT / "figures").glob("rq*/*/cells.jsonl.gz")):
        name, rq = cells.parent.name, cells.parent.parent.name
        made += publish(Results.load(Params.read(kedit.ROOT / "params" / rq / f"{name}.yaml"), cells.parent))
    return made


def differences(fresh: Results, committed: Results, tolerance: float = 0.03) -> list[str]:
    """Rows of two runs of the same grid whose values are further apart than the tolerance.

    Another processor may round another way and flip an item or two; more than that is a finding.
    """
    place = ["model", "method", "variant", "order", "edits", "benchmark", "metric"]
    both = stats.table(fresh).merge(stats.table(committed), on=place, how="outer", suffixes=("", "_ref"))
    apart = ~((both.value - both.value_ref).abs() <= tolerance) & ~(both.value.isna() & both.value_ref.isna())
    return [
        f"{r.method} after {r.edits} edits, {r.benchmark} {r.metric}: {r.value:.3f}, reference {r.value_ref:.3f}"
        for r in both[apart].itertuples()
    ]


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


# The README's tables ---------------------------------------------------------------------------------


def suite_table() -> pd.DataFrame:
    """The mini suite on the unedited SmolLM2: score, standard error, chance, n, distance from chance."""
    from math import sqrt

    from kedit import benchmarks
    from kedit.evaluate import evaluate

    lm = kedit.load("smollm2-135m-instruct")
    rows = []
    for name in benchmarks.SUITES["mini"]:
        about = benchmarks.metadata(name)
        items = evaluate(lm, name)
        values = [item["value"] for item in items]
        score = sum(values) / len(values)
        distance = stats.off_chance(values, about["chance"])
        rows.append(
            {
                "benchmark": name,
                "stands for": about["benchmark"],
                "metric": about["metric"],
                "unedited": f"{score:.3f}",
                "standard error": f"{sqrt(score * (1 - score) / len(values)):.3f}",
                "chance": f"{about['chance']:.2f}",
                "n": len(values),
                "off chance by (SE)": f"{distance:+.1f}",
                "": "" if abs(distance) >= 3 else "floor",
            }
        )
    return pd.DataFrame(rows)


TABLES: dict[str, Callable[[], pd.DataFrame]] = {"suite": suite_table, "editing": editing_table}


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table, without its index."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def update_readme(names: list[str]) -> None:
    """Measure tables and put them between their markers in README.md."""
    path = kedit.ROOT / "README.md"
    for name in names:
        if name not in TABLES:
            raise kedit.KeditError(f"there is no table {name!r}; there are {', '.join(TABLES)}.")
        table = markdown(TABLES[name]())
        text, replaced = re.subn(
            rf"(<!-- table {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            path.read_text(),
            flags=re.DOTALL,
        )
        if not replaced:
            raise kedit.KeditError(f"README.md has no place for the table {name!r}; add its markers.")
        write_atomic(path, text.encode())
