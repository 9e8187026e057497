"""From results to the files under figures/, and to one page."""

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import kedit
from kedit import KeditError
from kedit.analysis import claims, scores
from kedit.analysis.plots import Picture
from kedit.analysis.questions import QUESTIONS
from kedit.store import write_atomic
from kedit.study.notebook import folder_of
from kedit.study.params import Params
from kedit.study.results import Results

# A run's folder ----------------------------------------------------------------------------------


def publish(results: Results) -> list[Path]:
    """Write the figures (.png, .pdf), table.csv, cells.jsonl.gz and manifest.json where the results are from.

    What a run found goes among the runs of this machine, so no run can overwrite the reference it is compared with.
    """
    params, folder = results.params, folder_of(results.params, results.source)
    table = scores.table(results).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_atomic(folder / "table.csv", table.encode())
    figures = QUESTIONS[params.rq].figures(results)
    made = [path for name, figure in figures.items() for path in figure.save(folder, name)]
    return [*made, folder / "table.csv", *results.save(folder)]


def figures(results: Results) -> dict[str, Picture]:
    """The figures of a run's question, the main one under ``figure``; of what was run, not read, all files are written.

    Each is shown where a notebook names it, with its alt text.
    """
    if results.source == "run":
        publish(results)
    return QUESTIONS[results.params.rq].figures(results)


def redraw() -> list[Path]:
    """Redraw every committed figure and table from its committed cells."""
    made = []
    for cells in sorted((kedit.ROOT / "figures").glob("*/*/cells.jsonl.gz")):
        name, rq = cells.parent.name, cells.parent.parent.name
        made += publish(Results.load(Params.find(rq, name), cells.parent))
    return made


def commit(params: Params) -> list[Path]:
    """Make the last run of this machine the reference under figures/.

    Raises:
        KeditError: there is no such run, or it is of other parameters.
    """
    results = Results.load(params, folder_of(params, "run"))
    return publish(results)


def verify(params: Params) -> str:
    """Compare the last run of this machine with the committed reference: models, numbers, and the files' bytes.

    Returns:
        a sentence: to the byte, or within the tolerance of ``differences``.

    Raises:
        KeditError: one of the two is not there, or they differ.
    """
    what = f"{params.rq}/{params.name}"
    if not folder_of(params, "committed").exists():
        raise KeditError(f"{what} has no reference under figures/ to compare with; make publish makes your run one.")
    fresh, committed = (Results.load(params, folder_of(params, source), source) for source in ("run", "committed"))
    for model, about in committed.manifest["models"].items():
        if fresh.manifest["models"][model]["fingerprint"] != about["fingerprint"]:
            raise KeditError(f"{what}: model {model} is not the one of the committed reference; its weights differ.")
    if rows := differences(fresh, committed):
        raise KeditError(f"{what}: {len(rows)} rows differ from the committed reference, first: {rows[0]}.")
    publish(fresh)
    folders = folder_of(params, "run"), folder_of(params, "committed")
    one, other = ([(folder / name).read_bytes() for name in ("table.csv", "figure.png")] for folder in folders)
    return f"{what}: the fresh run agrees with the committed reference, " + (
        "table and figure to the byte." if one == other else "though not to the byte."
    )


def differences(fresh: Results, committed: Results, tolerance: float = 0.03) -> list[str]:
    """Rows of two runs of the same grid whose values are further apart than the tolerance.

    Another processor may round another way and flip an item or two; more than that is a finding.
    """
    row = [*scores.TRAJECTORY, "edits", "benchmark", "metric"]
    both = scores.table(fresh).merge(scores.table(committed), on=row, how="outer", suffixes=("", "_ref"))
    apart = ~((both.value - both.value_ref).abs() <= tolerance) & ~(both.value.isna() & both.value_ref.isna())
    return [
        f"{r.method} after {r.edits} edits, {r.benchmark} {r.metric}: {r.value:.3f}, reference {r.value_ref:.3f}"
        for r in both[apart].itertuples()
    ]


# The report ---------------------------------------------------------------------------------------

PAGE = Path(__file__).with_name("report.html")
UNSAID = "No description has been provided for this image"
FIGURE = """<figure id="{rq}"><h2><a href="{link}">{title}</a></h2>
<a href="{link}"><img src="data:image/png;base64,{figure}" alt="{alt}"></a><figcaption>{caption}</figcaption></figure>
"""


def html(folder: Path) -> list[Path]:
    """Render the committed notebooks, and a page to hand on: the decision, a table of answers, every question's figure.

    Returns:
        the files made, the page first. Nothing in them is fetched from elsewhere, and every link leads into the folder.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.filters import markdown2html

    exporter = HTMLExporter(mathjax_url="", require_js_url="")
    exporter.log.setLevel("ERROR")
    made, drawn = [], []
    stems = {question.notebook: rq for rq, question in QUESTIONS.items()}
    for stem in (*stems, "one_edit"):
        notebook = nbformat.read(kedit.ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
        title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
        pictures = _shown(notebook.cells, "image/png")
        for _, alt in pictures:  # which this template of nbconvert's does not take from the notebook
            page = page.replace(UNSAID, escape(alt), 1)
        made.append(folder / f"{stem}.html")
        write_atomic(made[-1], _linked(page, folder).encode())
        if stem in stems and pictures:
            figure, alt = pictures[0]
            read = next((cell.source for cell in notebook.cells if cell.source.startswith("*How to read it.*")), "")
            caption = markdown2html(read.partition("\n\n")[0]) + f"<p>{escape(alt)}</p>"
            about = {"rq": stems[stem], "link": made[-1].name, "title": escape(title), "alt": escape(alt)}
            drawn.append(FIGURE.format(figure=figure.strip(), caption=caption, **about))
    parts = {"DECISION": claims.decision(), "ANSWERS": claims.markdown(claims.answers())}
    page = PAGE.read_text().replace("FIGURES", "".join(drawn))
    for name, text in parts.items():
        page = page.replace(name, _linked(markdown2html(text).replace('href="notebooks/', 'href="'), folder))
    write_atomic(folder / "index.html", page.encode())
    return [folder / "index.html", *made]


def _linked(page: str, folder: Path) -> str:
    """A page whose links to notebooks lead to their HTML, others to what is copied beside it; folders go unlinked."""

    def target(match: re.Match[str]) -> str:
        path = (kedit.ROOT / "notebooks" / match[1]).resolve()
        if path.suffix == ".ipynb":
            return f'href="{path.stem}.html"'
        if not path.is_file():
            return ""
        copied = path.relative_to(kedit.ROOT)
        write_atomic(folder / copied, path.read_bytes())
        return f'href="{copied.as_posix()}"'

    return re.sub(r'href="(?!https?:|#|data:)([^"#]+)"', target, page)


def _shown(cells: Iterable[Any], kind: str) -> list[tuple[str, str]]:
    """Of what cells show, that of a kind and its text."""
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    return [(each[kind], each.get("text/plain", "")) for each in data if kind in each]
