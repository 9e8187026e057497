"""From results to the files under figures/, and to one page."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

import kedit
from kedit.analysis import plots, safety
from kedit.analysis import scores as stats
from kedit.analysis.inference import abilities
from kedit.analysis.questions import QUESTIONS
from kedit.store import write_atomic
from kedit.study.params import Params
from kedit.study.results import Results

# A run's folder ----------------------------------------------------------------------------------


def folder_of(params: Params) -> Path:
    """Where a run's figure, table, cells and manifest go."""
    return kedit.ROOT / "figures" / params.rq / params.name


def publish(results: Results) -> list[Path]:
    """Write the figures (.png, .pdf), table.csv, cells.jsonl.gz and manifest.json of a run."""
    folder = folder_of(results.params)
    table = stats.table(results).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_atomic(folder / "table.csv", table.encode())
    made = [path for name, figure in figures(results).items() for path in plots.save(figure, folder, name)]
    return [*made, folder / "table.csv", *results.save(folder)]


def figures(results: Results) -> dict[str, Figure]:
    """The figures of a run's question, by file name."""
    params = results.params
    if params.rq == "rq2":
        return {"figure": plots.rq2(abilities(results), *params.models)}
    if params.rq == "rq3":
        return {"figure": plots.rq3(abilities(results), size_of(results))}
    if params.rq == "rq4":
        return {"figure": plots.rq4(abilities(results))}
    if params.rq == "rq5":
        return {"figure": plots.rq5(stats.curves(results), params.benchmarks, safety.over_edits(results))}
    if params.rq == "discussion":
        return {"figure": plots.damage(stats.checkpoints(results))}
    kept = plots.retention(stats.retention(results))
    return {"figure": plots.rq1(stats.curves(results), params.benchmarks), "retention": kept}


def size_of(results: Results) -> Callable[[str], float]:
    """Parameters of each of the run's models, by name."""
    return {model: about["parameters"] for model, about in results.manifest["models"].items()}.get


def redraw() -> list[Path]:
    """Redraw every committed figure and table from its committed cells."""
    made = []
    for cells in sorted((kedit.ROOT / "figures").glob("*/*/cells.jsonl.gz")):
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


# The report ---------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Should we really edit language models?</title>
<style>
body {{ font: 16px/1.5 Georgia, serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }}
h1, h2 {{ font-weight: normal }} section {{ margin: 3em 0 }} img {{ max-width: 100% }}
p.verdict {{ white-space: pre-line }}
</style>
<h1>Should we really edit language models?</h1>
{sections}
</html>
"""
SECTION = """<section><h2><a href="{link}">{title}</a></h2>
<a href="{link}"><img src="data:image/png;base64,{figure}" alt="{title}"></a>
<p class="verdict">{verdict}</p></section>
"""


def html(folder: Path) -> list[Path]:
    """Render the committed notebooks, and a page with every question's figure and verdict side by side.

    Returns:
        the files made, the page first. Nothing in them is fetched from elsewhere.
    """
    from html import escape

    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(mathjax_url="", require_js_url="")
    made, sections = [], []
    for stem in QUESTIONS.values():
        notebook = nbformat.read(kedit.ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
        title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
        after = next(i for i, cell in enumerate(notebook.cells) if "## Verdict" in cell.source)
        verdict = "".join(output.text for output in notebook.cells[after + 1].outputs)
        (figure, *_) = [
            output.data["image/png"]
            for cell in notebook.cells
            for output in cell.get("outputs", ())
            if "image/png" in output.get("data", {})
        ]
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
        made.append(folder / f"{stem}.html")
        write_atomic(made[-1], page.encode())
        sections.append(
            SECTION.format(link=made[-1].name, title=escape(title), figure=figure.strip(), verdict=escape(verdict))
        )
    write_atomic(folder / "index.html", PAGE.format(sections="".join(sections)).encode())
    return [folder / "index.html", *made]
