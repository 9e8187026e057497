"""The audit: what each deviation of released code does to a curve, what the metric does, and which findings hold.

A deviation is two paths of one run, as published and as released, which edit the same facts in the same orders. What it
accounts for is judged as in ``verdicts``: the share kept as published less that as released, against the distance
between the path as published and the study's curve. The study's is a curve of other models, and its distance a number
without an interval; so what is said is that the deviation *is consistent with* it, or not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import special, stats

from kedit.analysis import inference, plots
from kedit.analysis.inference import MANY, Ability, Estimate, holm
from kedit.analysis.published import share_kept
from kedit.analysis.scores import LEVEL, NOISE, unseen
from kedit.analysis.verdicts import NAMES, Verdict, _judge
from kedit.editors import kind_of
from kedit.study.results import Results

Path = tuple[str, str]
"""Method and variant."""


@dataclass(frozen=True)
class Deviation:
    """What released code does otherwise; the two paths, and the method whose curve the study has."""

    what: str
    published: Path
    released: Path

    @property
    def curve(self) -> str:
        """The study's method."""
        return self.released[0]


DEFAULT = "default"
SEARCH = "whose search has clamp 4, decay 0.001 and rate 0.5, not the authors' 0.75, 0.5 and 0.1"
DEVIATIONS = (
    Deviation("ROME with two keys, one for the direction and one to divide by", ("r-rome", DEFAULT), ("rome", DEFAULT)),
    Deviation("ROME without second moments", ("rome", DEFAULT), ("rome", "no second moments")),
    Deviation("ROME with two keys and without second moments", ("r-rome", DEFAULT), ("rome", "no second moments")),
    Deviation("MEND whose edits do not accumulate", ("mend", DEFAULT), ("mend", "last edit only")),
    Deviation("PMET with positions counted from the padded side", ("pmet", DEFAULT), ("pmet", "padded left")),
    Deviation("GRACE applying one edit in 128", ("grace", DEFAULT), ("grace", "one in 128")),
    Deviation("KN with one point of the integral", ("kn", DEFAULT), ("kn", "one point")),
    Deviation("KN with one point and a rule that scales nothing", ("kn", DEFAULT), ("kn", "one point, t-2a")),
    Deviation(f"MEMIT {SEARCH}", ("memit", "own search"), ("memit", DEFAULT)),
    Deviation(f"AlphaEdit {SEARCH}", ("alphaedit", "own search"), ("alphaedit", DEFAULT)),
)
STUDY = "Llama2-7B"


# Edit success, by metric and form ------------------------------------------------------------------

FORMS = {"reliability": "prompt", "generalisation": "paraphrase"}
METRICS = {
    "comparison": lambda item: float(item["new"] > item["true"]),
    "graded": lambda item: np.nan_to_num(special.expit(item["new"] - item["true"]), nan=0.5),
    "token accuracy": lambda item: item.get("accuracy", np.nan),
    "written": lambda item: float(item["says"] == "new"),
}
"""Did the edit take? The new object is likelier than the old one; its probability a token, of the two; the share of its
tokens that are the likeliest, those before them given; the model writes it by itself."""
Orders = list[np.ndarray]
"""A number of each edit so far, by order."""


def readings(results: Results, at: int = -1) -> dict[tuple[str, str, str], dict[tuple[str, str], Orders]]:
    """(model, method, variant) -> (form, metric) -> numbers, at a checkpoint.

    From ``readings``, if the run has them; else of edit success the prompt and the mean over paraphrases.
    """
    name, count = "readings" if "readings" in results.params.measures else "edit", results.params.edits[at]
    found: dict[tuple, dict[tuple[str, str], Orders]] = {}
    for cell in (c for c in results.cells if (c.benchmark, c.edits) == (name, count) and c.method):
        items = pd.DataFrame([{"form": i["kind"], "id": i["id"]} | {m: f(i) for m, f in METRICS.items()}
                              for i in cell.items if i["kind"] != "locality"])  # fmt: skip
        for form, some in items.groupby("form", sort=False):
            for metric, values in some.groupby("id", sort=False)[list(METRICS)].mean().dropna(axis=1).items():
                place = found.setdefault((cell.model, cell.method, cell.variant), {})
                place.setdefault((FORMS.get(form, form), metric), []).append(values.to_numpy())
    return found


def over_orders(orders: Orders) -> Estimate:
    """Their mean, by the scatter of the orders' means, each being of facts of its own; of one order by its facts'.

    Never surer than the facts alone would be; where all are alike, by the exact bound of what is too rare to be seen.
    """
    every, means = np.concatenate(orders), np.array([each.mean() for each in orders])
    if len(every) < 2 or np.ptp(every) <= NOISE:
        return Estimate(every.mean(), unseen(len(every)) / stats.norm.ppf(1 - LEVEL), MANY, 0.0, tuple(means))
    rows = means if len(means) > 1 else every
    error = max(some.std(ddof=1) / len(some) ** 0.5 for some in (rows, every))
    return Estimate(means.mean(), error, len(rows) - 1, 0.0, tuple(means))


def less(one: Orders, other: Orders) -> Estimate:
    """The mean difference, edit by edit."""
    return over_orders([a - b for a, b in zip(one, other, strict=True)])


# Deviations ----------------------------------------------------------------------------------------


def study(method: str, edits: int) -> tuple[float, int]:
    """(share that the study's curve keeps, at which of its counts): the one nearest to so many edits; nan if none."""
    rows = share_kept()
    rows = rows[(rows.model == STUDY) & (rows.method == method) & (rows.benchmark == "mean") & (rows.edits > 0)]
    if not len(rows):
        return np.nan, 0
    row = rows.iloc[(np.log(rows.edits) - np.log(edits)).abs().argmin()]
    return float(row.kept), int(row.edits)


def _pairs(results: Results) -> Iterator[tuple[str, Deviation]]:
    paths = {(each.method, each.variant) for each in results.params.methods}
    yield from ((m, d) for m in results.params.models for d in DEVIATIONS if {d.published, d.released} <= paths)


def effects(results: Results, abilities: Sequence[Ability], at: int = -1) -> pd.DataFrame:
    """Both paths of each deviation at a checkpoint, on both scales. Holm's family: the rows.

    Returns:
        ``what``, ``model``, ``scale``, ``edits``, ``orders``; of the share kept ``published``, ``released`` and
        ``difference``, with ``p_holm``; of the edits in place ``in_published``, ``in_released`` and ``in_difference``
        (all ``Estimate``s); ``keeps``, whether each path keeps its edits; the study's ``share`` after
        ``theirs`` edits.
    """
    lines: dict[tuple, list[Ability]] = {}
    for a in inference.general(abilities, None):
        lines.setdefault((*a.line, a.scale), []).append(a)
    asked, rows = readings(results, at), []
    for (model, deviation), scale in ((pair, s) for pair in _pairs(results) for s in inference.SCALES):
        both = [lines.get((model, *path, scale)) for path in (deviation.published, deviation.released)]
        if not all(both):
            continue
        kept = [inference.kept(path, at) for path in both]
        metric = "prompt", {"value": "comparison"}.get(scale, scale)
        took = [asked[model, *path][metric] for path in (deviation.published, deviation.released)]
        edits, keeps = both[0][0].edits[at], tuple(path[0].editing[at] for path in both)
        about = [deviation, model, scale, edits, len(results.params.orders), *kept, inference.apart(*both, at)]
        rows.append([*about, *map(over_orders, took), less(*took), keeps, *study(deviation.curve, edits)])
    names = ["published", "released", "difference", "in_published", "in_released", "in_difference", "keeps"]
    columns = ["deviation", "model", "scale", "edits", "orders", *names, "share", "theirs"]
    frame = pd.DataFrame(rows, columns=columns)
    frame = frame.assign(what=[each.what for each in frame.deviation])
    return frame.assign(p_holm=holm([each.p for each in frame.difference]))


def _answer(row: pd.Series) -> str:
    """Whether a deviation moves the curve towards the study's (where there is none: at all): yes, no, open."""
    moved = row.p_holm < LEVEL and not row.difference.equal()
    gap = row.published.value - row.share
    if moved:
        return "yes" if np.isnan(gap) or gap * row.difference.value > 0 else "no"
    return "no" if row.difference.equal() else "open"


def deviation(rows: pd.DataFrame) -> Verdict:
    """What one deviation accounts for, from its rows of ``effects``."""
    first = rows.iloc[0]
    label, known = kind_of(first.deviation.curve).label, not np.isnan(first.share)
    claim = f"{first.what}: {f'accounts for some of the {label} curve of the study' if known else 'moves the curve'}"

    def told(prefix: str = "") -> str:
        names = [f"{prefix}{name}" for name in ("published", "released", "difference")]
        each = [(*(r[name] for name in names), NAMES[r.scale]) for _, r in rows.iterrows()]
        return "; ".join("as published {}, as released {}, difference {} ({})".format(*one) for one in each)

    because = f"Share kept after {first.edits} edits: {told()}. "
    if known:
        gap = f"{first.published.value - first.share:+.2f} is to be accounted for"
        because += f"The study's {STUDY} kept {first.share:.2f} after {first.theirs}: {gap} (right or wrong). "
    because += f"Edits in place: {told('in_')}."
    because += {
        (False, False): " Neither path keeps its edits: what they do to abilities is no price of editing.",
        (
            True,
            False,
        ): " As released the edits are not in place: that curve is of a model that was not edited so often.",
    }.get(tuple(map(bool, first.keeps)), "")
    if known and all(replace(r.published, null=r.share).equal() for r in rows.itertuples()):
        return Verdict(claim, "does not apply", f"As published it keeps what the study's curve does. {because}")
    found = {r.scale: {label: _answer(r)} for _, r in rows.iterrows()}
    return _judge(claim, found, first.orders, ("consistent with it", "not"), because)


def deviations(results: Results, abilities: Sequence[Ability]) -> list[Verdict]:
    """A sentence a deviation; of those that cannot be told here, why."""
    rows = effects(results, abilities)
    found = [deviation(some) for _, some in rows.groupby(["model", "what"], sort=False)]
    for each in (d for d in DEVIATIONS if d.what not in set(rows.what)):
        there = each in [d for _, d in _pairs(results)]
        why = "every ability is at the floor" if there else f"{results.params.name} does not have both paths"
        found.append(Verdict(each.what, "does not apply", f"Could not be tested here: {why}."))
    return found


# The metric ----------------------------------------------------------------------------------------


def metrics(results: Results, at: int = -1) -> pd.DataFrame:
    """A row a path and form: ``label``, each metric, and the ``gap`` between comparison and writing (``Estimate``s)."""
    rows = []
    for (model, method, variant), found in readings(results, at).items():
        for form in dict.fromkeys(form for form, _ in found):
            some = {metric: values for (place, metric), values in found.items() if place == form}
            row = {"label": _label(method, variant), "model": model, "form": form}
            row |= {metric: over_orders(values) for metric, values in some.items()}
            rows.append(row | {"gap": less(some["comparison"], some["written"])})
    return pd.DataFrame(rows)


def _label(method: str, variant: str) -> str:
    return kind_of(method).label + ("" if variant == DEFAULT else f" ({variant})")


def ranks(results: Results, at: int = -1) -> Verdict:
    """Do methods rank alike by what is compared, by token accuracy, and by what is written? Only methods that edit.

    A pair is turned round beyond noise if each metric tells the two apart, the other way (the larger of the two p, Holm
    over pairs, forms and metrics).
    """
    tests, lines = [], {k: v for k, v in readings(results, at).items() if kind_of(k[1]).edits and k[2] == DEFAULT}
    for (one, a), (other, b) in combinations(lines.items(), 2):
        for form, metric in (place for place in a if place[1] in ("comparison", "token accuracy") and place in b):
            if one[0] == other[0]:
                told = [less(a[form, name], b[form, name]) for name in (metric, "written")]
                turned = told[0].value * told[1].value < -(NOISE**2)
                names = f"{_label(*one[1:])} and {_label(*other[1:])} ({form}, {metric} {told[0].value:+.2f}, written "
                tests.append((turned, max(each.p for each in told), f"{names}{told[1].value:+.2f})"))
    turned = [test for test in tests if test[0]]
    sure = [test[2] for test, p in zip(turned, holm([test[1] for test in turned]), strict=True) if p < LEVEL]
    word = "not supported" if sure else "undecided" if turned else "supported"
    because = f"Of {len(tests)} comparisons of two methods {len(turned)} turn round, {len(sure)} beyond noise"
    claim = "Methods rank alike, whichever way success is measured"
    return Verdict(claim, word if len(tests) else "undecided", f"{because}: {'; '.join(sure) or 'none'}.")


# Pictures ------------------------------------------------------------------------------------------


def figures(results: Results) -> dict[str, plots.Picture]:
    """Both paths of each deviation beside the study's curve, and the differences at the end."""
    abilities, counts = inference.abilities(results), results.params.edits
    rows = pd.concat([effects(results, abilities, at) for at in range(1, len(counts))], ignore_index=True)
    if not len(rows):
        return plots._words("No deviation has both its paths and an ability off the floor.", "figure", "forest")
    groups = list(rows[rows.scale == "value"].groupby(["model", "what"], sort=False))
    old = {"color": plots.GREY, "marker": "s", "markersize": 4, "markerfacecolor": "white", "linestyle": "--"}
    with plots._panels(len(groups), 3, 2.0, "sequential edits", sharex=True, sharey=True) as (figure, axes):
        for ax, ((_, what), some) in zip(axes, groups, strict=True):
            style = plots._style(some.deviation.iloc[0].published[0])
            for column, drawn in (("published", style), ("released", old)):
                plots._path(ax, some.edits, list(some[column]), drawn)
            curve = share_kept().query("model == @STUDY and benchmark == 'mean'")
            curve = curve[(curve.method == some.deviation.iloc[0].curve) & (curve.edits <= 10 * counts[-1])]
            ax.plot(curve.edits, curve.kept, color="#555555", linewidth=0.9)
            ax.set_title(what.partition(" whose search")[0] + " (search)" * (" search " in what), fontsize=6, wrap=True)
            plots._edit_axis(ax, [0, 1, 10, 100])
            plots._shares(ax)
        for ax in axes[::3]:
            ax.set_ylabel("share of abilities kept", fontsize=8)
        keys = [plots._key("as published", linestyle="-"), plots._key("as released", **old)]
        plots._legend(figure, [*keys, plots._key(f"study, {STUDY}", color="#555555", marker="", linestyle="-")], "", 3)
    last = rows[rows.edits == counts[-1]].assign(label=lambda frame: frame.what.str.partition(", not")[0])
    last["method"] = [each.published[0] for each in last.deviation]
    with plots._panels(2, 2, 3.4, sharey=True) as (forest, axes):
        for ax, column, x in zip(axes, ("difference", "in_difference"), ("share kept", "edits in place"), strict=True):
            plots._forest(ax, plots._marks(last, "label", column, True))
            ax.set_xlabel(f"{x}: published - released", fontsize=8)
        axes[0].tick_params(axis="y", labelsize=6)
        plots._legend(forest, plots.BOTH, "")
    ends = [plots._told(last, "label", "scale", column) for column in ("difference", "in_difference")]
    alt = f"After {counts[-1]} edits, as published less as released. Share of abilities kept: {ends[0]}."
    return {"figure": plots.Picture(figure, alt), "forest": plots.Picture(forest, f"{alt} Edits in place: {ends[1]}.")}
