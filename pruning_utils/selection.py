"""From distances or scores to the layers to drop, as 0-based layer numbers in ascending order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pruning_utils.engine.checks import number, real_numbers, whole_number

# Of a bootstrap: for 256 samples they take 20 MiB.
DRAWS_AT_ONCE = 10_000


class Block(NamedTuple):
    """``size`` layers from ``start`` on (0-based), and the distance between their two ends."""

    start: int
    size: int
    distance: float

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer numbers ``start`` to ``start + size - 1``."""
        return tuple(range(self.start, self.start + self.size))


def block_distances(distance: np.ndarray, block_size: int, *, keep_last: int = 0) -> np.ndarray:
    """Distance between the ends of every block of one size.

    Args:
        distance: ``(L+1, L+1)`` matrix, [i, j] between the inputs of layers i and j; [i, L] uses
            the raw output.
        block_size: Layers in a block, from 1 to L - keep_last.
        keep_last: Number of last layers that no block may touch, at least 0.

    Returns:
        float64 array of shape ``(L - keep_last - block_size + 1,)``; entry l belongs to the block
        that starts at l.

    Raises:
        ValueError: If the matrix is not square or holds NaN or -inf where a block would read it,
            or a number is out of range.
    """
    distance = real_numbers("distance", distance)
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1] or len(distance) < 2:
        raise ValueError(
            f"distance must be a square matrix of L+1 rows, got shape {distance.shape}"
        )
    n_layers = len(distance) - 1
    whole_number("keep_last", keep_last, 0, n_layers - 1)
    whole_number("block_size", block_size, 1, n_layers - keep_last)
    values = np.diagonal(distance, block_size)[: n_layers - keep_last - block_size + 1]
    wrong = ~(values > -np.inf)
    if wrong.any():
        kind = "NaN" if np.isnan(values[wrong][0]) else "-inf"
        raise ValueError(f"the distance of the block at layer {int(wrong.argmax())} is {kind}")
    return values.copy()


def best_block(distance: np.ndarray, block_size: int, *, keep_last: int = 0) -> Block:
    """The block whose ends are closest, l*(n) of arXiv:2403.17887, Eq. (6).

    Of equal distances the one with the lower start is taken; +inf ranks last.

    Args:
        distance: ``(L+1, L+1)`` matrix, [i, j] between the inputs of layers i and j; [i, L] uses
            the raw output.
        block_size: Layers in a block, from 1 to L - keep_last.
        keep_last: Number of last layers that no block may touch, at least 0.

    Returns:
        The block: its first layer, 0-based, its size and its distance.

    Raises:
        ValueError: If the matrix is not square or holds NaN or -inf where a block would read it,
            or a number is out of range.
    """
    values = block_distances(distance, block_size, keep_last=keep_last)
    start = int(values.argmin())
    return Block(start, int(block_size), float(values[start]))


def resampled_starts(
    samples: np.ndarray,
    block_size: int,
    *,
    n_samples: int,
    draws: int = 1000,
    seed: int = 0,
    keep_last: int = 0,
) -> np.ndarray:
    """First layer of the best block when the calibration samples are drawn again (bootstrap).

    Args:
        samples: ``(N, L+1, L+1)`` distances of single samples, before the mean; all finite.
        block_size: Layers in the block.
        n_samples: Samples in a draw, with replacement, at least 1.
        draws: Number of draws, from 1 to 10 million.
        seed: Seed of the draws, a whole number from 0 on.
        keep_last: Number of last layers that no block may touch.

    Returns:
        int64 array of shape ``(draws,)``, 0-based layer numbers.

    Raises:
        ValueError: If a distance is not finite, or a number is out of range.
    """
    samples = real_numbers("samples", samples)
    if samples.ndim != 3 or not len(samples) or not np.isfinite(samples).all():
        raise ValueError(
            f"samples must be finite numbers of shape (N, L+1, L+1), got shape {samples.shape} "
            f"with {int((~np.isfinite(samples)).sum())} that are not finite"
        )
    n_starts = len(block_distances(samples[0], block_size, keep_last=keep_last))
    whole_number("n_samples", n_samples, 1, 10**9)
    whole_number("draws", draws, 1, 10**7)
    generator = np.random.default_rng(whole_number("seed", seed, 0))
    values = np.diagonal(samples, block_size, axis1=1, axis2=2)[:, :n_starts]
    # Not all draws at once: that is a number for each sample in each of them.
    starts = []
    for first in range(0, draws, DRAWS_AT_ONCE):
        n_drawn = min(DRAWS_AT_ONCE, draws - first)
        shares = np.full(len(values), 1 / len(values))
        starts.append((generator.multinomial(n_samples, shares, n_drawn) @ values).argmin(1))
    return np.concatenate(starts)


def least_important(
    scores: Sequence[float] | np.ndarray, n: int, *, keep_first: int = 0, keep_last: int = 0
) -> tuple[int, ...]:
    """The n layers with the lowest scores, all removed at once.

    With ``keep_first=4, keep_last=2`` it is the "+" rule of arXiv:2402.02834.

    Args:
        scores: One score a layer, shape ``(L,)``; +inf ranks last, NaN is refused.
        n: Number of layers to drop, from 0 to L - keep_first - keep_last, and less than L.
        keep_first: Number of first layers that stay.
        keep_last: Number of last layers that stay.

    Returns:
        Ascending layer numbers; among equal scores the lower number goes first.

    Raises:
        ValueError: If a score is NaN, or a number is out of range.
    """
    if n is None:  # which stands for all layers in an order
        whole_number("n", n, 0)
    return tuple(sorted(removal_order(scores, keep_first=keep_first, keep_last=keep_last, n=n)))


def removal_order(
    scores: Sequence[float] | np.ndarray,
    *,
    keep_first: int = 0,
    keep_last: int = 0,
    n: int | None = None,
) -> tuple[int, ...]:
    """Unprotected layers from the least important on, not in ascending order of their numbers.

    Args:
        scores: One score a layer, shape ``(L,)``; +inf ranks last, NaN is refused.
        keep_first: Number of first layers that stay.
        keep_last: Number of last layers that stay.
        n: How many of them to return, from 0 to L - keep_first - keep_last, and less than L; None:
            all that are not protected.

    Returns:
        0-based layer numbers; among equal scores the lower number goes first.

    Raises:
        ValueError: If a score is NaN, or a number is out of range.
    """
    values = real_numbers("scores", scores)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"scores must hold one number a layer, got shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"the score of layer {int(np.isnan(values).argmax())} is NaN")
    n_layers = len(values)
    whole_number("keep_first", keep_first, 0, n_layers)
    whole_number("keep_last", keep_last, 0, n_layers - keep_first)
    if n is not None:
        most = min(n_layers - keep_first - keep_last, n_layers - 1)
        whole_number("n", n, 0, most, of="unprotected layers")
    order = np.argsort(values, kind="stable")
    return tuple(int(layer) for layer in order if keep_first <= layer < n_layers - keep_last)[:n]


def deepest(n_layers: int, n: int, *, keep_last: int = 1) -> tuple[int, ...]:
    """The n deepest layers before the last ``keep_last``, which stay.

    With ``keep_last=1`` it is the simple rule of arXiv:2403.17887, Sec. 4.4. With ``keep_last=0``
    it is the reverse order of arXiv:2411.15558, which removes the last layer too.
    """
    whole_number("n_layers", n_layers, 1, 10**6)
    whole_number("keep_last", keep_last, 0, n_layers)
    whole_number("n", n, 0, min(n_layers - keep_last, n_layers - 1), of="unprotected layers")
    return tuple(range(n_layers - keep_last - n, n_layers - keep_last))


def alternate(n_layers: int, n: int) -> tuple[int, ...]:
    """Every second layer from L-2 downwards, then the rest from L-3 downwards; layer L-1 stays."""
    whole_number("n_layers", n_layers, 1, 10**6)
    whole_number("n", n, 0, n_layers - 1, of="layers below the last")
    order = [*range(n_layers - 2, -1, -2), *range(n_layers - 3, -1, -2)]
    return tuple(sorted(order[:n]))


def random_layers(n_layers: int, n: int, *, seed: int) -> tuple[int, ...]:
    """n different layers, all equally likely, drawn by ``seed``, a whole number from 0 on."""
    whole_number("n_layers", n_layers, 1, 10**6)
    whole_number("n", n, 0, n_layers - 1)
    whole_number("seed", seed, 0, 2**64)
    drawn = np.random.default_rng(seed).choice(n_layers, n, replace=False)
    return tuple(sorted(int(layer) for layer in drawn))


def count_for_fraction(n_layers: int, fraction: float) -> int:
    """Number of layers in a fraction of them, floor(L * fraction + 0.5).

    Raises:
        ValueError: If the fraction is outside [0, 1), or would leave no layer.
    """
    whole_number("n_layers", n_layers, 1, 10**6)
    fraction = number("fraction", fraction, "in [0, 1)", lambda share: 0 <= share < 1)
    # 50 * 0.29 is 14.499999999999998 in binary, and rounds up.
    n = math.floor(round(n_layers * fraction, 9) + 0.5)
    if n == n_layers:
        raise ValueError(f"fraction {fraction} of {n_layers} layers would leave none")
    return n
