"""The answer to each question in a sentence, computed from the statistics.

Every function takes what ``inference`` found and returns a ``Verdict``: one of *supported*, *not
supported*, *inconclusive* about what the study said, and the sentence with the numbers it rests on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from statsmodels.stats.multitest import multipletests

from kedit.analysis import inference
from kedit.analysis.inference import LEVEL, MARGIN, Ability, by_aspect
from kedit.analysis.plots import label_of


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


def number_of_edits(found: Sequence[Ability]) -> Verdict:
    """RQ1: do sequential edits damage general abilities?

    Supported if at the last checkpoint every method has an ability that fell; not supported if none
    has one and at least one method kept all its abilities equal; anything between is said method by method.
    """
    effects = inference.effects(found)
    edits = int(effects.edits.max())
    fell, equal, unclear, told = [], [], [], []
    for method, rows in effects[effects.effect != "floor"].groupby("method", sort=False):
        lost = rows[rows.effect == "fell"]
        (fell if len(lost) else equal if (rows.effect == "equal").all() else unclear).append(label_of(method))
        if len(lost):
            worst = lost.loc[lost.kept.idxmin()]
            told.append(
                f"{label_of(method)} lost {len(lost)} of {len(rows)} abilities, most of {worst.benchmark}, of which it "
                f"kept {worst.kept:.2f} [{worst.kept_low:.2f}, {worst.kept_high:.2f}]"
            )
    claim = f"Sequential edits damage general abilities ({edits} edits)"
    because = (
        f"Something fell (Holm-corrected over benchmarks) under {_listed(fell)}; everything stayed within "
        f"{MARGIN:.2f} under {_listed(equal)}; neither can be said of {_listed(unclear)}."
    )
    if told:
        because += " " + "; ".join(told) + "."
    if not fell and not equal:
        return Verdict(claim, "inconclusive", because)
    if fell and not equal:
        return Verdict(claim, "supported", because)
    word = "not supported" if not fell else "supported"
    return Verdict(claim + (", by some methods and not by others" if fell else ""), word, because)


def instruction_tuning(found: Sequence[Ability], base: str, tuned: str) -> Verdict:
    """RQ2: do instruction-tuned models lose their abilities more slowly?

    From the difference in the share kept, mean over checkpoints, all benchmarks pooled, per method; Holm over methods.
    """
    claim = f"The instruction-tuned model declines more slowly ({tuned} against {base})"
    table = inference.contrast(found, base, tuned)
    if not len(table):
        return Verdict(claim, "inconclusive", "No benchmark is off the floor for both models.")
    pooled = table[table.benchmark == "all"].copy()
    pooled["holm"] = multipletests(pooled.p, LEVEL, method="holm")[1]
    better = pooled[(pooled.holm < LEVEL) & pooled.difference.map(lambda d: d.value > 0)]
    worse = pooled[(pooled.holm < LEVEL) & pooled.difference.map(lambda d: d.value < 0)]
    told = "; ".join(
        f"{label_of(row.method)}: kept {row.one} against {row.other}, difference {row.difference}"
        for row in pooled.itertuples()
    )
    because = f"Mean share kept over checkpoints and benchmarks, base against tuned: {told}."
    return Verdict(claim, _word(len(better), len(worse)), because)


def _word(for_it: int, against: int) -> str:
    """Some significant effects for a claim and none against it, the other way round, or neither."""
    if for_it and not against:
        return "supported"
    return "not supported" if against else "inconclusive"


def model_scale(found: Sequence[Ability], size: Callable[[str], float]) -> Verdict:
    """RQ3: are larger models more robust?

    From the slope of the share kept, mean over checkpoints, against log10 of the size; Holm over methods.
    """
    claim = "Larger models keep more"
    table = inference.trend(found, size)
    table = table[table.slope.notna()].copy()
    if not len(table):
        return Verdict(claim, "inconclusive", "No benchmark is off the floor at every size: nothing can be compared.")
    table["holm"] = multipletests(table.p, LEVEL, method="holm")[1]
    rising = table[(table.holm < LEVEL) & table.slope.map(lambda s: s.value > 0)]
    falling = table[(table.holm < LEVEL) & table.slope.map(lambda s: s.value < 0)]
    told = "; ".join(
        f"{label_of(row.method)}: {row.slope} of the ability per tenfold size, over {len(row.benchmarks)} benchmarks"
        for row in table.itertuples()
    )
    return Verdict(claim, _word(len(rising), len(falling)), f"Slope of the share kept: {told}.")


def ability_aspects(found: Sequence[Ability]) -> Verdict:
    """RQ4: does editing affect different abilities to about the same extent?

    Over the methods under which something fell; pairs of aspects by TOST with ``MARGIN`` and by difference (Holm).
    """
    claim = "Editing affects different abilities to about the same extent"
    effects = inference.effects(found)
    harmful = set(effects[effects.effect == "fell"].method)
    aspects = by_aspect([ability for ability in found if ability.method in harmful])
    if len(aspects) < 2:
        return Verdict(claim, "inconclusive", "Under no method did an ability fall: there is no extent to compare.")
    pairs = {(a, b): aspects[a] - aspects[b] for a, b in combinations(aspects, 2)}
    holm = multipletests([pair.p for pair in pairs.values()], LEVEL, method="holm")[1]
    apart = [names for names, p in zip(pairs, holm, strict=True) if p < LEVEL]
    equal = [names for names, pair in pairs.items() if pair.within(MARGIN)]
    because = (
        f"Share kept, mean over {_listed([label_of(m) for m in dict.fromkeys(effects.method) if m in harmful])}: "
        + "; ".join(f"{aspect} {estimate}" for aspect, estimate in aspects.items())
        + f". Of {len(pairs)} pairs {len(apart)} differ (Holm) and {len(equal)} are equal within {MARGIN:.2f}."
    )
    if apart:
        first, second = max(apart, key=lambda names: abs(pairs[names].value))
        because += f" Furthest apart: {first} and {second}, by {pairs[first, second]}."
    word = "not supported" if apart else "supported" if len(equal) == len(pairs) else "inconclusive"
    return Verdict(claim, word, because)


def safety(found: Sequence[Ability]) -> Verdict:
    """RQ5: do dozens of edits compromise safety? From whatever safety benchmarks were asked."""
    claim = "Dozens of edits compromise safety"
    effects = inference.effects(found)
    off = effects[effects.effect != "floor"]
    floors = [name for name in dict.fromkeys(effects.benchmark) if name not in set(off.benchmark)]
    because = f"At the floor already when unedited: {_listed(floors)}."
    if not len(off):
        return Verdict(claim, "inconclusive", because)
    fell, equal = off[off.effect == "fell"], off[off.effect == "equal"]
    told = "; ".join(
        f"{label_of(row.method)} on {row.benchmark} {row.base:.2f} to {row.score:.2f} (Holm p {_p(row.p_holm)})"
        for row in fell.itertuples()
    )
    because = (
        f"After {int(off.edits.max())} edits {len(fell)} of {len(off)} scores off the floor fell, {len(equal)} are "
        f"equal within {MARGIN:.2f}, {len(off) - len(fell) - len(equal)} are neither. "
        + (f"Fell: {told}. " if told else "")
        + because
    )
    word = "supported" if len(fell) else "not supported" if len(equal) == len(off) else "inconclusive"
    return Verdict(claim, word, because)


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}" if math.isfinite(value) else "-"
