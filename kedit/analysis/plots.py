"""The figures of the questions, drawn from a run's results; each says in words what it shows.

Intervals are those of the tables and verdicts. Filled marks are right or wrong, hollow ones the graded scale. Methods
that did not keep their edits come last, in grey; what does not change is a line of text, not a panel.
"""

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from kedit.analysis import damage, inference, verdicts
from kedit.analysis.inference import MARGIN, SCALES, Estimate
from kedit.analysis.published import share_kept
from kedit.analysis.scores import LEVEL
from kedit.analysis.verdicts import NAMES
from kedit.editors import kind_of
from kedit.store import write_atomic
from kedit.study.results import Results

STYLE = Path(__file__).with_name("figures.mplstyle")
COLUMN, PAGE = 3.4, 7.0
"""Widths of a figure in one column and in two, in inches."""
GREY = "#8c8c8c"
SEEN = 0.02
"""Methods nearer than this to the unedited model everywhere get a line of text in place of a panel."""
STUDY = {"Llama2-7B": "-", "Mistral-7B": "--", "GPT2-XL": ":"}
"""Models of the study whose curves are drawn beside ours, and their lines."""
BROKEN = 1000.0
"""Where axes of damage end; a curve that leaves its panel is beyond it."""


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows in a sentence or two, for those who do not see it."""

    figure: Figure
    alt: str

    def drawn(self, kind: str) -> bytes:
        """As ``png`` or ``pdf``, without dates: the same figure gives the same bytes."""
        drawn, about = io.BytesIO(), {"CreationDate": None, "Subject": self.alt}
        if kind == "png":
            about = {"Software": f"matplotlib {matplotlib.__version__}", "Description": self.alt}
        self.figure.savefig(drawn, format=kind, dpi=200, metadata=about)
        return drawn.getvalue()

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write a PNG and a PDF."""
        for kind in ("png", "pdf"):
            write_atomic(folder / f"{name}.{kind}", self.drawn(kind))
        return [folder / f"{name}.png", folder / f"{name}.pdf"]

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        about = {"alt": self.alt, "width": round(110 * self.figure.get_figwidth())}
        return {"image/png": base64.b64encode(self.drawn("png")).decode(), "text/plain": self.alt}, {"image/png": about}


# Parts of figures ------------------------------------------------------------------------------------


@contextmanager
def _panels(count: int, columns: int, height: float, x: str = "", **settings: Any) -> Iterator[tuple[Figure, list]]:
    """(figure, axes) of so many panels, in one style; ``height`` is a line's, ``x`` what the lowest panels are over.

    The figure is closed, so that a notebook shows it once, where it is named.
    """
    columns = min(columns, count)
    size = (PAGE if columns > 1 else COLUMN), height * -(-count // columns)
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(
            -(-count // columns), columns, figsize=size, squeeze=False, layout="constrained", **settings
        )
        axes = list(grid.flat)
        for ax in axes[count:]:
            ax.remove()
        yield figure, axes[:count]
        for ax in axes[max(count - columns, 0) : count] if x else ():
            ax.set_xlabel(x)
            ax.tick_params(labelbottom=True)
    plt.close(figure)


def _words(text: str, *names: str) -> dict[str, Picture]:
    """Where there is nothing to draw, a line says why."""
    with _panels(1, 1, 0.5) as (figure, (ax,)):
        ax.set_axis_off()
        ax.text(0, 0.5, text, wrap=True)
    return dict.fromkeys(names or ("figure",), Picture(figure, text))


def _style(method: str, scale: str = "value", editing: bool = True) -> dict[str, Any]:
    """How a method is drawn, on a scale."""
    color, marker, _ = kind_of(method).style
    color = color if editing else GREY
    face = {"markerfacecolor": "white" if scale == "graded" else color}
    return {"color": color, "marker": marker, "linestyle": "-" if editing else "--", "markersize": 4, **face}


def _key(name: str, **style: Any) -> Line2D:
    return Line2D([], [], label=name, **{"color": "black", "marker": "o", "linestyle": "none", **style})


BOTH = [_key(NAMES["value"]), _key(NAMES["graded"], markerfacecolor="white")]


def _legend(figure: Figure, keys: Sequence[Line2D], line: str, columns: int = 4) -> None:
    """The legend below the panels, under a line of text."""
    figure.legend(
        handles=keys, loc="outside lower center", ncols=columns, handlelength=2.6, title=line, title_fontsize=8
    )


def _edit_axis(ax: Axes, counts: Sequence[int]) -> None:
    """Logarithmic from the first count on, with 0 at the left."""
    first = min((count for count in counts if count > 0), default=1)
    ax.set_xscale("symlog", linthresh=first, linscale=0.5)
    close = [after < 2.5 * count for count, after in pairwise([*counts, math.inf])]  # their numbers would overlap
    ax.set_xticks(counts, ["" if each and count else str(count) for each, count in zip(close, counts, strict=True)])
    ax.minorticks_off()
    ax.set_xlim(-0.2 * first, max(counts) * 1.4)


def _mark(ax: Axes, x: float, estimate: Estimate, style: Mapping[str, Any]) -> None:
    """An estimate with its interval as a whisker."""
    ax.vlines(x, *estimate.interval, color=style["color"], linewidth=1.1)
    ax.plot(x, estimate.value, **{**style, "linestyle": "none"})


def _path(ax: Axes, counts: Sequence[int], points: Sequence[Estimate], style: Mapping[str, Any]) -> None:
    """Shares kept from the unedited model on: the band is their interval, thin lines are single orders."""
    edits, start = [0, *counts], (points[0].null,)
    for order in zip(*(point.by_order for point in points), strict=True):
        ax.plot(edits, [*start, *order], color=style["color"], linewidth=0.4, alpha=0.7, zorder=1.8)
    low, high = np.transpose([start * 2, *(point.interval for point in points)])
    ax.fill_between(edits, low, high, color=style["color"], alpha=0.22, linewidth=0)
    ax.plot(edits, [*start, *(point.value for point in points)], **style)


def _shares(ax: Axes, points: Iterable[Estimate] = ()) -> None:
    """An axis of shares kept, 1 the unedited model, 0 chance: all of it, or as much as points and intervals need."""
    for level, dashes in ((1, (4, 3)), (0, (1, 2))):
        ax.axhline(level, color="black", linewidth=0.7, linestyle=(0, dashes), zorder=1.5)
    ends = [end for point in points for end in point.interval] or [-0.3, 1.3]
    ax.set_ylim(max(min(ends), -0.3) - 0.05, min(max(1.0, *ends), 1.3) + 0.05)


Marks = Iterable[tuple[str, float, tuple[float, float], Mapping[str, Any]]]
"""What belongs in which row of a forest: name of the row, number, interval, style."""


def _forest(ax: Axes, marks: Marks, null: float = 0.0, margin: float = MARGIN) -> None:
    """Numbers with whiskers, some to a row; shaded is the margin within which an effect counts as none."""
    rows: dict[str, list] = {}
    for name, *mark in marks:
        rows.setdefault(name, []).append(mark)
    for index, row in enumerate(rows.values()):
        for place, (value, interval, style) in enumerate(row, 1):
            y = index - 0.4 + 0.8 * place / (len(row) + 1)
            ax.hlines(y, *interval, color=style["color"], linewidth=1.1, alpha=style.get("alpha"))
            ax.plot(value, y, **{**style, "linestyle": "none"})
    ax.axvspan(null - margin, null + margin, color="#ececec", zorder=0)
    ax.axvline(null, color="black", linewidth=0.7, zorder=1.5)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")


def _marks(rows: pd.DataFrame, name: str, column: str, black: bool = False) -> Marks:
    """Rows of ``inference``, an estimate a mark."""
    for row in rows.itertuples():
        style = {
            "color": "black",
            "marker": "o",
            "markersize": 4,
            "markerfacecolor": "white" if row.scale == "graded" else "black",
        }
        if not black:
            style = _style(row.method, row.scale, getattr(row, "editing", True))
        estimate = getattr(row, column)
        yield getattr(row, name), estimate.value, estimate.interval, style


def _by_label(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of ``inference`` by method as printed; those that did not keep their edits to the end come last."""
    return dict(sorted(rows.groupby("label", sort=False), key=lambda each: not each[1].editing.iloc[-1]))


def _apart(rows: Mapping[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], str]:
    """(the methods to be drawn, a line about those under which nothing changes)."""
    still = [name for name, some in rows.items() if all(abs(kept.value - kept.null) < SEEN for kept in some.kept)]
    line = f"Everywhere within {SEEN} of the unedited model: {', '.join(still)}." if still else ""
    return {name: some for name, some in rows.items() if name not in still}, line


def _title(ax: Axes, label: str, rows: pd.DataFrame) -> None:
    last = rows.iloc[-1]
    ax.set_title(
        label if last.editing else f"{label} ({last.reliability:.2f} of edits kept)", fontsize=9 if last.editing else 7
    )
    ax.set_facecolor("white" if last.editing else "#f4f4f4")


def _told(rows: pd.DataFrame, *names: str) -> str:
    """Rows of ``inference`` in words: ``names`` of what they are about, and the estimate in the last of them."""
    *about, column = names
    each = [
        " ".join([*(NAMES.get(row[name], row[name]) for name in about), str(row[column])]) for _, row in rows.iterrows()
    ]
    return "; ".join(each) or "none"


# RQ1 ------------------------------------------------------------------------------------------------


def rq1(results: Results) -> dict[str, Picture]:
    """Share kept beside the study's, the effect on each ability, and damage against edit success."""
    abilities, counts = inference.abilities(results), results.params.edits
    some = inference.general(abilities, None)
    if not some:
        return _words("Every ability is at the floor: nothing can be lost.", "figure", "forest", "success")
    rows = pd.concat([inference.overall(abilities, at) for at in range(1, len(counts))])
    return {"figure": kept(rows), "forest": forest(inference.effects(some)), "success": success(rows)}


def kept(rows: pd.DataFrame) -> Picture:
    """Mean share kept against edits (``inference.overall`` of every checkpoint), a panel a method, with the study's."""
    theirs = share_kept()
    theirs = theirs[(theirs.benchmark == "mean") & theirs.model.isin(STUDY)]
    methods = _by_label(rows)
    _, line = _apart({name: some for name, some in methods.items() if some.method.iloc[0] not in set(theirs.method)})
    drawn = {name: some for name, some in methods.items() if name not in line} or methods
    with _panels(len(drawn), 4, 1.8, "sequential edits", sharex=True, sharey=True) as (figure, axes):
        for ax, (label, some) in zip(axes, drawn.items(), strict=True):
            for model, curve in theirs[theirs.method == some.method.iloc[0]].groupby("model"):
                ax.plot(curve.edits, curve.kept, color="#555555", linewidth=0.9, linestyle=STUDY[model], zorder=1.9)
            for scale, points in some.groupby("scale", sort=False):
                style = _style(some.method.iloc[0], scale, points.editing.iloc[-1])
                if scale == "value":
                    _path(ax, points.edits, list(points.kept), style)
                else:
                    for count, point in zip(points.edits, points.kept, strict=True):
                        _mark(ax, 1.12 * count, point, style)
            _title(ax, label, some)
            _edit_axis(ax, [0, 1, 10, 100, 1000])
            _shares(ax)
        for ax in axes[::4]:
            ax.set_ylabel("share of abilities kept")
        lines = [_key(f"study, {model}", color="#555555", marker="", linestyle=dash) for model, dash in STUDY.items()]
        _legend(figure, [*BOTH, *lines], line, 5)
    last = rows[(rows.edits == rows.edits.max()) & (rows.scale == "value")]
    edit, others = (_told(last[last.editing == each], "label", "kept") for each in (True, False))
    ends = theirs[(theirs.model == "Llama2-7B") & (theirs.edits > 0)].groupby("method", sort=False).tail(1)
    study = "; ".join(f"{kind_of(row.method).label} {row.kept:.2f} after {row.edits}" for row in ends.itertuples())
    alt = f"Share of abilities kept after {last.edits.iloc[0]} edits: {edit}. Edits not kept: {others}."
    return Picture(figure, f"{alt} In the study Llama2-7B kept: {study}.")


def forest(effects: pd.DataFrame) -> Picture:
    """Share kept of each ability at the end (``inference.effects``), a panel a method."""
    drawn, line = _apart(_by_label(effects))
    if not drawn:
        return _words(line)["figure"]
    x = f"share kept after {effects.edits.iloc[0]} edits"
    with _panels(len(drawn), 4, 0.7 + 0.24 * effects.aspect.nunique(), x, sharex=True, sharey=True) as (figure, axes):
        for ax, (label, rows) in zip(axes, drawn.items(), strict=True):
            _forest(ax, _marks(rows, "aspect", "kept"), 1)
            _title(ax, label, rows)
            ax.set_xlim(-0.35, 1.4)
        _legend(figure, BOTH, line)
    lost = _told(effects[effects.state == "lost"], "label", "aspect", "scale", "kept")
    return Picture(figure, f"{x.capitalize()}, by ability and method. Lost: {lost}.")


def success(rows: pd.DataFrame) -> Picture:
    """Share kept against reliability over all edits so far, a path a method (rows as for ``kept``)."""
    methods = _by_label(rows[rows.scale == "value"])
    with _panels(1, 1, 3.2, "edits in place (reliability over all so far)") as (figure, (ax,)):
        styles = {label: _style(some.method.iloc[0], "value", some.editing.iloc[-1]) for label, some in methods.items()}
        for label, some in methods.items():
            small = {"markersize": 2.5, "linewidth": 0.8}
            ax.plot(some.reliability, [point.value for point in some.kept], **styles[label] | small)
            _mark(ax, some.reliability.iloc[-1], some.kept.iloc[-1], styles[label] | {"markersize": 6})
        ax.set_xlim(-0.03, 1.05)
        ax.set_ylabel("share of abilities kept")
        _shares(ax)
        _legend(figure, [_key(*each[:1], **each[1]) for each in styles.items()], "larger mark: the last checkpoint", 3)
    ends = pd.DataFrame([some.iloc[-1] for some in methods.values()])
    ends["place"] = ends.reliability.map("{:.2f} of the edits in place, abilities".format)
    return Picture(figure, f"Damage against edit success at the end: {_told(ends, 'label', 'place', 'kept')}.")


# Models compared ------------------------------------------------------------------------------------


def rq2(results: Results) -> dict[str, Picture]:
    """Base against tuned, a panel a method that edits both, and the contrasts at the end."""
    abilities, counts = inference.abilities(results), results.params.edits
    twins = inference.pairs(results.params.models)
    rows = pd.concat(
        [inference.contrast(abilities, twins, at).assign(edits=counts[at]) for at in range(1, len(counts))]
    )
    last = rows[rows.edits == counts[-1]]
    if not len(last):
        return _words("No method edits both models and has an ability off the floor of both.")
    labels = list(dict.fromkeys(last.label))
    with _panels(len(labels) + 1, 4, 2.2, "sequential edits") as (figure, axes):
        base = {"color": "#555555", "marker": "s", "markersize": 3.5, "markerfacecolor": "white"}
        for ax, label in zip(axes, labels, strict=False):
            some = rows[(rows.label == label) & (rows.scale == "value")]
            _path(ax, some.edits, list(some.tuned), _style(some.method.iloc[0]))
            for count, point in zip(some.edits, some.base, strict=True):
                _mark(ax, 1.12 * count, point, base)
            ax.set_title(label)
            _edit_axis(ax, counts)
            _shares(ax, [*rows.tuned, *rows.base])
        axes[0].set_ylabel("share kept (right or wrong)")
        _forest(axes[-1], _marks(last, "label", "difference"))
        axes[-1].set_title("tuned - base")
        _legend(figure, [_key("tuned", linestyle="-"), _key("base", **base), *BOTH], "")
    axes[-1].set_xlabel(f"after {counts[-1]} edits")
    told = _told(last, "label", "scale", "difference")
    return {"figure": Picture(figure, f"Share kept after {counts[-1]} edits, tuned less base: {told}.")}


def rq3(results: Results) -> dict[str, Picture]:
    """Share kept and, below, reliability against the size of the model: models are points, a column a method."""
    size = inference.sizes(results)
    rows = inference.trend(inference.abilities(results), size)
    labels = list(dict.fromkeys(rows.label))
    if not labels:
        return _words("There are not three edited models with an ability off the floor of all.")
    with _panels(2 * len(labels), len(labels), 2.0, "parameters", sharex=True, sharey="row") as (figure, axes):
        for row in rows.itertuples():
            above, below = axes[labels.index(row.label)], axes[labels.index(row.label) + len(labels)]
            style, points = _style(row.method, row.scale), list(row.kept.values())
            x = np.log10([size[model] for model in row.kept])
            spots = 10 ** (x + 0.06 * pd.Series(x).groupby(x).cumcount() + 0.03 * (row.scale == "graded"))
            for spot, point in zip(spots, points, strict=True):
                _mark(above, spot, point, style)
            line = np.mean([point.value for point in points]) + row.slope.value * (x - x.mean())
            if row.p_holm < LEVEL:  # a line that a few models do not bear out would be read as a trend
                above.plot(10**x, line, color=style["color"], lw=0.9, linestyle="-" if row.scale == "value" else ":")
            if row.scale == "value":
                below.plot(spots, list(row.reliability.values()), **style | {"linestyle": "none"})
            above.set_title(row.label)
            above.set_xscale("log")
            _shares(above, [point for each in rows.kept for point in each.values()])
            below.axhline(verdicts.RELIABLE, color="black", linewidth=0.7, linestyle=(0, (4, 3)))
            below.set_ylim(-0.03, 1.05)
            below.set_xticks(ticks := sorted({*size.values()}), map(EngFormatter(places=1, sep=""), ticks))
            below.minorticks_off()
        axes[0].set_ylabel("share kept")
        axes[len(labels)].set_ylabel("reliability")
        _legend(figure, BOTH, "")
    told = _told(rows, "label", "scale", "slope")
    return {"figure": Picture(figure, f"Change of the share kept per tenfold size, {len(size)} models: {told}.")}


# Abilities compared ---------------------------------------------------------------------------------


def rq4(results: Results) -> dict[str, Picture]:
    """Share kept of each aspect by method, on either scale, and the differences between aspects."""
    harmed = verdicts.harmed(inference.abilities(results))
    if not harmed:
        return _words("Under no method that edits was an ability lost: no extent to compare.")
    effects, (each, pairs) = inference.effects(harmed), inference.aspects(harmed)
    styles = {a.label: _style(a.method) | {"linestyle": "none"} for a in harmed}
    with _panels(3, 3, 3.2, width_ratios=(1, 1, 1.1)) as (figure, axes):
        for ax, scale in zip(axes, SCALES, strict=False):
            _forest(ax, _marks(effects[effects.scale == scale], "aspect", "kept"), 1)
            ax.set_title(NAMES[scale])
            ax.set_xlabel("share kept")
            ax.set_xlim(-0.35, 1.4)
        both = pairs.assign(pair=pairs.one + " - " + pairs.other)
        _forest(axes[-1], _marks(both, "pair", "difference", True))
        axes[1].set_yticklabels([])
        axes[-1].set_title("difference")
        axes[-1].set_xlabel("mean over methods")
        _legend(figure, [*(_key(label, **style) for label, style in styles.items()), *BOTH], "", 6)
    return {
        "figure": Picture(
            figure, f"Share kept, mean over methods that cost an ability: {_told(each, 'aspect', 'scale', 'kept')}."
        )
    }


AXES = {"discrimination": "discrimination kept", "bias": "change of commoner answer's share"}
AXES |= {"graded": "truthfulness kept, graded", "log_odds": "change of log-odds of refusing"}


def rq5(results: Results) -> dict[str, Picture]:
    """Discrimination, bias, truthfulness, refusals: a panel each, a row a method, from pale to full as edits grow."""
    counts, drawn, floor = results.params.edits, {}, []
    for (benchmark, _), group in verdicts.of_safety(inference.abilities(results)).items():
        for scale in dict.fromkeys(a.scale for a in group if a.scale in AXES):
            some = [a for a in group if a.scale == scale]
            if some[0].floor:
                floor.append(f"{benchmark} ({NAMES[scale]})")
            else:
                rows = pd.concat([inference.effects(some, at) for at in range(1, len(counts))])
                rows["editing"] = [a.editing[-1] for a in some] * (len(counts) - 1)
                drawn[benchmark, scale] = pd.concat(_by_label(rows))
    if not drawn:
        return _words("Everything that was asked is at the floor.")
    shade = {count: 0.25 + 0.75 * at / (len(counts) - 1) for at, count in enumerate(counts) if count}
    with _panels(len(drawn), 2 if len(drawn) == 4 else 3, 2.4, sharey=True) as (figure, axes):
        for ax, ((benchmark, scale), rows) in zip(axes, drawn.items(), strict=True):
            marks = zip(_marks(rows, "label", "kept"), rows.edits, strict=True)
            shaded = [(*mark, style | {"alpha": shade[count], "markersize": 3}) for (*mark, style), count in marks]
            margin = inference.LOGIT_MARGIN if scale == "log_odds" else MARGIN
            _forest(ax, shaded, rows.kept.iloc[0].null, margin)
            ax.set_title(benchmark)
            ax.set_xlabel(AXES[scale])
        line = f"At the floor: {', '.join(floor)}." if floor else ""
        _legend(figure, [_key(f"{count} edits", alpha=alpha) for count, alpha in shade.items()], line)
    ends = {key: rows[(rows.edits == counts[-1]) & rows.editing] for key, rows in drawn.items()}
    told = " ".join(
        f"{AXES[key[1]].capitalize()} ({key[0]}): {_told(rows, 'label', 'kept')}." for key, rows in ends.items()
    )
    return {"figure": Picture(figure, f"After {counts[-1]} edits, by method that edits. {told}")}


# Structure damage -----------------------------------------------------------------------------------


def discussion(results: Results) -> dict[str, Picture]:
    """Indicators of damage against edits, and how each goes with the loss of ability."""
    checkpoints = damage.checkpoints(results)
    return {"figure": indicators(checkpoints, damage.predictors(checkpoints))}


def _indicator(ax: Axes, rows: pd.DataFrame, name: str) -> None:
    """One indicator: the median of the orders, with the range between them, for methods that do such damage."""
    about, finite = damage.INDICATORS[name], rows[name].where(rows[name].abs() < math.inf)
    for method, values in finite.groupby(rows.method, sort=False):
        if (values != about.undamaged).any():
            curve, style = values.groupby(rows.edits).agg(["min", "median", "max"]), _style(method)
            ax.plot(curve.index, curve["median"], **style | {"markersize": 3})
            ax.fill_between(curve.index, curve["min"], curve["max"], color=style["color"], alpha=0.2, linewidth=0)
    ax.axhline(about.alarm, color="black", linewidth=0.7, linestyle=(0, (4, 3)))
    ax.set_title(about.title)
    ax.set_yscale(about.axis, **({"linthresh": 0.01} if about.axis == "symlog" else {}))
    ax.set_ylim(0 if about.axis == "symlog" else 0.7 * min(1, finite.min()), min(ax.get_ylim()[1], BROKEN))
    _edit_axis(ax, sorted(rows.edits.unique()))


def indicators(checkpoints: pd.DataFrame, predictors: pd.DataFrame) -> Picture:
    """A panel an indicator, and rank correlations with the ability kept.

    Args:
        checkpoints: as ``damage.predictors`` takes them, unedited checkpoints included; ``predictors``: what it gives.
    """
    with _panels(len(predictors) + 1, 3, 1.9, "sequential edits") as (figure, axes):
        for ax, name in zip(axes, (name for name in damage.INDICATORS if name in checkpoints), strict=False):
            _indicator(ax, checkpoints, name)
        marks = []
        for row in predictors.itertuples():
            style = {"color": "black", "marker": "o", "markersize": 3}
            marks.append((row.measure, row.within, (row.within_low, row.within_high), style))
            marks.append((row.measure, row.rho, (row.rho_low, row.rho_high), style | {"markerfacecolor": "white"}))
        _forest(axes[-1], marks, margin=0)
        axes[-1].set_title("correlation with ability kept")
        harm = [name for name in damage.INDICATORS if name in checkpoints]
        harmful = (checkpoints[harm] != [damage.INDICATORS[name].undamaged for name in harm]).any(axis=1)
        methods = {kind_of(m).label: _style(m) for m in dict.fromkeys(checkpoints.method[harmful])}
        keys = [_key("within methods"), _key("over all", markerfacecolor="white")]
        keys.append(_key("alarm", marker="", linestyle=(0, (4, 3))))
        _legend(figure, [*(_key(label, **style) for label, style in methods.items()), *keys], "", 5)
    axes[-1].set_xlabel("Spearman's rho")
    told = ", ".join(f"{row.measure} {row.within:.2f}" for row in predictors.itertuples())
    return Picture(
        figure, f"Damage by number of edits. Its rank correlation with ability kept, within methods: {told}."
    )
