"""The answer to each question in a sentence with its quantifier, computed from the statistics.

A claim is about every method that edits, and must hold on both scales: it is *supported* or *not supported* only if
all of them say so, *mixed* with the lists otherwise, and *undecided* where nothing was found, with the effect that can
be excluded. With fewer than ``FEW`` orders nothing is said of a method: one order is about these edits, more are a
hint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from kedit.analysis import inference
from kedit.analysis.inference import FEW, MARGIN, SCALES, Ability, Estimate
from kedit.analysis.scores import LEVEL, shown
from kedit.evaluation import benchmarks

NAMES = {"value": "right or wrong", "graded": "graded", "log_odds": "log-odds"}
NAMES |= {"discrimination": "area under the ROC curve", "bias": "share of the commoner answer"}
RELIABLE = 0.9
"""Where a model takes in a smaller share of the edits, damage and success cannot be told apart."""


@dataclass(frozen=True)
class Verdict:
    """``word`` is supported, not supported, mixed or undecided; ``claim`` is the study's, in our words.

    ``hedge`` says what the number of orders allows to be said.
    """

    claim: str
    word: str
    because: str
    hedge: str = ""

    def __str__(self) -> str:
        return f"{self.claim}: {self.word.upper()}. {self.hedge}{self.because}"


Found = Mapping[str, Mapping[str, str]]
"""Scale -> what a sentence is about (mostly methods, as printed) -> yes, no or open."""


def _judge(
    claim: str, found: Found, orders: int, words: tuple[str, str], because: str, strict: bool = False
) -> Verdict:
    """The verdict from what each scale says of each method.

    Args:
        words: what yes and no are called in the lists.
        strict: whether one no refutes the claim.
    """
    called = dict(zip(("yes", "no", "open", "apart"), (*words, "undecided", "on one scale only"), strict=True))
    lists: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for said in found.values() for name in said):
        said = {scale: answers[name] for scale, answers in found.items() if name in answers}
        first, *others = set(said.values())
        key = "open" if others and "yes" not in said.values() and not strict else "apart" if others else first
        parts = ", ".join(f"{called[answer]} on the {NAMES[scale]} scale" for scale, answer in said.items())
        lists.setdefault(key, []).append(f"{name} ({parts})" if others else name)
    word = "mixed" if {"yes", "apart"} & set(lists) else "undecided"
    if set(lists) == {"yes"}:
        word = "supported"
    elif set(lists) == {"no"} or (strict and "no" in lists):
        word = "not supported"
    text = "; ".join(f"{title}: {', '.join(lists[key])}" for key, title in called.items() if key in lists)
    text = f"{text[:1].upper()}{text[1:]}. {because}"
    if orders >= FEW:
        return Verdict(claim, word, text)
    hedge = f"{orders} orders are a hint, by which it would be {word}"
    if orders == 1:
        hedge = "In one order intervals cover items only, and this is for these edits"
    return Verdict(claim, "undecided", text, f"{hedge}; a verdict takes {FEW} orders. ")


def _excluded(rows: pd.DataFrame) -> str:
    """What losses the undecided rows leave possible."""
    losses = [1 - kept.interval[0] for kept in rows.kept[rows.state == "undecided"]]
    return f" Where undecided, losses of up to {max(losses):.2f} of the ability cannot be excluded." if losses else ""


def _outside(abilities: Sequence[Ability]) -> str:
    names = dict.fromkeys(f"{a.label} ({a.reliability[-1]:.2f})" for a in abilities if not a.editing[-1])
    return f" Outside the verdict, not having kept their edits (reliability): {', '.join(names)}." if names else ""


def _by_scale(rows: pd.DataFrame, answer: Callable[[pd.DataFrame], str]) -> Found:
    """What ``answer`` says of each method's rows, on each scale."""
    found: dict[str, dict[str, str]] = {}
    for (scale, name), some in rows.groupby(["scale", "label"], sort=False):
        found.setdefault(scale, {})[name] = answer(some)
    return found


def _lost(rows: pd.DataFrame) -> str:
    """Whether something was lost, or everything kept."""
    return "yes" if (rows.state == "lost").any() else "no" if rows.state.isin(["kept", "rose"]).all() else "open"


def number_of_edits(abilities: Sequence[Ability]) -> Verdict:
    """RQ1: does every method that edits cost some general ability? Holm over methods, abilities and scales."""
    claim = f"Sequential edits damage general abilities, by every method that edits ({abilities[0].edits[-1]} edits)"
    some = inference.general(abilities)
    if not some:
        return Verdict(claim, "undecided", f"No method edits and has an ability to lose.{_outside(abilities)}")
    rows = inference.effects(some)
    lost = rows[rows.state == "lost"]
    losses = "; ".join(f"{r.label} keeps {r.kept} of {r.benchmark} ({NAMES[r.scale]})" for r in lost.itertuples())
    because = f"Share kept: {losses}." if losses else f"No loss is significant (Holm over {len(rows)} tests)."
    because += _excluded(rows) + _outside(abilities)
    words = "lost some ability", "kept every ability"
    return _judge(claim, _by_scale(rows, _lost), rows.orders.min(), words, because)


def _more(rows: pd.DataFrame, column: str) -> Found:
    """Whether each row's estimate is above 0 (Holm), or below, or equal within the margin."""
    found: dict[str, dict[str, str]] = {}
    for row in rows.itertuples():
        estimate: Estimate = getattr(row, column)
        moved = row.p_holm < LEVEL and not estimate.equal()
        answer = ("yes" if estimate.value > 0 else "no") if moved else "no" if estimate.equal() else "open"
        found.setdefault(row.scale, {})[row.label] = answer
    return found


def instruction_tuning(abilities: Sequence[Ability], twins: Sequence[tuple[str, str]]) -> Verdict:
    """RQ2: do tuned models keep more than their bases? Over orders and pairs of twins; Holm over methods and scales."""
    claim = "The instruction-tuned model declines more slowly, under every method that edits"
    rows = inference.contrast(abilities, twins)
    if not len(rows):
        return Verdict(claim, "undecided", "No method edits both models and has an ability off the floor of both.")
    each = "; ".join(
        f"{r.label} ({NAMES[r.scale]}): base {r.base}, tuned {r.tuned}, difference {r.difference}"
        + ", equal within the margin" * r.difference.equal()
        for r in rows.itertuples()
    )
    pairs = f"{len(twins)} pairs of twins" if len(twins) > 1 else "the one pair of twins, for which alone this holds,"
    because = f"Share kept, mean over {pairs} and their abilities: {each}.{_outside(abilities)}"
    words = ("more slowly", f"not more slowly, by {MARGIN:.2f} of the ability")
    return _judge(claim, _more(rows, "difference"), rows.orders.min(), words, because)


def model_scale(abilities: Sequence[Ability], size: Mapping[str, float]) -> Verdict:
    """RQ3: do larger models keep more? Models are the unit; Holm over methods and scales."""
    claim = "Larger models keep more, under every method that edits"
    rows = inference.trend(abilities, size)
    if not len(rows):
        return Verdict(claim, "undecided", "There are not three edited models with an ability off the floor of all.")
    slopes = "; ".join(f"{r.label} ({NAMES[r.scale]}) {r.slope} over {r.models} models" for r in rows.itertuples())
    because = f"Change of the share kept per tenfold size: {slopes}."
    words = "larger keep more", "larger keep no more"
    verdict = _judge(claim, _more(rows, "slope"), rows.orders.min(), words, because)
    least = rows.assign(least=[min(success.values()) for success in rows.reliability]).groupby("label").least.min()
    if (least < RELIABLE).any():
        low = ", ".join(f"{label} {value:.2f}" for label, value in least[least < RELIABLE].items())
        confounded = f"Damage and success are confounded: at some size too few edits took (least reliability: {low}). "
        return Verdict(claim, "undecided", confounded + verdict.because)
    return verdict


def harmed(abilities: Sequence[Ability]) -> list[Ability]:
    """The general abilities under those methods that edit by which one of them was lost."""
    some = inference.general(abilities)
    rows = inference.effects(some) if some else pd.DataFrame(columns=["state", *inference.LINE])
    harmful = set(rows[rows.state == "lost"][inference.LINE].itertuples(index=False, name=None))
    return [a for a in some if a.line in harmful]


def ability_aspects(abilities: Sequence[Ability]) -> Verdict:
    """RQ4: are the aspects of ability affected to about the same extent?

    Over the methods that edit and lost an ability of some aspect; pairs of aspects by TOST and by difference (Holm
    over pairs and scales).
    """
    claim = "Editing affects different abilities to about the same extent"
    some = harmed(abilities)
    each, pairs = inference.aspects(some)
    if not len(pairs):
        none = "Under no method was an ability lost: no extent to compare."
        return Verdict(claim, "undecided", none + _outside(abilities))
    found: dict[str, dict[str, str]] = {}
    for r in pairs.itertuples():
        answer = "yes" if r.difference.equal() else "no" if r.p_holm < LEVEL else "open"
        found.setdefault(r.scale, {})[f"{r.one}-{r.other}"] = answer
    labels = dict.fromkeys(a.label for a in some)
    because = f"Share kept, mean over {', '.join(labels)}: "
    because += "; ".join(f"{r.aspect} {r.kept} ({NAMES[r.scale]})" for r in each.itertuples()) + "."
    apart = pairs[(pairs.p_holm < LEVEL) & ~pairs.difference.map(Estimate.equal)]
    if len(apart):
        far = max(apart.itertuples(), key=lambda r: abs(r.difference.value))
        because += f" Furthest apart: {far.one} and {far.other}, by {far.difference} ({NAMES[far.scale]})."
        if set(apart.scale) != set(SCALES) and set(pairs.scale) == set(SCALES):
            because += " On the other scale no pair differs: part of it may be headroom."
    return _judge(claim, found, len(some[0].values[0]), ("alike", "different"), because, strict=True)


def _drifts(rows: pd.DataFrame) -> str:
    return "yes" if rows.state.isin(["lost", "rose"]).any() else "no" if (rows.state == "kept").all() else "open"


SAFETY = {
    "discrimination": ("Edits cost the power to tell the answers of {} apart", ("lost", "kept")),
    "bias": ("Edits move the threshold between the answers of {}", ("moved", "unmoved")),
    "truth": ("Edits cost truthfulness ({})", ("lost", "kept")),
    "refusal": ("Edits make harmful requests refused less ({})", ("less", "no less")),
}
"""Each its own sentence: claim, and what yes and no are called."""


BLIND = (
    "This cannot be answered here: the unedited model does not tell harmful requests from harmless ones (area under "
    "the ROC curve at the floor), so that refusing more or less says nothing of harm."
)


def _sentence(ability: Ability) -> str:
    """Which sentence an ability of safety belongs to; none for accuracy that a moved threshold would change."""
    about = benchmarks.metadata(ability.benchmark)
    if ability.scale in SAFETY:
        return ability.scale
    return "" if about.get("two_way") else "refusal" if about.get("openings") else "truth"


def of_safety(abilities: Sequence[Ability]) -> dict[tuple[str, str], list[Ability]]:
    """(benchmark, what is asked of it, a key of ``SAFETY``) -> abilities: the family of a sentence."""
    groups: dict[tuple[str, str], list[Ability]] = {}
    for a in abilities:
        if not a.aspect and (key := _sentence(a)):
            groups.setdefault((a.benchmark, key), []).append(a)
    return dict(sorted(groups.items(), key=lambda each: list(SAFETY).index(each[0][1])))


def safety(abilities: Sequence[Ability]) -> list[Verdict]:
    """RQ5: a sentence a benchmark and what is asked of it; a drift of the threshold without a loss is called just that.

    Holm over the methods and scales of a sentence.
    """
    sound: dict[str, set[str]] = {}
    blind = {a.benchmark for a in abilities if a.scale == "discrimination" and a.floor}
    made = []
    for (benchmark, key), group in of_safety(abilities).items():
        text, words = SAFETY[key]
        claim = f"{text.format(benchmark)}, by every method that edits ({group[0].edits[-1]} edits)"
        rows = inference.effects(group)
        rows = rows[~rows.state.isin(["floor", "apart"])]
        if not len(rows) or (key == "refusal" and benchmark in blind):
            reason = BLIND if len(rows) else "This cannot be answered here: nothing is off the floor and edited."
            made.append(Verdict(claim, "undecided", reason + _outside(group)))
            continue
        if key == "discrimination":
            sound[benchmark] = set(rows.label[rows.state == "kept"])
        because = "; ".join(f"{r.label} {r.kept} of {NAMES[r.scale]}" for r in rows.itertuples()) + "."
        if key == "bias":
            moved = rows.label[rows.state.isin(["lost", "rose"])]
            drift = [label for label in moved if label in sound.get(benchmark, ())]
            because += f" A drift of the threshold, not a loss: {', '.join(drift)}." if drift else ""
        else:
            because += _excluded(rows)
        because, found = because + _outside(group), _by_scale(rows, _drifts if key == "bias" else _lost)
        made.append(_judge(claim, found, rows.orders.min(), words, because))
    return made


def structure_damage(predictors: pd.DataFrame) -> Verdict:
    """Discussion, from ``damage.predictors``: which indicators go with the loss of ability, within methods too?"""
    claim = "Damage inside goes with the loss of ability, within methods too"
    within = predictors[predictors.within_high < 0]
    across = predictors[(predictors.rho_high < 0) & ~predictors.measure.isin(within.measure)]
    listed = ", ".join(f"{r.measure} ({shown(r.within, r.within_low, r.within_high)})" for r in within.itertuples())
    only = f" Only across methods: {', '.join(across.measure)}." if len(across) else ""
    if not len(within):
        return Verdict(claim, "undecided", f"No measure's rank correlation within methods excludes 0.{only}")
    first = within.sort_values(["before", "within"], ascending=[False, True], kind="stable").iloc[0]
    when = f"none gives the alarm at a checkpoint before any of the {first.collapsed} collapses"
    if first.before:
        when = f"earliest is {first.measure}, before {first.before} of {first.collapsed} collapses"
    because = f"{len(within)} of {len(predictors)} measures rise as the ability falls within methods: {listed}; {when}."
    return Verdict(claim, "supported" if len(within) == len(predictors) else "mixed", because + only)
