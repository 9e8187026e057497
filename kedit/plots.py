"""Figures, drawn from the tidy table alone."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kedit import benchmarks

# Okabe and Ito's colours, which the colour-blind can tell apart; a marker each for print.
STYLES = {
    "control": ("#7f7f7f", "x"),
    "rome": ("#d55e00", "o"),
    "memit": ("#0072b2", "s"),
}
SPARE = [("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"), ("#000000", "*"), ("#f0e442", "X")]
DASHES = {"reliability": "-", "generalisation": "--", "locality": ":"}

RC = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "kedit",
}


def style(method: str, methods: list[str]) -> tuple[str, str]:
    """Colour and marker of a method, the same in every figure."""
    if method in STYLES:
        return STYLES[method]
    others = [name for name in methods if name not in STYLES]
    return SPARE[others.index(method) % len(SPARE)]


def _edit_axis(ax: Axes, counts: list[int]) -> None:
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()
    ax.set_xlim(-0.08, max(counts) * 1.18)


def _curve(ax: Axes, rows: pd.DataFrame, color: str, marker: str, dash: str, band: bool = True) -> None:
    rows = rows.sort_values("edits")
    ax.plot(rows.edits, rows.value, color=color, marker=marker, linestyle=dash, markerfacecolor="white")
    if band:
        ax.fill_between(rows.edits, rows.ci_low, rows.ci_high, color=color, alpha=0.14, linewidth=0)


def ability_panel(ax: Axes, rows: pd.DataFrame, benchmark: str) -> None:
    """One benchmark against the number of edits, with the unedited score and chance."""
    methods = list(dict.fromkeys(rows.method))
    for method in methods:
        _curve(ax, rows[rows.method == method], *style(method, methods), "-", band=method != "control")
    base = rows[rows.edits == 0].iloc[0]
    ax.axhline(base.value, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    ax.axhline(base.chance, color="black", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1.5)
    about = benchmarks.metadata(benchmark)
    title = f"{benchmark} ({about['metric'].replace('_', ' ')})"
    ax.set_title(title + ("  [floor]" if base.status == "floor" else ""))
    ax.set_ylim(-0.03, 1.03)
    _edit_axis(ax, sorted(rows.edits.unique()))


def success_panel(ax: Axes, rows: pd.DataFrame, suffix: str = "") -> None:
    """Reliability, generalisation and locality over all edits so far, one colour a method."""
    methods = [method for method in dict.fromkeys(rows.method) if method != "control"] or ["control"]
    for method in methods:
        color, marker = style(method, methods)
        for metric, dash in DASHES.items():
            chosen = rows[(rows.method == method) & (rows.metric == metric + suffix) & (rows.edits > 0)]
            _curve(ax, chosen, color, marker, dash, band=metric == "reliability")
    ax.set_title("edit success" + (" (free generation)" if suffix else " (teacher-forced)"))
    ax.set_ylim(-0.03, 1.03)
    _edit_axis(ax, sorted(rows.edits.unique()))


def rq1(curves: pd.DataFrame, names: list[str]) -> Figure:
    """Figure RQ1: edit success, then one panel a benchmark, against the number of sequential edits."""
    panels = 1 + len(names)
    columns = min(4, panels)
    lines = -(-panels // columns)
    with plt.rc_context(RC):
        figure, axes = plt.subplots(
            lines, columns, figsize=(2.6 * columns, 2.15 * lines + 0.75), sharey=True, squeeze=False
        )
        flat = list(axes.flat)
        success_panel(flat[0], curves[curves.benchmark == "edit"])
        for ax, name in zip(flat[1:], names, strict=False):
            ability_panel(ax, curves[curves.benchmark == name], name)
        for ax in flat[panels:]:
            ax.set_visible(False)
        for ax in flat[max(0, panels - columns) : panels]:
            ax.set_xlabel("sequential edits")
        for line in axes:
            line[0].set_ylabel("score")
        methods = list(dict.fromkeys(curves.method))
        handles = [
            Line2D([], [], color=color, marker=marker, markerfacecolor="white", label=label_of(method))
            for method in methods
            for color, marker in [style(method, methods)]
        ]
        handles += [Line2D([], [], color="#444444", linestyle=dash, label=metric) for metric, dash in DASHES.items()]
        handles += [
            Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (4, 3)), label="unedited"),
            Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (1, 2)), label="chance"),
        ]
        figure.tight_layout(rect=(0, 0.0, 1, 1 - 0.42 / figure.get_figheight()))
        figure.legend(handles=handles, loc="upper center", ncol=len(handles), columnspacing=1.4, handlelength=2.6)
    plt.close(figure)  # so that a notebook shows it once, where it is named
    return figure


def label_of(method: str) -> str:
    """A method's name as it is printed."""
    return "control (no edit)" if method == "control" else method.upper()


def save(figure: Figure, folder: Path) -> list[Path]:
    """Write figure.png and figure.pdf, without dates, so the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "figure.png", dpi=200, metadata={"Software": f"matplotlib {matplotlib.__version__}"})
    figure.savefig(folder / "figure.pdf", metadata={"CreationDate": None})
    return [folder / "figure.png", folder / "figure.pdf"]
