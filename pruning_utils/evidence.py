"""How sure a number is: bootstrap intervals over the independent observations, and what they let one say of a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000


class Interval(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of independent observations (windows, questions, or differences of pairs) with its bootstrap interval.

    Arguments and errors as for :func:`statistic_interval`, with one number an observation.
    """
    return statistic_interval(values, lambda draws, axis: draws.mean(axis), confidence=confidence, seed=seed)


def statistic_interval(observations: np.ndarray, statistic: Callable[..., np.ndarray], *, confidence: float = 0.95,
                       seed: int = 0) -> Interval:
    """A statistic with the percentile interval of 2,000 bootstrap resamples.

    Args:
        observations: Shape ``(n, ...)``; the first axis, of at least 2, is resampled.
        statistic: Called with resampled observations and ``axis``, the axis that runs over them.
        confidence: In (0, 1).
        seed: Seed of the resampling.

    Returns:
        The :class:`Interval`; its value is the statistic of the observations themselves.

    Raises:
        ValueError: If there are fewer than 2 observations, or one is NaN.
    """
    observations = np.asarray(observations, dtype=np.float64)
    if observations.ndim == 0 or len(observations) < 2 or np.isnan(observations).any():
        raise ValueError(f"an interval needs at least 2 observations without NaN, got shape {observations.shape}")
    random, draws = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, 100):  # in parts, so that large observations need little memory
        chosen = random.integers(len(observations), size=(100, len(observations)))
        draws.append(statistic(observations[chosen], axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return Interval(float(statistic(observations, axis=0)), float(low), float(high))


def depth_correlation(distances: np.ndarray, axis: int) -> np.ndarray:
    """Spearman correlation of the place of a block with its mean distance; below 0, deeper blocks are more alike.

    Args:
        distances: Distances with observations along ``axis`` and blocks, in the order of depth, along the last axis.
        axis: The axis to average over first.

    Returns:
        Correlations in [-1, 1], of the shape that is left.
    """
    ranks = stats.rankdata(distances.mean(axis), axis=-1)
    depth = np.arange(ranks.shape[-1], dtype=float)
    ranks, depth = ranks - ranks.mean(-1, keepdims=True), depth - depth.mean()
    return (ranks * depth).sum(-1) / np.sqrt((ranks**2).sum(-1) * (depth**2).sum())


def verdict(interval: Interval, *, claimed: str) -> str:
    """What an interval says of a claim about the sign of its value.

    Args:
        interval: Of a difference, a correlation or the like, for which 0 means "no effect".
        claimed: ``"above 0"`` or ``"below 0"``.

    Returns:
        ``holds``, ``does not hold at this size`` (the interval lies on the other side), or ``cannot be told from this
        data`` (it holds 0).

    Raises:
        ValueError: For another claim.
    """
    if claimed not in ("above 0", "below 0"):
        raise ValueError(f"claimed must be 'above 0' or 'below 0', got {claimed!r}")
    if interval.low <= 0 <= interval.high:
        return "cannot be told from this data"
    return "holds" if (interval.low > 0) == (claimed == "above 0") else "does not hold at this size"
