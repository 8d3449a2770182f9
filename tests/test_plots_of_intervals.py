"""Figures with names down the side, of sets drawn from text, and of sets that differ in a layer."""

import numpy as np
import pandas as pd
import pytest

from pruning_utils import round_plots

ROWS = pd.DataFrame(
    {
        "panel": ["loss", "loss", "loss", "difference", "difference"],
        "group": ["few", "few", "many", "few", "many"],
        "name": ["LoRA", "LoRA", "LoRA", "LoRA", "LoRA"],
        "series": ["at once", "in rounds", "at once", "", ""],
        "value": [4.0, 5.0, 4.5, 1.0, 40.0],
        "low": [np.nan, np.nan, np.nan, 0.5, -9.0],
        "high": [np.nan, np.nan, np.nan, 1.5, 90.0],
        "runs": [[3.9, 4.1], None, None, None, [1.5, 80.0]],
        "is_void": [False, False, False, False, True],
    }
)


def points(axis) -> list[tuple]:
    """Places of single marks, without lines and ticks: x, y, marker."""
    found = []
    for line in axis.lines:
        if line.get_marker() not in ("None", "|"):
            found.append((line.get_xdata()[0], line.get_ydata()[0], line.get_marker()))
    return found


def test_a_row_has_its_name_under_the_heading_of_its_group():
    left, right = round_plots.interval_grid([ROWS]).axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["few", "LoRA", "many", "LoRA"]
    assert list(left.get_yticks()) == [4, 3, 2, 1]
    bold = [text.get_fontweight() for text in left.get_yticklabels()]
    assert bold == ["bold", "normal", "bold", "normal"]
    assert left.get_ylim() == (0.3, 4.7), "no row on the frame"
    assert [axis.get_title() for axis in (left, right)] == ["loss", "difference"]


def test_marks_stand_at_their_values_and_a_void_one_beyond_is_an_arrow_at_the_edge():
    left, right = round_plots.interval_grid([ROWS], margins={"difference": 0.1}).axes
    assert points(left) == [
        (4.0, pytest.approx(3.17), "o"),
        (5.0, pytest.approx(2.83), "s"),
        (4.5, pytest.approx(1.17), "o"),
    ]
    (runs,) = [line for line in left.lines if line.get_marker() == "|"]
    assert list(runs.get_xdata()) == [3.9, 4.1]
    low, high = right.get_xlim()
    assert (low, high) == (pytest.approx(0.43), pytest.approx(1.57)), "without the void row"
    assert points(right) == [(1.0, 3, "d"), (high, 1, ">")], "neither of the series"
    assert not [line for line in right.lines if line.get_marker() == "|"], "none under the arrow"
    (beyond,) = right.texts
    assert beyond.get_text() == "40" and beyond.xy == (high, 1)
    assert beyond.xyann[1] == 0 and beyond.get_va() == "center", "on the row of its arrow"


def test_levels_that_are_no_model_are_lines_of_their_own_panel():
    lines = pd.DataFrame({"panel": ["loss"], "name": ["ln V"], "value": [10.8]})
    figure = round_plots.interval_grid([ROWS], references=lines)
    left, right = figure.axes
    assert left.get_xlim()[1] > 10.8 > right.get_xlim()[1]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ln V", "at once", "in rounds"]


def test_each_table_is_a_row_of_panels_with_names_of_its_own():
    other = pd.DataFrame({"panel": ["accuracy"], "name": ["both"], "value": [0.4]})
    shown = round_plots.interval_grid([ROWS, other]).axes
    assert [axis.get_visible() for axis in shown] == [True, True, True, False]
    assert [text.get_text() for text in shown[2].get_yticklabels()] == ["both"]
    low, high = shown[2].get_xlim()
    assert low < 0.4 < high
    (alone,) = round_plots.interval_grid([other]).axes
    assert points(alone) == [(0.4, 1, "o")], "where no row has a series"


def test_sets_stand_by_their_draws():
    table = pd.DataFrame(
        {
            "criterion": "taylor",
            "n_samples": [1, 1, 50, 50],
            "seed": [0, 1, 0, 1],
            "layers": ["1 2", "2 3", "0 3", "0 3"],
            "loss": [4.0, 5.0, 6.0, 7.0],
        }
    )
    figure = round_plots.drawn_sets(table, n_layers=4, references={"unpruned": 3.0})
    left, right = figure.axes
    narrow = [bar for bar in left.patches if bar.get_width() < 1]
    gone = {}
    for bar in narrow:
        row = round(bar.get_y() + bar.get_height() / 2, 6)
        gone.setdefault(row, []).append(round(bar.get_x() + 0.45))
    assert gone == {0: [1, 2], 1: [2, 3], 2.6: [0, 3], 3.6: [0, 3]}
    assert [text.get_text() for text in left.get_yticklabels()] == ["1", "50"]
    assert list(left.get_yticks()) == [0.5, 3.1]
    assert points(right)[0][:2] == (4.0, 0.0)
    assert right.get_xlim() == (pytest.approx(2.6), pytest.approx(7.4))


def test_each_set_has_a_scale_and_its_best_swap_a_frame():
    table = pd.DataFrame(
        {
            "panel": ["reverse order"] * 4 + ["Taylor"] * 2,
            "spared": [2, 2, 3, 3, 1, 1],
            "dropped": [0, 1, 0, 1, 0, 2],
            "loss": [9.0, 8.0, 7.0, 12.0, 5.0, 4.0],
        }
    )
    figure = round_plots.swap_losses(
        table,
        levels={"reverse order": 8.5, "Taylor": 4.5},
        references={"ln V": 10.8},
        best={"reverse order": (3, 0), "Taylor": (1, 2)},
    )
    first, second, scale, other_scale = figure.axes
    assert first.get_title() == "reverse order, loss 8.5"
    limits = [axis.collections[0].get_clim() for axis in (first, second)]
    assert limits == [(7.0, 12.0), (4.0, 5.0)]
    assert sorted(zip(*first.lines[0].get_data(), strict=True)) == [(0.5, 1.5), (1.5, 0.5)]
    assert [frame.get_xy() for frame in first.patches] == [(0, 1)] * 2
    assert [frame.get_xy() for frame in second.patches] == [(1, 0)] * 2
    assert [text.get_text() for text in scale.texts] == ["ln V "]
    assert len(other_scale.texts) == 0, "ln V lies beyond it"
    assert [text.get_text() for text in other_scale.get_yticklabels()][::2] == ["4", "4.4", "4.8"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda table: round_plots.interval_grid([table]),
        lambda table: round_plots.drawn_sets(table, n_layers=4),
        lambda table: round_plots.swap_losses(table, levels={}, references={}, best={}),
    ],
)
def test_an_empty_table_is_refused(draw):
    with pytest.raises(ValueError, match="needs rows and the columns"):
        draw(pd.DataFrame({"panel": []}))
