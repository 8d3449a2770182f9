"""Intervals against textbook values and against coverage; verdicts at the edges."""

import numpy as np
import pytest
from scipy import stats

from pruning_utils.evidence import Interval, depth_correlation, mean_interval, statistic_interval, verdict


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
    covered = sum(low <= 0.3 <= high for _, low, high in
                  (mean_interval(random.random(60) < 0.3, seed=draw) for draw in range(200)))
    assert 0.88 < covered / 200 <= 0.99


def test_interval_of_any_statistic():
    pairs = np.column_stack([np.arange(50.0), 2 * np.arange(50.0)])
    found = statistic_interval(pairs, lambda draws, axis: draws[..., 1].mean(axis) / draws[..., 0].mean(axis))
    assert found == pytest.approx((2, 2, 2))


@pytest.mark.parametrize("observations", [[], [1.0], 3.0, [1.0, np.nan]])
def test_too_little_to_say(observations):
    with pytest.raises(ValueError, match="at least 2 observations"):
        mean_interval(observations)


def test_depth_correlation_equals_scipy_and_sees_direction():
    distances = np.random.default_rng(2).random((30, 12))
    expected = stats.spearmanr(np.arange(12), distances.mean(0)).statistic
    assert depth_correlation(distances, axis=0) == pytest.approx(expected)
    assert depth_correlation(np.stack([distances, distances]), axis=1) == pytest.approx([expected] * 2)
    assert depth_correlation(np.arange(8.0)[None, ::-1], axis=0) == pytest.approx(-1)


def test_verdicts():
    assert verdict(Interval(2, 1, 3), claimed="above 0") == "holds"
    assert verdict(Interval(2, 1, 3), claimed="below 0") == "does not hold at this size"
    assert verdict(Interval(-2, -3, -1), claimed="below 0") == "holds"
    assert verdict(Interval(1, 0, 3), claimed="above 0") == "cannot be told from this data"
    with pytest.raises(ValueError, match="'near 0'"):
        verdict(Interval(0, 0, 0), claimed="near 0")
