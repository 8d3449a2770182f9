"""Figures of levels beside differences, of times and of sizes: each mark stands where its table
says."""

import numpy as np
import pandas as pd
import pytest

from pruning_utils import cost_plots, evidence


def ends(**columns):
    """A table whose ``value`` has a bar from 0.1 below to 0.2 above."""
    table = pd.DataFrame(columns)
    return table.assign(low=table["value"] - 0.1, high=table["value"] + 0.2)


def names_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture
def pairs():
    """Two pairs of 2 items each, whose differences are 0.2 and 0."""
    differences = {"a": np.array([0.1, 0.3]), "b": np.array([-0.1, 0.1])}
    return evidence.paired_verdicts(differences, margin=0.05)


def test_token_times_have_a_row_a_quantity_and_a_column_a_prompt():
    table = pd.concat(
        [
            ends(panel=panel, column=column, series=series, batch_size=[1, 16], value=[value, 2])
            for panel in ("ms", "ratio")
            for column in ("short", "long")
            for series, value in (("unpruned", 1.0), ("depth", 0.8))
        ]
    )
    lines = pd.DataFrame([{"panel": "ratio", "name": "equal", "value": 1.0}])
    figure = cost_plots.token_times(table, baselines=lines)
    assert [axis.get_title() for axis in figure.axes] == ["short", "long", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes] == ["ms", "", "ratio", ""]
    top, bottom = figure.axes[0], figure.axes[2]
    assert top.lines[0].get_xydata().tolist() == [[0, 1], [1, 2]]
    assert top.lines[1].get_ydata().tolist() == [0.8, 2]
    assert top.lines[1].get_xdata() == pytest.approx([0.07, 1.07]), "beside the other"
    assert top.collections[0].get_segments()[0][:, 1] == pytest.approx([0.7, 1.0])
    assert len(bottom.lines) == len(top.lines) + 1 and bottom.lines[-1].get_ydata()[0] == 1
    assert names_of(figure) == ["unpruned", "fewer layers", "equal"]


def test_times_stand_against_each_cause_beside_what_it_alone_would_give():
    table = pd.concat(
        [
            ends(panel=panel, series="depth", size=size, x=[x], value=[x * 2.0])
            for panel in ("bytes", "layers")
            for size, x in ((6, 24), (11, 19))
        ]
    )
    lines = pd.DataFrame(
        {"panel": "layers", "name": "in proportion", "x": [0, 15, 30], "value": [0, 30, 60]}
    )
    figure = cost_plots.times_and_causes(table, lines, label="ms", hollow=11)
    left, right = figure.axes
    assert [axis.get_xlabel() for axis in (left, right)] == ["bytes", "layers"]
    filled, hollow = right.lines[0], right.lines[3]
    assert filled.get_xydata().tolist() == [[24, 48]] and hollow.get_xydata().tolist() == [[19, 38]]
    assert hollow.get_markerfacecolor() == "white" != filled.get_markerfacecolor()
    assert right.lines[-1].get_xydata().tolist() == [[0, 0], [15, 30], [30, 60]]
    assert [text.get_text() for text in right.texts] == ["in proportion"] and not left.texts
    assert names_of(figure) == ["fewer layers"]


def test_times_of_one_cause_stand_beside_each_other():
    shapes = {"depth": 19.0, "width": 30.0, "width, heads too": 30.1}
    table = pd.concat(
        [
            ends(panel="layers", series=series, size=6, x=[x], value=[40.0])
            for series, x in shapes.items()
        ]
    )
    lines = pd.DataFrame({"panel": "layers", "name": "line", "x": [0, 30], "value": [0, 40]})
    (axis,) = cost_plots.times_and_causes(table, lines, label="ms").axes
    alone, left, right = (axis.lines[number].get_xdata()[0] for number in (0, 3, 6))
    assert alone == 19 and left < 30 < 30.1 < right and right - left > 0.5


def test_levels_stand_above_their_differences_and_outliers_at_the_edge(pairs):
    levels = pd.concat(
        [
            ends(panel="xsum", series="pruned", place=[6, 24], value=[4.0, 17.25]),
            ends(panel="xsum", series="LoRA", place=[6, 24], value=[3.5, 8.0]),
        ]
    )
    figure = cost_plots.levels_and_differences(
        levels,
        pairs.assign(panel="xsum", place=[6, 24]),
        ticks={6: "6", 24: "24"},
        xlabel="layers",
        labels={"xsum": ("loss", "difference")},
        baselines=pd.DataFrame([{"panel": "xsum", "name": "unpruned", "value": 3.0}]),
        tops={"xsum": 11.0},
    )
    above, below = figure.axes
    assert above.get_title() == "XSum" and above.get_ylim()[1] == 11
    assert [text.get_text() for text in above.texts] == ["17.2 \u2191"], "what lies above the edge"
    assert above.lines[0].get_ydata()[0] == 3 and above.lines[1].get_ydata().tolist() == [4, 17.25]
    assert (above.get_ylabel(), below.get_ylabel()) == ("loss", "difference")
    thin, thick = (
        [segment[:, 1].tolist() for segment in bars.get_segments()]
        for bars in below.collections[-2:]
    )
    assert thin == pairs[["low", "high"]].to_numpy().tolist()
    assert thick == pairs[["low_90", "high_90"]].to_numpy().tolist()
    assert below.lines[-1].get_xydata().tolist() == [[6, pytest.approx(0.2)], [24, 0]]
    assert below.collections[0].get_datalim(below.transData).intervaly.tolist() == [-0.05, 0.05]
    assert names_of(figure) == ["unpruned", "unhealed", "LoRA"]


def test_groups_of_differences_have_a_heading_each_and_one_place_in_all_panels(pairs):
    table = pd.concat(
        [
            pairs.assign(panel=panel, group=["equal tokens", "equal seconds"], row="6 gone")
            for panel in ("XSum", "QuAC")
        ]
    )
    figure = cost_plots.grouped_differences(table, margin=0.05, label="nats", gap=1.0)
    left, right = figure.axes
    assert [axis.get_title() for axis in (left, right)] == ["XSum", "QuAC"]
    for axis in (left, right):
        assert axis.lines[-1].get_xydata().tolist() == [[pytest.approx(0.2), -1], [0, -4]]
        low, high = axis.get_ylim()
        assert low < -4.5 and high > 0.5, "no row lies on the frame"
    named = {tick.get_text(): tick.get_position()[1] for tick in left.get_yticklabels()}
    assert named == {"equal tokens": 0, "equal seconds": -3, "6 gone": -4}, "the last of one name"
    styles = {tick.get_text(): tick.get_fontstyle() for tick in left.get_yticklabels()}
    assert styles == {"equal tokens": "italic", "equal seconds": "italic", "6 gone": "normal"}


def test_two_trainings_stand_above_their_difference_with_every_run():
    table = pd.DataFrame(
        [
            {"panel": "6 gone", "series": series, "run": run, "tokens": tokens, "loss": loss}
            for series, start in (("LoRA", 4.0), ("all weights", 5.0))
            for run in (0, 1)
            for tokens, loss in ((0, 12.0), (2000, start + run))
        ]
    )
    figure = cost_plots.training_pairs(table, first="all weights", second="LoRA", floor=10.8)
    above, below = figure.axes
    runs_and_mean = [line.get_ydata().tolist() for line in above.lines[:3]]
    assert runs_and_mean == [[12, 5], [12, 6], [12, 5.5]]
    assert above.lines[2].get_xdata().tolist() == [0, 2] and above.lines[-1].get_ydata()[0] == 10.8
    assert [line.get_ydata().tolist() for line in below.lines[1:]] == [[0, 1], [0, 1], [0, 1]]
    assert below.get_ylim() == pytest.approx((-1.1, 1.1))
    assert names_of(figure) == ["all weights", "LoRA", "ln V"]
    nearer = table.assign(panel="14 gone", loss=10 + table["loss"] / 10)
    two = cost_plots.training_pairs(pd.concat([table, nearer]), first="all weights", second="LoRA")
    assert two.axes[2].get_ylim() == pytest.approx((-1.1, 1.1))
    assert two.axes[3].get_ylim() == pytest.approx((-0.11, 0.11)), "a scale of its own"
    low = cost_plots.training_pairs(table, first="all weights", second="LoRA", floor=20.0)
    assert names_of(low) == ["all weights", "LoRA"], "a panel that does not reach it has no line"


def test_losses_stand_against_stored_sizes():
    table = pd.concat(
        [
            ends(
                panel="XSum",
                n_dropped=depth,
                precision=["bfloat16", "nf4"],
                size=[200.0 - depth, 90.0],
                value=[3.0 + depth, 3.5],
            )
            for depth in (0, 6)
        ]
    )
    figure = cost_plots.sizes_and_losses(table, xlabel="MB", guess=12.0)
    (axis,) = figure.axes
    curves = [line for line in axis.lines if line.get_linestyle() == "-"]
    assert curves[1].get_xydata().tolist() == [[194, 9], [90, 3.5]]
    marks = [line for line in axis.lines if line.get_linestyle() != "-"]
    assert [mark.get_marker() for mark in marks] == ["o", "^", "o", "^"]
    assert names_of(figure) == ["0 layers removed", "6 layers removed", "bfloat16", "NF4"]
    near = cost_plots.sizes_and_losses(table, xlabel="MB", guess=9.8)
    assert names_of(near)[-1] == "ln V" and [*near.axes[0].lines[-1].get_ydata()] == [9.8, 9.8]


@pytest.mark.parametrize(
    "draw",
    [
        cost_plots.token_times,
        lambda table: cost_plots.times_and_causes(table, table, label=""),
        lambda table: cost_plots.levels_and_differences(
            table, table, ticks={}, xlabel="", labels={}
        ),
        lambda table: cost_plots.grouped_differences(table, margin=1, label=""),
        lambda table: cost_plots.training_pairs(table, first="a", second="b"),
        lambda table: cost_plots.sizes_and_losses(table, xlabel="", guess=1.0),
    ],
)
def test_they_refuse_other_tables(draw):
    with pytest.raises(ValueError, match="the table needs rows and the columns"):
        draw(pd.DataFrame({"panel": ["a"]}))
