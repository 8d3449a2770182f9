"""Figures show the numbers of their tables, refuse tables without them, and repeat their bytes."""

import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pruning_utils import depth_plots, evidence, plots, results

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
    raw = figure.axes[1].collections[0].get_array().reshape(N_LAYERS, N_LAYERS)
    assert (raw.min(), raw.max()) == (0.1, 0.3)


def test_curves_join_their_minima(blocks):
    figure = plots.distance_curves(blocks, block_sizes=[1, 2, 3])
    *curves, minima = figure.axes[0].lines
    assert [len(curve.get_xdata()) for curve in curves] == [6, 5, 4]
    assert minima.get_xydata().tolist() == [[2, 0.1], [4, 0.1], [2, 0.1]]


def test_stages_show_means_and_the_chosen_block(path_tables):
    figure = plots.stages(*path_tables)
    first, left, right = figure.axes
    assert first.lines[1].get_xydata().tolist() == [[2, 0.1]]
    assert [text.get_text() for text in left.texts] == [
        f"{np.exp(mean):,.0f}" for mean in (3.2, 6.2, 4.2)
    ]
    assert len(right.lines) == 2


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
        {"source": ["xsum", "quac"], "n_samples": [1, 4], "start": [3, 5], "share": [1.0, 0.5]}
    )
    figure = plots.chosen_starts(drawn, n_layers=N_LAYERS)
    assert [axis.collections[0].get_offsets().tolist() for axis in figure.axes] == [
        [[3, 0]],
        [[5, 1]],
    ]
    chosen = pd.DataFrame({"model": "a", "n_layers": 8, "block_size": [2, 4], "start": [4, 2]})
    line = plots.relative_starts(chosen, chosen.assign(model="b")).axes[0].lines[-1]
    assert line.get_xydata().tolist() == [[0.25, 0.5], [0.5, 0.25]]


@pytest.mark.parametrize(
    "draw, lacking",
    [
        (plots.distance_map, "block_size"),
        (plots.distance_curves, "start"),
        (plots.layer_scores, "definition"),
        (lambda table: plots.chosen_starts(table, n_layers=4), "share"),
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
    figure = plots.distance_map(blocks)
    plots.save_figure(figure, "99_test", tables=[table], profile="smoke")
    assert [text.get_text() for text in figure.texts] == ["smoke profile: not a result"]


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
    assert len(depth_plots.depth_curves(curves, n_layers=4, columns=3).axes) == 3, (
        "an empty place is hidden"
    )


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


def test_training_curves_have_a_line_for_each_method():
    table = pd.DataFrame(
        [
            {"panel": panel, "series": method, "tokens": 1000 * step, "loss": loss - step}
            for panel in ("6 layers", "14 layers")
            for method, loss in (("all weights", 9), ("LoRA", 8))
            for step in range(3)
        ]
    )
    figure = depth_plots.training_curves(table)
    assert [[line.get_ydata().tolist() for line in axis.lines] for axis in figure.axes] == 2 * [
        [[9, 8, 7], [8, 7, 6]]
    ]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 1, 2], "thousands"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all weights", "LoRA"]
    later = depth_plots.training_curves(
        table[(table["panel"] != "6 layers") | (table["series"] != "LoRA")]
    )
    assert [text.get_text() for text in later.legends[0].get_texts()] == ["all weights", "LoRA"], (
        "missing in the first"
    )


def test_rate_curves_fill_the_lowest_point_of_each_method():
    table = pd.DataFrame(
        [
            {"panel": panel, "series": method, "rate": rate, "loss": loss}
            for panel in ("taylor", "unpruned")
            for method, losses in (("LoRA", (3, 1, 2)), ("head", (5, 4)))
            for rate, loss in zip((1e-2, 3e-3, 1e-3), losses, strict=False)
        ]
    )
    for axis in depth_plots.rate_curves(table).axes:
        assert [line.get_xydata().tolist() for line in axis.lines] == [
            [[1e-3, 2], [3e-3, 1], [1e-2, 3]],
            [[3e-3, 1]],
            [[3e-3, 4], [1e-2, 5]],
            [[3e-3, 4]],
        ]
        assert [line.get_fillstyle() for line in axis.lines] == ["none", "full", "none", "full"]
        assert axis.get_xscale() == "log"


def test_rate_curves_show_where_the_methods_differ_and_stand_in_rows_of_three():
    table = pd.DataFrame(
        [
            {"panel": panel, "series": method, "rate": rate, "loss": loss}
            for panel in "abcd"
            for method, losses in (("LoRA", (1, 2, 90)), ("head", (4, 3, 5)))
            for rate, loss in zip((1e-3, 3e-3, 1e-2), losses, strict=True)
        ]
    )
    shown = [axis for axis in depth_plots.rate_curves(table).axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [*"abcd"]
    assert [
        (axis.get_subplotspec().rowspan.start, axis.get_subplotspec().colspan.start)
        for axis in shown
    ] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    for axis in shown:
        low, high = axis.get_ylim()
        assert high == 5 and 0.5 < low < 1, "the best of LoRA is 1, that of the head 3"


def test_a_swap_map_has_a_cell_for_each_pair():
    table = pd.DataFrame(
        [
            {"panel": panel, "spared": spared, "dropped": dropped, "change": spared - dropped}
            for panel in ("taylor", "reverse order")
            for spared in (2, 5)
            for dropped in (0, 1, 7)
        ]
    )
    maps = [axis for axis in depth_plots.swap_map(table).axes if axis.get_title()]
    for axis in maps:
        mesh = axis.collections[0]
        assert mesh.get_array().tolist() == [[2, 1, -5], [5, 4, -2]] and mesh.get_clim() == (-5, 5)
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "7"]
        assert [tick.get_text() for tick in axis.get_yticklabels()] == ["2", "5"]
    assert [axis.get_title() for axis in maps] == ["taylor", "reverse order"]


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


def test_rank_changes_join_the_ranks_of_each_name():
    table = pd.DataFrame(
        {
            "panel": "8 layers",
            "name": ["taylor", "reverse order", "random"],
            "pruned": [5.0, 18, 7],
            "healed": [4.0, 3.9, 4.5],
        }
    )
    (axis,) = depth_plots.rank_changes(table, before="pruned", after="healed").axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[1, 2], [3, 1], [2, 3]]
    assert [(text.get_text(), text.xy) for text in axis.texts][:2] == [
        ("taylor", (0, 1)),
        ("taylor", (1, 2)),
    ]
    assert axis.get_ylim() == (3.5, 0.5), "the lowest on top"


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


def test_speed_curves_show_ratios_with_their_spread():
    table = pd.DataFrame(
        [
            {
                "panel": "first token",
                "series": shape,
                "batch_size": batch,
                "value": value,
                "low": value - 0.1,
                "high": value + 0.2,
            }
            for shape, value in (("depth", 0.8), ("width", 1.1))
            for batch in (1, 16)
        ]
    )
    first, *hidden = depth_plots.speed_curves(table, columns=2).axes
    depth, width, unity = first.lines[0], first.lines[3], first.lines[-1]
    assert depth.get_xydata().tolist() == [[0, 0.8], [1, 0.8]] and width.get_ydata().tolist() == [
        1.1,
        1.1,
    ]
    spread = first.collections[0].get_segments()[0][:, 1]
    assert spread.tolist() == pytest.approx([0.7, 1.0]) and unity.get_ydata()[0] == 1
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["1", "16"] and not hidden[
        0
    ].get_visible()


def test_the_roof_is_the_lower_of_both_limits():
    table = pd.DataFrame(
        {
            "series": ["depth", "width"],
            "stage": "generating",
            "intensity": [1.0, 1.0],
            "attained": [2e9, 1e9],
        }
    )
    (axis,) = depth_plots.roofline(table, flops_per_second=1e11, bytes_per_second=1e10).axes
    across, roof = axis.lines[0].get_data()
    assert (
        roof == pytest.approx(np.minimum(across * 10, 100))
        and roof.max() == 100
        and roof.min() == 10 * across.min()
    )
    assert [line.get_ydata().tolist() for line in axis.lines[1:]] == [[2], [1]], "billions a second"
    assert [(text.get_text(), text.xy) for text in axis.texts] == [("generating", (1, 1))]


@pytest.mark.parametrize(
    "draw",
    [
        depth_plots.removed_by_criterion,
        depth_plots.speed_curves,
        depth_plots.training_curves,
        depth_plots.rate_curves,
        depth_plots.swap_map,
        lambda table: depth_plots.rank_changes(table, before="pruned", after="healed"),
        lambda table: depth_plots.roofline(table, flops_per_second=1, bytes_per_second=1),
        lambda table: depth_plots.depth_curves(table, n_layers=4),
        depth_plots.healing_curves,
        lambda table: depth_plots.differences(table, margin=1, label=""),
    ],
)
def test_depth_figures_refuse_other_tables(draw):
    with pytest.raises(ValueError, match="the table needs rows and the columns"):
        draw(pd.DataFrame({"panel": ["a"]}))
