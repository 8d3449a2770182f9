"""How sure a number is: bootstrap intervals over observations, and what they say of a claim."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 2000
UNTOLD = "cannot be told from this data"


class Interval(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of independent observations with its bootstrap interval.

    Observations are windows, questions, or differences of pairs. Arguments and errors are as for
    :func:`statistic_interval`, with one number an observation.
    """
    return statistic_interval(values, lambda means: means, confidence=confidence, seed=seed)


def group_intervals(table: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Means of groups of rows with their 95 % bootstrap intervals.

    Args:
        table: One observation a row.
        by: Columns that tell the groups apart; they keep the order of the table.
        value: Column to average.

    Returns:
        A row for each group: the columns ``by``, then ``value`` (the mean), ``low``, ``high`` and
        ``n``.

    Raises:
        ValueError: If a group has fewer than 2 observations, or NaN among them.
    """
    rows = []
    for names, group in table.groupby(list(by), sort=False):
        try:
            rows.append((*names, *mean_interval(group[value]), len(group)))
        except ValueError as error:
            raise ValueError(f"{names}: {error}") from error
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n"])


def statistic_interval(
    observations: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic of means with the percentile interval of 2,000 bootstrap resamples.

    Args:
        observations: Shape ``(n, ...)``; the first axis, of at least 2, is resampled and averaged.
        statistic: Called with means ``(...)`` of the observations, and with those of all resamples
            ``(2000, ...)``; returns a number for each, so it works along the last axes.
        confidence: In (0, 1).
        seed: Seed of the resampling.

    Returns:
        The :class:`Interval`; its value is the statistic of the observations themselves. The ends
        are NaN where the statistic is NaN for a resample.

    Raises:
        ValueError: If there are fewer than 2 observations, or one is NaN.
    """
    values = np.asarray(observations, dtype=np.float64)
    if values.ndim == 0 or len(values) < 2 or np.isnan(values).any():
        raise ValueError(
            f"an interval needs at least 2 observations without NaN, got shape {values.shape}"
        )
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(_resampled_means(values, seed)), [tail, 1 - tail])
    return Interval(float(statistic(values.mean(0))), float(low), float(high))


def _resampled_means(observations: np.ndarray, seed: int) -> np.ndarray:
    """Means (RESAMPLES, ...) of bootstrap resamples of observations (n, ...)."""
    return np.tensordot(_weights(len(observations), seed), observations, axes=1)


@functools.lru_cache(maxsize=2)
def _weights(n: int, seed: int) -> np.ndarray:
    """Weight of each of n observations in each resample, shape (RESAMPLES, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def depth_correlation(means: np.ndarray) -> np.ndarray:
    """Spearman correlation of the place of a block with its mean distance.

    Below 0, the states before and after deeper blocks are more alike.

    Args:
        means: Mean distances, with blocks in the order of depth along the last axis.

    Returns:
        Correlations in [-1, 1], of the shape that is left.
    """
    ranks = stats.rankdata(means, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    depth = np.arange(ranks.shape[-1], dtype=float)
    depth = depth - depth.mean()
    return (ranks * depth).sum(-1) / np.sqrt((ranks**2).sum(-1) * (depth**2).sum())


def fall_place(means: np.ndarray, *, width: int) -> np.ndarray:
    """Place from which a curve of means falls most within ``width`` steps.

    Curves lie along the last axis. The place is a 0-based index, as a float.
    """
    return (means[..., :-width] - means[..., width:]).argmax(-1).astype(float)


def fall_share(means: np.ndarray, *, width: int) -> np.ndarray:
    """Share of the steepest ``width`` steps in the whole fall of a curve of means.

    Curves lie along the last axis. The whole fall is from the first place to the lowest; the share
    is NaN where nothing falls.
    """
    whole = means[..., 0] - means.min(-1)
    drop = (means[..., :-width] - means[..., width:]).max(-1)
    return np.divide(drop, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def steepness(means: np.ndarray, *, places: Sequence[float]) -> np.ndarray:
    """Largest slope between neighbouring places of a curve of means, over its mean slope.

    Curves lie along the last axis, over ``places``. A straight line has 1.
    """
    slopes = np.diff(means, axis=-1) / np.diff(np.asarray(places, dtype=float))
    return slopes.max(-1) / ((means[..., -1] - means[..., 0]) / (places[-1] - places[0]))


def paired_verdicts(
    differences: Mapping[str, np.ndarray], *, margin: float, seed: int = 0
) -> pd.DataFrame:
    """Whether paired measurements differ, are equal within a margin, or cannot be told apart.

    Observations are resampled and, where there are several runs, runs too, so that the interval
    covers both. A pair "differs" if its interval excludes 0 at the confidence that the method of
    Holm (1979) gives it among all pairs, and is "equal" if its 90 % interval lies inside the margin
    (two one-sided tests, Schuirmann 1987).

    Args:
        differences: By name, one difference a window or question, shape ``(n,)``, or ``(n, runs)``
            for several runs (healing seeds) on the same ones.
        margin: Largest difference, of either sign, that counts as none; above 0.
        seed: Seed of the resampling.

    Returns:
        A row for each name: ``difference`` (the mean), ``low`` and ``high`` (at the confidence
        after Holm), ``low_90`` and ``high_90``, ``n``, ``runs``, ``detectable`` (the difference
        that such data finds in 80 % of cases, at 5 %) and ``verdict``.

    Raises:
        ValueError: If the margin is not above 0, or a difference has fewer than 2 observations, or
            NaN.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    draws: dict[str, np.ndarray] = {}
    rows: dict[str, dict] = {}
    for name, measured in differences.items():
        values = np.asarray(measured, dtype=np.float64).reshape(len(measured), -1)
        if len(values) < 2 or np.isnan(values).any():
            raise ValueError(
                f"{name}: at least 2 differences without NaN are needed, got shape {values.shape}"
            )
        n, runs = values.shape
        chosen = np.random.default_rng([seed, 1]).integers(runs, size=(RESAMPLES, runs))
        draws[name] = np.take_along_axis(_resampled_means(values, seed), chosen, axis=1).mean(1)
        rows[name] = {"difference": values.mean(), "n": n, "runs": runs}
    # Holm's order: the pair with the smallest share of draws beyond 0 comes first.
    shares = {name: min((drawn <= 0).mean(), (drawn >= 0).mean()) for name, drawn in draws.items()}
    differs = True
    for place, name in enumerate(sorted(shares, key=lambda name: shares[name])):
        drawn = draws[name]
        level = 0.05 / (len(draws) - place)
        low, low_90, high_90, high = np.quantile(drawn, [level / 2, 0.05, 0.95, 1 - level / 2])
        # Behind the first pair whose interval holds 0, no pair differs.
        differs = differs and not low <= 0 <= high
        is_equal = -margin < low_90 and high_90 < margin
        rows[name] |= {
            "low": low,
            "high": high,
            "low_90": low_90,
            "high_90": high_90,
            "detectable": 2.8 * drawn.std(),
            "verdict": _pair_verdict(differs, is_equal),
        }
    columns = "difference low high low_90 high_90 n runs detectable verdict".split()
    return pd.DataFrame.from_dict(rows, orient="index")[columns].rename_axis("pair").reset_index()


def _pair_verdict(differs: bool, is_equal: bool) -> str:
    """What is said of a pair: whether it differs from 0, and whether it is within the margin."""
    if differs:
        return "differs, within the margin" if is_equal else "differs"
    return "equal" if is_equal else UNTOLD


def verdict(interval: Interval, *, claimed: str) -> str:
    """What an interval says of a claim about the sign of its value.

    Args:
        interval: Of a difference, a correlation or the like, for which 0 means "no effect".
        claimed: ``"above 0"`` or ``"below 0"``.

    Returns:
        ``holds``, ``does not hold at this size`` (the interval lies on the other side), or ``cannot
        be told from this data`` (it holds 0, or its ends are NaN).

    Raises:
        ValueError: For another claim.
    """
    if claimed not in ("above 0", "below 0"):
        raise ValueError(f"claimed must be 'above 0' or 'below 0', got {claimed!r}")
    if not (interval.low > 0 or interval.high < 0):
        return UNTOLD
    return "holds" if (interval.low > 0) == (claimed == "above 0") else "does not hold at this size"
