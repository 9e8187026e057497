import math

import numpy as np
import pytest
from scipy.stats import norm

from kedit.stats import summarise


def items(values, base, ids=None):
    ids = range(len(values)) if ids is None else ids
    return [{"id": str(i), "value": v, "base": b} for i, v, b in zip(ids, values, base, strict=True)]


def test_the_value_has_wilsons_interval():
    n, k, z = 40, 30, norm.ppf(0.975)
    row = summarise(items([1.0] * k + [0.0] * (n - k), [1.0] * n))
    p = k / n
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n),
    )
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((centre - half, centre + half))


def test_the_difference_is_paired():
    """Twenty of a hundred items are lost: the interval is that of the mean loss, whatever the base score."""
    base = [1.0] * 60 + [0.0] * 40
    after = [0.0] * 20 + [1.0] * 40 + [0.0] * 40
    row = summarise(items(after, base))
    assert row["delta"] == pytest.approx(-0.2)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 100)
    assert row["delta_low"] == pytest.approx(-0.2 - half, abs=0.02)
    assert row["delta_high"] == pytest.approx(-0.2 + half, abs=0.02)


def test_clusters_widen_the_interval():
    """Five paraphrases of a request that stand or fall together are one observation, not five."""
    generator = np.random.default_rng(0)
    values = np.repeat(generator.integers(0, 2, 30).astype(float), 5)
    alone = summarise(items(values, [0.0] * 150))
    together = summarise(items(values, [0.0] * 150, ids=np.repeat(np.arange(30), 5)))
    assert together["n"] == alone["n"] == 150
    assert together["delta_high"] - together["delta_low"] > 1.8 * (alone["delta_high"] - alone["delta_low"])


@pytest.mark.parametrize(
    ("after", "base", "chance", "status"),
    [
        (80, 80, 0.25, "ok"),
        (30, 80, 0.25, "collapsed"),
        (28, 30, 0.25, "floor"),
        (5, 8, 0.25, "ok"),  # below chance by more than three errors: off the floor, and nothing to collapse
        (0, 20, 0.0, "collapsed"),
        (0, 3, 0.0, "floor"),
    ],
)
def test_status(after, base, chance, status):
    row = summarise(items([1.0] * after + [0.0] * (100 - after), [1.0] * base + [0.0] * (100 - base)), chance)
    assert row["status"] == status


def test_nothing_asked_is_not_zero():
    assert math.isnan(summarise([])["value"])


def test_retention_counts_the_edits_made_since():
    """Edit k at checkpoint n is n - k edits old; here every edit is forgotten after three more."""
    import dataclasses

    from kedit.stats import retention
    from kedit.study import Params, Results

    params = dataclasses.replace(
        Params.make(
            "rq1",
            "t",
            {"models": ["smollm2-135m-instruct"], "methods": ["rome"], "edits": [1, 5], "benchmarks": ["mini_mmlu"]},
        ),
        benchmarks=[],
    )

    def cell(method, count, forgotten):
        asked = [
            {"id": str(k), "kind": "reliability", "new": float(k > forgotten), "true": 0.5, "says": "other"}
            for k in range(1, (count or 5) + 1)
        ]
        return {"model": "smollm2-135m-instruct", "method": method, "variant": "default" if method else None,
                "order": 0, "edits": count, "benchmark": "edit", "items": asked}  # fmt: skip

    edits = [
        {
            "model": "smollm2-135m-instruct",
            "method": "rome",
            "variant": "default",
            "order": 0,
            "number": k,
            "request": str(k),
        }
        for k in range(1, 6)
    ]
    cells = [cell(None, 0, 5), cell("rome", 1, 0), cell("rome", 5, 2)]
    found = retention(Results(params, cells, edits, {})).set_index("after")
    assert found.value.to_dict() == {"0": 1.0, "1-2": 1.0, "3-9": 0.0}
    assert found.n.to_dict() == {"0": 2, "1-2": 2, "3-9": 2}
