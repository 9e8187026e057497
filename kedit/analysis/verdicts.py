"""The answer to each question in a sentence, computed from the statistics.

Every function takes what ``inference`` or ``damage`` computed and returns a ``Verdict``: one of *supported*, *not
supported*, *inconclusive* about what the study said, and the sentence with the numbers it rests on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from kedit.analysis import inference
from kedit.analysis.inference import LEVEL, MARGIN, Ability, Estimate, by_aspect, holm
from kedit.analysis.scores import shown
from kedit.editors import kind_of


@dataclass(frozen=True)
class Verdict:
    """``word`` is supported, not supported or inconclusive; ``claim`` is the study's, in our words."""

    claim: str
    word: str
    because: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.word.upper()}. {self.because}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _labels(methods: Sequence[str]) -> str:
    return _listed([kind_of(method).label for method in methods])


def number_of_edits(abilities: Sequence[Ability]) -> Verdict:
    """RQ1: do sequential edits damage general abilities?

    Supported if at the last checkpoint every method has an ability that fell; not supported if none
    has one and at least one method kept all its abilities equal; anything between is said method by method.
    """
    effects = inference.effects(abilities)
    fell, equal, unclear, losses = [], [], [], []
    for method, rows in effects[effects.effect != "floor"].groupby("method", sort=False):
        lost = rows[rows.effect == "fell"]
        (fell if len(lost) else equal if (rows.effect == "equal").all() else unclear).append(method)
        if len(lost):
            worst = lost.loc[lost.kept.idxmin()]
            losses.append(
                f"{kind_of(method).label} lost {len(lost)} of {len(rows)} abilities, most of {worst.benchmark}, of "
                f"which it kept {shown(worst.kept, worst.kept_low, worst.kept_high)}"
            )
    claim = f"Sequential edits damage general abilities ({effects.edits.max()} edits)"
    if fell and equal:
        claim += ", by some methods and not by others"
    because = (
        f"Something fell (Holm-corrected over benchmarks) under {_labels(fell)}; everything stayed within "
        f"{MARGIN:.2f} under {_labels(equal)}; neither can be said of {_labels(unclear)}."
    )
    if losses:
        because += f" {'; '.join(losses)}."
    return Verdict(claim, "supported" if fell else "not supported" if equal else "inconclusive", because)


def _direction(claim: str, estimates: Sequence[Estimate], because: str) -> Verdict:
    """Supported if some estimate is above 0 and none below (Holm over them), not supported if one is below."""
    moved = [e.value for e, p in zip(estimates, holm([e.p for e in estimates]), strict=True) if p < LEVEL]
    word = "not supported" if any(value < 0 for value in moved) else "supported" if moved else "inconclusive"
    return Verdict(claim, word, because)


def instruction_tuning(abilities: Sequence[Ability], base: str, tuned: str) -> Verdict:
    """RQ2: do instruction-tuned models lose their abilities more slowly?

    From the difference in the share kept, mean over checkpoints, all benchmarks pooled, per method; Holm over methods.
    """
    claim = f"The instruction-tuned model declines more slowly ({tuned} against {base})"
    table = inference.contrast(abilities, base, tuned)
    if not len(table):
        return Verdict(claim, "inconclusive", "No benchmark is off the floor for both models.")
    pooled = table[table.benchmark == "all"]
    methods = "; ".join(
        f"{kind_of(row.method).label}: kept {row.one} against {row.other}, difference {row.difference}"
        for row in pooled.itertuples()
    )
    because = f"Mean share kept over checkpoints and benchmarks, base against tuned: {methods}."
    return _direction(claim, pooled.difference, because)


def model_scale(abilities: Sequence[Ability], size: Mapping[str, float]) -> Verdict:
    """RQ3: are larger models more robust?

    From the slope of the share kept, mean over checkpoints, against log10 of the size; Holm over methods.
    """
    claim = "Larger models keep more"
    table = inference.trend(abilities, size)
    table = table[table.slope.notna()]
    if not len(table):
        return Verdict(claim, "inconclusive", "No benchmark is off the floor at every size: nothing can be compared.")
    slopes = "; ".join(
        f"{kind_of(row.method).label}: {row.slope} of the ability per tenfold size, over {len(row.benchmarks)} "
        "benchmarks"
        for row in table.itertuples()
    )
    return _direction(claim, table.slope, f"Slope of the share kept: {slopes}.")


def ability_aspects(abilities: Sequence[Ability]) -> Verdict:
    """RQ4: does editing affect different abilities to about the same extent?

    Over the methods under which something fell; pairs of aspects by TOST with ``MARGIN`` and by difference (Holm).
    """
    claim = "Editing affects different abilities to about the same extent"
    effects = inference.effects(abilities)
    fell = set(effects[effects.effect == "fell"].method)
    harmful = [method for method in effects.method.unique() if method in fell]
    groups = by_aspect([ability for ability in abilities if ability.method in harmful])
    if len(groups) < 2:
        return Verdict(claim, "inconclusive", "Under no method did an ability fall: there is no extent to compare.")
    aspects = {aspect: inference.kept(group) for aspect, group in groups.items()}
    pairs = {(a, b): aspects[a] - aspects[b] for a, b in combinations(aspects, 2)}
    corrected = holm([pair.p for pair in pairs.values()])
    apart = [names for names, p in zip(pairs, corrected, strict=True) if p < LEVEL]
    equal = [names for names, pair in pairs.items() if pair.within(MARGIN)]
    because = (
        f"Share kept, mean over {_labels(harmful)}: "
        + "; ".join(f"{aspect} {estimate}" for aspect, estimate in aspects.items())
        + f". Of {len(pairs)} pairs {len(apart)} differ (Holm) and {len(equal)} are equal within {MARGIN:.2f}."
    )
    if apart:
        first, second = max(apart, key=lambda names: abs(pairs[names].value))
        because += f" Furthest apart: {first} and {second}, by {pairs[first, second]}."
    word = "not supported" if apart else "supported" if len(equal) == len(pairs) else "inconclusive"
    return Verdict(claim, word, because)


def safety(abilities: Sequence[Ability]) -> Verdict:
    """RQ5: do dozens of edits compromise safety? From whatever safety benchmarks were asked."""
    claim = "Dozens of edits compromise safety"
    effects = inference.effects(abilities)
    off = effects[effects.effect != "floor"]
    floors = [name for name in effects.benchmark.unique() if name not in set(off.benchmark)]
    because = f"At the floor already when unedited: {_listed(floors)}."
    if not len(off):
        return Verdict(claim, "inconclusive", because)
    fell, equal = off[off.effect == "fell"], off[off.effect == "equal"]
    losses = "; ".join(
        f"{kind_of(row.method).label} on {row.benchmark} {row.base:.2f} to {row.score:.2f} (Holm p "
        f"{'below 0.001' if row.p_holm < 0.001 else f'{row.p_holm:.3f}'})"
        for row in fell.itertuples()
    )
    because = (
        f"After {off.edits.max()} edits {len(fell)} of {len(off)} scores off the floor fell, {len(equal)} are "
        f"equal within {MARGIN:.2f}, {len(off) - len(fell) - len(equal)} are neither. "
        + (f"Fell: {losses}. " if losses else "")
        + because
    )
    word = "supported" if len(fell) else "not supported" if len(equal) == len(off) else "inconclusive"
    return Verdict(claim, word, because)


def structure_damage(predictors: pd.DataFrame) -> Verdict:
    """Discussion, from ``damage.predictors``: which indicators go with the loss of ability, and which comes first?"""
    claim = "Damage inside goes with the loss of ability"
    rising = predictors[predictors.rho_high < 0]
    if not len(rising):
        return Verdict(claim, "inconclusive", "No measure's rank correlation with the ability kept excludes 0.")
    listed = ", ".join(f"{r.measure} ({shown(r.rho, r.rho_low, r.rho_high)})" for r in rising.itertuples())
    first = rising.sort_values(["before", "rho"], ascending=[False, True], kind="stable").iloc[0]
    when = (
        f"earliest is {first.measure}, before {first.before} of {first.collapsed} collapses"
        if first.before
        else f"none gives the alarm at a checkpoint before any of the {first.collapsed} collapses"
    )
    because = (
        f"{len(rising)} of {len(predictors)} measures rise as the ability falls (rank correlation): {listed}; {when}."
    )
    return Verdict(claim, "supported", because)
