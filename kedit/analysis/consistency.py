"""Do the study's published tables agree with themselves? Statements about their numbers, each tested exactly.

A check gathers cells into claims and asks two things of each: how improbable are these numbers if the statement holds
(``p_if_true``), and if it does not (``p_if_false``)? Its finding is ``does not`` (agree) where the former, ``agrees``
where the latter is below 5% by Holm's method over all claims of the check, and ``cannot be told`` otherwise. The
numbers were read from images, so no finding may rest on one cell: what counts are the largest p with any one cell of
the claim left out (``worst_...``), which covers any digit of it that was misread. Cells whose reading is doubtful enter
no check and are counted apart.

What does not agree could not be reproduced from the tables alone; nothing here says why. The strongest counter-argument
ends each docstring and is the frame's ``caveat``; the first line of a docstring is what was ``tested``.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from scipy import stats

from kedit.analysis import published
from kedit.analysis.inference import LEVEL, holm

ITEMS = {"MMLU": 14042, "BBH": 6511, "GSM8K": 1319, "CommonsenseQA": 1221, "TruthfulQA": 817, "ToxiGen": 940}
"""As the study says, but for MMLU, where it says 14,079; nothing here depends on which."""
FITTED = {"GSM8K": 1319, "CommonsenseQA": 1221, "TruthfulQA": 817, "ToxiGen": 817}
"""The n of which whole columns are fractions, as ``possible_values`` finds."""
CHANCE = {"MMLU": 0.25, "CommonsenseQA": 0.2, "TruthfulQA": 0.226, "ToxiGen": 0.5}
"""Where answers are chosen; BBH and GSM8K have no such level."""
MISREAD, DISAGREEING, MARGIN = 0.05, 0.01, 0.05
"""Share of cells of which a digit may be wrong (of GSM8K's and CommonsenseQA's, which are k/n, it is about 0.03); share
of items on which two models that were edited apart differ at least, right against wrong; and points above chance: a
model with fewer has next to nothing to lose."""
TWINS = {"Llama2-7B": "Llama2-7B-chat", "Mistral-7B": "Mistral-7B-Instruct"}
LINE = ["table", "model", "method"]
FINDINGS = np.array(["agrees", "does not", "cannot be told"])

SURE = "^$|as published"
"""Notes of cells that are not in doubt: what is odd "as published" was read without doubt."""
P = ["p_if_false", "p_if_true", "worst_if_false", "worst_if_true"]
"""With every cell, and the largest with any one left out; all by Holm's method."""
COLUMNS = ["table", "models", "methods", "edits", "benchmark", "cells", "arithmetic", *P]


def _check(claims: Callable[[pd.DataFrame], Iterator[tuple]]) -> Callable[..., pd.DataFrame]:
    """Make of claims about tables (by default the study's) a tidy frame of findings, one row a claim.

    Args:
        claims: takes cells with the unedited model's score as ``base``; gives what each claim is about (the first five
            columns), its cells, and a rule: cells -> (p if the statement is false, p if it is true, the arithmetic).
    """

    @functools.wraps(claims)
    def findings(rows: pd.DataFrame | None = None) -> pd.DataFrame:
        rows, made = published._every() if rows is None else rows, []
        rows = rows[rows.note.str.contains(SURE)]
        unedited = rows[rows.method == "none"].drop_duplicates(["model", "benchmark"]).rename(columns={"score": "base"})
        for labels, cells, rule in claims(rows.merge(unedited[["model", "benchmark", "base"]])):
            every = [rule(cells), *(rule(cells[:i] + cells[i + 1 :]) for i in map(cells.index, {*cells}))]
            made.append((*labels, len(cells), every[0][2], *every[0][:2], *np.max([p[:2] for p in every], axis=0)))
        frame = pd.DataFrame(made, columns=COLUMNS)
        frame[P] = np.transpose([holm(frame[key].astype(float)) for key in P])
        alone, found = (np.select([frame[P[i + 1]] < LEVEL, frame[P[i]] < LEVEL], [1, 0], 2) for i in (0, 2))
        robust = np.where(alone == found, "whichever one cell is misread", "if none is misread, " + FINDINGS[alone])
        frame = frame.assign(check=claims.__name__, finding=FINDINGS[found], robust=robust)
        tested, caveat = claims.__doc__.partition("\n")[0], claims.__doc__.rpartition("Against it: ")[2]
        return frame.assign(tested=tested, caveat=" ".join(caveat.split()))

    return findings


def _tail(chances: list[float], count: int) -> float:
    """P(``count`` or more of independent events with these probabilities), exactly."""
    return min(1.0, float(functools.reduce(np.convolve, ([1 - p, p] for p in chances), np.ones(1))[count:].sum()))


# Values that n items allow ---------------------------------------------------------------------------


def fits(score: float, n: int) -> bool:
    """Whether some k/n rounds to the score's four digits (a half either way), in whole numbers."""
    return 2 * abs(10_000 * round(score * n) - round(score * 10_000) * n) <= n


def _fitting(cells: list[tuple[float, int]]) -> tuple[float, float, str]:
    """Cells are (score, n)."""
    odd = [f"{score:.4f}" for score, n in cells if not fits(score, n)]
    by_chance, fitting = [min((n + 1) / 10_001, 1.0) for _, n in cells], len(cells) - len(odd)
    counts = ", ".join(f"{sum(fits(score, n) for score, _ in cells)} of {n}" for n in sorted({*ITEMS.values()}))
    text = f"{fitting} of {len(cells)} values are k/n ({sum(by_chance):.1f} by chance), not {' '.join(odd) or 'none'}"
    return _tail(by_chance, fitting), _tail([MISREAD] * len(cells), len(odd)), f"{text}; as fractions {counts}"


def _values(cells: pd.DataFrame, n: int) -> list[tuple[float, int]]:
    return [(score, n) for score in sorted(set(cells.score[cells.score > 0]))]


@_check
def possible_values(rows: pd.DataFrame) -> Iterator[tuple]:
    """The scores of a benchmark are fractions k/n of its n items.

    A claim is a table and benchmark, its cells the different values other than 0. Above n = 10,000 every four digits
    are some k/n. The arithmetic counts those that are fractions of other benchmarks' n, too.

    Against it: a mean over subjects or tasks (MMLU, BBH), a score without the answers that could not be read, or one
    rounded twice or cut off is no k/n of all items, though nothing is wrong with it; that another n fits better says
    how many items were asked, or which benchmark's column it is, not that models were scored wrongly.
    """
    for (table, name), cells in rows[rows.score > 0].groupby(["table", "benchmark"]):
        yield (table, "all", "all", "all", name), _values(cells, ITEMS[name]), _fitting


@_check
def values_of_a_line(rows: pd.DataFrame) -> Iterator[tuple]:
    """The scores of a method on a model are fractions k/n where those of their whole columns are.

    The n are ``FITTED``: of MMLU and BBH nothing can be told.

    Against it: one run may have been scored on fewer items (answers lost, a run cut short) or be a mean over several
    runs, and give such values honestly; a line that was read badly as a whole looks the same.
    """
    for (table, model, method), line in rows[(rows.score > 0) & rows.benchmark.isin(FITTED)].groupby(LINE):
        cells = [cell for name, some in line.groupby("benchmark") for cell in _values(some, FITTED[name])]
        yield (table, model, method, "all", " / ".join(line.benchmark.unique())), cells, _fitting


# Lines that agree ------------------------------------------------------------------------------------


def _near(n: int, apart: float, within: float) -> float:
    """P(two scores on n items differ by ``within`` at most), where ``apart`` n answers differ, each way as likely."""
    half, side = int(n * within + 1e-6) // 2, -(-round(max(apart, DISAGREEING) * n) // 2)
    return float(np.diff(stats.binom.cdf([side - half - 1, side + half], 2 * side, 0.5))[0])


def _agreeing(cells: list[tuple[bool, float]]) -> tuple[float, float, str]:
    """Cells are (whether two scores agree, how probable that is of two models)."""
    equal, chances = sum(cell[0] for cell in cells), [cell[1] for cell in cells]
    text = f"{equal} of {len(cells)} pairs of scores agree ({sum(chances):.1f} expected of two models)"
    return _tail([MISREAD] * len(cells), len(cells) - equal), _tail(chances, equal), text


def _pairs(rows: pd.DataFrame, which: Callable[[tuple, tuple], bool], within: float) -> Iterator[tuple]:
    """What pairs of lines (table, model, method) have in common, cells that say nothing left out."""
    models = rows.groupby(["table", "benchmark", "score"]).model.transform("nunique")
    rows = rows.assign(mute=(rows.score == 0) | (models > 2))[rows.method != "none"].set_index(["edits", "benchmark"])
    lines = {line: some[["score", "base", "mute"]].T.to_dict("list") for line, some in rows.groupby(LINE)}
    for one, other in ((one, other) for one in lines for other in lines if which(one, other)):
        both = [(key, *cell, *lines[other][key]) for key, cell in lines[one].items() if key in lines[other]]
        both = [(key, x, y, a, b) for key, x, a, dull, y, b, mute in both if not (dull and mute) and (x, y) != (a, b)]
        cells = [(abs(x - y) <= within + 1e-9, _near(ITEMS[key[1]], abs(a - b), within)) for key, x, y, a, b in both]
        about = (*zip(one, other, strict=True), *zip(*(key for key, *_ in both), strict=True))
        if cells:
            yield tuple(" / ".join(dict.fromkeys(map(str, each))) for each in about), cells, _agreeing


@_check
def repeated_lines(rows: pd.DataFrame) -> Iterator[tuple]:
    """Two lines of a table are the scores of two edited models, not those of one.

    Scores agree within 0.0002: below 5,000 items the same number of right answers. Left out are cells in which both
    scores are those of the unedited models, are 0, or are found with three models of the table (which is what models
    score that always answer the same). Two models are granted to give all but 1% of the items the same answer, right or
    wrong, or all but as many as their unedited scores differ by; the others fall each way alike. p if false: one line
    printed twice, with a digit misread in 5% of the cells.

    Against it: the cells of a line are not independent, since fewer edits are the first of more, so these p are too
    small; two methods of one family that hardly change a model may agree on more than 99% of the items.
    """
    return _pairs(rows, lambda one, other: one < other and one[0] == other[0], 0.0002)


@_check
def twins_alike(rows: pd.DataFrame) -> Iterator[tuple]:
    """The scores of a base and of a tuned model under one method are those of two models.

    The study compares them in its finding 4.2. As ``repeated_lines``, but scores agree to the third digit (0.001), and
    the two are granted to score the same on average once they are edited, which their unedited scores need not.

    Against it: what instruction tuning adds may be just what an edit takes away; the tables do not say on how many
    items the two models' answers differ, and the closer the unedited scores, the less this check can tell.
    """
    return _pairs(rows, lambda a, b: TWINS.get(a[1]) == b[1] and a[2] == b[2] and (a[0] == 5) == (b[0] == 5), 0.001)


# Chance and noise ------------------------------------------------------------------------------------


def _off_chance(cells: list[tuple[str, float]]) -> tuple[float, float, str]:
    """Cells are (benchmark, score)."""
    tests = [(round(score * ITEMS[name]), ITEMS[name], CHANCE[name]) for name, score in cells]
    p = [(stats.binom.sf(k - 1, n, chance + MARGIN), stats.binom.cdf(k, n, chance + MARGIN)) for k, n, chance in tests]
    texts = [f"{k}/{n}, chance {chance}: p {stats.binom.sf(k - 1, n, chance):.2g}" for k, n, chance in tests]
    return *np.min([(1.0, 1.0), *np.multiply(len(p), p)], axis=0), "; ".join(texts)


@_check
def above_chance(rows: pd.DataFrame) -> Iterator[tuple]:
    """The unedited model has something to lose: it scores 0.05 or more above chance.

    Exact binomial tests against chance + 0.05, the smallest p of a model's benchmarks times their number; the
    arithmetic has p against chance itself. Benchmarks without a chance level are not tested.

    Against it: 0.05 is our choice, and a large sample can be surely above chance by less; a score at chance that was
    generated still shows that the model writes an answer in the right form, which editing can destroy.
    """
    for (table, model), line in rows[(rows.method == "none") & rows.benchmark.isin(CHANCE)].groupby(LINE[:2]):
        cells = list(zip(line.benchmark, line.score, strict=True))
        yield (table, model, "none", 0, " / ".join(line.benchmark)), cells, _off_chance


def _difference(score: float, base: float, n: int) -> float:
    """p of the exact test, both sides, of two shares of n items each."""
    few, many = sorted((round(score * n), round(base * n)))
    return min(1.0, 2 * float(stats.hypergeom.cdf(few, 2 * n, few + many, n)))


def _changes(p: list[float]) -> tuple[float, float, str]:
    """Cells are p of changes; the arithmetic has the z to which the smallest corresponds."""
    beyond, plain, z = sum(holm(p) < LEVEL), sum(each < LEVEL for each in p), stats.norm.isf(min(p, default=1.0) / 2)
    text = f"{beyond} of {len(p)} beyond noise (Holm), {plain} uncorrected; largest |z| {z:.2f}"
    return min([1.0, *(len(p) * each for each in p)]), float(not p or plain > 0), text


@_check
def edits_change(rows: pd.DataFrame) -> Iterator[tuple]:
    """Scores after so many edits differ from those of the unedited model by more than sampling noise.

    A claim is a method on a model and a band of numbers of edits. p if false: of exact two-sample tests of its cells
    the smallest, times their number. ``p_if_true`` is a rule, not a probability: 0 (``does not``) where no cell
    differs by more than noise even before any correction, else 1.

    Against it: both models answered the same items, and a paired test, which needs their answers, finds smaller
    changes, so "inside noise" is not "no change". Items are the only noise counted: with one run and one order of
    edits, a change beyond it is one of these edits, not yet of the method.
    """
    bands = pd.cut(rows.edits, [0, 5, 20, 1000], labels=["1 to 5", "10 to 20", "30 to 1000"])
    for (*line, band), some in rows.groupby([*LINE, bands], observed=True):
        cells = [_difference(*cell) for cell in zip(some.score, some.base, some.benchmark.map(ITEMS), strict=True)]
        yield (*line, band, " / ".join(some.benchmark.unique())), cells, _changes


# All of it -------------------------------------------------------------------------------------------

CHECKS = (possible_values, values_of_a_line, repeated_lines, twins_alike, above_chance, edits_change)


def consistency(rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """All checks one below the other, and as ``doubtful_cells`` those that were left out, one a row."""
    rows = published._every() if rows is None else rows
    left = rows[~rows.note.str.contains(SURE)].assign(check="doubtful_cells", cells=1, finding=FINDINGS[2])
    left = left.rename(columns={"model": "models", "method": "methods", "note": "arithmetic"}).drop(columns="score")
    return pd.concat([*(check(rows) for check in CHECKS), left], ignore_index=True).astype({"table": str})


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """By check and table: ``All`` cells (of lines that are compared: pairs), and those in claims of each finding."""
    return pd.crosstab([found.check, found.table], found.finding, found.cells, aggfunc="sum", margins=True).fillna(0)
