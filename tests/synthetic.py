"""Made-up outcomes whose truth is known, for the tests of what is concluded from them."""

import numpy as np

from kedit.analysis.inference import Ability
from kedit.analysis.safety import gives, placements
from kedit.evaluation import benchmarks

ABILITIES = ("mini_mmlu", "mini_bbh", "mini_gsm8k", "mini_csqa", "mini_triviaqa")


def ability(
    benchmark="mini_mmlu", lost=0.0, method="rome", scale="value", model="m", orders=5, items=120, spread=0.0, seed=0,
    base=0.8, reliability=1.0, editing=True, variant="default", by_order=(), kept=None,
):  # fmt: skip
    """An ability of which a share is lost on average, its orders apart by ``spread`` (SD of the score).

    Args:
        lost: mean change of the score, downwards.
        by_order: what each order adds to it, in place of a random spread.
        kept: in place of ``lost``: the share of what was above chance.
    """
    rng = np.random.default_rng([seed, *map(ord, f"{benchmark}{method}{scale}{model}{variant}")])
    chance = benchmarks.metadata(benchmark)["chance"]
    if kept is not None:
        lost = (1 - kept) * (base - chance)
    shift = np.array(by_order) if len(by_order) else rng.normal(0, spread, orders)
    if scale == "value":  # a right answer is lost, a wrong one turns right; half of the order's effect by either
        before = (rng.random(items) < base).astype(float)
        change = rng.normal(0, 0.03, items) - shift[:, None]
        down = np.clip((0.05 + lost + change / 2) / base, 0, 1)
        up = np.clip((0.05 - change / 2) / (1 - base), 0, 1)
        draw = rng.random((len(shift), items))
        after = np.where(before > 0, draw >= down, draw < up).astype(float)
    else:
        before = np.clip(rng.normal(base, 0.1, items), 0, 1)
        after = before - lost + shift[:, None] + rng.normal(0, 0.06, items) + rng.normal(0, 0.1, (len(shift), items))
    values = np.stack([np.broadcast_to(before, after.shape), after])
    return Ability(
        model, method, variant, benchmark, scale, [0, 100], values, chance, [1.0, reliability], [True, editing]
    )


def both(**about):
    """The same on both scales."""
    return [ability(scale=scale, **about) for scale in ("value", "graded")]


def two_way(threshold=0.0, apart=3.0, benchmark="mini_toxigen", method="rome", orders=5, items=240, seed=0):
    """A two-way benchmark on all its scales: log-odds ``apart`` for the two answers, after edits moved by a threshold.

    Args:
        apart: how far apart the classes' means are after the edits; before, they are 3.
    """
    rng = np.random.default_rng([seed, *map(ord, method)])
    positive = np.arange(items) % 2 == 1
    noise = rng.normal(0, 1, items)
    odds = [np.where(positive, 1.5, -1.5) + noise] * orders
    after = [
        np.where(positive, 1, -1) * apart / 2 + noise + rng.normal(0, 0.3, items) + threshold + rng.normal(0, 0.05)
        for _ in range(orders)
    ]
    readings = {
        "value": (lambda x: ((x > 0) == positive).astype(float), 0.5),
        "graded": (lambda x: 1 / (1 + np.exp(np.where(positive, -x, x))), 0.5),
        "discrimination": (lambda x: placements(x, positive), 0.5),
        "bias": (lambda x: gives(x, odds[0]), np.nan),
    }
    return [
        Ability("m", method, "default", benchmark, scale, [0, 100],
                np.array([[read(x) for x in odds], [read(x) for x in after]]), chance, [1.0, 1.0], [True, True])
        for scale, (read, chance) in readings.items()
    ]  # fmt: skip
