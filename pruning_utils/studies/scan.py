"""Similarity of all layers in one pass, and how firmly the closest block is chosen: 01."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pruning_utils import data, evidence, models, selection, similarity
from pruning_utils.studies import study

DISTANCES = {"last token": "angular_distance", "all tokens": "angular_distance_all_tokens"}
INFLUENCES = {"mean over tokens": "block_influence", "flattened": "block_influence_flattened"}
QUANTISED = ("nf4", "int8")
COLUMNS = ("quantity", "start", "block_size", "n_samples", "value", "stderr", "low", "high")


def scan_layers(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    n_samples: int,
    seq_len: int,
    block_sizes: Sequence[int],
    sample_counts: Sequence[int],
    draws: int,
    seed: int,
) -> list[dict]:
    """Similarity of layers on one text in one precision, and how the choice of the block moves when
    text is redrawn.

    Args:
        point: ``source`` (a calibration text) and ``precision`` (``bfloat16``, ``float32``, ``nf4``
            or ``int8``).
        model: Name for :func:`models.load_model`, with ``revision``.
        dtype: What quantised weights are multiplied in.
        n_samples: Windows of ``seq_len`` tokens, at least 2.
        seq_len: Tokens in a window.
        block_sizes: Sizes n whose chosen block is resampled.
        sample_counts: Numbers of windows in a draw.
        draws: Draws with replacement for each of them.
        seed: Seed of the text and of the draws.

    Returns:
        Rows with ``quantity``, ``start`` (first layer of the block, or the layer), ``block_size``,
        ``n_samples``, ``value``, ``stderr``, ``low`` and ``high``: the distances under both token
        rules for every block, both influences for every layer, under ``chosen`` the share of draws
        in which a block is the closest of its size, and for each size the claims of
        arXiv:2403.17887, Sec. 4.3, with ends of intervals: ``depth correlation`` (Spearman, of
        distance and place, over blocks with neither first nor last layer) and ``last block minus
        median``.
    """
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2 for intervals, got {n_samples}")
    precision = point["precision"]
    if precision in QUANTISED:
        network, tokenizer = study.loaded(model, revision, dtype, precision)
    else:
        network, tokenizer = study.loaded(model, revision, precision)
    for size in block_sizes:  # refused before the pass, not after it
        selection.best_block(np.zeros(2 * [len(models.decoder_layers(network)) + 1]), size)
    windows = data.calibration_windows(
        tokenizer, n_samples, seq_len, source=point["source"], seed=seed
    )
    found = similarity.measure_similarity(network, windows)
    rows = [*_distance_rows(found), *_influence_rows(found)]
    for size in block_sizes:
        rows += _claim_rows(found.last_token_samples, size)
        for count in sample_counts:
            rows += _choice_rows(found.last_token_samples, size, count, draws, seed)
    return [_completed({"n_samples": n_samples, **row}) for row in rows]


def _completed(row: dict) -> dict:
    """The row with all columns, in order."""
    return {name: row.get(name, np.nan) for name in COLUMNS}


def _distance_rows(found: similarity.Similarity) -> Iterator[dict]:
    """Distances of every block; standard errors of those at the last token."""
    samples = found.last_token_samples
    stderr = samples.std(0, ddof=1) / np.sqrt(len(samples))
    n_layers = len(found.block_influence)
    for quantity, attribute in DISTANCES.items():
        values = getattr(found, attribute)
        for size in range(1, n_layers + 1):
            for start in range(n_layers - size + 1):
                ends = (start, start + size)
                row = {"quantity": quantity, "start": start, "block_size": size}
                row["value"] = values[ends]
                if quantity == "last token":
                    row["stderr"] = stderr[ends]
                yield row


def _influence_rows(found: similarity.Similarity) -> Iterator[dict]:
    for quantity, attribute in INFLUENCES.items():
        for layer, value in enumerate(getattr(found, attribute)):
            yield {"quantity": quantity, "start": layer, "block_size": 1, "value": value}


def _claim_rows(samples: np.ndarray, size: int) -> Iterator[dict]:
    """What Sec. 4.3 says of blocks of a size, from distances ``(n, L + 1, L + 1)``."""
    blocks = np.diagonal(samples, size, axis1=1, axis2=2)
    claims = {
        "depth correlation": evidence.statistic_interval(
            blocks[:, 1:-1], evidence.depth_correlation
        ),
        "last block minus median": evidence.statistic_interval(
            blocks, lambda means: means[..., -1] - np.median(means, axis=-1)
        ),
    }
    for claim, interval in claims.items():
        row = {"quantity": claim, "start": 0, "block_size": size, "value": interval.value}
        yield {**row, "low": interval.low, "high": interval.high}


def _choice_rows(
    samples: np.ndarray, size: int, count: int, draws: int, seed: int
) -> Iterator[dict]:
    """Shares of draws of ``count`` windows in which each block of the size is the closest."""
    starts = selection.resampled_starts(samples, size, n_samples=count, draws=draws, seed=seed)
    for start, times in zip(*np.unique(starts, return_counts=True), strict=True):
        yield {
            "quantity": "chosen",
            "start": int(start),
            "block_size": size,
            "n_samples": count,
            "value": times / draws,
        }
