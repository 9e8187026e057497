import math

import matplotlib.pyplot as plt
import pandas as pd

from kedit.analysis import plots
from kedit.analysis.published import published


def frame():
    rows = [
        ("control", 0, 1.0, 0.0, 1.0), ("control", 30, 1.0, 0.0, 1.0),
        ("rome", 0, 1.0, 0.0, 1.0), ("rome", 10, 0.9, 0.2, 1.1), ("rome", 30, 0.4, 0.5, 4.0),
        ("mend", 0, 1.0, 0.0, 1.0), ("mend", 10, 0.0, 1e7, 1e12), ("mend", 30, 0.0, math.inf, math.inf),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["method", "edits", "kept", "relative", "perplexity"])


def test_damage_has_a_panel_a_measure_and_a_place_for_none(tmp_path):
    figure = plots.damage(frame())
    kept, relative, perplexity, legend = figure.axes
    assert [ax.get_title() for ax in (kept, relative, perplexity)] == [
        "ability kept", "weights: |dW| / |W|", "perplexity, ratio"]  # fmt: skip
    assert relative.get_ylim()[0] == 0 < relative.get_ylim()[1] <= plots.BROKEN
    assert perplexity.get_ylim()[0] < 1 < perplexity.get_ylim()[1] <= plots.BROKEN
    assert [text.get_text() for text in legend.get_legend().get_texts()] == ["control (no edit)", "ROME", "MEND"]
    first, second = (plots.save(plots.damage(frame()), tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == second


def test_published_curves_are_grey_and_begin_unedited():
    figure, ax = plt.subplots()
    plots.overlay(ax, published("meta-llama/Llama-2-7b-hf", "mmlu"))
    plt.close(figure)
    assert len(ax.lines) == len(ax.texts) == 6
    assert all(line.get_xdata()[0] == 0 and line.get_ydata()[0] == 0.4587 for line in ax.lines)


def test_a_panel_of_what_was_published_shows_ours_and_theirs():
    def lines(benchmark):
        rows = [("none", 0, 0.5), ("rome", 0, 0.5), ("rome", 20, 0.2)]
        frame = pd.DataFrame(rows, columns=["method", "edits", "value"]).assign(
            model="meta-llama/Llama-2-7b-hf", ci_low=0.1, ci_high=0.6, chance=0.25, status="ok"
        )
        figure, ax = plt.subplots()
        plots.ability_panel(ax, frame[frame.method == "rome"], benchmark)
        plt.close(figure)
        return [max(line.get_xdata()) for line in ax.lines if line.get_color() == "#a6a6a6"]

    assert lines("mini_mmlu") == []
    assert max(lines("mmlu")) <= 20
    assert len(lines("mmlu")) == 6
