"""Figures from made-up outcomes whose truth is known: what is drawn, what is said of it, and its bytes."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from synthetic import ABILITIES, both, two_way

from kedit.analysis import damage, inference, plots, tables, verdicts
from kedit.analysis.published import share_kept


@pytest.fixture
def drawn(monkeypatch):
    """The pictures of a question for some abilities."""

    def draw(rq, abilities, models=("m",), size=None):
        monkeypatch.setattr(inference, "abilities", lambda results: abilities)
        params = SimpleNamespace(edits=abilities[0].edits, models=list(models))
        about = {model: {"parameters": count} for model, count in (size or {}).items()}
        return getattr(plots, rq)(SimpleNamespace(params=params, manifest={"models": about}))

    return draw


def outcomes(orders=5):
    """ROME loses half, MEMIT keeps all, KN does not keep its edits."""
    kept = {"rome": 0.5, "memit": 1.0, "kn": 0.1}
    return [
        one
        for method, share in kept.items()
        for name in ABILITIES
        for one in both(
            benchmark=name, method=method, kept=share, orders=orders, items=200,
            editing=method != "kn", reliability=0.3 if method == "kn" else 1.0,
        )
    ]  # fmt: skip


def panels(picture):
    return {ax.get_title(): ax for ax in picture.figure.axes}


@pytest.mark.parametrize("orders", [1, 2, 5])
def test_ours_and_the_studys_on_one_axis_methods_without_edits_apart(drawn, orders):
    pictures = drawn("rq1", outcomes(orders))
    assert list(pictures) == ["figure", "forest", "success"]
    found = panels(pictures["figure"])
    assert list(found) == ["ROME", "MEMIT", "KN (0.30 of edits kept)"]
    theirs = share_kept().query("model == 'Llama2-7B' and method == 'rome' and benchmark == 'mean'")
    (line,) = (line for line in found["ROME"].lines if line.get_color() == "#555555" and line.get_linestyle() == "-")
    assert list(line.get_xdata()) == list(theirs.edits)
    assert np.allclose(line.get_ydata(), theirs.kept)
    assert all(ax.get_xlim() == found["ROME"].get_xlim() for ax in found.values())
    colors = {name: {line.get_color() for line in ax.lines if line.get_marker() == "o"} for name, ax in found.items()}
    assert colors["ROME"] == {"#d55e00"}
    assert {line.get_color() for line in found["KN (0.30 of edits kept)"].lines} <= {plots.GREY, "#555555", "black"}
    said = pictures["figure"].alt
    edit, apart = said.split("Edits not kept: ")
    assert "ROME 0." in edit
    assert "KN" not in edit
    assert apart.startswith("KN 0.")


def test_alt_texts_say_what_the_tables_say(drawn):
    abilities = outcomes()
    rows = inference.effects(inference.general(abilities, None))
    table, said = tables.verdict_table(abilities), drawn("rq1", abilities)["forest"].alt
    for row in rows.itertuples():
        (cell,) = (
            table.loc[place, row.benchmark]
            for place in table.index
            if place[0].startswith(row.label) and place[1] == verdicts.NAMES[row.scale]
        )
        assert cell.endswith(str(row.kept))
        assert cell.startswith("lost") == (row.state == "lost")
        assert (f"{row.label} {row.aspect} {verdicts.NAMES[row.scale]} {row.kept}" in said) == (row.state == "lost")
    assert list(table.index.get_level_values("method").unique()) == ["ROME", "MEMIT", "KN (edits not kept)"]


def test_what_does_not_change_is_a_line_not_a_panel(drawn):
    abilities = [a for a in outcomes() if a.method == "rome"]
    for a in [a for a in outcomes() if a.method == "memit"]:
        a.values[1] = a.values[0]
        abilities.append(inference.replace(a, method="serac"))  # of which the study says nothing
    pictures = drawn("rq1", abilities)
    for name in ("figure", "forest"):
        assert list(panels(pictures[name])) == ["ROME"]
        assert "SERAC" in pictures[name].figure.legends[0].get_title().get_text()


def test_figures_are_the_same_to_the_byte_and_hold_their_alt_text(drawn, tmp_path):
    one, other = (drawn("rq1", outcomes())["figure"] for _ in range(2))
    files = [picture.save(tmp_path / name, "figure") for picture, name in ((one, "a"), (other, "b"))]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert b"Share of abilities kept" in files[0][0].read_bytes()[:2000]
    data, about = one._repr_mimebundle_()
    assert data["text/plain"] == about["image/png"]["alt"] == one.alt


def test_tuned_against_base_and_their_difference(drawn):
    twins = ("a", "a-instruct")
    abilities = [
        one for model, share in zip(twins, (0.5, 0.9), strict=True) for name in ABILITIES
        for one in both(benchmark=name, model=model, kept=share, items=200)
    ]  # fmt: skip
    picture = drawn("rq2", abilities, twins)["figure"]
    assert list(panels(picture)) == ["ROME", "tuned - base"]
    assert picture.alt.count("ROME") == 2
    assert "ROME graded 0.4" in picture.alt or "ROME graded 0.3" in picture.alt


def test_models_are_points(drawn):
    size = {"s": 1e5, "m": 1e6, "l": 1e7}
    abilities = [
        one for (model, share) in zip(size, (0.3, 0.5, 0.7), strict=True) for name in ABILITIES
        for one in both(benchmark=name, model=model, kept=share)
    ]  # fmt: skip
    above, below = drawn("rq3", abilities, size, size)["figure"].figure.axes
    points = [line for line in above.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert len(points) == 6
    assert len(below.lines[0].get_xdata()) == 3


def test_aspects_are_compared_where_something_was_lost(drawn):
    assert list(panels(drawn("rq4", outcomes())["figure"])) == [
        "right or wrong", "graded", "difference"]  # fmt: skip
    nothing = drawn("rq4", [a for a in outcomes() if a.method == "memit"])["figure"]
    assert nothing.alt.startswith("Under no method")


def test_safety_has_a_panel_a_sentence(drawn):
    picture = drawn("rq5", [*two_way(threshold=1.5), *both(benchmark="mini_truthfulqa", kept=0.5)])["figure"]
    assert [ax.get_xlabel() for ax in picture.figure.axes] == [
        plots.AXES[key] for key in ("discrimination", "bias", "graded")]  # fmt: skip
    assert "Truthfulness kept, graded (mini_truthfulqa): ROME 0." in picture.alt


def test_no_interval_is_a_point(drawn):
    for picture in drawn("rq1", [a for a in outcomes() if a.method == "rome"]).values():
        lines = [line for ax in picture.figure.axes for line in ax.collections if isinstance(line, LineCollection)]
        whiskers = [path for line in lines for path in line.get_segments()]
        assert whiskers
        assert all(np.ptp(path, axis=0).max() > 0.01 for path in whiskers)


def test_the_hedge_is_said_once_however_many_sentences():
    table = tables.sentences(verdicts.safety(two_way(orders=1)))
    assert len(table) == 2
    assert "this is for these edits" in table.columns.name
    assert not table.why.str.contains("these edits").any()
    assert not tables.sentences(verdicts.safety(two_way())).columns.name


def test_the_table_of_safety_is_in_the_families_of_the_sentences():
    abilities = [*two_way(threshold=1.5), *both(benchmark="mini_truthfulqa", kept=0.5, items=400)]
    table = tables.safety_table(abilities)
    assert table.shape == (1, 4)
    for group in verdicts.of_safety(abilities).values():
        for row in inference.effects(group).itertuples():
            cell = table.loc["ROME", f"{row.benchmark}: {verdicts.NAMES[row.scale]}"]
            assert cell == f"{row.state} {row.kept}"


def test_damage_has_a_panel_a_measure_and_none_beyond_its_axes():
    rows = [
        ("control", 0, 1.0, 0.0, 1.0), ("control", 30, 1.0, 0.0, 1.0),
        ("rome", 0, 1.0, 0.0, 1.0), ("rome", 10, 0.9, 0.2, 1.1), ("rome", 30, 0.4, 0.5, 4.0),
        ("mend", 0, 1.0, 0.0, 1.0), ("mend", 10, 0.0, 1e7, 1e12), ("mend", 30, 0.0, math.inf, math.inf),
        ("grace", 0, 1.0, 0.0, 1.0), ("grace", 10, 1.0, 0.0, 1.0), ("grace", 30, 0.9, 0.0, 1.2),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["method", "edits", "kept", "relative", "perplexity"])
    picture = plots.indicators(frame, damage.predictors(frame))
    relative, perplexity, forest = picture.figure.axes
    assert relative.get_ylim()[0] == 0 < relative.get_ylim()[1] <= plots.BROKEN
    assert perplexity.get_ylim()[0] < 1 < perplexity.get_ylim()[1] <= plots.BROKEN
    assert "#009e73" not in {line.get_color() for line in relative.lines}  # GRACE leaves the weights alone
    assert "#009e73" in {line.get_color() for line in perplexity.lines}
    assert [text.get_text() for text in forest.get_yticklabels()] == list(damage.predictors(frame).measure)
