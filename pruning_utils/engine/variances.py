"""Variance of a mean over items and runs, its quantiles, levels of many tests, correlated ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from pruning_utils.engine.later import stats


class MeanSquares(NamedTuple):
    """What each source adds to the variance of a mean of ``(n, k)`` values, with its freedom.

    Each is a mean square over the number of values, so that items and runs both hold the residual
    once. Fields are numbers, or arrays of one shape.

    Attributes:
        items: Mean square of the means of items, over n k.
        runs: Mean square of the means of runs, over n k; NaN with one run.
        residual: Mean square of what neither explains, over n k; NaN with one run.
        items_df: Degrees of freedom of ``items``; of one stratum n - 1.
        residual_df: Of ``residual``; of one stratum (n - 1)(k - 1).
        n_runs: k.
    """

    items: float | np.ndarray
    runs: float | np.ndarray
    residual: float | np.ndarray
    items_df: float | np.ndarray
    residual_df: float | np.ndarray
    n_runs: int


class Parts(NamedTuple):
    """Independent estimates of variance, each with its degrees of freedom, that add up to one.

    Attributes:
        variances: Shape ``(parts, ...)``.
        df: The same shape.
    """

    variances: np.ndarray
    df: np.ndarray


def satterthwaite(variances: np.ndarray, df: np.ndarray) -> np.ndarray:
    """Degrees of freedom of sums of independent variances along the first axis.

    ``(sum v)**2 / sum(v**2 / df)`` of Satterthwaite (1946), Biometrics Bulletin 2, 110-114. A sum
    of variances that are all 0 has the largest of their degrees of freedom.
    """
    variances, df = np.asarray(variances, dtype=float), np.asarray(df, dtype=float)
    spread = (variances**2 / df).sum(0)
    total = variances.sum(0) ** 2
    return np.divide(total, spread, out=np.array(df.max(0), dtype=float), where=spread > 0)


def mean_squares(values: np.ndarray, strata: np.ndarray) -> MeanSquares:
    """Mean squares of items crossed with runs, for the mean over strata of the strata's means.

    Items are nested in strata; a run is common to all strata, and its effect is that on the mean
    over strata.

    Args:
        values: Shape ``(n, k)``, without NaN.
        strata: Label of each item, shape ``(n,)``; at least 2 items a stratum.
    """
    names = np.unique(strata)
    k = values.shape[1]
    items, residuals, runs, sizes = [], [], [], []
    for name in names:
        block = values[strata == name]
        size = len(block)
        of_items, of_runs = block.mean(1), block.mean(0)
        items.append(of_items.var(ddof=1) / size)
        left = block - of_items[:, None] - of_runs + block.mean()
        freedom = (size - 1) * (k - 1)
        residuals.append((left**2).sum() / freedom / (size * k) if freedom else np.nan)
        runs.append(of_runs)
        sizes.append(size)
    share = 1 / len(names) ** 2
    freedom_of_items = np.array(sizes) - 1.0
    return MeanSquares(
        items=sum(items) * share,
        runs=np.mean(runs, axis=0).var(ddof=1) / k if k > 1 else np.nan,
        residual=sum(residuals) * share,
        items_df=float(satterthwaite(np.array(items), freedom_of_items)),
        residual_df=float(satterthwaite(np.array(residuals), freedom_of_items * max(k - 1, 1))),
        n_runs=k,
    )


def parts_of_mean(squares: MeanSquares) -> Parts:
    """The variance of a mean over items and runs, as one part or, with two runs, as two.

    The variance is ``items + runs - residual``, in which neither items nor runs add less than
    nothing. Its degrees of freedom are Satterthwaite's, but at most the mean of those of items and
    runs that is harmonic and weighted by their shares: Satterthwaite's alone are too many where a
    few runs make up about half of the variance.

    With two runs no common degrees of freedom do: their variance is known so badly that 95 % would
    cover 87 %. Items and runs then stay two parts with a quantile each, and nothing is deducted,
    which covers too often rather than too seldom.
    """
    items = np.asarray(squares.items, dtype=float)
    items_df = np.broadcast_to(squares.items_df, items.shape)
    if squares.n_runs == 1:
        return Parts(items[None], items_df[None])
    runs, residual = np.asarray(squares.runs), np.asarray(squares.residual)
    runs_df = np.broadcast_to(squares.n_runs - 1.0, items.shape)
    if squares.n_runs == 2:
        return Parts(np.stack([items, runs]), np.stack([items_df, runs_df]))
    total = np.maximum(items, residual) + np.maximum(runs, residual) - residual
    squared = items**2 / items_df + runs**2 / runs_df + residual**2 / squares.residual_df
    df = np.divide(total**2, squared, out=np.array(items_df), where=squared > 0)
    of_runs = np.maximum(runs - residual, 0)
    share = np.divide(of_runs, total, out=np.zeros_like(total), where=total > 0)
    at_most = 1 / ((1 - share) / items_df + share / runs_df)
    return Parts(total[None], np.minimum(df, at_most)[None])


def half_width(parts: Parts, tail: float | np.ndarray) -> np.ndarray:
    """Distance from the mean to the end of an interval that leaves ``tail`` beyond this end.

    ``sqrt(sum(v * t(tail, df)**2))``: with one part Student's interval, with several that of Howe
    (1974), JASA 69, 789-794.
    """
    return np.sqrt((parts.variances * special.stdtrit(parts.df, tail) ** 2).sum(0))


def tail_beyond(parts: Parts, distance: float) -> float:
    """The tail, at most one half, for which :func:`half_width` is ``distance`` (at least 0).

    It is the p-value of a one-sided test.
    """
    if distance == 0:
        return 0.5
    if len(parts.variances) == 1:
        error = float(np.sqrt(parts.variances[0]))
        return float(special.stdtr(parts.df[0], -distance / error)) if error else 0.0
    smallest, largest = 1e-15, 0.5 - 1e-12
    if half_width(parts, smallest) <= distance:
        return 0.0
    if half_width(parts, largest) >= distance:
        return 0.5
    exponent = optimize.brentq(
        lambda exponent: float(half_width(parts, 10.0**exponent)) - distance,
        np.log10(smallest),
        np.log10(largest),
    )
    return float(10.0**exponent)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjusted p-values of tests along the last axis, each in [0, 1].

    Holm (1979), Scand. J. Statist. 6, 65-70: the smallest of m p-values is multiplied by m, the
    next by m - 1 and so on, and none is below one before it. Rejecting what is at most 0.05 rejects
    any true hypothesis of the family in at most 5 % of families.
    """
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, axis=-1, kind="stable")
    steps = np.arange(p_values.shape[-1], 0, -1)
    raised = np.maximum.accumulate(np.take_along_axis(p_values, order, -1) * steps, axis=-1)
    adjusted = np.empty_like(p_values)
    np.put_along_axis(adjusted, order, np.minimum(raised, 1), -1)
    return adjusted


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis: Pearson's of the ranks.

    Equal values have the mean of their ranks.

    Args:
        first: Numbers of shape ``(..., n)``, n at least 2.
        second: The same, of a shape that goes with it.

    Returns:
        Correlations in [-1, 1], of the shape that is left; NaN where all values are equal.
    """
    ranks = [stats.rankdata(values, axis=-1) for values in (first, second)]
    x, y = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
