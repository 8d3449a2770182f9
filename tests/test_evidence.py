"""Intervals against textbook values and against coverage; verdicts at the edges."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pruning_utils import evidence
from pruning_utils.evidence import (
    Interval,
    depth_correlation,
    mean_interval,
    statistic_interval,
    verdict,
)


def test_mean_interval_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = mean_interval(values)
    margin = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - margin, abs=0.02)
    assert found.high == pytest.approx(values.mean() + margin, abs=0.02)
    assert mean_interval(values) == found, "the same seed gives the same interval"
    wider = mean_interval(values, confidence=0.99)
    assert wider.low < found.low and found.high < wider.high


def test_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = sum(
        low <= 0.3 <= high
        for _, low, high in (
            mean_interval(random.random(60) < 0.3, seed=draw) for draw in range(200)
        )
    )
    assert 0.88 < covered / 200 <= 0.99


def test_interval_of_any_statistic():
    pairs = np.column_stack([np.arange(50.0), 2 * np.arange(50.0)])
    found = statistic_interval(pairs, lambda means: means[..., 1] / means[..., 0])
    assert found == pytest.approx((2, 2, 2))


def test_interval_of_a_curve_is_that_of_drawing_observations_by_hand():
    curves = np.random.default_rng(3).normal([5, 4, 1, 2], 1, (40, 4))
    found = statistic_interval(curves, lambda means: evidence.fall_share(means, width=1))
    random = np.random.default_rng(4)
    draws = [
        evidence.fall_share(curves[random.integers(40, size=40)].mean(0), width=1)
        for _ in range(4000)
    ]
    assert found.value == pytest.approx(evidence.fall_share(curves.mean(0), width=1))
    assert found[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_a_statistic_that_some_resamples_lack_has_no_ends():
    curves = np.array([[0.0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0]])
    found = statistic_interval(curves, lambda means: evidence.fall_share(means, width=1))
    assert np.isfinite(found.value) and np.isnan(found[1:]).all()
    assert verdict(found, claimed="above 0") == verdict(found, claimed="below 0") == evidence.UNTOLD


@pytest.mark.parametrize("observations", [[], [1.0], 3.0, [1.0, np.nan]])
def test_too_little_to_say(observations):
    with pytest.raises(ValueError, match="at least 2 observations"):
        mean_interval(observations)


def test_depth_correlation_equals_scipy_and_sees_direction():
    distances = np.random.default_rng(2).random((30, 12))
    expected = [stats.spearmanr(np.arange(12), row).statistic for row in distances]
    assert depth_correlation(distances) == pytest.approx(expected)
    assert depth_correlation(distances[0]) == pytest.approx(expected[0])
    assert depth_correlation(np.arange(8.0)[::-1]) == pytest.approx(-1)


def test_verdicts():
    assert verdict(Interval(2, 1, 3), claimed="above 0") == "holds"
    assert verdict(Interval(2, 1, 3), claimed="below 0") == "does not hold at this size"
    assert verdict(Interval(-2, -3, -1), claimed="below 0") == "holds"
    assert verdict(Interval(1, 0, 3), claimed="above 0") == "cannot be told from this data"
    with pytest.raises(ValueError, match="'near 0'"):
        verdict(Interval(0, 0, 0), claimed="near 0")


# --- groups, curves, pairs ------------------------------------------------------------------------


def test_groups_have_the_intervals_of_their_means():
    random = np.random.default_rng(2)
    table = pd.DataFrame(
        {"task": ["b"] * 300 + ["a"] * 200, "depth": 1, "score": random.normal(5, 1, 500)}
    )
    found = evidence.group_intervals(table, ["task", "depth"], "score")
    assert found[["task", "depth"]].to_numpy().tolist() == [["b", 1], ["a", 1]]
    for row, size in zip(found.itertuples(), (300, 200), strict=True):
        values = table[table["task"] == row.task]["score"]
        alone = mean_interval(values)
        assert (row.value, row.n) == (pytest.approx(values.mean()), size)
        assert row.low == pytest.approx(alone.low, abs=0.02) and row.high == pytest.approx(
            alone.high, abs=0.02
        )
    with pytest.raises(ValueError, match="'a'.*: .*at least 2 observations without NaN, got"):
        evidence.group_intervals(
            pd.DataFrame({"task": ["a", "a"], "score": [1, np.nan]}), ["task"], "score"
        )


@pytest.mark.parametrize(
    "means, width, place, share",
    [
        ([1, 1, 1, 0, 0], 1, 2, 1.0),  # all at one step
        ([4, 3, 2, 1, 0], 2, 0, 0.5),  # a straight line: the share is that of the width
        ([5, 4, 1, 2, 0], 1, 1, 0.6),
        ([5, 4, 1, 2, 0], 2, 0, 0.8),
    ],
)
def test_fall_by_hand(means, width, place, share):
    means = np.array(means, dtype=float)
    assert evidence.fall_place(means, width=width) == place
    assert evidence.fall_share(means, width=width) == pytest.approx(share)
    stacked = np.stack([means, means + 1, 2 * means])
    assert evidence.fall_place(stacked, width=width).tolist() == [place] * 3
    assert evidence.fall_share(stacked, width=width) == pytest.approx([share] * 3)


def test_what_does_not_fall_has_no_share():
    assert np.isnan(evidence.fall_share(np.array([1.0, 2, 3]), width=1))


def test_steepness_by_hand():
    line = np.array([0.0, 3, 4])
    assert evidence.steepness(line, places=[0, 3, 4]) == pytest.approx(1)
    assert evidence.steepness(np.stack([line, line]), places=[0, 1, 4]) == pytest.approx([3, 3])


def test_pairs_that_differ_are_equal_or_cannot_be_told():
    random = np.random.default_rng(0)
    found = evidence.paired_verdicts(
        {
            "far": random.normal(0.1, 0.2, 400),
            "near": random.normal(0.01, 0.02, 400),
            "same": random.permutation(np.tile([-0.05, 0.05], 200)),
            "wide": np.tile([-1.0, 1], 50) + 0.01,
        },
        margin=0.02,
    ).set_index("pair")
    assert found["verdict"].to_dict() == {
        "far": "differs",
        "near": "differs, within the margin",
        "same": "equal",
        "wide": evidence.UNTOLD,
    }
    assert found.loc["far", "difference"] == pytest.approx(0.1, abs=0.03)
    assert found.loc["wide", "detectable"] == pytest.approx(2.8 / np.sqrt(100), rel=0.1)
    assert (found["low"] <= found["low_90"]).all() and (found["high_90"] <= found["high"]).all()


def test_holm_takes_away_what_one_of_many_would_find():
    values = stats.norm.ppf((np.arange(100) + 0.5) / 100)
    # Z = 2.2: alone beyond 1.96, among ten not beyond 2.81.
    values = values / values.std(ddof=1) + 0.22
    alone = evidence.paired_verdicts({"a": values}, margin=0.01)
    assert alone["verdict"].item() == "differs"
    many = {"a": values, **{f"none {n}": np.tile([-1.0, 1], 50) for n in range(9)}}
    assert set(evidence.paired_verdicts(many, margin=0.01)["verdict"]) == {evidence.UNTOLD}
    # Holm is a ladder: once the smallest is told apart, the next needs less.
    two = evidence.paired_verdicts({"a": values, "b": values + 1}, margin=0.01)
    assert set(two["verdict"]) == {"differs"}


def test_few_false_alarms_under_no_difference():
    random = np.random.default_rng(5)
    alarms = sum(
        (
            evidence.paired_verdicts(
                {str(n): random.normal(0, 1, 80) for n in range(3)}, margin=0.01, seed=draw
            )["verdict"]
            == "differs"
        ).any()
        for draw in range(100)
    )
    assert alarms <= 12, "about 5 of 100 families"


def test_runs_that_differ_widen_the_interval():
    noise = np.random.default_rng(0).normal(0, 0.1, (200, 1))
    alike, apart = noise + np.zeros((1, 3)), noise + np.array([[-0.1, 0.0, 0.1]])
    found = evidence.paired_verdicts({"alike": alike, "apart": apart}, margin=0.02).set_index(
        "pair"
    )
    assert np.ptp(found["difference"]) < 1e-12 and (found["runs"] == 3).all()
    widths = found["high"] - found["low"]
    assert widths["apart"] > 3 * widths["alike"]
    assert found["verdict"].to_dict()["apart"] == evidence.UNTOLD


@pytest.mark.parametrize(
    "pairs, margin, message",
    [
        ({"a": [1.0, 2]}, 0, "margin must be above 0, got 0"),
        ({"a": [1.0]}, 1, r"a: at least 2 .* got shape \(1, 1\)"),
        ({"a": [1.0, np.nan]}, 1, "a: at least 2 differences without NaN"),
    ],
)
def test_pairs_without_numbers_are_refused(pairs, margin, message):
    with pytest.raises(ValueError, match=message):
        evidence.paired_verdicts(pairs, margin=margin)
