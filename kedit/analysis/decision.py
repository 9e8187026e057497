"""Which editor should I use? A table of what each method gives and costs after so many edits, and a sentence on it."""

from typing import get_args, get_type_hints

import numpy as np
import pandas as pd

from kedit.analysis import inference, scores
from kedit.analysis.audit import less, over_orders
from kedit.analysis.inference import FEW, MARGIN, SCALES, Estimate
from kedit.analysis.scores import LEVEL, LINE, shown
from kedit.analysis.verdicts import NAMES
from kedit.editors import kind_of, make_hparams
from kedit.editors.protocol import Editor
from kedit.editors.retrieval import RetrievalEditor
from kedit.evaluation import success
from kedit.model.memory import Memory
from kedit.study.results import Results

COUNTS = (1, 10, 100, 1000)
REASONS = {
    "no": "Did not keep their edits",
    "words": "Answer in the very words of the edit only",
    "harm": "A loss of a tenth of the abilities cannot be excluded",
}
"""Why a method is not to be used."""


def ordinary(kind: type[Editor]) -> bool:
    """Whether the edits are in the weights, so that the model can be saved as any other."""
    made = get_type_hints(kind.make_memory)["return"]
    memories = [each for each in get_args(made) or (made,) if issubclass(each, Memory)]
    return all((each.routes, each.answering) == (Memory.routes, Memory.answering) for each in memories)


def beforehand(kind: type[Editor], model: str, tokens: int) -> str:
    """What a method needs before its first edit."""
    layers = len(kind.moments_at(make_hparams(kind, model)))
    needs = [f"second moments of {layers} layer{'s' * (layers > 1)} ({tokens:,} tokens read once)"] if layers else []
    needs += ["training"] if kind.trained else []
    needs += ["a sentence encoder"] if issubclass(kind, RetrievalEditor) else []
    return ", ".join(needs) or "nothing"


def decision(results: Results) -> pd.DataFrame:
    """A row a method and checkpoint (1, 10, 100, 1,000 edits as far as they were run, and the last).

    Returns:
        ``label``, ``edits``, ``orders``; ``success`` (the model writes the new object by itself), ``generalisation``,
        ``locality`` and, of the share of abilities kept, ``value`` and ``graded`` (``Estimate``s);
        ``editing``, whether it keeps its edits, and ``follows``, in other wordings; ``seconds`` and ``bytes`` an edit,
        ``needs`` beforehand, ``saved`` as an ordinary model; ``written``, success edit by edit, by order.
    """
    params, rows, took, unedited = results.params, [], {}, {}
    abilities = inference.abilities(results)
    for place, _, after, before in scores.answers(results, ["edit"]):
        for metric, items in success.outcomes(after, before).items() if place["edits"] else ():
            line = tuple(place[name] for name in [*LINE, "edits"])
            took.setdefault((*line, metric), []).append(np.array([item["value"] for item in items]))
            if metric == "generalisation":
                unedited.setdefault(line, []).extend(item["base"] for item in items)
    for at, count in [(i, n) for i, n in enumerate(params.edits) if n and (n in COUNTS or n == params.edits[-1])]:
        for line, both in inference.overall(abilities, at).groupby(LINE, sort=False):
            kind, written = kind_of(line[1]), took[*line, count, "reliability_generated"]
            row = {"label": both.label.iloc[0], "edits": count, "orders": len(params.orders), "written": written}
            row |= {name: over_orders(took[*line, count, name]) for name in ("generalisation", "locality")}
            row |= {"success": over_orders(written), "editing": both.editing.iloc[0]}
            row |= {"follows": row["generalisation"].value >= (1 + np.mean(unedited[*line, count])) / 2}
            row |= dict(zip(both.scale, both.kept, strict=True))
            row |= {"seconds": results.manifest["edits"]["median_seconds"].get(kind.name, np.nan)}
            sizes = [e.bytes / len(e.requests) for e in results.edits if (e.model, e.method, e.variant) == line]
            row |= {"bytes": np.median(sizes), "needs": beforehand(kind, line[0], params.statistics.tokens)}
            rows.append(row | {"saved": ordinary(kind)})
    return pd.DataFrame(rows)


def shown_table(rows: pd.DataFrame) -> pd.DataFrame:
    """``decision``, to be read; shares of edits are cut off at 0 and 1."""

    def share(one: Estimate) -> str:
        low, high = one.interval
        return shown(one.value, max(low, 0.0), min(high, 1.0))

    names = {"success": "edits written by the model", "generalisation": "other wordings", "locality": "neighbours kept"}
    table = pd.DataFrame(
        {"edits": rows.edits, "method": rows.label} | {n: rows[k].map(share) for k, n in names.items()}
    )
    for scale in (scale for scale in SCALES if scale in rows):
        table[f"abilities kept ({NAMES[scale]})"] = rows[scale].map(str)
    table["s an edit"] = rows.seconds.map("{:.2g}".format)
    table["kB an edit"] = (rows.bytes / 1000).map("{:,.1f}".format)
    table["needs beforehand"], table["saved as a model"] = rows.needs, rows.saved.map({True: "yes", False: "no"})
    return table.set_index(["edits", "method"])


def sentence(rows: pd.DataFrame) -> str:
    """What to use after so many edits, from the rows of ``decision`` of one checkpoint.

    To be used are methods that keep their edits, in other wordings too (half-way from the unedited model's score to 1),
    and of which a loss of ``MARGIN`` of the abilities can be excluded on every scale: the one whose edits the model
    writes most often, and those that it does not surpass beyond noise.
    """
    first, scales = rows.iloc[0], [scale for scale in SCALES if scale in rows]
    safe = [all(row[s].above(1 - MARGIN) < LEVEL for s in scales) for _, row in rows.iterrows()]
    why = np.select([~rows.editing.astype(bool), ~rows.follows.astype(bool), ~np.array(safe)], list(REASONS), "")
    sound = [row for _, row in rows[why == ""].iterrows()]
    start = f"After {first.edits} edits{'' if first.orders >= FEW else f' (orders: {first.orders}, a hint only)'}"
    best = max(sound, key=lambda row: row.success.value, default=None)
    good = [row for row in sound if row is best or less(best.written, row.written).interval[0] <= 0]
    listed = "; ".join(
        f"{row.label} ({row.success.value:.2f} of the edits written, {row.locality.value:.2f} of the neighbours kept, "
        f"{row.seconds:.2g} s an edit, {'in the weights' if row.saved else 'in a memory'})"
        for row in good
    )
    others = {"As harmless, but fewer edits take": [row.label for row in sound if not any(row is one for one in good)]}
    others |= {reason: list(rows.label[why == key]) for key, reason in REASONS.items()}
    rest = "".join(f" {reason}: {', '.join(labels)}." for reason, labels in others.items() if labels)
    return f"{start}: {f'use {listed}' if good else 'no method is shown to be sound'}.{rest}"
