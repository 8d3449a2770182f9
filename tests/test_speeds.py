"""Points, ratios and verdicts of the times of shapes, on made data."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pruning_utils import evidence
from pruning_utils.studies import shapes, speeds

NAMES = {"depth": "fewer layers", "width": "narrower layers"}
NAMED = ("depth", "unpruned")
REMOVED = {2: "3 4", 5: "1 2 3 4 5"}


def made_times(ratios: dict, *, n_runs: int = 5, sample: str = "round") -> pd.DataFrame:
    """Seconds of the unpruned model, and of shapes that take a share of them, with some noise."""
    rng = np.random.default_rng(0)
    rows = []
    for batch, prompt in ((1, 12), (4, 12)):
        for (n_dropped, shape), ratio in {(0, "unpruned"): 1.0, **ratios}.items():
            for run in range(n_runs):
                row = {"n_dropped": n_dropped, "shape": shape, "run": 0, sample: run}
                row |= {"batch_size": batch, "prompt_tokens": prompt}
                seconds = 0.05 * batch * ratio * np.exp(rng.normal(scale=0.01))
                rows.append({**row, "per_token_seconds": seconds})
    return pd.DataFrame(rows)


def judged(ratios: dict) -> dict:
    """The verdicts by part, at one text."""
    rows = speeds.judged_ratios(
        speeds.round_ratios(made_times(ratios)),
        batch=1,
        bound=0.95,
        n_layers=10,
        sizes={2: "larger size", 3: "middle size", 4: "smaller size"},
        names=NAMES,
        cell="Speed",
        model="made",
        notebook="07_depth_against_width",
    )
    return {row["part"]: row for row in rows}


def test_every_shape_of_a_size_is_asked_beside_the_unpruned_model():
    found = shapes.sized_points(REMOVED, {"depth": 0, "width": 3})
    assert [(row["n_dropped"], row["shape"]) for row in found] == [
        (0, "unpruned"),
        *((n, shape) for n in REMOVED for shape in ("depth", "width")),
    ]
    assert [row["layers"] for row in found] == ["", *(REMOVED[n] for n in (2, 2, 5, 5))]
    assert [row["n_kv_heads"] for row in found] == [0, 0, 3, 0, 3]


@pytest.mark.parametrize(
    "its, expected",
    [
        (3, {"depth": 0, "width": 3, "fewer heads": 2}),
        (1, {"depth": 0, "width": 1}),  # two thirds of a head cannot stay
        (6, {"depth": 0, "width": 6, "fewer heads": 4}),
    ],
)
def test_a_model_with_other_heads_keeps_the_same_share_of_them(its, expected):
    given = {"depth": 0, "width": 3, "fewer heads": 2}
    assert shapes.shapes_of_heads(given, 3, its) == expected


@pytest.mark.parametrize(("first", "its"), [(0, 3), (3, 0), (3, -1), (3, 1.0)])
def test_heads_that_no_model_has_are_refused(first, its):
    with pytest.raises(ValueError, match="whole number"):
        shapes.shapes_of_heads({"depth": 0, "width": 3}, first, its)


def test_a_narrow_model_loses_no_layers_while_it_is_timed():
    sizes = pd.DataFrame(shapes.sized_points(REMOVED, {"depth": 0, "width": 3}))
    sizes["width"] = ["", "", "40 3", "", "20 3"]
    found = shapes.timed_points(sizes, batch_sizes=[1, 4], prompts=[12, 99])
    assert [row["layers"] for row in found] == 4 * ["", "3 4", "", "1 2 3 4 5", ""]
    assert [row["batch_size"] for row in found] == 2 * ([1] * 5 + [4] * 5)
    assert [row["prompt_tokens"] for row in found] == [12] * 10 + [99] * 10


def test_in_rounds_every_shape_is_asked_for_again():
    sizes = pd.DataFrame(shapes.sized_points({2: "3 4"}, {"depth": 0})).assign(width="")
    asked = {"batch_sizes": [1], "prompts": [12, 99]}
    once = shapes.timed_points(sizes, **asked)
    found = shapes.timed_points(sizes, **asked, rounds=3)
    assert [point.pop("round") for point in found] == [0] * 4 + [1] * 4 + [2] * 4
    assert found == 3 * once


def test_ratios_are_geometric_means_of_rounds_and_paired_by_them():
    times = made_times({(2, "depth"): 0.8})
    # All is slower in one round, which no ratio shows.
    times.loc[times["round"] == 3, "per_token_seconds"] *= 2
    found = speeds.round_ratios(times)
    seconds = times.query("batch_size == 1").pivot(
        index="round", columns="shape", values="per_token_seconds"
    )
    each = np.log(seconds["depth"] / seconds["unpruned"])
    row = found.rows.set_index("batch").loc[1]
    assert row["ratio"] == pytest.approx(np.exp(each.mean())) and row["n"] == 5
    assert tuple(row[["low", "high"]]) == pytest.approx(
        tuple(np.exp(evidence.mean_interval(each)))[1:]
    )
    assert found.logarithms[12, 1, 2, "depth"].to_numpy() == pytest.approx(each.to_numpy())


def test_runs_of_a_process_in_a_round_are_one_sample():
    times = made_times({(2, "depth"): 0.8})
    twice = pd.concat([times, times.assign(run=1)], ignore_index=True)
    once, again = (speeds.round_ratios(table).rows for table in (times, twice))
    pd.testing.assert_frame_equal(once, again)


def test_runs_of_two_processes_are_not_paired():
    times = made_times({(2, "depth"): 0.8}, sample="run").query("batch_size == 1")
    own, whole = (np.log(times.query("shape == @shape")["per_token_seconds"]) for shape in NAMED)
    row = speeds.run_ratios(times).iloc[0]
    assert row["ratio"] == pytest.approx(np.exp(own.mean() - whole.mean())) and row["n"] == 5
    # Welch's interval, written out.
    parts = own.var() / 5, whole.var() / 5
    freedom = sum(parts) ** 2 / sum(part**2 / 4 for part in parts)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    assert np.log([row["low"], row["high"]]) == pytest.approx(
        [np.log(row["ratio"]) - half, np.log(row["ratio"]) + half]
    )
    shuffled = times.copy()
    is_whole = shuffled["shape"] == "unpruned"
    shuffled.loc[is_whole, "run"] = shuffled.loc[is_whole, "run"].to_numpy()[::-1]
    assert tuple(speeds.run_ratios(shuffled).iloc[0]) == tuple(row)


@pytest.mark.parametrize(
    ("ratios_of", "sample"), [(speeds.run_ratios, "run"), (speeds.round_ratios, "round")]
)
def test_a_single_time_has_no_interval(ratios_of, sample):
    times = made_times({(2, "depth"): 0.8}, n_runs=1, sample=sample)
    with pytest.raises(ValueError, match=f"at least 2 {sample}s of each shape, got one"):
        ratios_of(times)


@pytest.mark.parametrize(
    "ratio, fewer, narrower",
    [(0.8, "holds", "does not hold"), (1.0, "does not hold", "holds")],
)
def test_fewer_layers_must_be_faster_and_narrower_ones_must_not(ratio, fewer, narrower):
    found = judged({(2, "depth"): ratio, (2, "width"): ratio})
    of_depth = found["fewer layers, larger size: over 5 % faster"]
    of_width = found["narrower layers, larger size: not over 5 % faster"]
    assert (of_depth["verdict"], of_width["verdict"]) == (fewer, narrower)
    assert of_depth["low"] < of_depth["value"] < of_depth["high"]
    assert of_depth["value"] == pytest.approx(ratio, rel=0.02), "a ratio, and not a distance"
    assert of_depth["depth"] == "size of 8 of 10 layers"


def test_ratios_at_one_number_of_texts_are_a_family_of_their_own():
    alone = judged({(2, "depth"): 0.95 * np.exp(-0.016)})
    among = judged({(2, "depth"): 0.95 * np.exp(-0.016), **{(n, "width"): 0.95 for n in (2, 3, 4)}})
    part = "fewer layers, larger size: over 5 % faster"
    assert alone[part]["verdict"] == "holds" and among[part]["verdict"] == "cannot be told"


def test_what_reading_alone_takes_grows_with_the_bytes_and_layers_with_their_number():
    sizes = pd.DataFrame(shapes.sized_points({2: "3 4"}, {"depth": 0, "width": 3}))
    sizes["weights"] = [40_000_000, 30_000_000, 30_000_000]
    times = sizes[["n_dropped", "shape"]].rename(columns={"shape": "series"})
    times = times.assign(value=[10.0, 7.0, 9.0], low=0.0, high=0.0)
    causes, lines = speeds.causes_of_time(times, sizes, n_layers=10, bytes_per_second=8e9)
    reading, in_a_row = causes["panel"].unique()
    assert causes[causes["panel"] == reading]["x"].tolist() == [40, 30, 30]
    assert causes[causes["panel"] == in_a_row]["x"].tolist() == [10, 8, 10]
    ends = lines.groupby("panel").last()
    assert ends.loc[reading].tolist() == ["reading alone", 40, 5.0]
    assert ends.loc[in_a_row].tolist() == ["in proportion", 10, 10.0]
