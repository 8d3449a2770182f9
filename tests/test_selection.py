"""From numbers to layers, by hand: no block is off by one, and none is left out."""

import math

import numpy as np
import pytest

from pruning_utils import selection


def is_plain(layers) -> bool:
    """An ascending tuple of different Python whole numbers."""
    return (
        isinstance(layers, tuple)
        and all(type(layer) is int for layer in layers)
        and list(layers) == sorted(set(layers))
    )


def planted(n_layers: int, starts: dict[int, int], low: float = 0.1) -> np.ndarray:
    """Distances that grow with the block, but are low where size n starts at ``starts[n]``."""
    distance = (
        np.abs(np.subtract.outer(np.arange(n_layers + 1.0), np.arange(n_layers + 1.0)))
        / (n_layers + 1)
        + 0.5
    )
    np.fill_diagonal(distance, 0)
    for size, start in starts.items():
        distance[start, start + size] = low
    return distance


# --- blocks ---------------------------------------------------------------------------------------


def test_planted_minima_are_found_for_every_block_size():
    n_layers = 10
    # A different start for each size: neighbouring sizes differ by more than one, layer 0 and the
    # end are among them.
    starts = {1: 9, 2: 0, 3: 7, 4: 2, 5: 5, 6: 0, 7: 3, 8: 1, 9: 1, 10: 0}
    distance = planted(n_layers, starts)
    for size, start in starts.items():
        found = selection.best_block(distance, size)
        assert found == (start, size, 0.1)
        assert found.layers == tuple(range(start, start + size)) and is_plain(found.layers)
        assert found.start + found.size <= n_layers


@pytest.mark.parametrize("size", range(1, 8))
def test_every_block_can_be_the_best_one(size):
    n_layers = 7
    for start in range(n_layers - size + 1):
        found = selection.best_block(planted(n_layers, {size: start}), size)
        assert (
            found.start == start
            and found.layers[0] == start
            and found.layers[-1] == start + size - 1
        )


def test_block_distances_are_the_entries_from_input_to_input():
    distance = np.arange(25.0).reshape(5, 5)
    assert selection.block_distances(distance, 1).tolist() == [1, 7, 13, 19]
    assert selection.block_distances(distance, 3).tolist() == [3, 9]
    assert selection.block_distances(distance, 4).tolist() == [4]
    assert selection.block_distances(distance, 1, keep_last=2).tolist() == [1, 7]
    assert selection.block_distances(distance, 2, keep_last=1).tolist() == [2, 8]
    values = selection.block_distances(distance, 1)
    values[:] = -1
    assert distance[0, 1] == 1, "the result is a copy"


def test_kept_last_layers_are_in_no_block():
    distance = planted(6, {2: 4})
    distance[3, 5] = 0.2
    distance[0, 2] = 0.3
    assert selection.best_block(distance, 2) == (4, 2, 0.1)
    assert selection.best_block(distance, 2, keep_last=1) == (3, 2, 0.2)
    assert selection.best_block(distance, 2, keep_last=2) == (0, 2, 0.3)
    assert selection.best_block(distance, 2, keep_last=4) == (0, 2, 0.3)
    assert selection.best_block(distance, 1, keep_last=5).layers == (0,)
    for size, keep_last in ((3, 4), (7, 0), (6, 1), (0, 0), (-1, 0)):
        with pytest.raises(
            ValueError, match=f"block_size .* whole number from 1 to {6 - keep_last}, got {size}"
        ):
            selection.best_block(distance, size, keep_last=keep_last)
    for keep_last in (-1, 6, 7):
        with pytest.raises(
            ValueError, match=f"keep_last must be a whole number from 0 to 5, got {keep_last}"
        ):
            selection.best_block(distance, 1, keep_last=keep_last)


def test_equal_distances_take_the_lower_start():
    distance = planted(8, {3: 2})
    distance[5, 8] = distance[4, 7] = 0.1
    assert selection.best_block(distance, 3).start == 2
    assert selection.best_block(np.zeros((5, 5)), 2).start == 0


def test_infinite_distances_lose_and_nan_is_refused():
    distance = np.full((5, 5), math.inf)
    distance[2, 4] = 7.0
    assert selection.best_block(distance, 2) == (2, 2, 7.0)
    assert selection.best_block(distance, 1) == (0, 1, math.inf)
    distance[1, 3] = math.nan
    with pytest.raises(ValueError, match="the block at layer 1 is NaN"):
        selection.best_block(distance, 2)
    assert selection.best_block(distance, 3).start == 0, "no block of three reads that entry"
    distance[1, 3] = -math.inf
    with pytest.raises(ValueError, match="the block at layer 1 is -inf"):
        selection.best_block(distance, 2)
    distance = planted(4, {2: 0})
    distance[2, 4] = math.nan
    assert selection.best_block(distance, 2, keep_last=1).start == 0, (
        "nor does one before the kept layer"
    )


@pytest.mark.parametrize(
    "distance",
    [np.zeros(4), np.zeros((3, 4)), np.zeros((1, 1)), np.zeros((0, 0)), np.zeros((2, 2, 2))],
)
def test_other_shapes_than_square_are_refused(distance):
    with pytest.raises(ValueError, match=r"square matrix of L\+1 rows, got shape"):
        selection.best_block(distance, 1)


def test_numpy_numbers_count_and_others_do_not():
    found = selection.best_block(planted(5, {2: 1}), np.int64(2), keep_last=np.int32(0))
    assert found == (1, 2, 0.1) and is_plain(found.layers)
    assert [type(value) for value in found] == [int, int, float]
    for size in (2.0, True, "2", None, np.float64(2)):
        with pytest.raises(ValueError, match="block_size must be a whole number"):
            selection.best_block(planted(5, {2: 1}), size)


# --- the bootstrap --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "keep_last", "n_samples"), [(2, 0, 4), (3, 1, 9), (1, 2, 1)])
def test_resampled_starts_equal_a_slow_bootstrap_with_the_same_draws(size, keep_last, n_samples):
    generator = np.random.default_rng(5)
    samples = generator.random((4, 8, 8)).astype(np.float32)
    found = selection.resampled_starts(
        samples, size, n_samples=n_samples, draws=60, seed=3, keep_last=keep_last
    )
    counts = np.random.default_rng(3).multinomial(n_samples, [0.25] * 4, 60)
    expected = []
    for times in counts:
        drawn = [samples[index].astype(float) for index in range(4) for _ in range(times[index])]
        assert len(drawn) == n_samples
        expected.append(
            selection.best_block(np.mean(drawn, axis=0), size, keep_last=keep_last).start
        )
    assert found.tolist() == expected and found.dtype == np.int64 and len(set(expected)) > 1


def test_resampled_starts_of_known_samples():
    one = planted(6, {2: 3})
    assert selection.resampled_starts(one[None], 2, n_samples=5, draws=7).tolist() == [3] * 7
    # Each sample has its own closest block.
    two = np.stack([planted(6, {2: 0}), planted(6, {2: 4})])
    single = selection.resampled_starts(two, 2, n_samples=1, draws=4000, seed=1)
    assert set(single) == {0, 4} and abs((single == 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    # A draw of one each is a tie: layer 0.
    pair = selection.resampled_starts(two, 2, n_samples=2, draws=4000, seed=1)
    assert abs((pair == 0).mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    kept = selection.resampled_starts(two, 2, n_samples=1, draws=200, keep_last=1)
    assert kept.max() <= 3
    assert (single == selection.resampled_starts(two, 2, n_samples=1, draws=4000, seed=1)).all()
    assert (single != selection.resampled_starts(two, 2, n_samples=1, draws=4000, seed=2)).any()
    assert selection.resampled_starts(two.tolist(), 2, n_samples=3, draws=2).shape == (2,)


def test_wrong_bootstraps_are_refused():
    samples = np.stack([planted(6, {2: 3})] * 3)
    for name, value in (("n_samples", 0), ("n_samples", 2.5), ("draws", 0), ("draws", True)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 1"):
            selection.resampled_starts(samples, 2, **{"n_samples": 3, "draws": 5, name: value})
    for value in (math.nan, math.inf):
        wrong = samples.copy()
        wrong[1, 0, 2] = value
        with pytest.raises(
            ValueError, match=r"samples must be finite .* with 1 that are not finite"
        ):
            selection.resampled_starts(wrong, 2, n_samples=3)
    for wrong in (samples[0], samples[:0], np.zeros((3, 4, 5))):
        with pytest.raises(ValueError, match="shape"):
            selection.resampled_starts(wrong, 2, n_samples=3)
    with pytest.raises(ValueError, match="block_size must be a whole number from 1 to 6, got 7"):
        selection.resampled_starts(samples, 7, n_samples=3)


# --- one score a layer ----------------------------------------------------------------------------

SCORES = [0.5, 0.1, math.inf, 0.3, 0.1, 0.9, 0.2, 0.4]


def test_the_least_important_layers_by_hand():
    # Ties: 1 before 4; +inf last.
    assert selection.removal_order(SCORES) == (
        1,
        4,
        6,
        3,
        7,
        0,
        5,
        2,
    )
    expected = [
        (),
        (1,),
        (1, 4),
        (1, 4, 6),
        (1, 3, 4, 6),
        (1, 3, 4, 6, 7),
        (0, 1, 3, 4, 6, 7),
        (0, 1, 3, 4, 5, 6, 7),
    ]
    for n, layers in enumerate(expected):
        assert selection.least_important(SCORES, n) == layers
        assert selection.removal_order(SCORES, n=n) == selection.removal_order(SCORES)[:n]
        assert is_plain(selection.least_important(SCORES, n))
    assert selection.least_important([2, 2, 2, 2], 2) == (0, 1)
    # Ties of a deep model.
    assert selection.least_important([1, 0] * 50, 20) == tuple(range(1, 41, 2))
    assert selection.least_important([math.inf, math.inf, 1, math.inf], 3) == (0, 1, 2)
    assert selection.least_important([-math.inf, -1, 0, 1], 1) == (0,)
    assert selection.least_important(np.array(SCORES, dtype=np.float32), np.int64(3)) == (1, 4, 6)


def test_protected_layers_stay():
    scores = [0.0, 0.1, 0.2, 0.3, 9.0, 7.0, 8.0, 6.0, 0.05, 0.01]
    # The "+" rule.
    assert selection.least_important(scores, 3, keep_first=4, keep_last=2) == (
        5,
        6,
        7,
    )
    assert selection.least_important(scores, 4, keep_first=4, keep_last=2) == (4, 5, 6, 7)
    assert selection.removal_order(scores, keep_first=4, keep_last=2) == (7, 5, 6, 4)
    assert selection.least_important(scores, 1, keep_last=1) == (0,)
    assert selection.least_important(scores, 1, keep_first=1) == (9,)
    assert selection.least_important(scores, 0, keep_first=5, keep_last=5) == ()
    assert selection.least_important(scores, 9, keep_first=1) == tuple(range(1, 10))
    for n, protected, most in (
        (5, {"keep_first": 4, "keep_last": 2}, 4),
        (1, {"keep_first": 5, "keep_last": 5}, 0),
        (10, {}, 9),
        (10, {"keep_last": 1}, 9),
        (-1, {}, 9),
    ):
        with pytest.raises(
            ValueError, match=f"n must be a whole number from 0 to {most} .*, got {n}$"
        ):
            selection.least_important(scores, n, **protected)
    for protected, name, most in (
        ({"keep_first": 11}, "keep_first", 10),
        ({"keep_last": -1}, "keep_last", 10),
        ({"keep_first": 6, "keep_last": 5}, "keep_last", 4),
    ):
        with pytest.raises(
            ValueError, match=f"{name} must be a whole number from 0 to {most}, got"
        ):
            selection.least_important(scores, 0, **protected)


def test_wrong_scores_are_refused():
    with pytest.raises(ValueError, match="the score of layer 2 is NaN"):
        selection.least_important([1, 2, math.nan, 0], 1)
    for scores in ([], [[1, 2], [3, 4]], 3.0):
        with pytest.raises(ValueError, match="scores must hold one number a layer, got shape"):
            selection.least_important(scores, 0)
    for n in (1.0, True, None, "1"):
        with pytest.raises(ValueError, match="n must be a whole number"):
            selection.least_important(SCORES, n)


# --- rules that need no scores --------------------------------------------------------------------


def test_the_deepest_layers():
    assert selection.deepest(32, 8) == (23, 24, 25, 26, 27, 28, 29, 30)
    assert selection.deepest(32, 8, keep_last=0) == (24, 25, 26, 27, 28, 29, 30, 31)
    assert selection.deepest(32, 8, keep_last=3) == (21, 22, 23, 24, 25, 26, 27, 28)
    assert selection.deepest(4, 3) == (0, 1, 2) and selection.deepest(4, 0) == ()
    assert selection.deepest(4, 3, keep_last=0) == (1, 2, 3)
    assert is_plain(selection.deepest(np.int64(32), np.int64(8)))
    for n, keep_last, most in ((4, 1, 3), (4, 0, 3), (3, 2, 2), (-1, 1, 3)):
        with pytest.raises(ValueError, match=f"n must be a whole number from 0 to {most} "):
            selection.deepest(4, n, keep_last=keep_last)
    with pytest.raises(ValueError, match="keep_last must be a whole number from 0 to 4, got 5"):
        selection.deepest(4, 0, keep_last=5)


def test_every_second_layer_from_the_last_but_one_downwards():
    assert selection.alternate(30, 1) == (28,)
    assert selection.alternate(30, 3) == (24, 26, 28)
    assert selection.alternate(30, 8) == (14, 16, 18, 20, 22, 24, 26, 28)
    assert selection.alternate(30, 15) == tuple(range(0, 30, 2))
    assert selection.alternate(30, 16) == tuple(sorted([*range(0, 30, 2), 27]))
    assert selection.alternate(30, 18) == tuple(sorted([*range(0, 30, 2), 27, 25, 23]))
    assert selection.alternate(30, 24) == tuple(sorted([*range(0, 30, 2), *range(11, 28, 2)]))
    assert selection.alternate(30, 29) == tuple(range(29)) and selection.alternate(30, 0) == ()
    assert selection.alternate(7, 3) == (1, 3, 5) and selection.alternate(7, 4) == (1, 3, 4, 5)
    assert selection.alternate(7, 6) == (0, 1, 2, 3, 4, 5)
    assert is_plain(selection.alternate(np.int64(30), np.int64(18)))
    with pytest.raises(
        ValueError, match=r"n must be a whole number from 0 to 6 \(layers below the last\), got 7"
    ):
        selection.alternate(7, 7)


def test_random_layers():
    assert selection.random_layers(30, 8, seed=1) == selection.random_layers(30, 8, seed=1)
    assert len({selection.random_layers(30, 8, seed=seed) for seed in range(20)}) == 20
    counts = np.zeros(10)
    for seed in range(2000):
        layers = selection.random_layers(10, 3, seed=seed)
        assert is_plain(layers) and len(layers) == 3 and 0 <= layers[0] and layers[-1] <= 9
        counts[list(layers)] += 1
    assert np.abs(counts - 600).max() < 4.5 * math.sqrt(2000 * 0.3 * 0.7)
    assert (
        selection.random_layers(10, 0, seed=0) == ()
        and len(selection.random_layers(10, 9, seed=0)) == 9
    )
    for n in (10, -1):
        with pytest.raises(ValueError, match=f"n must be a whole number from 0 to 9, got {n}"):
            selection.random_layers(10, n, seed=0)
    for seed in (-1, 0.5, None):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            selection.random_layers(10, 3, seed=seed)


def test_the_number_of_layers_in_a_fraction_rounds_half_up():
    fractions = {
        0: 0,
        0.1: 3,
        0.2: 6,
        0.25: 8,
        0.35: 11,
        0.4: 12,
        0.45: 14,
        0.5: 15,
        0.6: 18,
        0.8: 24,
    }
    assert {
        fraction: selection.count_for_fraction(30, fraction) for fraction in fractions
    } == fractions
    assert (
        selection.count_for_fraction(32, 0.25) == 8 and selection.count_for_fraction(24, 0.27) == 6
    )
    # 14.5, though 50 * 0.29 is 14.499999999999998 in binary.
    assert selection.count_for_fraction(50, 0.29) == 15
    assert (
        selection.count_for_fraction(10, 0.149) == 1
        and selection.count_for_fraction(10, 0.151) == 2
    )
    for n_layers in range(1, 60):
        for percent in range(0, 100):
            # The rule in whole numbers.
            exact = (2 * n_layers * percent + 100) // 200
            if exact < n_layers:
                found = selection.count_for_fraction(n_layers, percent / 100)
                assert found == exact and type(found) is int
    for fraction in (-0.1, 1, 1.0, 1.5, math.nan, math.inf, True, "0.5", None):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got"):
            selection.count_for_fraction(30, fraction)
    with pytest.raises(ValueError, match="fraction 0.9 of 3 layers would leave none"):
        selection.count_for_fraction(3, 0.9)


@pytest.mark.parametrize(
    "choose",
    [
        lambda n_layers, n: selection.deepest(n_layers, n),
        lambda n_layers, n: selection.alternate(n_layers, n),
        lambda n_layers, n: selection.random_layers(n_layers, n, seed=0),
    ],
)
def test_wrong_counts_are_refused(choose):
    for n in (2.0, True, "2", None, math.nan, 30):
        with pytest.raises(ValueError, match="n must be a whole number from 0 to 29"):
            choose(30, n)
    for n_layers in (30.0, True, "30", None, 0, -1):
        with pytest.raises(ValueError, match="n_layers must be a whole number from 1"):
            choose(n_layers, 0)
