"""Intervals and pairs against textbook values, against coverage, and at their edges."""

import functools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pruning_utils import evidence
from pruning_utils.engine import variances
from pruning_utils.evidence import (
    Interval,
    depth_correlation,
    mean_interval,
    statistic_interval,
    two_factor_interval,
    verdict,
)

# By hand: means of items 2, 5, 8, of runs 4, 6, in all 5; MS_items 18, MS_runs 6, MS_residual 0.
ADDITIVE = np.array([[1.0, 3], [4, 6], [7, 9]])


def test_mean_interval_is_that_of_the_textbook():
    values = np.random.default_rng(1).normal(3, 2, 12)
    for confidence in (0.95, 0.99):
        found = mean_interval(values, confidence=confidence)
        ends = stats.t.interval(confidence, 11, values.mean(), stats.sem(values))
        assert found == pytest.approx((values.mean(), *ends), rel=1e-12)
    assert mean_interval([2.0, 2, 2]) == (2, 2, 2)
    with pytest.raises(ValueError, match=r"one number an observation .* got shape \(3, 2\)"):
        mean_interval(ADDITIVE)


# --- items and runs -------------------------------------------------------------------------------


def test_mean_squares_by_hand():
    found = variances.mean_squares(ADDITIVE, np.zeros(3))
    assert found == pytest.approx((18 / 6, 6 / 6, 0, 2, 2, 2), abs=1e-12)
    # An interaction of -+1 in the corners changes neither means of items nor of runs.
    values = ADDITIVE + [[1, -1], [0, 0], [-1, 1]]
    squares = variances.mean_squares(values, np.zeros(3))
    assert squares[:3] == pytest.approx((18 / 6, 6 / 6, 4 / 2 / 6))


def test_three_runs_by_hand():
    values = np.hstack([ADDITIVE, ADDITIVE[:, :1] + 4])  # runs 4, 6, 8: MS_items 27, MS_runs 12
    found = two_factor_interval(values)
    variance = (27 + 12) / 9
    assert (found.value, found.n, found.runs) == (pytest.approx(6), 3, 3)
    assert found.standard_error == pytest.approx(np.sqrt(variance)) and found.runs_sd == 2
    # Satterthwaite: 39**2 / (27**2 / 2 + 12**2 / 2) = 3.48; weighted by shares, both have 2.
    assert found.df == pytest.approx(2)
    half = stats.t.ppf(0.975, 2) * np.sqrt(variance)
    assert found[1:3] == pytest.approx((6 - half, 6 + half))


def test_satterthwaite_by_hand():
    assert variances.satterthwaite([27, 12], [2, 2]) == pytest.approx(39**2 / (27**2 + 12**2) * 2)
    assert variances.satterthwaite([5, 0], [7, 1]) == 7
    assert variances.satterthwaite([0, 0], [7, 1]) == 7, "nothing varies"


def test_two_runs_keep_a_quantile_each():
    found = two_factor_interval(ADDITIVE)
    half = np.sqrt(3 * stats.t.ppf(0.975, 2) ** 2 + 1 * stats.t.ppf(0.975, 1) ** 2)
    assert found[1:3] == pytest.approx((5 - half, 5 + half))
    assert found.standard_error == pytest.approx(2)


def test_one_run_is_over_items_alone():
    values = np.random.default_rng(0).normal(size=20)
    found = two_factor_interval(values[:, None])
    assert found[:3] == pytest.approx(mean_interval(values)) and found.df == 19
    assert np.isnan(found.runs_sd) and found.runs == 1


def test_runs_that_are_alike_add_nothing():
    values = np.random.default_rng(0).normal(size=(50, 1)) + np.zeros((1, 4))
    assert two_factor_interval(values)[:3] == pytest.approx(mean_interval(values[:, 0]))


def test_strata_count_alike_whatever_their_size():
    random = np.random.default_rng(3)
    sizes = {"a": 10, "b": 40}
    values = {name: random.normal(size=size) for name, size in sizes.items()}
    found = two_factor_interval(
        np.concatenate(list(values.values())), strata=np.repeat(list(sizes), list(sizes.values()))
    )
    assert found.value == pytest.approx((values["a"].mean() + values["b"].mean()) / 2)
    squares = [values[name].var(ddof=1) / size for name, size in sizes.items()]
    assert found.standard_error == pytest.approx(np.sqrt(sum(squares)) / 2)
    welch = sum(squares) ** 2 / (squares[0] ** 2 / 9 + squares[1] ** 2 / 39)
    assert found.df == pytest.approx(welch)
    # A run that is 1 higher everywhere is so in the mean over strata.
    runs = np.concatenate(list(values.values()))[:, None] + [0, 1, 2]
    labels = np.repeat(list(sizes), list(sizes.values()))
    of_runs = two_factor_interval(runs, strata=labels)
    assert of_runs.runs_sd == pytest.approx(1)
    assert of_runs.standard_error**2 == pytest.approx(sum(squares) / 4 + 1 / 3)


@pytest.mark.parametrize(
    "values, strata, message",
    [
        ([1.0], None, r"at least 2 finite observations, got shape \(1,\)"),
        ([[1.0, np.nan], [1, 2]], None, r"at least 2 finite observations, got shape \(2, 2\)"),
        ([1.0, np.inf, 2.0], None, r"at least 2 finite observations, got shape \(3,\)"),
        (np.zeros((2, 2, 2)), None, r"got shape \(2, 2, 2\)"),
        ([1.0, 2, 3], ["a", "a"], r"3 items need a stratum each, got shape \(2,\)"),
        ([1.0, 2, 3], ["a", "a", "b"], "stratum .*b.* has 1 item"),
    ],
)
def test_values_without_an_interval_are_refused(values, strata, message):
    with pytest.raises(ValueError, match=message):
        two_factor_interval(values, strata=strata)


# --- coverage -------------------------------------------------------------------------------------

REPLICATIONS = 8000


def standard_items(random, shape: str, size: tuple) -> np.ndarray:
    """Effects of items with mean 0 and standard deviation 1."""
    if shape == "normal":
        return random.standard_normal(size)
    if shape == "exponential":
        return random.standard_exponential(size) - 1
    drawn = np.exp(0.5 * random.standard_normal(size))
    return (drawn - np.exp(0.125)) / np.sqrt(np.exp(0.5) - np.exp(0.25))


@functools.cache
def moments_of_items(shape: str, n: int) -> np.ndarray:
    """Of the effects of n items and of as many residuals: means, variances and the covariance.

    Shape ``(5, REPLICATIONS)``; with them any size of the residual is known.
    """
    random = np.random.default_rng(n)
    found = []
    for _ in range(8):
        items = standard_items(random, shape, (REPLICATIONS // 8, n))
        residuals = random.standard_normal(items.shape)
        covariance = (items * residuals).mean(1) - items.mean(1) * residuals.mean(1)
        found.append(
            [
                items.mean(1),
                residuals.mean(1),
                items.var(1, ddof=1),
                residuals.var(1, ddof=1),
                covariance * n / (n - 1),
            ]
        )
    return np.concatenate(found, axis=1)


def drawn_tables(random, shape: str, n: int, k: int, of_runs: float, residual: float):
    """Errors of means and mean squares of many tables, as ``(n, k)`` values have them.

    Only the means of items are drawn; what is left has the distribution that normal runs and
    residuals give it.
    """
    scale = residual / np.sqrt(k)
    mean, other_mean, variance, other_variance, covariance = moments_of_items(shape, n)
    error = mean + scale * other_mean + of_runs / np.sqrt(k) * random.standard_normal(REPLICATIONS)
    left = (n - 1) * (k - 1)
    runs = of_runs**2 / k + residual**2 / (n * k)
    return error, variances.MeanSquares(
        items=(variance + 2 * scale * covariance + scale**2 * other_variance) / n,
        runs=runs * random.chisquare(k - 1, REPLICATIONS) / (k - 1),
        residual=residual**2 / (n * k) * random.chisquare(left, REPLICATIONS) / left,
        items_df=n - 1.0,
        residual_df=float(left),
        n_runs=k,
    )


def coverages(shape: str, n: int, k: int) -> dict[tuple, float]:
    """Shares of tables whose 95 % interval holds the truth, by the sds of residual and runs.

    Runs have a standard deviation of up to twice the standard error over items, and of once and
    twice that of items.
    """
    random = np.random.default_rng([n, k])
    found = {}
    for residual in (0.3, 1.0):
        of_items = np.sqrt((1 + residual**2 / k) / n)
        for of_runs in (0, 0.5 * of_items, of_items, 2 * of_items, 1.0, 2.0):
            error, squares = drawn_tables(random, shape, n, k, of_runs, residual)
            half = variances.half_width(variances.parts_of_mean(squares), 0.025)
            found[residual, of_runs] = (np.abs(error) <= half).mean()
    return found


def slack(share: float, draws: int = REPLICATIONS) -> float:
    """Four standard errors of a share among so many draws: one in 30,000 lies beyond."""
    return 4 * np.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("k", [3, 4, 6])
@pytest.mark.parametrize(
    "shape, n",
    [
        ("normal", 24),
        ("normal", 600),
        ("lognormal", 24),
        ("lognormal", 100),
        ("exponential", 100),
        ("exponential", 3000),
    ],
)
def test_95_percent_of_intervals_cover_the_truth(shape, n, k):
    for sizes, share in coverages(shape, n, k).items():
        assert 0.93 - slack(0.93) < share < 0.97 + slack(0.97), sizes


@pytest.mark.parametrize("shape, n", [("normal", 24), ("lognormal", 100), ("exponential", 3000)])
def test_intervals_of_two_runs_cover_too_often_rather_than_too_seldom(shape, n):
    for sizes, share in coverages(shape, n, 2).items():
        assert share > 0.945 - slack(0.945), sizes


def test_a_few_very_skewed_items_are_the_corner_that_covers_too_little():
    """As Student's interval of one factor does; more runs are no help, more items are."""
    for k in (3, 6):
        assert 0.92 - slack(0.92) < coverages("exponential", 24, k)[0.3, 0] < 0.94


def test_intervals_over_strata_cover_the_truth():
    random = np.random.default_rng(7)
    labels = np.repeat(np.arange(3), (10, 20, 60))
    truth = np.array([0.1, 0.5, 0.9])
    covered = 0
    for _ in range(600):
        values = truth[labels][:, None] + random.normal(0, 1, (90, 1)) * (1 + labels[:, None])
        values = values + random.normal(0, 0.3, (1, 3)) + random.normal(0, 0.5, (90, 3))
        found = two_factor_interval(values, strata=labels)
        covered += found.low <= 0.5 <= found.high
    assert 0.93 - slack(0.93, 600) < covered / 600 < 0.97 + slack(0.97, 600)


# --- statistics that are no means -----------------------------------------------------------------


def test_interval_of_any_statistic():
    pairs = np.column_stack([np.arange(50.0), 2 * np.arange(50.0)])
    found = statistic_interval(pairs, lambda means: means[..., 1] / means[..., 0])
    assert found == pytest.approx((2, 2, 2))
    assert statistic_interval(pairs, lambda means: means[..., 1]) == statistic_interval(
        pairs, lambda means: means[..., 1]
    ), "the same seed gives the same interval"


def test_resamples_are_as_many_as_said_and_each_has_n_observations():
    sizes = []
    statistic_interval(np.ones((5, 3)), lambda means: sizes.append(means.shape) or means[..., 0])
    assert sizes[-1] == (3,), "of the observations themselves"
    assert sum(size[0] for size in sizes[:-1]) == 20_000 and {s[1:] for s in sizes[:-1]} == {(3,)}
    counts = evidence._resample_counts(5, 0, 3)
    assert set(counts.sum(1, dtype=int)) == {5}
    assert (counts != evidence._resample_counts(5, 0, 4)).any()
    assert counts.mean(0, dtype=float) == pytest.approx(np.ones(5), abs=0.12)


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
    for interval in (mean_interval, lambda values: statistic_interval(values, lambda m: m)):
        with pytest.raises(ValueError, match="at least 2 finite observations"):
            interval(observations)


def test_depth_correlation_equals_scipy_and_sees_direction():
    distances = np.random.default_rng(2).random((30, 12))
    expected = [stats.spearmanr(np.arange(12), row).statistic for row in distances]
    assert depth_correlation(distances) == pytest.approx(expected)
    assert depth_correlation(distances[0]) == pytest.approx(expected[0])
    assert depth_correlation(np.arange(8.0)[::-1]) == pytest.approx(-1)


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


# --- groups and tasks -----------------------------------------------------------------------------


def test_groups_have_the_intervals_of_their_means():
    random = np.random.default_rng(2)
    table = pd.DataFrame(
        {"task": ["b"] * 300 + ["a"] * 200, "depth": 1, "score": random.normal(5, 1, 500)}
    )
    found = evidence.group_intervals(table, ["task", "depth"], "score")
    assert found.columns.tolist() == ["task", "depth", "value", "low", "high", "n"]
    assert found[["task", "depth"]].to_numpy().tolist() == [["b", 1], ["a", 1]]
    for row, size in zip(found.itertuples(), (300, 200), strict=True):
        alone = mean_interval(table[table["task"] == row.task]["score"])
        assert (row.value, row.low, row.high, row.n) == (*alone, size)
    with pytest.raises(ValueError, match="'a'.*: .*at least 2 finite observations, got"):
        evidence.group_intervals(
            pd.DataFrame({"task": ["a", "a"], "score": [1, np.nan]}), ["task"], "score"
        )


def test_rows_without_a_group_are_refused():
    table = pd.DataFrame({"task": ["a", "a", None, None], "score": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(ValueError, match="each row must have a value in task; task has none"):
        evidence.group_intervals(table, ["task"], "score")


@pytest.mark.parametrize("confidence", [95, 0, 1, float("nan")])
def test_a_confidence_outside_0_and_1_is_refused(confidence):
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got"):
        mean_interval([1.0, 2.0, 3.0], confidence=confidence)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got"):
        evidence.statistic_interval(
            [1.0, 2.0, 3.0], lambda _: pytest.fail("work began"), confidence=confidence
        )


def questions(correct: dict[str, list], **more) -> pd.DataFrame:
    """Rows of answered questions, of one run."""
    rows = [
        {"dataset": name, "item": item, "correct": right, **more}
        for name, answers in correct.items()
        for item, right in enumerate(answers)
    ]
    return pd.DataFrame(rows)


def test_tasks_count_alike_above_their_floors():
    first = questions({"a": [1, 1, 1, 0], "b": [1, 0] * 8}, seed=5)
    floors = {"a": 0.25, "b": 0.5, "c": 0.9}
    found = evidence.pooled_accuracy(first, floors)
    assert found.value == pytest.approx((0.5 + 0) / 2) and (found.n, found.runs) == (20, 1)
    error = np.sqrt(first["correct"][:4].var() / 4 + first["correct"][4:].var() / 16) / 2
    assert found.standard_error == pytest.approx(error)
    second = questions({"a": [1, 1, 1, 1], "b": [1, 0] * 8}, seed=4).sample(frac=1, random_state=1)
    both = pd.concat([first, second])
    found = evidence.pooled_accuracy(both, floors, run="seed")
    assert (found.value, found.runs) == (pytest.approx((0.625 + 0) / 2), 2)
    assert found.runs_sd == pytest.approx(np.std([0.25, 0.375], ddof=1))


@pytest.mark.parametrize(
    "table, run, message",
    [
        (questions({"z": [1, 0]}), None, r"\['z'\] are not among \['a', 'b'\]"),
        (questions({"a": [1, 0]}).iloc[[0, 1, 1]], None, "dataset a, item 1 more than once"),
        (questions({"a": [1, 0]}), "seed", r"no columns \['seed'\]"),
        (questions({"a": [1]}), None, "at least 2"),
        (
            pd.concat([questions({"a": [1, 0]}, seed=1), questions({"a": [1]}, seed=2)]),
            "seed",
            "lacks dataset a, item 1 in the run 2",
        ),
    ],
)
def test_tasks_without_floor_or_question_are_refused(table, run, message):
    with pytest.raises(ValueError, match=message):
        evidence.pooled_accuracy(table, {"a": 0.5, "b": 0.5}, run=run)


# --- pairs ----------------------------------------------------------------------------------------


def rows_of(values: dict[tuple, float], names=("item", "seed")) -> pd.DataFrame:
    """A table with these names of columns and the values under ``loss``."""
    rows = [{**dict(zip(names, key, strict=True)), "loss": v} for key, v in values.items()]
    return pd.DataFrame(rows)


def test_paired_subtracts_item_by_item_and_run_by_run():
    first = rows_of({("y", 2): 5, ("y", 1): 4, ("x", 1): 1, ("x", 2): 2})
    second = rows_of({("x", 1): 10, ("y", 1): 20, ("x", 2): 30, ("y", 2): 40})
    found = evidence.paired(first, second, on=["item"], value="loss", run="seed")
    assert found.tolist() == [[4 - 20, 5 - 40], [1 - 10, 2 - 30]]
    untrained = rows_of({("x",): 100, ("y",): 200}, names=("item",))
    found = evidence.paired(first, untrained, on=["item"], value="loss", run="seed")
    assert found.tolist() == [[-196, -195], [-99, -98]]
    assert evidence.paired(untrained, first, on=["item"], value="loss", run="seed").tolist() == [
        [99, 98],
        [196, 195],
    ]
    alone = evidence.paired(untrained, untrained[::-1], on=["item"], value="loss")
    assert alone.tolist() == [[0], [0]]


ITEMS = {("x", 1): 1, ("y", 1): 2, ("x", 2): 3, ("y", 2): 4}


@pytest.mark.parametrize(
    "second, message",
    [
        ({k: v for k, v in ITEMS.items() if k[0] == "x"}, "second lacks 1 items, .* item y"),
        ({**ITEMS, ("z", 1): 5, ("z", 2): 6}, "first lacks 1 items, .* item z"),
        ({k: v for k, v in ITEMS.items() if k != ("y", 2)}, "second lacks item y in the run 2"),
        ({(i, s + 1): v for (i, s), v in ITEMS.items()}, r"same runs, got \[1, 2\] and \[2, 3\]"),
    ],
)
def test_tables_that_are_no_pair_are_refused(second, message):
    with pytest.raises(ValueError, match=message):
        evidence.paired(rows_of(ITEMS), rows_of(second), on=["item"], value="loss", run="seed")


def test_repeats_and_missing_columns_of_a_pair_are_refused():
    table = rows_of(ITEMS)
    with pytest.raises(ValueError, match="first has item x more than once"):
        evidence.paired(table, table, on=["item"], value="loss")
    with pytest.raises(ValueError, match=r"first has no columns \['nll'\]"):
        evidence.paired(table, table, on=["item"], value="nll", run="seed")
    with pytest.raises(ValueError, match="neither table has the column 'run'"):
        evidence.paired(table, table, on=["item", "seed"], value="loss", run="run")


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
    assert (found["low"] <= found["low_90"]).all() and (found["high_90"] <= found["high"]).all()


def test_columns_of_a_pair_are_those_of_the_textbook():
    values = np.random.default_rng(2).normal(0.3, 1, 30)
    found = evidence.paired_verdicts({"a": values, "b": -values - 1}, margin=0.5)
    row, other = found.iloc[0], found.iloc[1]
    test = stats.ttest_1samp(values, 0)
    assert row["p"] == pytest.approx(test.pvalue)
    assert other["p"] == pytest.approx(stats.ttest_1samp(values, -1).pvalue)
    assert row["p_holm"] == pytest.approx(max(row["p"], 2 * other["p"]))
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert (row["low_90"], row["high_90"]) == pytest.approx(tuple(test.confidence_interval(0.9)))
    sides = [
        stats.ttest_1samp(values, end, alternative=side).pvalue
        for end, side in ((0.5, "less"), (-0.5, "greater"))
    ]
    assert row["p_equal_holm"] == pytest.approx(min(1, 2 * max(sides)))
    assert row["p_beyond_holm"] == 1
    beyond = stats.ttest_1samp(values, -0.5, alternative="greater").pvalue
    assert other["p_beyond_holm"] == pytest.approx(2 * 2 * beyond)
    assert (row["n"], row["runs"], row["margin"]) == (30, 1, 0.5)


def test_tail_is_the_inverse_of_the_width():
    for runs in (1, 2, 3):
        values = np.random.default_rng(4).normal(size=(10, runs))
        parts = variances.parts_of_mean(variances.mean_squares(values, np.zeros(10)))
        for tail in (0.4, 0.025, 1e-6):
            width = float(variances.half_width(parts, tail))
            assert variances.tail_beyond(parts, width) == pytest.approx(tail, rel=1e-6)
        assert variances.tail_beyond(parts, 0) == 0.5
    nothing = variances.Parts(np.array([0.0]), np.array([3.0]))
    assert variances.tail_beyond(nothing, 0.1) == 0


def test_holm_by_hand():
    assert variances.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert variances.holm([0.5, 0.5]).tolist() == [1, 1]
    assert variances.holm([[0.01, 0.02], [0.02, 0.01]]).tolist() == [[0.02, 0.02], [0.02, 0.02]]


def test_holm_takes_away_what_one_of_many_would_find():
    values = stats.norm.ppf((np.arange(100) + 0.5) / 100)
    # t = 2.2: alone beyond 1.98, among ten not beyond 2.87.
    values = values / values.std(ddof=1) + 0.22
    alone = evidence.paired_verdicts({"a": values}, margin=0.01)
    assert alone["verdict"].item() == "differs"
    many = {"a": values, **{f"none {n}": np.tile([-1.0, 1], 50) for n in range(9)}}
    found = evidence.paired_verdicts(many, margin=0.01)
    assert set(found["verdict"]) == {evidence.UNTOLD}
    assert found.loc[0, ["low", "high"]].tolist() == alone.loc[0, ["low", "high"]].tolist(), (
        "intervals have one level, whatever the family"
    )
    # Holm is a ladder: once the smallest is told apart, the next needs less.
    two = evidence.paired_verdicts({"a": values, "b": values + 1}, margin=0.01)
    assert set(two["verdict"]) == {"differs"}


def test_equality_is_corrected_as_difference_is():
    values = np.tile([-1.0, 1], 200)
    margin = 2 * values.std(ddof=1) / 20  # p = 0.023 at the end of the margin
    alone = evidence.paired_verdicts({"a": values}, margin=margin)
    assert alone["verdict"].item() == "equal"
    four = {"a": values, **{f"b{n}": values + margin for n in range(3)}}
    assert evidence.paired_verdicts(four, margin=margin)["verdict"][0] == evidence.UNTOLD


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


def test_strata_of_a_pair_count_alike():
    values = np.array([1.0, 2, 3, 10, 11, 12, 13, 14])
    labels = ["a"] * 3 + ["b"] * 5
    found = evidence.paired_verdicts({"x": values}, margin=1, strata={"x": labels}).iloc[0]
    interval = two_factor_interval(values, strata=labels)
    assert found["difference"] == 7 == interval.value
    assert (found["low"], found["high"]) == interval[1:3]


# --- errors of families ---------------------------------------------------------------------------


def families(random, mean: float, k: int, many: int = 3000, pairs: int = 3) -> tuple:
    """Means of families of pairs, with their error and degrees of freedom: 48 items, k runs."""
    n, of_runs, residual = 48, 0.02, 0.1
    shape = (many, pairs)
    items = random.normal(0, 0.1, (*shape, n)) + residual / np.sqrt(k) * random.normal(
        size=(*shape, n)
    )
    left = (n - 1) * (k - 1)
    runs = of_runs**2 / k + residual**2 / (n * k)
    parts = variances.parts_of_mean(
        variances.MeanSquares(
            items.var(-1, ddof=1) / n,
            runs * random.chisquare(k - 1, shape) / (k - 1),
            residual**2 / (n * k) * random.chisquare(left, shape) / left,
            n - 1.0,
            float(left),
            k,
        )
    )
    values = mean + items.mean(-1) + of_runs / np.sqrt(k) * random.normal(size=shape)
    return values, np.sqrt(parts.variances[0]), parts.df[0]


@pytest.mark.parametrize("k", [3, 5])
def test_at_most_5_percent_of_families_differ_where_nothing_does(k):
    values, errors, df = families(np.random.default_rng(1), 0, k)
    p_values = variances.holm(2 * stats.t.sf(np.abs(values) / errors, df))
    assert (p_values <= 0.05).any(-1).mean() <= 0.05 + slack(0.05, len(values))


@pytest.mark.parametrize("k", [3, 5])
def test_at_most_5_percent_of_families_are_equal_where_all_are_at_the_margin(k):
    margin = 0.2
    values, errors, df = families(np.random.default_rng(2), margin, k)
    p_values = variances.holm(
        np.maximum(
            stats.t.cdf((values - margin) / errors, df), stats.t.sf((values + margin) / errors, df)
        )
    )
    share = (p_values <= 0.05).any(-1).mean()
    assert 0.02 < share <= 0.05 + slack(0.05, len(values)), "not by being idle"


def test_verdicts_err_in_at_most_5_percent_of_families():
    """The function itself, with fewer draws."""
    random = np.random.default_rng(5)
    differing = equal = 0
    for _ in range(120):
        runs = random.normal(0, 0.03, (3, 1, 3))
        values = random.normal(0, 0.2, (3, 40, 1)) + runs + random.normal(0, 0.1, (3, 40, 3))
        pairs = {str(place): value for place, value in enumerate(values)}
        differing += evidence.paired_verdicts(pairs, margin=0.15)["p_holm"].min() <= 0.05
        shifted = {name: value + 0.15 for name, value in pairs.items()}
        found = evidence.paired_verdicts(shifted, margin=0.15)["verdict"]
        equal += found.isin(["equal", "differs, within the margin"]).any()
    assert max(differing, equal) / 120 <= 0.05 + slack(0.05, 120)


@pytest.mark.parametrize("pairs", [1, 10])
def test_detectable_is_found_in_80_percent_of_cases(pairs):
    random = np.random.default_rng(3)
    n, many = 30, 4000
    # With sd 1 the difference that (t + t) * 1 / sqrt(n) names; the first step of Holm finds it.
    tails = stats.t.isf([0.05 / (2 * pairs), 0.2], n - 1)
    values = random.normal(tails.sum() / np.sqrt(n), 1, (many, n))
    t_values = values.mean(1) / (values.std(1, ddof=1) / np.sqrt(n))
    found = (2 * stats.t.sf(t_values, n - 1) * pairs <= 0.05).mean()
    assert found == pytest.approx(0.8, abs=0.02 + slack(0.8, many))
    one = np.random.default_rng(0).normal(size=n)
    family = {str(place): one for place in range(pairs)}
    told = evidence.paired_verdicts(family, margin=1)["detectable"]
    assert told.tolist() == pytest.approx([tails.sum() * stats.sem(one)] * pairs)


@pytest.mark.parametrize(
    "pairs, asked, message",
    [
        ({"a": [1.0, 2]}, {"margin": 0}, "margin must be above 0, got 0"),
        ({"a": [1.0, 2]}, {}, "margin or effect must be given"),
        ({"a": [1.0]}, {"margin": 1}, r"a: .*at least 2 .* got shape \(1,\)"),
        ({"a": [1.0, np.nan]}, {"margin": 1}, "a: .*at least 2 finite observations"),
        ({"a": [1.0, 2]}, {"margin": 1, "runs_needed": 2}, "a: 2 runs are needed, got 1"),
        ({"a": [1.0, 2]}, {"margin": 0.02, "effect": -0.0216}, r"margin 0\.02, effect -0\.0216"),
        ({"a": [1.0, 2]}, {"effect": 0.0}, "a: margin must be above 0"),
        ({"a": [1.0, 2]}, {"effect": np.nan}, "effect of 'a' must be a number, got nan"),
        ({"a": [1.0, 2]}, {"effect": {"b": 1.0}}, r"'a' is not in \['b'\]"),
    ],
)
def test_pairs_without_numbers_are_refused(pairs, asked, message):
    with pytest.raises(ValueError, match=message):
        evidence.paired_verdicts(pairs, **asked)


def test_the_margin_is_at_most_a_quarter_of_the_effect():
    pairs = {"a": np.array([1.0, 2]), "b": np.array([1.0, 3])}
    found = evidence.paired_verdicts(pairs, effect=-0.8)
    assert found["margin"].tolist() == [0.2, 0.2]
    found = evidence.paired_verdicts(pairs, effect={"a": 1.0, "b": 2.0}, margin=0.25)
    assert found["margin"].tolist() == [0.25, 0.25]
    found = evidence.paired_verdicts(pairs, effect={"a": 1.0, "b": 2.0})
    assert found["margin"].tolist() == [0.25, 0.5]


# --- verdicts -------------------------------------------------------------------------------------


def test_verdicts():
    assert verdict(Interval(2, 1, 3), claimed="above 0") == evidence.HOLDS == "holds"
    assert verdict(Interval(2, 1, 3), claimed="below 0") == evidence.FAILS == "does not hold"
    assert verdict(Interval(-2, -3, -1), claimed="below 0") == "holds"
    assert verdict(Interval(1, 0, 3), claimed="above 0") == evidence.UNTOLD == "cannot be told"
    assert evidence.UNTESTABLE == "not testable here"
    with pytest.raises(ValueError, match="'near 0'"):
        verdict(Interval(0, 0, 0), claimed="near 0")


@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_differences_without_spread_allow_no_test(constant):
    found = evidence.paired_verdicts(
        {"alike": np.full(3, constant), "apart": np.array([0.1, -0.2, 0.15])}, margin=0.5
    ).set_index("pair")
    assert found.loc["alike", "verdict"] == evidence.UNTOLD
    assert found.loc["alike", ["p_holm", "p_equal_holm", "p_beyond_holm"]].tolist() == [1, 1, 1]
    assert found.loc["alike", "difference"] == constant


def test_many_questions_without_any_difference_are_equal():
    found = evidence.paired_verdicts({"few": np.zeros(23), "many": np.zeros(24)}, margin=0.1)
    assert found["verdict"].tolist() == [evidence.UNTOLD, "equal"]


def test_ends_of_a_rank_correlation_are_fishers():
    found = evidence.rank_correlation_interval(0.5, 30)
    half = 1.959964 * (1.06 / 27) ** 0.5
    assert np.arctanh(found.high) - np.arctanh(0.5) == pytest.approx(half)
    assert np.arctanh(0.5) - np.arctanh(found.low) == pytest.approx(half)
    assert evidence.rank_correlation_interval(1.0, 30).high == 1
    for wrong in ((1.1, 30), (0.5, 3)):
        with pytest.raises(ValueError, match="must be"):
            evidence.rank_correlation_interval(*wrong)


# --- what is named wrongly, or out of range -------------------------------------------------------

ALIKE = {"a": np.arange(30.0)}
QUESTIONS = pd.DataFrame({"dataset": ["x"] * 4, "item": range(4), "correct": [0, 1, 1, 0]})
JUDGED = dict.fromkeys("model measure data depth recipe notebook cell".split(), "x")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: evidence.paired_verdicts(ALIKE, margin=1, strata={"A": np.arange(30) % 2}),
            r"strata must be of pairs, \['A'\] are not among \['a'\]",
        ),
        (lambda: evidence.paired_verdicts(ALIKE, margin="1"), "margin must be above 0, got '1'"),
        (lambda: evidence.paired_verdicts(ALIKE, margin=True), "margin must be above 0, got True"),
        (lambda: evidence.paired_verdicts(ALIKE, margin=np.inf), "margin must be above 0, got inf"),
        (lambda: evidence.paired_verdicts(ALIKE, effect="x"), "effect of 'a' must be a number"),
        (lambda: evidence.paired_verdicts(ALIKE, effect=np.nan), "effect of 'a' must be a number"),
        (
            lambda: evidence.paired_verdicts(ALIKE, margin=1, runs_needed="3"),
            "runs_needed must be a whole number of at least 1, got '3'",
        ),
        (lambda: evidence.fall_place(np.arange(5.0), width=0), "width must be .* from 1 to 4"),
        (lambda: evidence.fall_share(np.arange(5.0), width=5), "width must be .* from 1 to 4"),
        (lambda: evidence.fall_share(np.arange(5.0), width=-1), "width must be .* from 1 to 4"),
        (
            lambda: evidence.steepness(np.arange(3.0), places=[0, 1]),
            "3 means need a place each, got 2",
        ),
        (lambda: evidence.pooled_accuracy(QUESTIONS, {"x": 25}), r"floor of x must be in \[0, 1\]"),
        (
            lambda: evidence.pooled_accuracy(QUESTIONS.drop(columns="dataset"), {"x": 0.25}),
            "questions has no column dataset",
        ),
        (
            lambda: evidence.group_intervals(QUESTIONS, ["task"], "correct"),
            r"table has no columns \['task'\]",
        ),
        (
            lambda: evidence.group_intervals(QUESTIONS, "dataset", "correct"),
            "by must be a list of columns, got 'dataset'",
        ),
    ],
)
def test_what_is_named_wrongly_or_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unpruned": 0.25}, "floor must be given, got None"),
        (
            {"levels": 0.25, "floor": 0.5},
            "levels must be a list, one level for each side, got 0.25",
        ),
        (
            {"levels": evidence.Interval(1, 0.9, 1.1), "floor": 0.5},
            r"levels must be a list, .*, got Interval\(value=1",
        ),
        ({"higher_is_better": "no"}, "higher_is_better must be True or False, got 'no'"),
    ],
)
def test_a_control_needs_its_floor_and_its_direction(given, message):
    found = evidence.paired_verdicts(ALIKE, margin=1).iloc[0]
    with pytest.raises(ValueError, match=message):
        evidence.judge("A1", "a", found, claimed="above 0", **JUDGED, **given)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.5, 1e-9, 123.4])
@pytest.mark.parametrize("n", [2, 3, 10, 23])
def test_a_few_equal_differences_prove_nothing_however_they_are_rounded(value, n):
    found = evidence.paired_verdicts({"a": np.full(n, value)}, margin=value / 2)
    assert found["verdict"].tolist() == ["cannot be told"] and found["p"].tolist() == [1]


def test_a_correlation_lies_within_its_interval():
    for correlation in (-1.0, -0.9995, 0.2, 0.9995, 1.0):
        found = evidence.rank_correlation_interval(correlation, 1000)
        assert found.low <= found.value <= found.high


def test_a_curve_that_falls_is_as_steep_as_its_mirror_image():
    means = np.array([4.0, 3.0, 0.0])
    assert evidence.steepness(means, places=[0, 1, 2]) == 1.5
    assert evidence.steepness(-means, places=[0, 1, 2]) == 1.5


def test_strata_have_a_label_each():
    for missing in (np.nan, None):
        with pytest.raises(ValueError, match="strata must have a label for each item"):
            evidence.two_factor_interval([1, 2, 3, 4], strata=["a", "a", missing, missing])


def test_equal_values_share_their_rank():
    first, second = np.array([1.0, 1, 2, 3]), np.array([2.0, 1, 3, 3])
    expected = stats.spearmanr(first, second).statistic
    assert variances.rank_correlation(first, second) == pytest.approx(expected)
