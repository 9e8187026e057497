import numpy as np
import pandas as pd
import pytest

from kedit.analysis import consistency as c
from kedit.evaluation import benchmarks

NAMES = ("MMLU", "GSM8K", "BBH", "CommonsenseQA")
EDITS = (1, 5, 10, 20, 50, 100)


def tables(seed=0, n=c.ITEMS, methods=("rome", "memit", "pmet"), models=("A", "B"), fall=0.01, table=2):
    """Lines of models scored apart: k/n, falling a little with every edit."""
    random = np.random.default_rng(seed)
    rows = []
    for model in models:
        start = {name: random.uniform(0.35, 0.6) for name in NAMES}
        for method, edits in [("none", 0), *((m, e) for m in methods for e in EDITS)]:
            for name in NAMES:
                k = random.binomial(n[name], start[name] - fall * (edits > 5) * random.uniform(0.5, 1))
                rows.append((table, model, method, edits, name, round(k / n[name], 4), ""))
    return pd.DataFrame(rows, columns=["table", "model", "method", "edits", "benchmark", "score", "note"])


def of(frame, **where):
    for key, value in where.items():
        frame = frame[frame[key] == value]
    return frame


def test_what_has_no_defect_agrees():
    rows = tables()
    assert "does not" not in set(c.repeated_lines(rows).finding)
    assert set(of(c.possible_values(rows), benchmark="GSM8K").finding) == {"agrees"}
    assert "does not" not in set(c.values_of_a_line(rows).finding)
    assert set(c.above_chance(rows).finding) == {"agrees"}


def test_a_line_printed_twice_is_found_and_one_misread_digit_neither_hides_nor_makes_it():
    rows = tables()
    one, other = ((rows.model == model) & (rows.method == "memit") for model in "AB")
    rows.loc[other, "score"] = rows.score[one].to_numpy()
    rows.loc[rows.index[other][3], "score"] += 0.03
    found = c.repeated_lines(rows)
    assert of(found, finding="does not").models.tolist() == ["A / B"]
    few = tables()
    few = few[(few.method == "none") | ((few.edits == 100) & few.benchmark.isin(["MMLU", "GSM8K"]))]
    one, other = ((few.model == model) & (few.method == "memit") for model in "AB")
    few.loc[other, "score"] = few.score[one].to_numpy()
    assert "does not" not in set(c.repeated_lines(few).finding)  # two cells are too few


def test_values_that_n_items_do_not_allow():
    assert c.fits(0.0886, 1319) is False
    assert c.fits(0.0887, 1319)  # 117/1319 = 0.088704
    assert all(c.fits(round(k / 817, 4), 817) for k in range(818))
    assert sum(c.fits(u / 10_000, 817) for u in range(10_001)) == 818  # no two k share four digits
    rows = tables(n={**c.ITEMS, "GSM8K": 1000})
    assert set(of(c.possible_values(rows), benchmark="GSM8K").finding) == {"does not"}
    assert set(of(c.possible_values(rows), benchmark="MMLU").finding) == {"cannot be told"}
    rows, wrong = tables(), tables(seed=1, n={**c.ITEMS, "GSM8K": 1000, "CommonsenseQA": 1000})
    line = (rows.model == "A") & (rows.method == "pmet")
    rows.loc[line, "score"] = wrong.score[line]
    found = of(c.values_of_a_line(rows), finding="does not")
    assert found[["models", "methods"]].to_numpy().tolist() == [["A", "pmet"]]


def test_a_tuned_model_with_the_scores_of_its_base_is_found():
    base, tuned = tables(models=["Llama2-7B"]), tables(seed=1, models=["Llama2-7B-chat"], table=3)
    line = base.method == "rome"
    tuned.loc[line, "score"] = base.score[line] + 0.0002
    found = c.twins_alike(pd.concat([base, tuned], ignore_index=True)).set_index("methods").finding
    assert found.to_dict() == {"rome": "does not", "memit": "agrees", "pmet": "agrees"}


def test_baselines_at_chance_are_told_from_those_above():
    rows = tables(models=["A", "B", "C"])
    for model, above in (("A", 0.0), ("B", 0.05), ("C", 0.2)):
        for name, chance in c.CHANCE.items():
            rows.loc[(rows.model == model) & (rows.method == "none") & (rows.benchmark == name), "score"] = (
                chance + above
            )
    assert c.above_chance(rows).finding.tolist() == ["does not", "cannot be told", "agrees"]


def test_changes_inside_and_beyond_noise():
    rows = tables(methods=["rome"], models=["A"], fall=0.3)
    unedited = rows[rows.method == "none"].set_index("benchmark").score
    few = rows.edits.between(1, 5)
    rows.loc[few, "score"] = rows.benchmark[few].map(unedited) + 0.002
    found = c.edits_change(rows).set_index("edits").finding
    assert found.to_dict() == {"1 to 5": "does not", "10 to 20": "agrees", "30 to 1000": "agrees"}
    rows.loc[rows.index[few][0], "score"] = 0.9  # one cell, as a misread digit makes it
    found = c.edits_change(rows).set_index("edits").loc["1 to 5"]
    assert found.finding == "cannot be told"
    assert "if none is misread, agrees" in found.robust


def test_doubtful_cells_enter_no_check():
    rows = tables()
    rows.loc[rows.method == "pmet", "note"] = "uncertain reading"
    rows.loc[rows.method == "rome", "note"] = "0.886 as published"
    found = c.consistency(rows)
    assert not found[found.check != "doubtful_cells"].methods.str.contains("pmet").any()
    assert found.methods.str.contains("rome").any()
    assert of(found, check="doubtful_cells").cells.sum() == (rows.method == "pmet").sum()


def test_exact_numbers():
    assert c._tail([0.5, 0.5, 0.5], 2) == pytest.approx(0.5)
    assert c._near(1000, 0.0, 0.0) == pytest.approx(252 / 1024)  # ten answers differ, five each way
    assert c._difference(0.5, 0.5, 10) == 1.0
    assert c._difference(0.0, 0.5, 10) == pytest.approx(2 * 252 / 15504)  # 5 of 10 and 0 of 10: Fisher


def test_what_is_said_of_benchmarks_is_what_is_asked():
    for name in benchmarks.suites()["paper"]:
        meta = benchmarks.metadata(name)
        if (key := meta["benchmark"].removesuffix(" MC1")) in c.ITEMS:
            assert meta["reading"]["items"] == c.ITEMS[key]
            assert meta["chance"] == c.CHANCE.get(key, 0.0)


def test_the_published_tables():
    found = c.consistency()
    counts = c.summary(found)
    by_check = counts.iloc[:-1].groupby("check").sum()[["agrees", "does not", "cannot be told"]]
    assert by_check.T.to_dict("list") == {
        "above_chance": [8, 10, 12],
        "doubtful_cells": [0, 0, 24],
        "edits_change": [320, 364, 170],
        "possible_values": [226, 155, 108],
        "repeated_lines": [3290, 21, 6],
        "twins_alike": [189, 46, 2],
        "values_of_a_line": [336, 6, 41],
    }
    wrong = of(found, finding="does not")
    keys = ["table", "models", "methods"]
    assert of(wrong, check="repeated_lines")[keys].to_numpy().tolist() == [
        ["4", "Pythia-2.8B / Pythia-6.9B", "memit"],
        ["5", "Llama2-7B", "pmet / rome"],
    ]
    assert of(wrong, check="twins_alike").methods.tolist() == ["pmet", "rome"]
    assert of(wrong, check="values_of_a_line")[keys].to_numpy().tolist() == [["2", "Llama2-7B", "grace"]]
    values = of(wrong, check="possible_values").set_index("benchmark").arithmetic
    assert set(values.index) == {"BBH", "ToxiGen"}
    assert "39 of 817, 1 of 940" in values["ToxiGen"]
    assert (found.caveat[found.check != "doubtful_cells"].str.len() > 50).all()
    early = of(found, check="edits_change", table="5")
    assert "agrees" not in set(early[early.edits != "30 to 1000"].finding)  # no change up to 20 edits beyond noise
