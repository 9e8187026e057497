"""Figures, drawn from the tidy table alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kedit.analysis import inference
from kedit.analysis.inference import Ability, Estimate, aspect_of
from kedit.analysis.published import published
from kedit.evaluation import benchmarks

# A colour (Okabe and Ito's, which the colour-blind can tell apart), a marker and a dash for each method;
# variations on one method share its colour.
STYLES = {
    "control": ("#7f7f7f", "x", "-"),
    "rome": ("#d55e00", "o", "-"),
    "r-rome": ("#d55e00", "D", "--"),
    "memit": ("#0072b2", "s", "-"),
    "alphaedit": ("#0072b2", "*", "--"),
    "pmet": ("#56b4e9", "p", "-"),
    "kn": ("#000000", "X", "-"),
    "mend": ("#cc79a7", "v", "-"),
    "ft-l": ("#e69f00", "<", "-"),
    "ft-m": ("#e69f00", ">", "--"),
    "grace": ("#009e73", "^", "-"),
    "serac": ("#117733", "P", "--"),
    "ike": ("#117733", "h", ":"),
}
UNKNOWN = ("#882255", "d", "-.")
METRICS = ("reliability", "generalisation", "locality")
CROWD = 5
"""With more methods than this, bands give way to one interval each at the last checkpoint."""

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


def _edit_axis(ax: Axes, counts: list[int]) -> None:
    first = min((count for count in counts if count > 0), default=1)  # logarithmic from there on
    ax.set_xscale("symlog", linthresh=first, linscale=0.6)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()
    ax.set_xlim(-0.08 * first if min(counts) == 0 else 0.9 * min(counts), max(counts) * 1.25)
    ax.set_ylim(-0.03, 1.03)


def _curves(ax: Axes, rows: pd.DataFrame) -> None:
    """One curve a method, with its 95% interval unless it is the control."""
    methods = list(dict.fromkeys(rows.method))
    for place, method in enumerate(methods):
        color, marker, dash = STYLES.get(method, UNKNOWN)
        own = rows[rows.method == method].sort_values("edits")
        ax.plot(own.edits, own.value, color=color, marker=marker, linestyle=dash, markerfacecolor="white")
        if method == "control":
            continue
        if len(methods) <= CROWD:
            ax.fill_between(own.edits, own.ci_low, own.ci_high, color=color, alpha=0.14, linewidth=0)
        else:
            end = own.iloc[-1]
            where = end.edits * (1.04 + 0.16 * place / len(methods))  # side by side
            ax.plot([where, where], [end.ci_low, end.ci_high], color=color, linewidth=0.9, linestyle="-")


def ability_panel(ax: Axes, rows: pd.DataFrame, benchmark: str) -> None:
    """One benchmark against the number of edits, with the unedited score, chance, and what was published."""
    theirs = published(rows.model.iloc[0], benchmark)
    overlay(ax, theirs[theirs.edits <= rows.edits.max()])
    _curves(ax, rows)
    base = rows[rows.edits == 0].iloc[0]
    ax.axhline(base.value, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    ax.axhline(base.chance, color="black", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1.5)
    about = benchmarks.metadata(benchmark)
    title = f"{benchmark} ({about['metric'].replace('_', ' ')})"
    ax.set_title(title + ("  [floor]" if base.status == "floor" else ""))
    _edit_axis(ax, sorted(rows.edits.unique()))


def overlay(ax: Axes, rows: pd.DataFrame) -> None:
    """Published scores (``published.published``) as thin grey lines, each named at its last point."""
    unedited = rows[rows.method == "none"]
    for method, own in rows[rows.method != "none"].groupby("method", sort=False):
        own = pd.concat([unedited, own]).sort_values("edits")
        ax.plot(own.edits, own.score, color="#a6a6a6", linewidth=0.7, zorder=1.2)
        ax.annotate(method, (own.edits.iloc[-1], own.score.iloc[-1]), color="#8c8c8c", fontsize=5, va="bottom")


def success_panel(ax: Axes, rows: pd.DataFrame, metric: str) -> None:
    """Reliability, generalisation or locality over all edits so far."""
    rows = rows[(rows.metric == metric) & (rows.edits > 0)]
    _curves(ax, rows)
    ax.set_title(metric, fontstyle="italic")
    _edit_axis(ax, sorted(rows.edits.unique()))


def _legend(figure: Figure, spare: list[Axes], methods: list[str], lines: bool = True) -> None:
    """The legend, in place of the axes that no panel needs."""
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle=dash, markerfacecolor="white", label=label_of(method))
        for method in methods
        for color, marker, dash in [STYLES.get(method, UNKNOWN)]
    ]
    if lines:
        handles += [
            Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (4, 3)), label="unedited"),
            Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (1, 2)), label="chance"),
        ]
    for ax in spare:
        ax.set_axis_off()
    columns = 1 + (len(handles) > 8)
    legend = spare[0].legend(handles=handles, loc="center left", ncol=columns, handlelength=2.6, fontsize=8)
    legend.set_in_layout(len(spare) == 1)  # with a free place beside it no panel need give way


def rq1(curves: pd.DataFrame, names: list[str]) -> Figure:
    """Figure RQ1: edit success, then one panel a benchmark, against the number of sequential edits."""
    panels = len(METRICS) + len(names)
    columns = 4
    lines = -(-(panels + 1) // columns)
    with plt.rc_context(RC):
        figure, axes = plt.subplots(
            lines, columns, figsize=(2.6 * columns, 2.2 * lines), sharey=True, squeeze=False, layout="constrained"
        )
        flat = list(axes.flat)
        for ax, metric in zip(flat, METRICS, strict=False):
            success_panel(ax, curves[curves.benchmark == "edit"], metric)
        for ax, name in zip(flat[len(METRICS) :], names, strict=False):
            ability_panel(ax, curves[curves.benchmark == name], name)
        for ax in flat[max(0, panels - columns) : panels]:
            ax.set_xlabel("sequential edits")
        for line in axes:
            line[0].set_ylabel("score")
        _legend(figure, flat[panels:], list(dict.fromkeys(curves.method)))
    plt.close(figure)  # so that a notebook shows it once, where it is named
    return figure


def retention(kept: pd.DataFrame) -> Figure:
    """Figure of retention: is an edit still there after n more? One curve a method (``stats.retention``)."""
    bins = list(dict.fromkeys(kept.after))
    with plt.rc_context(RC):
        figure, (ax, spare) = plt.subplots(
            1, 2, figsize=(6.8, 2.6), layout="constrained", width_ratios=(2.2, 1), squeeze=True
        )
        methods = list(dict.fromkeys(kept.method))
        for place, method in enumerate(methods):
            color, marker, dash = STYLES.get(method, UNKNOWN)
            own = kept[kept.method == method]
            where = [bins.index(name) + 0.3 * (place / max(1, len(methods) - 1) - 0.5) for name in own.after]
            ax.plot(where, own.value, color=color, marker=marker, linestyle=dash, markerfacecolor="white")
            ax.vlines(where, own.ci_low, own.ci_high, color=color, linewidth=0.8)
        ax.set_xticks(range(len(bins)), bins)
        ax.set_xlabel("edits made since")
        ax.set_ylabel("still in place (reliability)")
        ax.set_ylim(-0.03, 1.03)
        _legend(figure, [spare], methods, lines=False)
    plt.close(figure)
    return figure


def _frame(lines: int, columns: int, **settings: Any) -> tuple[Figure, Any]:
    size = (2.6 * columns, 2.2 * lines)
    return plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **settings)


def _kept_axis(ax: Axes, counts: Sequence[int]) -> None:
    """Number of edits against the share kept; dashed at 1, the unedited model, dotted at 0, chance."""
    _edit_axis(ax, list(counts))
    ax.set_ylim(-0.28, 1.28)
    ax.axhline(1, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    ax.axhline(0, color="black", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1.5)


def _kept_curve(ax: Axes, abilities: Sequence[Ability], color: str, marker: str, dash: str, label: str) -> None:
    """Mean share kept of some abilities against the number of edits, with its 95% band."""
    counts = abilities[0].edits
    points = [inference.kept(abilities, at) for at in range(len(counts))]
    low, high = np.transpose([point.interval for point in points])
    ax.plot(
        counts,
        [p.value for p in points],
        color=color,
        marker=marker,
        linestyle=dash,
        markerfacecolor="white",
        label=label,
    )
    ax.fill_between(counts, low, high, color=color, alpha=0.14, linewidth=0)


def _forest(ax: Axes, names: Sequence[str], estimates: Sequence[Estimate], color: str, marker: str = "o") -> None:
    """Numbers with their 95% intervals, one under the other; hollow where the interval holds 0."""
    for place, estimate in enumerate(estimates):
        low, high = estimate.interval
        ax.plot([low, high], [place, place], color=color, linewidth=1.0)
        face = "white" if low <= 0 <= high else color
        ax.plot([estimate.value], [place], marker=marker, color=color, markerfacecolor=face, linestyle="none")
    ax.axvline(0, color="black", linewidth=0.8, zorder=1.5)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def rq2(found: Sequence[Ability], base: str, tuned: str) -> Figure:
    """Figure RQ2: share kept by the base and the tuned model, and the difference for each benchmark.

    One column a method. Above: mean over the benchmarks that are off the floor for both. Below: how much
    more the tuned model keeps, mean over checkpoints; above 0 it is the more robust.
    """
    table = inference.contrast(found, base, tuned)
    methods = list(dict.fromkeys(table.method))
    with plt.rc_context(RC):
        figure, axes = _frame(2, len(methods) + 1)
        for column, method in enumerate(methods):
            color, marker, _ = STYLES.get(method, UNKNOWN)
            rows = table[table.method == method]
            common = set(rows.benchmark)
            top, below = axes[:, column]
            for model, dash, name in ((base, "-", "base"), (tuned, "--", "instruction-tuned")):
                own = [a for a in found if (a.model, a.method) == (model, method) and a.benchmark in common]
                _kept_curve(top, own, color, marker, dash, name)
            _kept_axis(top, own[0].edits)
            top.set_title(label_of(method))
            top.set_xlabel("sequential edits")
            _forest(below, list(rows.benchmark), list(rows.difference), color, marker)
            below.set_xlabel("tuned keeps more by")
            if column:
                below.set_yticklabels([])
        axes[0, 0].set_ylabel("share kept")
        handles = [
            Line2D([], [], color="black", linestyle=dash, label=name)
            for dash, name in (("-", "base"), ("--", "instruction-tuned"))
        ]
        handles += [Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (1, 2)), label="chance")]
        axes[1, -1].set_axis_off()
        axes[0, -1].set_axis_off()
        axes[0, -1].legend(handles=handles, loc="center left", handlelength=2.6, fontsize=8)
    plt.close(figure)
    return figure


def rq3(found: Sequence[Ability], size: Callable[[str], float]) -> Figure:
    """Figure RQ3: one row a method, one column a benchmark, one curve a model size; last, the trend with size."""
    models = sorted({a.model for a in found}, key=size)
    shades = dict(zip(models, plt.get_cmap("viridis_r")(np.linspace(0.12, 0.95, len(models))), strict=True))
    table = inference.trend(found, size).set_index("method")
    benchmarks_ = list(dict.fromkeys(a.benchmark for a in found))
    with plt.rc_context(RC):
        figure, axes = _frame(len(table), len(benchmarks_) + 1)
        for line, method in zip(axes, table.index, strict=True):
            for ax, name in zip(line, benchmarks_, strict=False):
                own = {a.model: a for a in found if (a.method, a.benchmark) == (method, name)}
                for model in models:
                    if not own[model].floor:
                        _kept_curve(ax, [own[model]], shades[model], "o", "-", model)
                floors = sum(a.floor for a in own.values())
                ax.set_title(name + (f"  [{floors} at the floor]" if floors else ""))
                _kept_axis(ax, own[models[0]].edits)
            line[0].set_ylabel(f"{label_of(method)}: share kept")
            _trend(line[-1], table.loc[method], size, shades, STYLES.get(method, UNKNOWN)[0])
        for ax in axes[-1, :-1]:
            ax.set_xlabel("sequential edits")
        axes[-1, -1].set_xlabel("parameters")
        handles = [
            Line2D([], [], color=shades[model], marker="o", markerfacecolor="white", label=model) for model in models
        ]
        figure.legend(handles=handles, loc="outside lower center", ncol=len(models), fontsize=8)
    plt.close(figure)
    return figure


def _trend(ax: Axes, row: pd.Series, size: Callable[[str], float], shades: Mapping[str, Any], color: str) -> None:
    ax.set_title("mean against size")
    ax.set_xscale("log")
    ax.set_ylim(-0.28, 1.28)
    if row.slope is None:
        ax.text(0.5, 0.5, "no benchmark off the floor\nat every size", ha="center", transform=ax.transAxes)
        return
    for model, estimate in row.kept.items():
        ax.errorbar(size(model), estimate.value, np.abs(np.subtract(estimate.interval, estimate.value))[:, None],
                    color=shades[model], marker="o", markerfacecolor="white", linewidth=1.0)  # fmt: skip
    x = np.log10([size(model) for model in row.kept])
    middle = np.mean([estimate.value for estimate in row.kept.values()])
    ax.plot(10**x, middle + row.slope.value * (x - x.mean()), color=color, linewidth=1.0, zorder=1.4)
    ax.text(0.03, 0.03, f"slope {row.slope}", transform=ax.transAxes, fontsize=7)
    ax.minorticks_off()


def rq4(found: Sequence[Ability]) -> Figure:
    """Figure RQ4: share of each aspect of ability that is kept at the last checkpoint, by method."""
    aspects: dict[str, list[Ability]] = {}
    for ability in found:
        if (aspect := aspect_of(ability.benchmark)) and not ability.floor:
            aspects.setdefault(aspect, []).append(ability)
    methods = list(dict.fromkeys(a.method for own in aspects.values() for a in own))
    with plt.rc_context(RC):
        figure, ((ax, spare),) = plt.subplots(
            1, 2, figsize=(8.8, 3.2), width_ratios=(4, 1), squeeze=False, layout="constrained"
        )
        for place, own in enumerate(aspects.values()):
            for index, method in enumerate(methods):
                estimate = inference.kept([a for a in own if a.method == method])
                color, marker, _ = STYLES.get(method, UNKNOWN)
                where = place + 0.7 * ((index + 0.5) / len(methods) - 0.5)
                ax.vlines(where, *estimate.interval, color=color, linewidth=1.0)
                ax.plot(where, estimate.value, color=color, marker=marker, markerfacecolor="white", linestyle="none")
            ax.axvspan(place - 0.45, place + 0.45, color="#f4f4f4", zorder=0)
        ax.axhline(1, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
        ax.axhline(0, color="black", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1.5)
        ax.set_xticks(
            range(len(aspects)),
            [f"{a}\n({', '.join(dict.fromkeys(x.benchmark for x in own))})" for a, own in aspects.items()],
        )
        ax.grid(visible=False, axis="x")
        ax.set_ylabel(f"share kept after {found[0].edits[-1]} edits")
        _legend(figure, [spare], methods)
    plt.close(figure)
    return figure


def rq5(curves: pd.DataFrame, names: Sequence[str], measures: pd.DataFrame) -> Figure:
    """Figure RQ5: the safety benchmarks, and what lies behind their scores.

    Args:
        curves: ``stats.curves``.
        measures: ``stats.safety``: method, edits, measure, value, ci_low, ci_high.
    """
    shown = list(dict.fromkeys(measures.measure))
    panels = len(names) + len(shown)
    columns = min(3, panels + 1)
    lines = -(-(panels + 1) // columns)
    with plt.rc_context(RC):
        figure, axes = _frame(lines, columns)
        flat = list(axes.flat)
        for ax, name in zip(flat, names, strict=False):
            ability_panel(ax, curves[curves.benchmark == name], name)
        for ax, measure in zip(flat[len(names) :], shown, strict=False):
            rows = measures[measures.measure == measure]
            _curves(ax, rows)
            ax.set_title(measure)
            _edit_axis(ax, sorted(rows.edits.unique()))
        for ax in flat[max(0, panels - columns) : panels]:
            ax.set_xlabel("sequential edits")
        for line in axes:
            line[0].set_ylabel("score or share")
        _legend(figure, flat[panels:], list(dict.fromkeys(curves.method)))
    plt.close(figure)
    return figure


LABELS = {
    "control": "control (no edit)",
    "alphaedit": "AlphaEdit",
}


def label_of(method: str) -> str:
    """A method's name as it is printed."""
    return LABELS.get(method, method.upper())


def save(figure: Figure, folder: Path, name: str = "figure") -> list[Path]:
    """Write a PNG and a PDF, without dates, so the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    figure.savefig(png, dpi=200, metadata={"Software": f"matplotlib {matplotlib.__version__}"})
    figure.savefig(pdf, metadata={"CreationDate": None})
    return [png, pdf]


# measure of stats.MEASURES -> (title, its axis). Ratios are drawn on logarithmic axes; distances on axes that are
# linear up to 0.01, so that no damage at all has its place on them.
DAMAGE = {
    "kept": ("ability kept", "linear"),
    "relative": ("weights: |dW| / |W|", "symlog"),
    "spectral": ("spectral norm, ratio", "log"),
    "condition": ("condition number, ratio", "log"),
    "cosine": ("states: cosine distance", "symlog"),
    "l2": ("states: relative distance", "symlog"),
    "perplexity": ("perplexity, ratio", "log"),
    "entropy": ("entropy, change (nats)", "symlog"),
    "kl": ("KL from unedited (nats)", "symlog"),
}
BROKEN = 1000.0
"""Where the axes of damage end; a curve that leaves its panel is beyond it."""


def damage(checkpoints: pd.DataFrame, alarms: dict[str, float] | None = None) -> Figure:
    """Figure of structure damage: one panel a measure against the number of edits, one curve a method.

    Args:
        checkpoints: as ``stats.predictors`` takes them, unedited checkpoints included; orders are drawn as
            their median, with the range between them.
        alarms: measure -> threshold, drawn as a dotted line.
    """
    shown = [name for name in DAMAGE if name in checkpoints]
    methods = list(dict.fromkeys(checkpoints.method))
    columns = min(5, len(shown) + 1)
    lines = -(-(len(shown) + 1) // columns)
    with plt.rc_context(RC):
        figure, axes = plt.subplots(
            lines, columns, figsize=(2.2 * columns, 2.2 * lines), squeeze=False, layout="constrained"
        )
        flat = list(axes.flat)
        for ax, name in zip(flat, shown, strict=False):
            title, scale = DAMAGE[name]
            finite = checkpoints[name].where(checkpoints[name].abs() < float("inf"))
            for method in methods:
                color, marker, dash = STYLES.get(method, UNKNOWN)
                own = finite[checkpoints.method == method].groupby(checkpoints.edits).agg(["min", "median", "max"])
                ax.fill_between(own.index, own["min"], own["max"], color=color, alpha=0.14, linewidth=0)
                ax.plot(own.index, own["median"], color=color, marker=marker, linestyle=dash, markerfacecolor="white")
            if alarms and name in alarms:
                ax.axhline(alarms[name], color="black", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1.5)
            ax.set_title(title)
            _edit_axis(ax, sorted(checkpoints.edits.unique()))
            if name == "kept":
                ax.set_ylim(min(-0.03, finite.min() - 0.03), max(1.03, finite.max() + 0.03))
                continue
            ax.set_yscale(scale, **({"linthresh": 0.01} if scale == "symlog" else {}))
            ax.autoscale(axis="y")
            ax.set_ylim(0 if scale == "symlog" else 0.7 * min(1, finite.min()), min(ax.get_ylim()[1], BROKEN))
        for ax in flat[max(0, len(shown) - columns) : len(shown)]:
            ax.set_xlabel("sequential edits")
        _legend(figure, flat[len(shown) :], methods, lines=False)
    plt.close(figure)
    return figure
