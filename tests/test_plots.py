"""Figures show the numbers of their tables, refuse tables without them, and repeat their bytes."""

import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pruning_utils import (
    cost_plots,
    depth_plots,
    evidence,
    healing_plots,
    importance_plots,
    plots,
    results,
    round_plots,
)
from pruning_utils.engine import reader_names

N_LAYERS = 6


@pytest.fixture
def blocks():
    """Distances with the minimum of size n at start (n * 2) % (number of starts)."""
    rows = []
    for size in range(1, N_LAYERS + 1):
        starts = N_LAYERS - size + 1
        rows += [
            {
                "start": start,
                "block_size": size,
                "angular_distance": 0.1 if start == size * 2 % starts else 0.3,
                "angular_distance_stderr": 0.01,
            }
            for start in range(starts)
        ]
    return pd.DataFrame(rows)


def alike_labels(table):
    """A table whose rows all have one label, as those that were put together have some alike."""
    return table.set_axis([0] * len(table))


@pytest.fixture
def path_tables():
    losses = pd.DataFrame(
        [
            {"stage": stage, "loss": loss + window / 10}
            for (stage, loss), window in itertools.product(
                (("unpruned", 3), ("pruned", 6), ("healed", 4)), range(5)
            )
        ]
    )
    history = pd.DataFrame(
        [
            {"tokens": 100 * step, "split": split, "loss": 6 - step / 5}
            for split in ("train", "eval")
            for step in range(5)
        ]
    )
    distances = pd.DataFrame({"start": range(5), "angular_distance": [0.5, 0.2, 0.1, 0.2, 0.4]})
    return distances, losses, history


def test_map_marks_the_minimum_of_every_row(blocks):
    figure = plots.distance_map(blocks)
    marks = figure.axes[0].lines[0].get_xydata() - 0.5
    expected = [(size * 2 % (N_LAYERS - size + 1), size - 1) for size in range(1, N_LAYERS + 1)]
    assert marks.tolist() == [list(map(float, place)) for place in expected]
    scaled = figure.axes[0].collections[0].get_array().reshape(N_LAYERS, N_LAYERS)
    assert scaled[0].min() == 0 and scaled[0].max() == 1, "scaled per row"
    two = plots.distance_map(pd.concat([blocks.assign(model="a"), blocks.assign(model="b")]))
    assert [axis.get_title() for axis in two.axes] == ["a", "b", ""], "the last is the scale"


def test_an_axis_of_shares_names_points():
    figure, (axis,) = plots.new_figure(plots.NARROW, 2)
    axis.plot([0, 1], [-0.07, 0.005])
    axis.set_yticks([-0.07, 0, 0.005])
    plots.in_points(axis.yaxis)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["−7", "0", "0.5"]


def test_curves_join_their_minima(blocks):
    figure = plots.distance_curves(blocks, block_sizes=[1, 2, 3])
    *curves, minima = figure.axes[0].lines
    assert [len(curve.get_xdata()) for curve in curves] == [6, 5, 4]
    assert minima.get_xydata().tolist() == [[2, 0.1], [4, 0.1], [2, 0.1]]
    *_, same = plots.distance_curves(alike_labels(blocks), block_sizes=[1, 2, 3]).axes[0].lines
    assert same.get_xydata().tolist() == minima.get_xydata().tolist()


def test_stages_show_means_and_the_chosen_block(path_tables):
    figure = plots.stages(*path_tables)
    first, left, right = figure.axes
    assert first.lines[1].get_xydata().tolist() == [[2, 0.1]]
    assert [text.get_text() for text in left.texts] == [
        f"{np.exp(mean):,.0f}" for mean in (3.2, 6.2, 4.2)
    ]
    assert len(right.lines) == 2
    first, *_ = plots.stages(*map(alike_labels, path_tables)).axes
    assert first.lines[1].get_xydata().tolist() == [[2, 0.1]]


def test_other_figures_show_their_rows():
    scores = pd.DataFrame(
        {
            "layer": [0, 1, 0, 1],
            "definition": ["mean over tokens"] * 2 + ["flattened"] * 2,
            "value": [0.1, 0.2, 0.3, 0.4],
        }
    )
    (axis,) = plots.layer_scores(scores).axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[0.1, 0.2], [0.3, 0.4]]
    assert (axis.get_yscale(), plots.layer_scores(scores, log=False).axes[0].get_yscale()) == (
        "log",
        "linear",
    )
    drawn = pd.DataFrame(
        {
            "model": "a",
            "removed": ["2 of 6"] * 3 + ["3 of 6"],
            "source": ["xsum", "xsum", "quac", "xsum"],
            "n_samples": [1, 4, 1, 4],
            "share": [0.5, 1.0, 0.25, 0.75],
        }
    )
    figure = plots.choice_agreement(drawn)
    lines = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    assert lines == [[[[1, 0.5], [4, 1]], [[1, 0.25]]], [[[4, 0.75]]]]
    assert [axis.get_title() for axis in figure.axes] == ["2 of 6", "3 of 6"]
    chosen = pd.DataFrame({"model": "a", "n_layers": 8, "block_size": [2, 4], "start": [4, 2]})
    line = depth_plots.relative_starts(chosen, chosen.assign(model="b")).axes[0].lines[-1]
    assert line.get_xydata().tolist() == [[0.25, 0.5], [0.5, 0.25]]


def test_every_published_model_is_drawn():
    chosen = pd.DataFrame({"model": ["a"], "n_layers": [4], "block_size": [1], "start": [2]})
    others = pd.concat([chosen.assign(model=f"model {number}") for number in range(7)])
    axis = depth_plots.relative_starts(chosen, others).axes[0]
    assert len(axis.lines) == 1 + 7 + 1


def test_crosses_lie_on_the_minima_where_the_first_blocks_are_left_out():
    blocks = pd.DataFrame(
        [(n, start, abs(start - 5) + 1) for n in (1, 2) for start in range(3, 9)],
        columns=["block_size", "start", "angular_distance"],
    )
    (line,) = plots.distance_map(blocks).axes[0].lines
    assert line.get_xdata().tolist() == [2.5, 2.5], "the third column, which starts at 5"


@pytest.mark.parametrize(
    "draw, lacking",
    [
        (plots.distance_map, "block_size"),
        (plots.distance_curves, "start"),
        (plots.layer_scores, "definition"),
        (plots.choice_agreement, "share"),
    ],
)
def test_a_table_without_its_columns_is_refused(draw, lacking):
    with pytest.raises(ValueError, match=f"missing: .*{lacking}"):
        draw(pd.DataFrame({"value": [1.0]}))


def test_an_empty_table_is_refused(blocks):
    with pytest.raises(ValueError, match="it is empty"):
        plots.distance_map(blocks[:0])


def test_saved_figures_repeat_to_the_byte_and_name_their_numbers(blocks, tmp_path, monkeypatch):
    saved = {}
    for run in ("one", "two"):
        monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path / run))
        table = results.table_path("cpu", "99_test", "tiny")
        results.load_or_compute(table, lambda: blocks, parameters={"seed": 0})
        png = plots.save_figure(
            plots.distance_map(blocks), "99_test", tables=[table], profile="cpu"
        )
        saved[run] = png.read_bytes(), png.with_suffix(".pdf").read_bytes()
        assert png == tmp_path / run / "figures" / "99_test.png"
        origin = Image.open(png).info["Source"]
        assert results.read_record(table)["sha256"] in origin and "tiny.csv" in origin
        assert results.read_record(table)["sha256"].encode() in saved[run][1]
    assert saved["one"] == saved["two"]
    assert b"CreationDate" not in saved["one"][1]


def test_smoke_figures_are_stamped(blocks, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    table = results.table_path("smoke", "99_test", "tiny")
    results.load_or_compute(table, lambda: blocks, parameters={"seed": 0})
    figure, written = plots.distance_map(blocks), []
    monkeypatch.setattr(
        plots,
        "write_figure",
        lambda figure, *_, **__: written.extend(text.get_text() for text in figure.texts),
    )
    plots.save_figure(figure, "99_test", tables=[table], profile="smoke")
    assert written == ["smoke profile: not a result"]
    assert not figure.texts, "the caller's figure is left as it was"


# --- depth ----------------------------------------------------------------------------------------


@pytest.fixture
def curves():
    """Two panels, two series of three depths; values are 1, 2, 3, and 10, 20, 30."""
    return pd.DataFrame(
        [
            {
                "panel": panel,
                "series": series,
                "n_dropped": n,
                "value": scale * (n + 1),
                "low": scale * (n + 0.5),
                "high": scale * (n + 2),
            }
            for panel in ("piqa", "pooled")
            for series, scale in (("pruned", 1), ("healed", 10))
            for n in (2, 0, 1)
        ]
    )


def test_depth_curves_without_bands_have_one_bar_a_panel_as_long_as_the_widest_interval(curves):
    figure = depth_plots.depth_curves(curves, n_layers=4, bands=False)
    for axis, (_, points) in zip(figure.axes, curves.groupby("panel", sort=False), strict=False):
        (bar,) = axis.collections
        (ends,) = bar.get_segments()
        assert np.ptp(ends[:, 1]) == pytest.approx((points["high"] - points["low"]).max())
        assert ends[0, 0] > points["n_dropped"].max() / 4, "it stands beside the curves"
    assert "widest interval" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_depth_curves_show_every_mean_at_its_fraction(curves):
    baselines = pd.DataFrame([{"panel": "piqa", "name": "chance", "value": 0.5}])
    figure = depth_plots.depth_curves(
        curves, n_layers=4, baselines=baselines, columns=2, label="accuracy"
    )
    first, second = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["PIQA", "pooled"]
    for axis, n_baselines in ((first, 1), (second, 0)):
        pruned, healed = axis.lines[:2]
        assert pruned.get_xydata().tolist() == [[0, 1], [0.25, 2], [0.5, 3]]
        assert healed.get_ydata().tolist() == [10, 20, 30]
        assert pruned.get_color() == plots.colour_of("pruned") != healed.get_color()
        assert [line.get_ydata()[0] for line in axis.lines[2:]] == [0.5] * n_baselines
        band = axis.collections[0].get_paths()[0].get_extents()
        assert (band.ymin, band.ymax) == (0.5, 4)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["pruned", "healed", "chance"]
    axes = depth_plots.depth_curves(curves, n_layers=4, columns=3).axes
    assert [axis.get_visible() for axis in axes] == [True, True]


def test_a_dashed_curve_looks_like_its_twin(curves):
    figure = depth_plots.depth_curves(
        curves, n_layers=4, columns=2, dashed={"healed": "pruned"}, legend_columns=1
    )
    pruned, healed = figure.axes[0].lines[:2]
    assert figure.legends[0]._ncols == 1
    assert healed.get_color() == pruned.get_color() == plots.colour_of("pruned")
    assert healed.get_marker() == pruned.get_marker()
    assert (pruned.get_linestyle(), healed.get_linestyle()) == ("-", "--")
    assert healed.get_markerfacecolor() == "white" != pruned.get_markerfacecolor()


def test_levels_on_more_questions_stand_side_by_side_on_the_curves(curves):
    more = curves[curves["n_dropped"] == 1].assign(value=9.0, low=8.0, high=11.0)
    figure = depth_plots.depth_curves(curves, n_layers=4, more_questions=more)
    for axis in figure.axes[:2]:
        (first, _, (bar,)), (second, _, _) = axis.containers
        assert [*first.get_ydata(), *second.get_ydata()] == [9, 9]
        assert first.get_xdata()[0] < 0.25 < second.get_xdata()[0]
        assert first.get_xdata()[0] + second.get_xdata()[0] == pytest.approx(0.5)
        assert bar.get_segments()[0][:, 1].tolist() == [8, 11]
    assert "more questions" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_healing_curves_have_a_line_for_each_depth():
    table = pd.DataFrame(
        [
            {"panel": rule, "n_dropped": n, "tokens": 1000 * step, "loss": n - step}
            for rule in ("similarity", "deepest")
            for n in (2, 8)
            for step in range(3)
        ]
    )
    figure = depth_plots.healing_curves(table)
    assert [len(axis.lines) for axis in figure.axes] == [2, 2]
    assert figure.axes[1].lines[1].get_xydata().tolist() == [[0, 8], [1, 7], [2, 6]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["2", "8"]
    beside = depth_plots.healing_curves(table, unpruned=-1.5)
    assert [[*axis.lines[-1].get_ydata()] for axis in beside.axes] == 2 * [[-1.5, -1.5]]
    assert beside.legends[0].get_texts()[-1].get_text() == "0 (unpruned)"


def test_differences_stand_beside_their_margin():
    table = evidence.paired_verdicts(
        {"a": np.array([0.1, 0.2, 0.3]), "b": np.array([-0.1, 0.1])}, margin=0.02
    )
    (axis,) = depth_plots.differences(table, margin=0.02, label="accuracy").axes
    assert axis.lines[-1].get_xydata().tolist() == [[pytest.approx(0.2), 1], [0, 0]]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "b"]
    corrected = [segment[:, 0].tolist() for segment in axis.collections[0].get_segments()]
    assert corrected == table[["low", "high"]].to_numpy().tolist()
    assert axis.patches[0].get_extents().transformed(
        axis.transData.inverted()
    ).width == pytest.approx(0.04)
    assert axis.get_xscale() == "linear"


def test_differences_far_apart_stand_on_a_scale_that_is_linear_around_0():
    table = evidence.paired_verdicts(
        {"a": np.array([19.0, 20, 21]), "b": np.array([-0.5, 0.5])}, margin=0.02
    )
    figure = depth_plots.differences(table, margin=0.02, label="loss", linear=1)
    (axis,) = figure.axes
    places = axis.transData.transform([[value, 0] for value in (-1, 0, 0.5, 1, 10)])[:, 0]
    assert places[1] - places[0] == pytest.approx(places[3] - places[1])
    assert places[2] - places[1] == pytest.approx((places[3] - places[1]) / 2)
    assert axis.transData.transform([20, 0])[0] - axis.transData.transform([2, 0])[
        0
    ] == pytest.approx(places[4] - places[3]), "a decade is as wide anywhere"
    figure.canvas.draw()
    assert {"0", "1", "10"} <= {tick.get_text() for tick in axis.get_xticklabels()}


def test_drawing_fills_the_removed_layers():
    figure = depth_plots.removed_layers({"deepest": [2, 3], "none": []}, n_layers=5)
    cells = figure.axes[0].collections[0].get_array()
    assert cells.astype(int).tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]


def test_removed_sets_lie_at_their_depth():
    table = pd.DataFrame(
        {
            "criterion": ["taylor", "taylor", "magnitude"],
            "model": ["theirs", "ours", "ours"],
            "n_layers": [4, 10, 10],
            "blocks": ["0 3", "5", "1 2"],
        }
    )
    taylor, magnitude = depth_plots.removed_by_criterion(table).axes
    for axis, expected in (
        (taylor, [(0, 1, 2), (0, 0.25, 2), (0.75, 0.25, 2), (0, 1, 1), (0.5, 0.1, 1)]),
        (magnitude, [(0, 1, 1), (0.1, 0.1, 1), (0.2, 0.1, 1)]),
    ):
        drawn = [(bar.get_x(), bar.get_width(), bar.get_y() + 0.35) for bar in axis.patches]
        assert np.array(drawn) == pytest.approx(np.array(expected))
    assert taylor.patches[-1].get_facecolor() != taylor.patches[1].get_facecolor(), (
        "ours has the criterion's colour"
    )
    assert [tick.get_text() for tick in taylor.get_yticklabels()] == ["ours", "theirs"]
    both, _ = depth_plots.removed_by_criterion(table, own=2).axes
    assert both.patches[-1].get_facecolor() == both.patches[1].get_facecolor()


def test_a_row_without_a_set_says_so():
    table = pd.DataFrame(
        {"criterion": ["a", "a", "b"], "model": ["theirs", "ours", "ours"], "n_layers": 4}
    ).assign(blocks="1")
    for missing, expected in (("", []), ("not published", [("not published", 2)])):
        first, second = depth_plots.removed_by_criterion(table, missing=missing).axes
        assert [(text.get_text(), text.get_position()[1]) for text in second.texts] == expected
        assert not first.texts


@pytest.fixture
def levels():
    return pd.DataFrame(
        {
            "panel": ["accuracy"] * 2 + ["loss on a", "loss on a", "loss on b"],
            "measure": ["accuracy"] * 2 + ["loss"] * 3,
            "label": "rank",
            "series": ["rank 2", "rank 2, own rate", "rank 2", "rank 8", "rank 2"],
            "choice": [2, 2, 2, 8, 2],
            "joined": False,
            "value": [0.4, 0.5, 4.0, 12.0, 3.0],
            "low": [0.3, 0.4, 3.5, 11.0, 2.0],
            "high": [0.5, 0.6, 4.5, 13.0, 4.0],
        }
    )


BASELINES = pd.DataFrame(
    {
        "panel": ["accuracy", "loss on a"],
        "name": ["guess", "ln V"],
        "value": [0.25, 10.0],
    }
)


def test_levels_have_units_intervals_and_lines(levels):
    figure = importance_plots.level_panels(levels, baselines=BASELINES, columns=3)
    accuracy, first, second = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "accuracy (%)",
        "loss (nats per token)",
        "",
    ]
    points = [container.lines[0] for container in accuracy.containers]
    assert [line.get_ydata().tolist() for line in points] == [[40], [50]]
    assert [line.get_fillstyle() for line in points] == ["full", "none"], "own rate is hollow"
    assert points[0].get_color() == points[1].get_color() == plots.colour_of("rank 2")
    bar = accuracy.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert bar.tolist() == pytest.approx([30, 50])
    assert accuracy.lines[-1].get_ydata()[0] == 25
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["rank 2", "rank 2, own rate", "rank 8", "guess", "ln V"], "lines last"
    assert first.get_ylim() == second.get_ylim(), "one measure, one axis"


def test_levels_beyond_a_uniform_guess_or_far_out_are_arrows_at_the_edge(levels):
    _, first, _ = importance_plots.level_panels(levels, baselines=BASELINES, columns=3).axes
    (label,) = first.texts
    assert label.get_text() == "12.0" and label.xy[1] == first.get_ylim()[1] == pytest.approx(11.2)
    none = pd.Series(dtype=float)
    far = pd.Series([1.0, 2, 3, 4, 100])
    # Quartiles 2 and 4: the edge of what is far out is 10; 4 + 0.15 * (4 - 1) is where it ends.
    assert importance_plots._upper_edge(far, none) == pytest.approx(4.45)
    assert importance_plots._upper_edge(far[:4], none) == np.inf
    assert importance_plots._upper_edge(pd.Series([1.0]), none) == np.inf


def test_arrows_at_one_choice_stand_below_each_other(levels):
    far = levels[levels["panel"] == "loss on a"]
    far = far.assign(choice=8, value=[12.0, 13.0], low=[11.0, 12.0], high=[13.0, 14.0])
    figure = importance_plots.level_panels(far, baselines=BASELINES, columns=1)
    figure.canvas.draw()
    (axis,) = figure.axes
    first, second = (text.get_window_extent() for text in axis.texts)
    assert second.y1 < first.y0 or second.x0 > first.x1, "no label covers another"


def test_differences_stand_below_levels_in_their_own_units(levels):
    table = evidence.paired_verdicts(
        {"a": np.array([0.1, 0.2, 0.3]), "b": np.array([-0.1, 0.1])}, margin=0.02
    ).assign(panel=["answers", "text"], measure=["accuracy", "loss"])
    figure = importance_plots.levels_and_differences(levels, table, baselines=BASELINES)
    answers, text = figure.axes[3:]
    assert [axis.get_title() for axis in (answers, text)] == ["answers", "text"]
    assert [axis.get_xlabel() for axis in (answers, text)] == ["points", "nats per token"]
    for axis, factor, row in ((answers, 100, table.iloc[0]), (text, 1, table.iloc[1])):
        drawn = [bars.get_segments()[0][:, 0].tolist() for bars in axis.collections]
        expected = [[factor * row[end] for end in ends] for ends in (ENDS_95, ENDS_90)]
        assert np.array(drawn) == pytest.approx(np.array(expected))
        assert axis.lines[-1].get_xdata().tolist() == [pytest.approx(factor * row["difference"])]
        assert axis.get_ylim() == (-0.7, 0.7), "no row on the frame"
        margin = axis.patches[0].get_extents().transformed(axis.transData.inverted())
        assert margin.width == pytest.approx(0.04 * factor)


ENDS_95, ENDS_90 = ("low", "high"), ("low_90", "high_90")


def test_neighbours_of_a_measure_end_where_neither_is_cut():
    def rows(panel: str, *values: float) -> pd.DataFrame:
        ends = {"value": values, "high": [value + 0.5 for value in values]}
        return pd.DataFrame({"panel": panel, "measure": "loss", **ends})

    panels = [("far", rows("far", 1.0, 1.1, 1.2, 1.3, 90.0)), ("near", rows("near", 5.0, 5.5))]
    none = pd.DataFrame(columns=["panel", "name", "value"])
    far, near = importance_plots._upper_edges(panels, none)
    assert far == near and 6.0 < near < 90.0
    assert importance_plots._upper_edges(panels[1:], none) == [np.inf]


def test_profiles_are_over_the_median_and_end_at_twice_our_largest():
    ours = pd.DataFrame({"model": "ours", "layer": [1, 0, 2], "score": [2.0, 100, 2]})
    theirs = pd.DataFrame({"model": "theirs", "layer": [0, 1, 2], "score": [np.inf, 3, 6]})
    table = pd.concat([ours, theirs]).assign(criterion="perplexity", n_layers=3)
    (axis,) = importance_plots.score_profiles(table, own="ours").axes
    grey, arrow, mine, _ = axis.lines
    assert grey.get_xydata().tolist() == [[pytest.approx(1 / 3), 0.5], [pytest.approx(2 / 3), 1]]
    assert arrow.get_xdata().tolist() == [0]
    assert mine.get_ydata().tolist() == [50, 1, 1] and mine.get_color() == "#0072B2"
    assert [text.get_text() for text in axis.texts] == ["0"]
    assert axis.get_yscale() == "log" and axis.get_ylim() == (0.5, 100)
    flat = table.assign(score=1.0)
    (axis,) = importance_plots.score_profiles(flat, own="ours").axes
    assert axis.get_yscale() == "linear" and not axis.texts


@pytest.mark.parametrize(
    "draw",
    [
        depth_plots.removed_by_criterion,
        importance_plots.level_panels,
        lambda table: importance_plots.levels_and_differences(table, table),
        lambda table: importance_plots.score_profiles(table, own="a"),
        lambda table: depth_plots.depth_curves(table, n_layers=4),
        depth_plots.healing_curves,
        lambda table: depth_plots.differences(table, margin=1, label=""),
        lambda table: healing_plots.levels_beside_differences(
            table, table, labels=("", ""), references=table
        ),
        lambda table: healing_plots.removed_at_depths(table, n_layers=4),
        lambda table: healing_plots.rank_levels(table, before="pruned", after="healed"),
        healing_plots.rate_panels,
        lambda table: healing_plots.training_runs(table, references={}),
    ],
)
def test_depth_figures_refuse_other_tables(draw):
    with pytest.raises(ValueError, match="the table needs rows and the columns"):
        draw(pd.DataFrame({"panel": ["a"]}))


# --- levels beside differences, ranks, rates, trainings -------------------------------------------


def level_tables():
    """Levels of three rows before and after healing, and two differences from the third."""
    levels = pd.DataFrame(
        [
            ("8 layers", name, series, value, value - 0.1, value + 0.1)
            for name, series, value in (
                ("a", "healed", 4.0),
                ("b", "healed", 5.0),
                ("c", "healed", 6.0),
                ("a", "pruned", 19.0),
            )
        ],
        columns=["panel", "name", "series", "value", "low", "high"],
    )
    differences = pd.DataFrame(
        [("8 layers", "a", "healed", -2.0, -3, -1, -2.5, -1.5)]
        + [("8 layers", "b", "healed", 9.0, 8, 10, 8.5, 9.5)],
        columns=["panel", "name", "series", "difference", "low", "high", "low_90", "high_90"],
    )
    lines = pd.DataFrame({"panel": ["8 layers"], "name": ["ln V"], "value": [10.8]})
    return levels, differences, lines


def test_levels_and_differences_of_a_row_stand_at_one_height():
    levels, differences, lines = level_tables()
    figure = healing_plots.levels_beside_differences(
        levels, differences, labels=("loss", "difference"), references=lines, margin=0.5
    )
    left, right = figure.axes
    healed, pruned, guess = left.lines
    assert healed.get_xydata().tolist() == [[4, 0.12], [5, -1], [6, -2]]
    assert pruned.get_xydata().tolist() == [[19, -0.12]], "two of one row stand apart"
    assert guess.get_xdata() == [10.8, 10.8] and guess.get_linestyle() == "-."
    assert right.lines[-1].get_xydata().tolist() == [[-2, 0], [9, -1]]
    thin, thick = (
        [segment[:, 0].tolist() for segment in bars.get_segments()] for bars in right.collections
    )
    assert (thin, thick) == ([[-3, -1], [8, 10]], [[-2.5, -1.5], [8.5, 9.5]])
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["a", "b", "c"]
    assert left.get_ylim() == right.get_ylim() == (-2.4, 0.6), "no row on the frame"


def test_levels_and_differences_beyond_an_axis_stand_at_its_edge():
    levels, differences, lines = level_tables()
    figure = healing_plots.levels_beside_differences(
        levels,
        differences,
        labels=("loss", "difference"),
        references=lines,
        limits=(3, 12),
        difference_limits=(-1.5, 1.5),
    )
    left, right = figure.axes
    assert left.get_xlim() == (3, 12) and right.get_xlim() == (-1.5, 1.5)
    assert [(text.get_text(), text.xy) for text in left.texts] == [("19.0 \u2192", (12, -0.12))]
    assert [(text.get_text(), text.xy) for text in right.texts] == [
        ("\u2190 \u22122.0", (-1.5, 0)),
        ("9.0 \u2192", (1.5, -1)),
    ]


def test_removed_layers_have_a_panel_for_each_number():
    table = pd.DataFrame(
        {
            "rule": ["a", "b", "a", "b"],
            "n_dropped": [2, 2, 1, 1],
            "layers": ["0 3", "1 2", "3", "1"],
        }
    )
    one, two = healing_plots.removed_at_depths(table, n_layers=4).axes
    assert [axis.get_title() for axis in (one, two)] == ["1 of 4 layers", "2 of 4 layers"]
    filled = [axis.collections[0].get_array().reshape(2, 4).tolist() for axis in (one, two)]
    assert filled == [[[0, 0, 0, 1], [0, 1, 0, 0]], [[1, 0, 0, 1], [0, 1, 1, 0]]]


def test_rank_levels_say_the_values_that_make_the_ranks():
    table = pd.DataFrame(
        {"panel": "8 layers", "name": ["a", "healed"], "before": [7.0, 5.0], "after": [4.0, 4.5]}
    )
    figure = healing_plots.rank_levels(table, before="before", after="after", marked=["healed"])
    (axis,) = figure.axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[2, 1], [1, 2]]
    assert [line.get_color() for line in axis.lines] == ["0.6", plots.colour_of("healed")]
    said = [text.get_text() for text in axis.texts]
    assert said == ["a  7.00", "4.00  a", "healed  5.00", "4.50  healed"]


def test_rate_panels_name_what_lies_above_them():
    table = pd.DataFrame(
        {
            "panel": "reverse order",
            "series": "LoRA",
            "rate": [1e-3, 3e-3, 1e-2, 3e-2],
            "loss": [5.0, 4.0, 4.5, 12.0],
        }
    )
    (axis,) = healing_plots.rate_panels(table).axes
    # The median is 4.75: the panel reaches 2.5 * 0.75 above the lowest loss, and has room for a
    # mark there.
    top = 4 + 1.06 * 1.875
    assert axis.get_ylim() == pytest.approx((4 - 0.08 * 1.875, top))
    assert axis.lines[1].get_xydata().tolist() == [[3e-3, 4]], "the lowest is filled"
    assert [(text.get_text(), text.xy) for text in axis.texts] == [("12.0 \u2192", (3e-2, top))]
    (same,) = healing_plots.rate_panels(alike_labels(table)).axes
    assert same.lines[1].get_xydata().tolist() == [[3e-3, 4]]
    # A run that failed draws no mark, and moves none.
    failed = table[-1:].assign(series="DoRA", loss=np.nan)
    (beside,) = healing_plots.rate_panels(pd.concat([table, failed])).axes
    assert beside.get_ylim() == axis.get_ylim() and not len(beside.lines[3].get_xdata())
    assert [text.get_text() for text in beside.texts] == ["12.0 \u2192"]
    further = pd.concat([table, table[-1:].assign(series="QLoRA", loss=20.04)])
    (axis,) = healing_plots.rate_panels(further).axes
    assert [text.get_text() for text in axis.texts] == ["12.0 to 20.0 \u2192"]


def test_training_runs_have_a_line_each():
    table = pd.DataFrame(
        {
            "panel": ["far"] * 4 + ["near"] * 2,
            "series": "LoRA",
            "run": [0, 0, 1, 1, 0, 0],
            "tokens": [0, 1000] * 3,
            "loss": [20.0, 7, 20, 8, 5, 4],
        }
    )
    far, near = healing_plots.training_runs(table, references={"ln V": 10.8}).axes
    lines = [line.get_xydata().tolist() for line in far.lines[:2]]
    assert lines == [[[0, 20], [1, 7]], [[0, 20], [1, 8]]]
    assert far.lines[2].get_ydata() == [10.8, 10.8] and len(near.lines) == 1


def test_levels_and_differences_stand_below_the_heading_of_their_group():
    table = pd.DataFrame(
        {
            "group": ["small", "small", "large"],
            "pair": ["a - b", "c - b", "a - b"],
            "first": [0.1, 0.2, 0.3],
            "second": [0.4, 0.4, 0.5],
            "difference": [-0.3, -0.2, -0.2],
            "low": [-0.4, -0.3, -0.3],
            "high": [-0.2, -0.1, -0.1],
            "low_90": [-0.38, -0.28, -0.28],
            "high_90": [-0.22, -0.12, -0.12],
            "margin": [0.05, 0.05, 0.1],
        }
    )
    figure = depth_plots.levels_and_differences(table, level="accuracy", label="difference")
    left, right = figure.axes
    second, first = left.lines
    assert first.get_xydata().tolist() == [[0.1, -1], [0.2, -2], [0.3, -4]]
    assert second.get_xdata().tolist() == [0.4, 0.4, 0.5]
    shown = dict(
        zip(left.get_yticks(), (text.get_text() for text in left.get_yticklabels()), strict=True)
    )
    assert shown == {0: "small", -1: "a - b", -2: "c - b", -3: "large", -4: "a - b"}
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.1, 0.1, 0.2])
    bars = [line.get_segments()[0][:, 0].tolist() for line in right.collections]
    assert bars == [[-0.4, -0.2], [-0.38, -0.22]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["second", "first"]
    assert right.get_xscale() == "linear"
    references = pd.DataFrame(
        [("small", "unpruned", 0.6), ("small", "floor", 0.0), ("large", "floor", 0.1)],
        columns=["group", "name", "value"],
    )
    figure = depth_plots.levels_and_differences(
        table,
        level="accuracy",
        label="difference",
        sides=("deepest", "closest"),
        references=references,
        linear=0.1,
    )
    left, right = figure.axes
    lines = [line.get_segments()[0].tolist() for line in left.collections[1:]]
    assert lines == [[[0.6, -2.5], [0.6, -0.5]], [[0, -2.5], [0, -0.5]], [[0.1, -4.5], [0.1, -3.5]]]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["closest", "deepest", "unpruned", "floor"], "a line is named once"
    assert right.get_xscale() == "symlog"


def test_names_of_ones_own_have_looks_of_their_own():
    looks = plots.looks_of(["mine", "taylor", "yours", "mine"])
    assert looks["taylor"] == plots.ENTITIES["taylor"]
    assert len(set(looks.values())) == 3 and list(looks) == ["mine", "taylor", "yours"]


def test_twenty_names_of_ones_own_have_twenty_looks(monkeypatch):
    monkeypatch.setattr(plots, "MET", {})
    names = [f"rule {number}" for number in range(20)]
    assert len({*plots.looks_of(names).values()}) == 20
    assert len({plots.look_of(name) for name in names}) == 20
    assert [plots.look_of(name) for name in names[:6]] == [*plots.OF_FREE]


def test_names_that_figures_draw_one_by_one_have_looks_of_their_own():
    mine, yours = (plots.look_of(name) for name in ("rank 4 of mine", "rank 16 of mine"))
    assert mine != yours and plots.look_of("rank 4 of mine") == mine
    assert plots.colour_of("rank 16 of mine") == yours[0]
    # Two entities of one look, in one figure.
    assert plots.ENTITIES["healed"] == plots.ENTITIES["LoRA"]
    looks = plots.looks_of(["healed", "LoRA"])
    assert looks["healed"] == plots.ENTITIES["healed"] != looks["LoRA"]


def test_a_group_is_drawn_together_wherever_its_rows_stand():
    ends = {"difference": 0.1, "low": 0.0, "high": 0.2, "low_90": 0.05, "high_90": 0.15}
    rows = [("A", "r1"), ("B", "r1"), ("A", "r2")]
    table = pd.DataFrame(
        [{"panel": "text", "group": group, "row": row, **ends} for group, row in rows]
    )
    (axis,) = cost_plots.grouped_differences(table, margin=0.1, label="nats").axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    order = [name for _, name in sorted(zip(-axis.get_yticks(), names, strict=True))]
    assert order == ["A", "r1", "r2", "B", "r1"]


def test_ticks_lie_within_a_panel_and_what_is_missing_draws_no_other_mark():
    rows = [
        {"panel": "p", "name": "a", "value": 1.0, "low": 0.9, "high": 1.1, "runs": [0.5, 1.6]},
        {"panel": "p", "name": "b", "value": 1.2, "low": 1.1, "high": 1.3, "series": "first"},
    ]
    table = pd.concat([pd.DataFrame([row]) for row in rows])
    figure = round_plots.interval_grid([table])
    low, high = figure.axes[0].get_xlim()
    assert low < 0.5 and high > 1.6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first"]


def test_names_on_a_hub_and_paths_are_not_translated():
    for name in ("me/full", "results/full/table.csv", "/data/deepest", "~/deepest"):
        assert reader_names.in_words(name) == name
    assert reader_names.in_words("full - unpruned") == "all weights minus unpruned"
    assert reader_names.in_words("seconds / full") == "seconds / all weights"


def test_legends_name_what_any_panel_shows():
    scores = pd.DataFrame(
        {"model": ["a", "b", "b"], "layer": [0, 1, 0], "definition": ["x", "y", "y"], "value": 1.0}
    )
    axes = plots.layer_scores(scores).axes
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["x", "y"]
    assert axes[1].lines[0].get_xdata().tolist() == [0, 1]
    drawn = pd.DataFrame(
        {"model": ["a", "a", "b"], "removed": ["1", "2", "1"], "source": ["xsum", "xsum", "quac"]}
    ).assign(n_samples=1, share=0.5)
    figure = plots.choice_agreement(drawn)
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["XSum", "QuAC"]


def test_levels_of_ones_own_are_drawn_and_layers_that_are_none_refused(curves):
    baselines = pd.DataFrame({"panel": curves["panel"].iloc[:1], "name": "mine", "value": 0.5})
    figure = depth_plots.depth_curves(curves, n_layers=4, baselines=baselines)
    assert "mine" in [text.get_text() for text in figure.legends[0].get_texts()]
    with pytest.raises(ValueError, match="each layer of a must be .* from 0 to 7, got 9"):
        depth_plots.removed_layers({"a": [1, 9]}, n_layers=8)


def test_sizes_that_no_block_has_and_what_is_no_table_are_refused(blocks):
    for sizes in ([2, 80], []):
        with pytest.raises(ValueError, match="block_sizes must be among those of the table"):
            plots.distance_curves(blocks, block_sizes=sizes)
    with pytest.raises(ValueError, match="the table must be a DataFrame, got dict"):
        plots.distance_curves({"start": [0]})


def test_large_marks_look_like_the_curves_that_they_belong_to(curves):
    of_ones_own = curves.assign(series=curves["series"].replace({"pruned": "mine"}))
    also = of_ones_own.assign(series="yours")
    both = pd.concat([of_ones_own, also], ignore_index=True)
    figure = depth_plots.depth_curves(both, n_layers=4, more_questions=both)
    twins = {"yours": "mine"}
    depth_plots.depth_curves(both, n_layers=4, more_questions=both, dashed=twins)
    curve = {line.get_label(): line for line in figure.axes[0].lines}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"mine", "yours"} <= {*names}
    marks = [bar.lines[0] for bar in figure.axes[0].containers]
    of_curves = {
        (line.get_color(), line.get_marker())
        for line in curve.values()
        if len(line.get_xdata()) > 1 and line.get_linestyle() == "-"
    }
    assert {(mark.get_color(), mark.get_marker()) for mark in marks} <= of_curves
    assert len({mark.get_color() for mark in marks}) == both["series"].nunique()
