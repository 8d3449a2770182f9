"""How sure a number is, and what it says of a claim: intervals, pairs, and rows of verdicts.

A mean has Student's interval: over independent observations, or over items (questions, documents)
crossed with runs (healing seeds, draws of calibration text), both of which are samples of what
might have been. The bootstrap is for statistics that are no means.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pruning_utils import runtime
from pruning_utils.engine import variances, verdict_rows
from pruning_utils.engine.checks import number, true_or_false, whole_number
from pruning_utils.engine.later import stats
from pruning_utils.engine.verdict_rows import FAILS, HOLDS, UNTESTABLE, UNTOLD

__all__ = [
    "FAILS",
    "FEW",
    "HOLDS",
    "RESAMPLES",
    "UNTESTABLE",
    "UNTOLD",
    "FactorInterval",
    "Interval",
    "depth_correlation",
    "fall_place",
    "fall_share",
    "group_intervals",
    "judge",
    "mean_interval",
    "paired",
    "paired_verdicts",
    "pooled_accuracy",
    "rank_correlation_interval",
    "save_verdicts",
    "statistic_interval",
    "steepness",
    "two_factor_interval",
    "verdict",
    "verdict_table",
]
RESAMPLES = 20_000
CHUNK = 1_000  # resamples that are drawn at once
FEW = 24  # items from which on simulations hold the intervals
ROUNDING = 1e-12  # standard errors below it, as a share of the largest value, are none
LARGEST_KEPT = 5_000  # observations whose resamples are kept for the next curve
CLAIMS = ("above 0", "below 0", "equal", verdict_rows.ABOVE_MARGIN)
LEVEL = 0.95
# The margin of an equality is at most this share of what pruning itself changes.
LARGEST_MARGIN = 0.25


class Interval(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class FactorInterval(NamedTuple):
    """A mean over items and runs, with the ends of its interval and what they are made of.

    Attributes:
        value: The mean, over strata where there are several.
        low: Lower end.
        high: Upper end.
        df: Degrees of freedom of the standard error (Satterthwaite 1946).
        standard_error: Root of the variance of the mean.
        runs_sd: Standard deviation of the means of the runs; NaN with one run.
        n: Number of items.
        runs: Number of runs.
    """

    value: float
    low: float
    high: float
    df: float
    standard_error: float
    runs_sd: float
    n: int
    runs: int


# --- means ----------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Mean of independent observations with Student's interval.

    The ends are ``mean -+ t * s / sqrt(n)``, with the standard deviation s and the quantile t of
    n - 1 degrees of freedom. Observations are documents, questions, or differences of pairs; for
    several runs on the same ones see :func:`two_factor_interval`.

    Args:
        values: At least 2 numbers, shape ``(n,)``.
        confidence: In (0, 1).

    Raises:
        ValueError: If there are fewer than 2 observations, one is not finite, or they are no row
            of numbers; or if the confidence is out of range.
    """
    observed = np.asarray(values, dtype=np.float64)
    if observed.ndim > 1:
        raise ValueError(f"one number an observation is needed, got shape {observed.shape}")
    return Interval(*two_factor_interval(observed, confidence=confidence)[:3])


def group_intervals(table: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Means of groups of rows with their 95 % intervals of :func:`mean_interval`.

    Args:
        table: One independent observation a row.
        by: Columns that tell the groups apart; they keep the order of the table.
        value: Column to average.

    Returns:
        A row for each group: the columns ``by``, then ``value`` (the mean), ``low``, ``high`` and
        ``n``.

    Raises:
        ValueError: If a group has fewer than 2 observations, or one that is not finite; if a row
            lacks what tells its group; or if ``by`` is a text, or a column is missing.
    """
    if isinstance(by, str):
        raise ValueError(f"by must be a list of columns, got {by!r}")
    absent = [name for name in [*by, value] if name not in table]
    if absent:
        raise ValueError(f"table has no columns {absent}, only {list(table.columns)}")
    lacking = [name for name in by if table[name].isna().any()]
    if lacking:
        raise ValueError(f"each row must have a value in {', '.join(by)}; {lacking[0]} has none")
    rows = []
    for names, group in table.groupby(list(by), sort=False):
        try:
            rows.append((*names, *mean_interval(group[value]), len(group)))
        except ValueError as error:
            raise ValueError(f"{names}: {error}") from error
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n"])


def two_factor_interval(
    values: Sequence[float] | np.ndarray,
    *,
    strata: Sequence | np.ndarray | None = None,
    confidence: float = 0.95,
) -> FactorInterval:
    """Mean over items crossed with runs, both random, with its interval.

    With the mean squares MS of the table of n items and k runs, the variance of its mean,
    ``runs / k + items / n + interaction / (n k)``, is
    ``(MS_items + MS_runs - MS_residual) / (n k)``, in which neither items nor runs count less than
    nothing. The ends are Student's, with the degrees of freedom of Satterthwaite (1946, Biometrics
    Bulletin 2, 110-114), bounded as ``engine.variances.parts_of_mean`` says. With one run the
    interval is over items alone. With two nothing is deducted, and the ends are those of Howe
    (1974, JASA 69, 789-794).

    In simulations with 24 to 3,000 items and three to six runs, "95 %" covers 93 to 97 %. Outside
    lie 24 items as skewed as exponential ones, with 92 % as for any Student's interval, and 24
    items whose residual is twice their own spread, with 98 %. Two runs tell so little of their
    spread that items and runs have a quantile each, and 95 to 99.5 % are covered.

    Args:
        values: Shape ``(n,)``, or ``(n, k)`` for k runs on the same items.
        strata: A label for each item, such as its task. The value is then the mean over strata of
            the strata's means, whatever their sizes, and runs are common to all strata.
        confidence: In (0, 1).

    Returns:
        The :class:`FactorInterval`.

    Raises:
        ValueError: If there are fewer than 2 items, in a stratum or at all, or one is not finite;
            if labels are not one an item; or if the confidence is out of range.
    """
    table, labels = _checked_values(values, strata)
    squares = variances.mean_squares(table, labels)
    return _interval(table, labels, squares, variances.parts_of_mean(squares), confidence)


def _checked_values(
    values: Sequence[float] | np.ndarray, strata: Sequence | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values as ``(n, k)`` and a label for each item."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or len(table) < 2 or not table.shape[1] or not np.isfinite(table).all():
        raise ValueError(
            f"an interval needs at least 2 finite observations, got shape {np.shape(values)}"
        )
    if strata is None:
        return table, np.zeros(len(table), dtype=int)
    labels = np.asarray(strata)
    if pd.isna(np.asarray(strata, dtype=object)).any():
        raise ValueError("strata must have a label for each item, got a missing one")
    if labels.shape != (len(table),):
        raise ValueError(f"{len(table)} items need a stratum each, got shape {labels.shape}")
    names, sizes = np.unique(labels, return_counts=True)
    if sizes.min() < 2:
        raise ValueError(f"stratum {names[sizes.argmin()]!r} has 1 item, an interval needs 2")
    return table, labels


def _interval(
    table: np.ndarray,
    labels: np.ndarray,
    squares: variances.MeanSquares,
    parts: variances.Parts,
    confidence: float,
) -> FactorInterval:
    """The interval of a checked table whose mean has these parts of variance."""
    number("confidence", confidence, "in (0, 1)", lambda share: 0 < share < 1)
    n, k = table.shape
    value = float(np.mean([table[labels == name].mean() for name in np.unique(labels)]))
    half = float(variances.half_width(parts, (1 - confidence) / 2))
    return FactorInterval(
        value,
        value - half,
        value + half,
        df=float(variances.satterthwaite(*parts)),
        standard_error=float(np.sqrt(parts.variances.sum())),
        runs_sd=float(np.sqrt(squares.runs * k)),
        n=n,
        runs=k,
    )


def pooled_accuracy(
    questions: pd.DataFrame,
    floors: Mapping[str, float],
    *,
    column: str = "correct",
    run: str | None = None,
    confidence: float = 0.95,
) -> FactorInterval:
    """Mean over tasks of what their accuracy is above its floor, whatever the tasks' sizes.

    Args:
        questions: Columns ``dataset``, ``item``, ``column`` and, where it is named, ``run``; one
            row a question and run.
        floors: By dataset, the accuracy without information, in [0, 1]; of every dataset in the
            table.
        column: What is averaged, such as ``correct`` or ``correct_norm``, in [0, 1].
        run: Column that tells runs on the same questions apart; None for one run.
        confidence: In (0, 1).

    Returns:
        The interval of :func:`two_factor_interval` with tasks as strata. A floor is taken as known.

    Raises:
        ValueError: If a dataset has no floor, a question is there twice or not in every run, a
            dataset has fewer than 2 questions, or NaN is among the values.
    """
    if "dataset" not in questions:
        raise ValueError(f"questions has no column dataset, only {list(questions.columns)}")
    datasets = list(questions["dataset"].unique())
    missing = [name for name in datasets if name not in floors]
    if missing:
        raise ValueError(f"floors must name every dataset, {missing} are not among {list(floors)}")
    for name in datasets:
        number(f"floor of {name}", floors[name], "in [0, 1]", lambda share: 0 <= share <= 1)
    wide = _by_run(questions, ["dataset", "item"], column, run, "questions")
    names = wide.index.get_level_values("dataset")
    above = wide.to_numpy(dtype=float) - np.array([floors[name] for name in names])[:, None]
    return two_factor_interval(above, strata=names.to_numpy(), confidence=confidence)


def _by_run(
    table: pd.DataFrame, on: Sequence[str], value: str, run: str | None, called: str
) -> pd.DataFrame:
    """Values with an item a row, in order of appearance, and a run a column."""
    needed = [*on, value, *([run] if run else [])]
    lacking = [name for name in needed if name not in table.columns]
    if lacking:
        raise ValueError(f"{called} has no columns {lacking}, only {list(table.columns)}")
    keys = [*on, *([run] if run else [])]
    repeated = table[table.duplicated(keys)]
    if len(repeated):
        name = _named(keys, tuple(repeated.iloc[0][keys]))
        raise ValueError(f"{called} has {name} more than once")
    if not run:
        return table.set_index(list(on))[[value]]
    wide = table.pivot(index=list(on), columns=run, values=value)
    present = table.assign(_there=1).pivot(index=list(on), columns=run, values="_there")
    gaps = present[present.isna().any(axis=1)]
    if len(gaps):
        lost = gaps.columns[gaps.iloc[0].isna()][0]
        raise ValueError(f"{called} lacks {_named(on, gaps.index[0])} in the run {lost}")
    order = table[list(on)].drop_duplicates()
    return wide.loc[pd.MultiIndex.from_frame(order) if len(on) > 1 else order[on[0]]]


def _named(columns: Sequence[str], key: object) -> str:
    """An item as a person reads it: ``dataset boolq, item 3``."""
    values = key if isinstance(key, tuple) else (key,)
    return ", ".join(f"{column} {value}" for column, value in zip(columns, values, strict=True))


# --- statistics that are no means -----------------------------------------------------------------


def statistic_interval(
    observations: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic of means with the percentile interval of 20,000 bootstrap resamples.

    For what is no mean: places, shares, ranks, correlations. A mean has :func:`mean_interval`.

    Args:
        observations: Shape ``(n, ...)``; the first axis, of at least 2, is resampled and averaged.
        statistic: Called with means ``(...)`` of the observations, and with those of many resamples
            ``(resamples, ...)``; returns a number for each, so it works along the last axes.
        confidence: In (0, 1).
        seed: Seed of the resampling.

    Returns:
        The :class:`Interval`; its value is the statistic of the observations themselves. The ends
        are NaN where the statistic is NaN for a resample.

    Raises:
        ValueError: If there are fewer than 2 observations, one is not finite, or the confidence or
            the seed is out of range.
    """
    seed = whole_number("seed", seed, 0)
    values = np.asarray(observations, dtype=np.float64)
    if values.ndim == 0 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"an interval needs at least 2 finite observations, got shape {values.shape}"
        )
    number("confidence", confidence, "in (0, 1)", lambda share: 0 < share < 1)
    drawn = []
    for chunk in range(RESAMPLES // CHUNK):
        weights = _resample_counts(len(values), seed, chunk) / len(values)
        drawn.append(statistic(np.tensordot(weights, values, axes=1)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return Interval(float(statistic(values.mean(0))), float(low), float(high))


def _resample_counts(n: int, seed: int, chunk: int) -> np.ndarray:
    """As :func:`_drawn_counts`; they are kept where the bytes of all chunks are few."""
    draw = _kept_counts if n <= LARGEST_KEPT else _drawn_counts
    return draw(n, seed, chunk)


def _drawn_counts(n: int, seed: int, chunk: int) -> np.ndarray:
    """How often each of n observations is in each resample of a chunk, shape (CHUNK, n)."""
    drawn = np.random.default_rng([seed, chunk]).integers(n, size=(CHUNK, n))
    drawn += n * np.arange(CHUNK)[:, None]
    # No observation is drawn 256 times; in one byte, many curves share what was drawn once.
    return np.bincount(drawn.ravel(), minlength=CHUNK * n).reshape(CHUNK, n).astype(np.uint8)


_kept_counts = functools.lru_cache(maxsize=2 * RESAMPLES // CHUNK)(_drawn_counts)


def depth_correlation(means: np.ndarray) -> np.ndarray:
    """Spearman correlation of the place of a block with its mean distance.

    Below 0, the states before and after deeper blocks are more alike.

    Args:
        means: Mean distances, with blocks in the order of depth along the last axis.

    Returns:
        Correlations in [-1, 1], of the shape that is left.
    """
    return variances.rank_correlation(means, np.arange(np.shape(means)[-1]))


def rank_correlation_interval(correlation: float, n: int) -> Interval:
    """Spearman's rank correlation with Fisher's 95 % interval, as if the n items were drawn.

    The variance of its inverse hyperbolic tangent is 1.06 / (n - 3) for ranks: Fieller, Hartley and
    Pearson (1957), Biometrika 44, 470-481.

    Args:
        correlation: In [-1, 1].
        n: Items that were ranked, at least 4.

    Raises:
        ValueError: If one is out of range.
    """
    number("correlation", correlation, "in [-1, 1]", lambda value: -1 <= value <= 1)
    whole_number("n", n, 4)
    half = stats.norm.ppf(0.975) * math.sqrt(1.06 / (n - 3))
    # Of 1 there is no inverse: from 0.999 on the end towards 0 stays where it is.
    middle = np.arctanh(np.clip(correlation, -0.999, 0.999))
    low, high = float(np.tanh(middle - half)), float(np.tanh(middle + half))
    return Interval(correlation, min(low, correlation), max(high, correlation))


def fall_place(means: np.ndarray, *, width: int) -> np.ndarray:
    """Place from which a curve of means falls most within ``width`` steps.

    Curves lie along the last axis. The place is a 0-based index, as a float. ``width`` is from 1 to
    the steps of a curve.
    """
    whole_number("width", width, 1, np.shape(means)[-1] - 1, of="steps of a curve")
    return (means[..., :-width] - means[..., width:]).argmax(-1).astype(float)


def fall_share(means: np.ndarray, *, width: int) -> np.ndarray:
    """Share of the steepest ``width`` steps in the whole fall of a curve of means.

    Curves lie along the last axis. The whole fall is from the first place to the lowest; the share
    is NaN where nothing falls. ``width`` is from 1 to the steps of a curve.
    """
    whole_number("width", width, 1, np.shape(means)[-1] - 1, of="steps of a curve")
    whole = means[..., 0] - means.min(-1)
    drop = (means[..., :-width] - means[..., width:]).max(-1)
    return np.divide(drop, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def steepness(means: np.ndarray, *, places: Sequence[float]) -> np.ndarray:
    """Largest slope between neighbouring places of a curve of means, over its mean slope.

    Curves lie along the last axis, over ``places``, ascending. A straight line has 1. Of a curve
    that falls the slope is the one that falls most.
    """
    if len(places) != np.shape(means)[-1]:
        raise ValueError(f"{np.shape(means)[-1]} means need a place each, got {len(places)}")
    means = np.asarray(means, dtype=float)
    slopes = np.diff(means, axis=-1) / np.diff(np.asarray(places, dtype=float))
    mean_slope = (means[..., -1:] - means[..., :1]) / (places[-1] - places[0])
    return (slopes / mean_slope).max(-1)


# --- pairs ----------------------------------------------------------------------------------------


def paired(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    on: Sequence[str],
    value: str,
    run: str | None = None,
) -> np.ndarray:
    """Differences ``first - second`` of observations of the same items.

    Args:
        first: One observation a row.
        second: Of exactly the same items, in any order.
        on: Columns that name an item, such as ``["dataset", "item"]``.
        value: Column whose values are subtracted.
        run: Column that tells runs on the same items apart. A table without this column, such as
            that of a model that was not trained, counts for every run of the other; two with it
            need the same runs.

    Returns:
        Shape ``(n, k)``: items in the order of ``first``, runs in ascending order.

    Raises:
        ValueError: If an item is in one table only (one is named), or twice in a run, runs differ,
            or a column is missing.
    """
    tables = []
    for called, table in (("first", first), ("second", second)):
        tables.append(_by_run(table, on, value, run if run in table.columns else None, called))
    if run is not None and run not in first.columns and run not in second.columns:
        raise ValueError(f"neither table has the column {run!r} of runs")
    left, right = tables
    for missing, called in (
        (left.index.difference(right.index), "second"),
        (right.index.difference(left.index), "first"),
    ):
        if len(missing):
            raise ValueError(
                f"{called} lacks {len(missing)} items, among them {_named(on, missing[0])}"
            )
    by_run = [table for table, whole in ((left, first), (right, second)) if run in whole.columns]
    if len(by_run) == 2 and list(by_run[0].columns) != list(by_run[1].columns):
        runs = [list(table.columns) for table in by_run]
        raise ValueError(f"both tables need the same runs, got {runs[0]} and {runs[1]}")
    return left.to_numpy(dtype=float) - right.loc[left.index].to_numpy(dtype=float)


def paired_verdicts(
    differences: Mapping[str, np.ndarray],
    *,
    margin: float | None = None,
    effect: float | Mapping[str, float] | None = None,
    strata: Mapping[str, Sequence] | None = None,
    runs_needed: int = 1,
) -> pd.DataFrame:
    """Whether paired measurements differ, are equal within a margin, or cannot be told apart.

    All pairs of a call are one family. A pair "differs" if the test of its mean that belongs to the
    interval of :func:`two_factor_interval` has a p-value of at most 5 % after Holm (1979, Scand.
    J. Statist. 6, 65-70). It is "equal" if the two one-sided tests of Schuirmann (1987, J.
    Pharmacokin. Biopharm. 15, 657-680) against both ends of the margin have, also after Holm. It
    "differs, within the margin" if both hold, and "cannot be told" if neither does.
    All intervals have one level, 95 %, without correction: an interval may exclude 0 where, among
    so many pairs, the difference cannot be told. Nor can that of few items, fewer than
    :data:`FEW`, whose differences are all alike: without spread there is no test.

    Args:
        differences: By name, one difference an item, shape ``(n,)``, or ``(n, runs)`` for several
            runs (healing seeds) on the same ones.
        margin: Largest difference, of either sign, that counts as none; above 0. None: a quarter of
            the effect.
        effect: What pruning itself changes in this measure on the same questions, with any sign:
            one number, or one a pair. No margin may be above a quarter of it.
        strata: By name, a label for each item; see :func:`two_factor_interval`.
        runs_needed: Fewest runs that each pair must have.

    Returns:
        A row for each name: ``difference`` (the mean), ``low`` and ``high`` (95 %), ``low_90`` and
        ``high_90`` (90 %: inside the margin where one pair alone would be "equal"), ``n``,
        ``runs``, ``p`` and ``p_holm`` (of no difference), ``p_equal_holm`` (of a difference at
        the margin or beyond), ``p_beyond_holm`` (of one at the margin or within), ``margin``,
        ``detectable`` (the difference that such data finds in about 80 % of cases at the first
        step of Holm, ``(t(0.05 / (2 m)) + t(0.2)) * standard error`` for m pairs) and ``verdict``.

    Raises:
        ValueError: If a margin is not above 0, is above a quarter of the effect, or neither is
            given; if strata are of no pair; or if a pair has fewer than 2 items, one that is not
            finite, or too few runs.
    """
    margins = _margins(list(differences), margin, effect)
    whole_number("runs_needed", runs_needed, 1)
    unknown = [name for name in strata or {} if name not in differences]
    if unknown:
        raise ValueError(f"strata must be of pairs, {unknown} are not among {list(differences)}")
    rows: dict[str, dict] = {}
    for name, measured in differences.items():
        rows[name] = _tested_pair(
            name, measured, margins[name], len(differences), (strata or {}).get(name)
        )
        if rows[name]["runs"] < runs_needed:
            raise ValueError(f"{name}: {runs_needed} runs are needed, got {rows[name]['runs']}")
    for p_value in ("p", "p_equal", "p_beyond"):
        adjusted = variances.holm(np.array([row[p_value] for row in rows.values()]))
        for row, after_holm in zip(rows.values(), adjusted, strict=True):
            row[f"{p_value}_holm"] = after_holm
    for row in rows.values():
        row["verdict"] = _pair_verdict(row["p_holm"] <= 0.05, row["p_equal_holm"] <= 0.05)
    columns = (
        "difference low high low_90 high_90 n runs p p_holm p_equal_holm p_beyond_holm margin "
        "detectable verdict"
    ).split()
    table = pd.DataFrame(list(rows.values()), index=list(rows), columns=columns)
    return table.rename_axis("pair").reset_index()


def _margins(
    names: list[str], margin: float | None, effect: float | Mapping[str, float] | None
) -> dict[str, float]:
    """The margin of each pair, checked against the effect."""
    if margin is not None:
        margin = number("margin", margin, "above 0", lambda width: 0 < width < math.inf)
    if effect is None:
        if margin is None:
            raise ValueError("margin or effect must be given, got neither")
        return dict.fromkeys(names, float(margin))
    effects = effect if isinstance(effect, Mapping) else dict.fromkeys(names, effect)
    margins = {}
    for name in names:
        if name not in effects:
            raise ValueError(f"effect must name every pair, {name!r} is not in {list(effects)}")
        change = number(f"effect of {name!r}", effects[name], "a number", math.isfinite)
        largest = LARGEST_MARGIN * abs(change)
        margins[name] = largest if margin is None else float(margin)
        if not 0 < margins[name] <= largest:
            raise ValueError(
                f"{name}: margin must be above 0 and at most a quarter of what pruning changes: "
                f"margin {margins[name]:g}, effect {effects[name]:g}"
            )
    return margins


def _tested_pair(
    name: str, measured: np.ndarray, margin: float, pairs: int, strata: Sequence | None
) -> dict:
    """Mean, intervals and p-values, before Holm, of one of so many pairs."""
    try:
        table, labels = _checked_values(measured, strata)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    squares = variances.mean_squares(table, labels)
    parts = variances.parts_of_mean(squares)
    found = _interval(table, labels, squares, parts, LEVEL)
    narrow = _interval(table, labels, squares, parts, 0.90)
    size = abs(found.value)
    # The tail of the nearer end of the margin, seen from its own side.
    towards_margin = variances.tail_beyond(parts, abs(margin - size))
    is_within = size < margin
    p = 2 * variances.tail_beyond(parts, size)
    p_equal = towards_margin if is_within else 1 - towards_margin
    p_beyond = 1.0 if is_within else 2 * towards_margin
    if found.n < FEW and found.standard_error <= ROUNDING * np.abs(table).max():
        # A few observations that are all alike do not say how far others may lie.
        p = p_equal = p_beyond = 1.0
    first_step = variances.half_width(parts, 0.05 / (2 * pairs))
    return {
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "low_90": narrow.low,
        "high_90": narrow.high,
        "n": found.n,
        "runs": found.runs,
        "p": p,
        "p_equal": p_equal,
        "p_beyond": p_beyond,
        "margin": margin,
        "detectable": float(first_step + variances.half_width(parts, 0.2)),
    }


def _pair_verdict(differs: bool, is_equal: bool) -> str:
    """What is said of a pair: whether it differs from 0, and whether it is within the margin."""
    if differs:
        return "differs, within the margin" if is_equal else "differs"
    return "equal" if is_equal else UNTOLD


# --- verdicts on claims ---------------------------------------------------------------------------


def verdict(interval: Interval | FactorInterval, *, claimed: str) -> str:
    """What an interval says of a claim about the sign of its value.

    Args:
        interval: Of a difference, a correlation or the like, for which 0 means "no effect".
        claimed: ``"above 0"`` or ``"below 0"``.

    Returns:
        :data:`HOLDS`, :data:`FAILS` (the interval lies on the other side), or :data:`UNTOLD` (it
        holds 0, or its ends are NaN).

    Raises:
        ValueError: For another claim.
    """
    if claimed not in ("above 0", "below 0"):
        raise ValueError(f"claimed must be 'above 0' or 'below 0', got {claimed!r}")
    return verdict_rows.word_for_sign(interval.low, interval.high, claimed)


def judge(
    claim: str,
    part: str,
    found: Interval | FactorInterval | Mapping,
    *,
    claimed: str,
    model: str,
    measure: str,
    data: str,
    depth: float | str,
    recipe: str,
    notebook: str,
    cell: str,
    margin: float | None = None,
    levels: Sequence[float | Interval | FactorInterval] = (),
    unpruned: float | Interval | FactorInterval | None = None,
    floor: float | None = None,
    higher_is_better: bool = True,
    tokens_per_parameter: float | None = None,
    paper_tokens_per_parameter: float | None = None,
    kind: str | None = None,
    n: int | None = None,
    runs: int | None = None,
    level: float = LEVEL,
    asked: str = verdict_rows.BEFOREHAND,
) -> dict:
    """One row of ``verdicts.csv``: what a measurement says of a part of a claim.

    It is "not testable here" if a level or the unpruned model is at its floor, or if the model was
    trained on less than a tenth of the paper's tokens per parameter. A pair is then judged by its
    p-values after Holm, another interval by its ends. Equality fails only where the difference is
    larger than the margin; a claimed sign fails on the other side of 0, and for a pair that is
    equal.

    Args:
        claim: Code of the claim in ``reference/claims.csv``, such as ``A5``.
        part: What part of it, such as ``"healed, loss"``.
        found: Interval of the difference or other quantity, or a row (a Series or a dict) of
            :func:`paired_verdicts`.
        claimed: ``"above 0"``, ``"below 0"``, ``"equal"`` or ``"above the margin"``.
        model: Name of the model.
        measure: Such as ``"loss"`` or ``"accuracy"``.
        data: Text or tasks.
        depth: Removed layers, or what else tells how much.
        recipe: How the model was healed.
        notebook: Name of the notebook.
        cell: Title of the cell that shows it.
        margin: For the last two with an interval; a pair brings its own.
        levels: Levels of the two sides that are compared, as numbers or as intervals.
        unpruned: Level of the unpruned model, the positive control.
        floor: The level without information: of accuracy that without the question, of loss ln V.
        higher_is_better: True for accuracy, False for loss. A level clears the floor if its whole
            interval does.
        tokens_per_parameter: Of this healing; None where nothing is trained.
        paper_tokens_per_parameter: Of the paper's.
        kind: Kind of the interval; needed for an :class:`Interval`, of which it cannot be told.
        n: Number of items; taken from ``found`` where it says so.
        runs: Number of runs; likewise.
        level: Confidence of the interval.
        asked: ``"beforehand"``; or ``"afterwards"`` for a part that was not named so before tables
            of the same data had been seen, or whose models were healed anew since.

    Returns:
        The row: ``claim, part, model, measure, data, depth, recipe, value, low, high, level, kind,
        n, runs, tokens_per_parameter, unpruned, floor, verdict, notebook, cell, reason, asked``.
        The reason says why nothing can be tested, else it is "".

    Raises:
        ValueError: For another claim, an equality without a margin above 0, levels or an unpruned
            one without a floor, levels that are no list, a direction that is neither True nor
            False, or an interval whose kind, n or runs nobody says.
    """
    if claimed not in CLAIMS:
        raise ValueError(f"claimed must be one of {CLAIMS}, got {claimed!r}")
    if (levels or unpruned is not None) and floor is None:
        raise ValueError("levels are compared with a floor: floor must be given, got None")
    if floor is not None:
        floor = number("floor", floor, "a number", math.isfinite)
    higher_is_better = true_or_false("higher_is_better", higher_is_better)
    if isinstance(found, (Interval, FactorInterval)):
        ends = {"value": found.value, "low": found.low, "high": found.high}
        word = _word_of_interval(found, claimed, margin)
    else:
        ends = {"value": found["difference"], "low": found["low"], "high": found["high"]}
        word = verdict_rows.word_of_pair(found, claimed)
    reason = verdict_rows.untestable_because(
        levels,
        unpruned,
        floor,
        higher_is_better=higher_is_better,
        tokens_per_parameter=tokens_per_parameter,
        paper_tokens_per_parameter=paper_tokens_per_parameter,
    )
    return {
        **{"claim": claim, "part": part, "model": model, "measure": measure, "data": data},
        **{"depth": depth, "recipe": recipe, **ends, "level": level},
        **_made_of(found, kind, n, runs),
        "tokens_per_parameter": np.nan if tokens_per_parameter is None else tokens_per_parameter,
        "unpruned": np.nan if unpruned is None else verdict_rows.value_of(unpruned),
        "floor": np.nan if floor is None else floor,
        "verdict": UNTESTABLE if reason else word,
        **{"notebook": notebook, "cell": cell, "reason": reason, "asked": asked},
    }


def _word_of_interval(found: Interval | FactorInterval, claimed: str, margin: float | None) -> str:
    """The verdict on a claim by the ends of an interval."""
    if claimed in ("above 0", "below 0"):
        return verdict_rows.word_for_sign(found.low, found.high, claimed)
    if margin is None or not margin > 0:
        of = "equality" if claimed == "equal" else "more than it"
        raise ValueError(f"margin must be above 0 for a claim of {of}, got {margin}")
    if claimed == verdict_rows.ABOVE_MARGIN:
        return verdict_rows.word_for_sign(found.low - margin, found.high - margin, "above 0")
    return verdict_rows.word_for_equality(found.low, found.high, margin)


def _made_of(
    found: Interval | FactorInterval | Mapping, kind: str | None, n: int | None, runs: int | None
) -> dict:
    """Kind, n and runs of an interval: what is said of it, or else what it says itself."""
    if isinstance(found, FactorInterval):
        n, runs = found.n, found.runs
    elif not isinstance(found, Interval):
        n, runs = int(found["n"]), int(found["runs"])
    if not isinstance(found, Interval):
        kind = kind or ("t over items" if runs == 1 else "t over items and runs")
    if kind is None or n is None or runs is None:
        raise ValueError(f"kind, n and runs must be given, got {kind!r}, {n} and {runs}")
    return {"kind": kind, "n": n, "runs": runs}


def verdict_table(rows: Iterable[Mapping]) -> pd.DataFrame:
    """Rows of :func:`judge` as a table, sorted by claim, part, model and data.

    Raises:
        ValueError: If a code is not in ``reference/claims.csv``, a word is none of the four, a row
            has other columns, or two have the same claim, part, model, measure, data, depth and
            recipe.
    """
    claims = pd.read_csv(runtime.project_root() / "reference" / "claims.csv")
    return verdict_rows.checked_table(rows, claims["id"])


def save_verdicts(rows: Iterable[Mapping], path: str | os.PathLike) -> pd.DataFrame:
    """Write :func:`verdict_table` to a file, whole or not at all; floats have six digits.

    Args:
        rows: From :func:`judge`.
        path: The file, such as ``verdicts.csv`` beside a notebook's tables.

    Returns:
        The table.

    Raises:
        ValueError: If a code is not in ``reference/claims.csv``, a word is none of the four, or two
            rows say the same part of a claim; nothing is written then.
    """
    table = verdict_table(rows)
    with runtime.atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    return table
