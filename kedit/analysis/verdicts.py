"""The answer to each question in a sentence, computed from the statistics.

Every function takes what ``inference`` or ``damage`` computed and returns a ``Verdict``: one of *supported*, *not
supported*, *inconclusive* about what the study said, and the sentence with the numbers it rests on.
"""

from collections.abc import Iterable, Mapping, Sequence
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


def _word(supported: bool, not_supported: bool) -> str:
    return "supported" if supported else "not supported" if not_supported else "inconclusive"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _labels(methods: Iterable[str]) -> str:
    return _listed(kind_of(method).label for method in methods)


def _each(rows: pd.DataFrame, template: str) -> str:
    """What is said of each row: ``template`` has fields of the row ``r``, and the ``label`` of its method."""
    return "; ".join(template.format(r=row, label=kind_of(row.method).label) for row in rows.itertuples())


def number_of_edits(abilities: Sequence[Ability]) -> Verdict:
    """RQ1: do sequential edits damage general abilities?

    Supported if at the last checkpoint an ability fell under some method, and the claim then says whether others
    kept everything; not supported if nothing fell and some method kept all its abilities equal; else inconclusive.
    """
    effects = inference.effects(abilities)
    groups = dict(iter(effects[effects.effect != "floor"].groupby("method", sort=False)))
    lost = {method: rows[rows.effect == "fell"] for method, rows in groups.items()}
    fell = [method for method in groups if len(lost[method])]
    equal = [method for method, rows in groups.items() if (rows.effect == "equal").all()]
    unclear = [method for method in groups if method not in [*fell, *equal]]
    losses = []
    for method in fell:
        worst = min(lost[method].itertuples(), key=lambda row: row.kept.value)
        losses.append(
            f"{kind_of(method).label} lost {len(lost[method])} of {len(groups[method])} abilities, "
            f"most of {worst.benchmark}, of which it kept {worst.kept}"
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
    return Verdict(claim, _word(bool(fell), bool(equal)), because)


def _direction(claim: str, estimates: Sequence[Estimate], because: str) -> Verdict:
    """Supported if some estimate is above 0 and none below (Holm over them), not supported if one is below."""
    moved = [e.value for e, p in zip(estimates, holm([e.p for e in estimates]), strict=True) if p < LEVEL]
    down = any(value < 0 for value in moved)
    return Verdict(claim, _word(bool(moved) and not down, down), because)


def instruction_tuning(abilities: Sequence[Ability], base: str, tuned: str) -> Verdict:
    """RQ2: do instruction-tuned models lose their abilities more slowly?

    From the difference in the share kept, mean over checkpoints, all benchmarks pooled, per method; Holm over methods.
    """
    claim = f"The instruction-tuned model declines more slowly ({tuned} against {base})"
    table = inference.contrast(abilities, base, tuned)
    if not len(table):
        return Verdict(claim, "inconclusive", "No benchmark is off the floor for both models.")
    pooled = table[table.benchmark == "all"]
    kept = _each(pooled, "{label}: kept {r.one} against {r.other}, difference {r.difference}")
    because = f"Mean share kept over checkpoints and benchmarks, base against tuned: {kept}."
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
    slopes = _each(table, "{label}: {r.slope} of the ability per tenfold size, over {r.benchmarks} benchmarks")
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
    return Verdict(claim, _word(not apart and len(equal) == len(pairs), bool(apart)), because)


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
    if len(fell):
        p = fell.p_holm.map(lambda p: "below 0.001" if p < 0.001 else f"{p:.3f}")
        losses = _each(fell.assign(p=p), "{label} on {r.benchmark} {r.base:.2f} to {r.score:.2f} (Holm p {r.p})")
        because = f"Fell: {losses}. {because}"
    because = (
        f"After {off.edits.max()} edits {len(fell)} of {len(off)} scores off the floor fell, {len(equal)} are "
        f"equal within {MARGIN:.2f}, {len(off) - len(fell) - len(equal)} are neither. {because}"
    )
    return Verdict(claim, _word(len(fell) > 0, len(equal) == len(off)), because)


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
