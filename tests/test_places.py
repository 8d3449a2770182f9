"""Blocks at every place against one at a time, their controls, and the curves they stand beside."""

import numpy as np
import pandas as pd
import pytest
from tiny_model import N_LAYERS, make_study

from pruning_utils import data, depth_plots, evidence, models, plots, selection, similarity, surgery
from pruning_utils.evaluation import token_losses
from pruning_utils.studies import depth, places


def test_every_place_of_every_size_is_a_point():
    points = places.place_points([1, 3], 5, 7)
    assert [point["layers"] for point in points] == [*"01234", "0 1 2", "1 2 3", "2 3 4"]
    assert {(point["recipe"], point["seed"]) for point in points} == {("", 7)}


@pytest.mark.parametrize("size", [0, 5])
def test_sizes_that_leave_nothing_to_compare_are_refused(size):
    with pytest.raises(ValueError, match=rf"block_sizes must lie in \[1, 4\], got {size}"):
        places.place_points([1, size], 5)


def test_random_places_are_different_ones_of_all_and_depend_on_the_seed_alone():
    every = places.place_points([3], 12)
    first, again, other = (places.random_points(3, 12, 6, seed) for seed in (0, 0, 1))
    assert first == again and first != other
    starts = [every.index(point) for point in first]
    assert starts == sorted(set(starts)) and len(starts) == 6
    assert places.random_points(3, 12, 99) == every
    seen = {point["layers"] for seed in range(40) for point in places.random_points(3, 12, 2, seed)}
    assert seen == {point["layers"] for point in every}
    with pytest.raises(ValueError, match="n_blocks must be a whole number of at least 1, got 0"):
        places.random_points(3, 12, 0)


def test_rules_are_compared_with_blocks_on_the_same_questions():
    right = {("a", 1): (1, 0, 0), ("a", 2): (1, 1, 0), ("b", 1): (0, 0, 1)}
    blocks = pd.DataFrame(
        [
            {"start": start, "dataset": task, "item": item, "right": given[place]}
            for (task, item), given in right.items()
            for place, start in ((1, 4), (2, 7))
        ]
    )
    rule = pd.DataFrame(
        [
            {"rule": "closest", "dataset": task, "item": item, "right": given[0]}
            for (task, item), given in [*reversed(right.items()), (("b", 2), (1,))]
        ]
    )
    (found,) = places.minus_blocks(rule, blocks).values()
    assert list(found.index) == sorted(right) and list(found.columns) == [4, 7]
    assert found.to_numpy().tolist() == [[1, 1], [0, 1], [0, -1]]
    with pytest.raises(ValueError, match="closest lacks 1 of 3 questions of blocks"):
        places.minus_blocks(rule[rule["dataset"] == "a"], blocks)


def test_losses_are_those_of_models_without_each_block(tiny, tmp_path):
    points = places.place_points([2], N_LAYERS)
    asked = {"tasks": {}, "limit": None, "texts": {"xsum": 2}, "dtype": "float32"}
    study = make_study(tiny, tmp_path, points, **asked)
    rows = pd.DataFrame([{**point, **row} for point in points for row in study(point)])
    found = places.with_sizes(rows)
    assert set(found["block_size"]) == {2}
    assert found["start"].tolist() == list(np.repeat(range(N_LAYERS - 1), 2))
    model, tokenizer = models.load_model(tiny, dtype="float32")
    windows = data.document_windows(tokenizer, 2, study.seq_len, source="xsum")
    expected = token_losses(surgery.drop_layers(model, (1, 2)), windows).mean(1)
    here = found[found["start"] == 1].sort_values("item")
    assert here["nll"].to_numpy() == pytest.approx(expected.numpy(), rel=1e-5)


def test_distances_are_those_of_the_ends_of_each_block(tiny):
    rows = places.place_distances(
        {"source": "xsum"},
        model=tiny,
        revision=None,
        dtype="float32",
        block_sizes=[1, 3],
        n_samples=2,
        seq_len=16,
        seed=1,
    )
    model, tokenizer = models.load_model(tiny, dtype="float32")
    windows = data.calibration_windows(tokenizer, 2, 16, seed=1)
    expected = similarity.measure_similarity(model, windows).angular_distance
    assert len(rows) == N_LAYERS + N_LAYERS - 2
    for row in rows:
        start = row["start"]
        assert row["distance"] == pytest.approx(expected[start, start + row["block_size"]])


def test_the_nearest_block_without_a_layer_is_found_on_either_side():
    block = selection.Block(11, 8, 0.1)
    assert places.nearest_without(11, block, 30).layers == tuple(range(12, 20))
    assert places.nearest_without(18, block, 30).layers == tuple(range(10, 18))
    at_the_end = selection.Block(22, 8, 0.1)
    assert places.nearest_without(23, at_the_end, 30).start == 15, "none fits behind it"
    assert places.nearest_without(29, selection.Block(21, 8, 0.1), 30).start == 21
    middle = selection.Block(2, 3, 0.1)
    assert places.nearest_without(3, middle, 8).start == 0, "of two at the same distance the first"
    with pytest.raises(ValueError, match="outside of some block of 5 of 6 layers, got 3"):
        places.nearest_without(3, selection.Block(0, 5, 0.1), 6)


@pytest.fixture
def losses():
    """Losses of a whole model, of two rules, and of one rule healed with two seeds."""
    rng = np.random.default_rng(0)
    rows = [
        {"rule": rule, "n_dropped": n_dropped, "seed": seed, "healed": healed}
        | {"model": "m", "dataset": "xsum", "item": item, "nll": rng.normal(n_dropped)}
        for healed, seeds in ((False, [0]), (True, [1, 2]))
        for rule, n_dropped in (("none", 0), ("similarity", 2), ("deepest", 2), ("similarity", 4))
        for seed in seeds
        for item in range(5)
        if not (healed and rule != "similarity")
    ]
    table = pd.DataFrame(rows)
    watched = table[table["healed"]].assign(dataset="healing eval")
    return table[~table["healed"]], pd.concat([table[table["healed"]], watched])


def test_curves_of_losses_begin_at_the_whole_model(losses):
    found = depth.loss_curves(*losses, "nll").set_index(["series", "n_dropped"])
    assert list(found.index) == [
        *(("closest block", n) for n in (0, 2, 4)),
        *(("deepest but last", n) for n in (0, 2)),
        *(("closest block, healed", n) for n in (0, 2, 4)),
    ]
    unhealed, healed = losses
    whole = unhealed.loc[unhealed["rule"] == "none", "nll"]
    for series in ("closest block", "deepest but last", "closest block, healed"):
        assert found.loc[(series, 0), ["value", "low", "high"]].tolist() == pytest.approx(
            evidence.mean_interval(whole)
        )
    rows = healed[(healed["dataset"] == "xsum") & (healed["n_dropped"] == 4)]
    expected = evidence.two_factor_interval(rows.pivot(index="item", columns="seed", values="nll"))
    assert found.loc[("closest block, healed", 4), ["value", "low", "high"]].tolist() == (
        pytest.approx([expected.value, expected.low, expected.high])
    )


def test_slopes_of_two_curves_are_compared_at_their_largest():
    first, second = [0.0, 3, 4], [0.0, 2, 8]
    means = np.array([[first, second], [second, first]])
    assert depth.slope_difference(means, places=[0, 1, 3]).tolist() == [0, 0]
    assert depth.slope_difference(means, places=[0, 2, 3]).tolist() == [1.5 - 6, 6 - 1.5]


def test_the_share_that_healing_takes_back_is_that_of_the_cost():
    accuracy, loss = [0.5, 0.1, 0.3], [3.0, 5.0, 3.5]
    found = depth.share_recovered(np.array([accuracy, loss, [2.0, 2.0, 3.0]]))
    assert found[:2].tolist() == pytest.approx([0.5, 0.75]) and np.isnan(found[2])
    assert depth.share_recovered(accuracy).shape == ()


def test_figures_mark_blocks_at_their_loss_and_distance():
    shown = pd.DataFrame(
        [
            {"panel": "smollm2-135m", "row": row, "start": start, "value": start + shift}
            for shift, row in ((0, "one layer"), (10, "a quarter"))
            for start in range(4)
        ]
    ).assign(low=lambda rows: rows["value"] - 1, high=lambda rows: rows["value"] + 1)
    ends = pd.DataFrame({"panel": "smollm2-135m", "start": range(4), "distance": [4, 3, 2, 1]})
    levels = pd.DataFrame(
        [{"panel": "smollm2-135m", "name": name, "value": 2} for name in ("unpruned", "ln V")]
    )
    figure = depth_plots.place_losses(
        shown, ends, {"smollm2-135m": {"closest block": 3, "control": 1}}, baselines=levels
    )
    single, block, distance = figure.axes
    assert [axis.get_title() for axis in figure.axes] == [
        "SmolLM2-135M-Instruct: one layer",
        "SmolLM2-135M-Instruct: a quarter",
        "",
    ]
    assert len(single.lines) == 3, "losses, and two levels"
    assert [line.get_xydata().tolist() for line in block.lines[-2:]] == [[[3, 13]], [[1, 11]]]
    assert [line.get_xydata().tolist() for line in distance.lines[-2:]] == [[[3, 1]], [[1, 3]]]
    assert block.lines[-2].get_color() == plots.colour_of("closest block")
    for lacking in (shown.drop(columns="start"), shown.head(0)):
        with pytest.raises(ValueError, match="the table needs rows and the columns"):
            depth_plots.place_losses(lacking, ends, {}, baselines=levels)


def test_levels_stand_at_the_place_of_their_block():
    table = pd.DataFrame(
        {
            "panel": ["one", "one", "two"],
            "series": ["random block", "closest block", "random block"],
            "start": [3, 5, 0],
            "value": [0.125, 0.25, -0.25],
            "low": [0.0, 0.125, -0.5],
            "high": [0.25, 0.5, 0.0],
        }
    )
    lines = pd.DataFrame({"panel": ["one", "two"], "name": ["floor"] * 2, "value": [0.0, 0.01]})
    figure = depth_plots.place_levels(table, baselines=lines, label="points")
    first, second = figure.axes
    drawn = {
        bars.lines[0].get_xdata()[0]: (
            bars.lines[0].get_ydata()[0],
            bars.lines[2][0].get_segments()[0][:, 1].tolist(),
        )
        for bars in first.containers
    }
    assert drawn == {3: (0.125, [0.0, 0.25]), 5: (0.25, [0.125, 0.5])}
    (line,) = [line for line in second.lines if len(line.get_xdata()) == 2]
    assert set(line.get_ydata()) == {0.01} and second.get_title() == "two"
    (legend,) = figure.legends
    named = {text.get_text() for text in legend.get_texts()}
    assert named == {"random block", "closest block", "floor"}
