"""The README's tables."""

import re
from collections.abc import Callable

import pandas as pd

import kedit
from kedit.analysis import scores as stats
from kedit.analysis.single import editing_table
from kedit.evaluation import benchmarks
from kedit.evaluation.harness import evaluate
from kedit.pico.train import RECIPES
from kedit.store import write_atomic

# The README's tables ---------------------------------------------------------------------------------


def suite_table() -> pd.DataFrame:
    """The mini suite on the unedited SmolLM2: score, standard error, chance, n, distance from chance."""
    from math import sqrt

    lm = kedit.load("smollm2-135m-instruct")
    rows = []
    for name in benchmarks.suites()["mini"]:
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


def pico_table() -> pd.DataFrame:
    """Every pico model on every pico benchmark: score and standard error; * within three of chance (floor)."""
    from math import sqrt

    about = {name: benchmarks.metadata(name) for name in benchmarks.suites()["pico"]}
    rows = [{"benchmark": n, "stands for": a["benchmark"], "chance": f"{a['chance']:.3g}"} for n, a in about.items()]
    for model in RECIPES:
        lm = kedit.load(model)
        for row in rows:
            values = [item["value"] for item in evaluate(lm, row["benchmark"])]
            score = sum(values) / len(values)
            floor = abs(stats.off_chance(values, about[row["benchmark"]]["chance"])) < 3
            row[model] = f"{score:.2f} ± {sqrt(score * (1 - score) / len(values)):.2f}" + " *" * floor
    return pd.DataFrame(rows)


TABLES: dict[str, Callable[[], pd.DataFrame]] = {
    "suite": suite_table,
    "pico": pico_table,
    "editing": editing_table,
}


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
