"""What the committed results say, in lines that can be checked: for the README, CLAIMS.md and the report.

Nothing here is written by hand: every word of a verdict and every number comes from figures/<question>/<run>/.
"""

import json
from functools import cache

import pandas as pd

import kedit
from kedit.analysis import damage, inference, scores, verdicts
from kedit.analysis.inference import FEW
from kedit.analysis.questions import QUESTIONS
from kedit.analysis.scores import LINE, shown
from kedit.analysis.verdicts import NAMES, Verdict
from kedit.study.notebook import folder_of
from kedit.study.params import Params
from kedit.study.results import Results

WHAT = {
    "rq1": "mean share of abilities kept",
    "rq2": "share kept, tuned less base",
    "rq3": "change of the share kept per tenfold size",
    "rq4": "share kept, mean over methods",
    "rq5": "kept (1: all of it), or change (0: none)",
    "discussion": "rank correlation with ability kept, within methods",
}
"""What the numbers beside a question's verdicts are, of the questions that have verdicts."""
Found = list[tuple[Verdict, pd.DataFrame]]
"""Verdicts, each with its lines: ``label``, ``scale`` as printed, ``value``, and ``text`` with the interval."""


def _lines(rows: pd.DataFrame, label: str, column: str) -> pd.DataFrame:
    """Rows of ``inference`` as lines."""
    text = [str(each) for each in rows[column]]
    values = [each.value for each in rows[column]]
    return pd.DataFrame({"label": rows[label], "scale": rows.scale.map(NAMES.get), "value": values, "text": text})


def _structure(results: Results) -> Found:
    rows = damage.predictors(damage.checkpoints(results))
    text = [shown(row.within, row.within_low, row.within_high) for row in rows.itertuples()]
    lines = pd.DataFrame({"label": rows.measure, "scale": "", "value": rows.within, "text": text})
    return [(verdicts.structure_damage(rows), lines)]


def found(results: Results) -> Found:
    """Every verdict of a run's question, with the numbers that it rests on."""
    rq = results.params.rq
    if rq == "discussion":
        return _structure(results)
    abilities = inference.abilities(results)
    if rq == "rq1":
        rows = inference.overall(abilities)
        return [(verdicts.number_of_edits(abilities), _lines(rows[rows.editing], "label", "kept"))]
    if rq == "rq2":
        twins = inference.pairs(results.params.models)
        rows = inference.contrast(abilities, twins)
        return [(verdicts.instruction_tuning(abilities, twins), _lines(rows, "label", "difference"))]
    if rq == "rq3":
        size = inference.sizes(results)
        return [(verdicts.model_scale(abilities, size), _lines(inference.trend(abilities, size), "label", "slope"))]
    if rq == "rq4":
        rows, _ = inference.aspects(verdicts.harmed(abilities))
        return [(verdicts.ability_aspects(abilities), _lines(rows, "aspect", "kept"))]
    groups = [inference.effects(group) for group in verdicts.of_safety(abilities).values()]
    lines = [_lines(rows[~rows.state.isin(["floor", "apart"])], "label", "kept") for rows in groups]
    return list(zip(verdicts.safety(abilities), lines, strict=True))


def runs(rq: str) -> list[Params]:
    """The runs of a question under figures/, the deciding one first: of the most orders, then of the most edits."""
    names = {path.parent.name for path in (kedit.ROOT / "figures" / rq).glob("*/cells.jsonl.gz")} - {"smoke"}
    found = [Params.find(rq, name) for name in sorted(names)]
    return sorted(found, key=lambda params: (-len(params.orders), -params.edits[-1]))


@cache
def committed() -> dict[tuple[str, str], tuple[Results, Found]]:
    """(question, run) -> the results under figures/ and what they say; of a question's runs, the deciding one first."""
    every = {}
    for rq in WHAT:
        for params in runs(rq):
            results = Results.load(params, folder_of(params, "committed"))
            every[rq, params.name] = results, found(results)
    return every


def title(rq: str) -> str:
    """The question, as its notebook is headed."""
    notebook = json.loads((kedit.ROOT / "notebooks" / f"{QUESTIONS[rq].notebook}.ipynb").read_text())
    return notebook["cells"][0]["source"][0].lstrip("# ").strip()


def _command(results: Results) -> str:
    """How to make a run again."""
    rq, name = results.params.rq, results.params.name
    return f"`make {rq}`" if name == QUESTIONS[rq].default else f"`make {rq} PARAMS={name}`"


def _minutes(results: Results) -> str:
    """Of two cores, for all that the run asks, with nothing stored yet."""
    return f"{results.manifest['work_seconds'] / 120:.0f}"


def _range(lines: pd.DataFrame) -> str:
    """The least and the largest number on each scale."""
    parts = []
    for scale, some in lines.groupby("scale", sort=False):
        ends = [some.loc[some.value.idxmin()], some.loc[some.value.idxmax()]]
        parts.append(f"{scale} " + " to ".join(dict.fromkeys(f"{end.text} ({end.label})" for end in ends)))
    return "; ".join(part.strip() for part in parts)


def answers() -> pd.DataFrame:
    """A row a question: its answer, what was measured, with 95% intervals, and what it takes to check it."""
    rows = {}
    for (rq, _), (results, said) in committed().items():
        words = [verdict.word for verdict, _ in said]
        orders, hedged = len(results.params.orders), any(verdict.hedge for verdict, _ in said)
        counted = ", ".join(
            f"{word} ({words.count(word)})" if len(words) > 1 else word for word in dict.fromkeys(words)
        )
        few = f"Only {orders} order{'s' * (orders > 1)} of edits"
        reason = few if hedged else said[0][0].because.partition(". ")[0].rstrip(".")
        measured = "; ".join(filter(None, (_range(lines) for _, lines in said)))
        row = {
            "question": f"[{title(rq)}](notebooks/{QUESTIONS[rq].notebook}.ipynb)",
            "answer": f"{counted}. {reason}.",
        }
        row |= {"measured": f"{WHAT[rq]}: {measured}" if measured else "-"}
        rows.setdefault(rq, row | {"command": _command(results), "minutes": _minutes(results)})
    return pd.DataFrame(rows.values())


def claims() -> pd.DataFrame:
    """A row a verdict, and below it one for each number that it rests on: of every committed run."""
    rows = []
    for (rq, name), (results, said) in committed().items():
        about = {"command": _command(results), "minutes": _minutes(results)}
        about["file"] = f"[{rq}/{name}](figures/{rq}/{name}/table.csv)"
        for verdict, lines in said:
            rows.append({"claim": f"**{rq.upper()}: {verdict.claim}**", "measured": f"**{verdict.word}**", **about})
            for label, some in lines.groupby("label", sort=False):
                text = "; ".join(f"{row.scale} {row.text}".strip() for row in some.itertuples())
                rows.append({"claim": f"{label}: {WHAT[rq]}", "measured": text, **dict.fromkeys(about, "")})
    return pd.DataFrame(rows)


# Should I edit? -----------------------------------------------------------------------------------

SAID = {
    "yes": "**Abilities kept, within a tenth of their mean on both scales**: {}. The new object is preferred, in other "
    "wordings too. A single ability may have lost more (CLAIMS.md), and the table says how often the model says it.",
    "costs": "**At a price**, the ability named: {}. The new object is preferred, in other wordings too.",
    "open": "**Undecided**: {}. The new object is preferred, but the loss of a tenth of the abilities' mean cannot be "
    "excluded.",
    "words": "**Only for the very words of the edit**: {}. In other wordings no more than half of the way is gone.",
    "no": "**No**: {}. After the last edit too few of them are in place.",
}
"""What a method comes to -> the sentence about those that do."""


def _rq1() -> Results:
    return next(results for (rq, _), (results, _) in committed().items() if rq == "rq1")


def methods() -> pd.DataFrame:
    """A row a method of RQ1's deciding run, at its last checkpoint: what one gets, what it costs, a key of ``SAID``.

    The new object is preferred in other wordings if generalisation is at least half-way between the unedited model's
    and 1. *Said* is what free generation begins with: a model may prefer the new object to the old one and say neither.
    """
    results = _rq1()
    abilities = inference.abilities(results)
    some = inference.general(abilities)
    harm = inference.effects(some) if some else pd.DataFrame(columns=["state", "label", "aspect"])
    success = scores.curves(results).query("benchmark == 'edit' and edits == edits.max()")
    rows = []
    for line, both in inference.overall(abilities).groupby(LINE, sort=False):
        first, own = both.iloc[0], success[(success[LINE] == line).all(axis=1)].set_index("metric")
        lost = ", ".join(dict.fromkeys(harm.aspect[(harm.state == "lost") & (harm.label == first.label)]))
        general = own.loc["generalisation"]
        kind = "costs" if lost else "yes" if all(kept.equal() for kept in both.kept) else "open"
        if general.value < (1 + general.value - general.delta) / 2:
            kind = "words"
        row = {"method": first.label + f" ({lost})" * bool(lost), "kind": kind if first.editing else "no"}
        for metric, name in ASKED.items():
            row[name] = shown(*own.loc[metric, ["value", "ci_low", "ci_high"]])
        rows.append(row | {f"kept, {NAMES[each.scale]}": str(each.kept) for each in both.itertuples()})
    return pd.DataFrame(rows)


ASKED = {
    "reliability": "edit preferred",
    "reliability_generated": "edit said",
    "generalisation": "other wordings preferred",
    "generalisation_generated": "other wordings said",
    "locality": "neighbours unharmed",
    "locality_generated": "neighbours still said",
}
"""Metric of edit success -> its column."""


def decision() -> str:
    """Should I edit? In sentences, as far as RQ1's deciding run tells, and the numbers they rest on."""
    params, table = _rq1().params, methods()
    orders = len(params.orders)
    hedge = f"; {orders} order{'s' * (orders > 1)} of edits, where a verdict takes {FEW}" if orders < FEW else ""
    text = (
        f"After {params.edits[-1]} edits of {params.models[0]}, one on top of the other{hedge} (safety is RQ5's):\n\n"
    )
    for kind, sentence in SAID.items():
        if len(some := table[table.kind == kind]):
            text += f"- {sentence.format(', '.join(some.method))}\n"
    return f"{text}\n{markdown(table.drop(columns='kind'))}"


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table, without its index."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
