"""Can a grid decide anything? The minimal detectable effect, from what the committed runs scatter by."""

from collections.abc import Iterator
from contextlib import suppress

import kedit
from kedit import KeditError
from kedit.analysis.inference import ALL, MARGIN, abilities, components, detectable
from kedit.study.params import Params
from kedit.study.results import Results

POWER = 0.8


def _alike(params: Params) -> Iterator[Results]:
    """Committed runs of the same edit set, two orders or more, and some of the same benchmarks."""
    for cells in sorted((kedit.ROOT / "figures").glob("*/*/cells.jsonl.gz")):
        other = Params.find(cells.parent.parent.name, cells.parent.name)
        shared = set(other.benchmarks) & set(params.benchmarks)
        if shared and len(other.orders) > 1 and other.edit_set == params.edit_set:
            with suppress(KeditError):  # its parameter file was changed since: nothing is known of it
                yield Results.load(other, cells.parent)


def sentence(params: Params) -> str:
    """The least loss that a grid finds four times in five, as shares kept, on both scales; or why it is not known."""
    runs = [abilities(results) for results in _alike(params)]
    found = detectable(components(runs), params, POWER) if runs else None
    if found is None or not len(found):
        return "Minimal detectable effect: not known, as no committed run of these benchmarks has two orders or more."
    sizes = {
        scale: f"{rows.effect[rows.benchmark == ALL].iloc[0]:.2f} (mean over abilities; each alone "
        f"{rows.effect[rows.benchmark != ALL].min():.2f} to {rows.effect[rows.benchmark != ALL].max():.2f})"
        for scale, rows in found.groupby("scale", sort=False)
    }
    return (
        f"Minimal detectable effect at {POWER:.0%} power, in shares kept: {sizes['value']} right or wrong, "
        f"{sizes['graded']} graded; {MARGIN:.2f} is the margin. "
        + ("One order: for these edits only." if len(params.orders) == 1 else f"{len(params.orders)} orders.")
    )
