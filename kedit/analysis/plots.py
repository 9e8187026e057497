"""The figures of the questions, drawn from a run's results."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kedit.analysis import inference, scores
from kedit.analysis.damage import INDICATORS, checkpoints
from kedit.analysis.inference import Ability
from kedit.analysis.published import published
from kedit.editors import kind_of
from kedit.evaluation import benchmarks
from kedit.evaluation.success import METRICS
from kedit.store import write_atomic
from kedit.study.results import Results

STYLE = Path(__file__).with_name("figures.mplstyle")
HOLLOW = {"markerfacecolor": "white"}
LEVELS = {
    label: {"color": "black", "linewidth": 0.8, "linestyle": (0, dashes)}
    for label, dashes in (("unedited", (4, 3)), ("chance", (1, 2)))
}
CROWD = 5
"""With more methods than this, bands give way to one interval each at the last checkpoint."""
BROKEN = 1000.0
"""Where the axes of damage end; a curve that leaves its panel is beyond it."""

Panel = Callable[[Axes], None]
Styles = Mapping[str, Mapping[str, Any]]
KeptCurve = tuple[Sequence[Ability], Mapping[str, Any]]


# Panels ---------------------------------------------------------------------------------------------


@contextmanager
def _panels(lines: int, columns: int, size: tuple[float, float] = (2.6, 2.2), **settings: Any) -> Iterator[Any]:
    """(figure, axes) of lines x columns panels, each of one size, in one style.

    The figure is closed, so that a notebook shows it once, where it is named.
    """
    size = (size[0] * columns, size[1] * lines)
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **settings)
        yield figure, axes
    plt.close(figure)


def _by_edits(draw: Sequence[Panel], legend: Styles, columns: int, y: str = "", **settings: Any) -> Figure:
    """Panels that share the number of edits as their axis, line by line, and the legend behind the last of them."""
    columns = min(columns, len(draw) + 1)
    with _panels(-(-(len(draw) + 1) // columns), columns, **settings) as (figure, axes):
        for ax, panel in zip(axes.flat, draw, strict=False):
            panel(ax)
        for ax in axes.flat[max(0, len(draw) - columns) : len(draw)]:
            ax.set_xlabel("sequential edits")
        for ax in axes[:, 0]:
            ax.set_ylabel(y)
        _legend(axes.flat[len(draw) :], legend)
    return figure


def _style(method: str) -> dict[str, Any]:
    """How a method's curve is drawn."""
    return dict(zip(("color", "marker", "linestyle"), kind_of(method).style, strict=True)) | HOLLOW


def _styles(methods: Iterable[str]) -> Styles:
    """What the legend says of methods."""
    return {kind_of(method).label: _style(method) for method in methods}


def _legend(spare: Sequence[Axes], styles: Styles) -> None:
    """The legend, on the axes that no panel needs."""
    for ax in spare:
        ax.set_axis_off()
    handles = [Line2D([], [], **style, label=label) for label, style in styles.items()]
    columns = 1 + (len(handles) > 8)
    legend = spare[0].legend(handles=handles, loc="center left", ncol=columns, handlelength=2.6, fontsize=8)
    legend.set_in_layout(len(spare) == 1)  # with free axes beside it no panel need give way


def _curve(ax: Axes, edits: Any, values: Any, band: tuple[Any, Any] | None, style: Mapping[str, Any]) -> None:
    """A curve and, around it, its band from low to high."""
    ax.plot(edits, values, **style)
    if band is not None:
        ax.fill_between(edits, *band, color=style["color"], alpha=0.14, linewidth=0)


def _edit_axis(ax: Axes, counts: Sequence[int]) -> None:
    first = min((count for count in counts if count > 0), default=1)  # logarithmic from there on
    ax.set_xscale("symlog", linthresh=first, linscale=0.6)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()
    ax.set_xlim(-0.08 * first if min(counts) == 0 else 0.9 * min(counts), max(counts) * 1.25)
    ax.set_ylim(-0.03, 1.03)


def _levels(ax: Axes, unedited: float, chance: float) -> None:
    for level, style in zip((unedited, chance), LEVELS.values(), strict=True):
        ax.axhline(level, **style, zorder=1.5)


# Scores against the number of edits -----------------------------------------------------------------


def curves_panel(ax: Axes, rows: pd.DataFrame, title: str, **font: str) -> None:
    """One curve a method of some number from 0 to 1, with its 95% interval unless it edits nothing."""
    count = rows.method.nunique()
    for index, (method, curve) in enumerate(rows.sort_values("edits", kind="stable").groupby("method", sort=False)):
        style, edits = _style(method), kind_of(method).edits
        band = (curve.ci_low, curve.ci_high) if edits and count <= CROWD else None
        _curve(ax, curve.edits, curve.value, band, style)
        if edits and count > CROWD:
            end = curve.iloc[-1]
            where = end.edits * (1.04 + 0.16 * index / count)  # side by side
            ax.plot([where, where], [end.ci_low, end.ci_high], color=style["color"], linewidth=0.9, linestyle="-")
    ax.set_title(title, **font)
    _edit_axis(ax, sorted(rows.edits.unique()))


def ability_panel(ax: Axes, rows: pd.DataFrame, benchmark: str) -> None:
    """One benchmark against the number of edits, with the unedited score, chance, and what was published."""
    theirs = published(rows.model.iloc[0], benchmark)
    overlay(ax, theirs[theirs.edits <= rows.edits.max()])
    base = rows[rows.edits == 0].iloc[0]
    title = f"{benchmark} ({benchmarks.metadata(benchmark)['metric'].replace('_', ' ')})"
    curves_panel(ax, rows, title + ("  [floor]" if base.status == "floor" else ""))
    _levels(ax, base.value, base.chance)


def overlay(ax: Axes, rows: pd.DataFrame) -> None:
    """Published scores (``published.published``) as thin grey lines, each named at its last point."""
    unedited = rows[rows.method == "none"]
    for method, curve in rows[rows.method != "none"].groupby("method", sort=False):
        curve = pd.concat([unedited, curve]).sort_values("edits")
        ax.plot(curve.edits, curve.score, color="#a6a6a6", linewidth=0.7, zorder=1.2)
        ax.annotate(method, (curve.edits.iloc[-1], curve.score.iloc[-1]), color="#8c8c8c", fontsize=5, va="bottom")


def _ability_panels(curves: pd.DataFrame, names: Sequence[str]) -> list[Panel]:
    studied = [(name, benchmarks.metadata(name)["metric"]) for name in names]
    of = {name: curves[(curves.benchmark == name) & (curves.metric == metric)] for name, metric in studied}
    return [partial(ability_panel, rows=rows, benchmark=name) for name, rows in of.items()]


def rq1(results: Results) -> dict[str, Figure]:
    """Edit success, then one panel a benchmark, against the number of sequential edits; and ``retention``."""
    curves = scores.curves(results)
    success = curves[(curves.benchmark == "edit") & (curves.edits > 0) & curves.metric.isin(METRICS)]
    by_metric = success.groupby("metric", sort=False)
    panels = [partial(curves_panel, rows=rows, title=name, fontstyle="italic") for name, rows in by_metric]
    panels += _ability_panels(curves, results.params.benchmarks)
    figure = _by_edits(panels, _styles(curves.method.unique()) | LEVELS, 4, "score", sharey=True)
    return {"figure": figure, "retention": retention(results)}


def retention(results: Results) -> Figure:
    """Is an edit still there after n more? One curve a method (``scores.retention``)."""
    kept = scores.retention(results)
    bins, methods = list(kept.after.unique()), kept.method.unique()
    with _panels(1, 2, (3.4, 2.6), width_ratios=(2.2, 1)) as (figure, ((ax, spare),)):
        for index, (method, curve) in enumerate(kept.groupby("method", sort=False)):
            where = [bins.index(name) + 0.3 * (index / max(1, len(methods) - 1) - 0.5) for name in curve.after]
            ax.plot(where, curve.value, **_style(method))
            ax.vlines(where, curve.ci_low, curve.ci_high, color=_style(method)["color"], linewidth=0.8)
        ax.set_xticks(range(len(bins)), bins)
        ax.set_xlabel("edits made since")
        ax.set_ylabel("still in place (reliability)")
        ax.set_ylim(-0.03, 1.03)
        _legend([spare], _styles(methods))
    return figure


def rq5(results: Results) -> dict[str, Figure]:
    """The safety benchmarks, and what lies behind their scores."""
    curves = scores.curves(results)
    panels = _ability_panels(curves, results.params.benchmarks)
    behind = curves[curves.metric.isin(["discrimination", "bias"]) | (curves.metric == "refused")]
    for (name, metric), rows in behind.groupby(["benchmark", "metric"], sort=False):
        panels.append(partial(curves_panel, rows=rows, title=f"{name}: {metric}"))
    return {"figure": _by_edits(panels, _styles(curves.method.unique()) | LEVELS, 3, "score or share")}


# Share kept ------------------------------------------------------------------------------------------


def _kept_panel(ax: Axes, curves: Iterable[KeptCurve], counts: Sequence[int], title: str) -> None:
    """Mean share kept of some abilities, in a style, with 95% bands; 1 is the unedited model, 0 chance."""
    for abilities, style in curves:
        points = [inference.kept(abilities, at) for at in range(len(counts))]
        band = np.transpose([point.interval for point in points])
        _curve(ax, counts, [point.value for point in points], band, style)
    ax.set_title(title)
    _edit_axis(ax, counts)
    ax.set_ylim(-0.28, 1.28)
    _levels(ax, 1, 0)


def _by_method(abilities: Sequence[Ability]) -> dict[str, list[Ability]]:
    groups: dict[str, list[Ability]] = {}
    for ability in inference.general(abilities):
        if ability.scale == "value":
            groups.setdefault(ability.label, []).append(ability)
    return groups


def _models_figure(results: Results, styles: Styles) -> dict[str, Figure]:
    """Mean share kept over abilities against the number of edits: a panel a method that edits, a curve a model."""
    groups, counts = _by_method(inference.abilities(results)), results.params.edits
    panels = [
        partial(
            _kept_panel,
            curves=[
                ([a for a in group if a.model == model], style)
                for model, style in styles.items()
                if any(a.model == model for a in group)
            ],
            counts=counts,
            title=label,
        )
        for label, group in groups.items()
    ]
    return {"figure": _by_edits(panels, styles | {"chance": LEVELS["chance"]}, 3, "share kept")}


def _shades(models: Sequence[str]) -> Styles:
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 0.95, len(models)))
    return {
        m: {"color": shade, "marker": "o", "linestyle": "-"} | HOLLOW for m, shade in zip(models, shades, strict=True)
    }


def rq2(results: Results) -> dict[str, Figure]:
    """Share kept by the base and the tuned models."""
    return _models_figure(results, _shades(results.params.models))


def rq3(results: Results) -> dict[str, Figure]:
    """Share kept by models of several sizes."""
    size = inference.sizes(results)
    return _models_figure(results, _shades(sorted(size, key=size.__getitem__)))


def rq4(results: Results) -> dict[str, Figure]:
    """Share of each aspect of ability that is kept at the last checkpoint, by method."""
    abilities = [a for a in inference.general(inference.abilities(results)) if a.scale == "value"]
    names = list(dict.fromkeys(a.aspect for a in abilities))
    methods = list(dict.fromkeys(a.method for a in abilities))
    with _panels(1, 2, (4.4, 3.2), width_ratios=(4, 1)) as (figure, ((ax, spare),)):
        for column, aspect in enumerate(names):
            for index, method in enumerate(methods):
                estimate = inference.kept([a for a in abilities if (a.aspect, a.method) == (aspect, method)])
                where = column + 0.7 * ((index + 0.5) / len(methods) - 0.5)
                ax.vlines(where, *estimate.interval, color=_style(method)["color"], linewidth=1.0)
                ax.plot(where, estimate.value, **_style(method) | {"linestyle": "none"})
        _levels(ax, 1, 0)
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel(f"share kept after {results.params.edits[-1]} edits")
        _legend([spare], _styles(methods) | LEVELS)
    return {"figure": figure}


# Structure damage ------------------------------------------------------------------------------------


def _damage_panel(ax: Axes, rows: pd.DataFrame, name: str, title: str, scale: str) -> None:
    """One indicator, or the ability ``kept``: the median of the orders, with the range between them."""
    finite = rows[name].where(rows[name].abs() < float("inf"))
    for method, values in finite.groupby(rows.method, sort=False):
        curve = values.groupby(rows.edits).agg(["min", "median", "max"])
        _curve(ax, curve.index, curve["median"], (curve["min"], curve["max"]), _style(method))
    ax.set_title(title)
    _edit_axis(ax, sorted(rows.edits.unique()))
    if name == "kept":
        ax.set_ylim(min(-0.03, finite.min() - 0.03), max(1.03, finite.max() + 0.03))
        return
    ax.set_yscale(scale, **({"linthresh": 0.01} if scale == "symlog" else {}))
    ax.autoscale(axis="y")
    ax.set_ylim(0 if scale == "symlog" else 0.7 * min(1, finite.min()), min(ax.get_ylim()[1], BROKEN))


def damage(checkpoints: pd.DataFrame) -> Figure:
    """One panel an indicator of damage against the number of edits, one curve a method.

    Args:
        checkpoints: as ``damage.predictors`` takes them, unedited checkpoints included.
    """
    drawn = [("kept", "ability kept", "linear"), *((name, i.title, i.axis) for name, i in INDICATORS.items())]
    panels = [
        partial(_damage_panel, rows=checkpoints, name=name, title=title, scale=scale)
        for name, title, scale in drawn
        if name in checkpoints
    ]
    return _by_edits(panels, _styles(checkpoints.method.unique()), 5, size=(2.2, 2.2))


def discussion(results: Results) -> dict[str, Figure]:
    """Structure damage beside the ability kept."""
    return {"figure": damage(checkpoints(results))}


def save(figure: Figure, folder: Path, name: str = "figure") -> list[Path]:
    """Write a PNG and a PDF, without dates, so the same figure gives the same bytes."""
    made = []
    for kind, metadata in (
        ("png", {"Software": f"matplotlib {matplotlib.__version__}"}),
        ("pdf", {"CreationDate": None}),
    ):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=200 if kind == "png" else "figure", metadata=metadata)
        made.append(folder / f"{name}.{kind}")
        write_atomic(made[-1], drawn.getvalue())
    return made
