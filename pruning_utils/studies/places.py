"""Blocks of layers at every place of a model: what they cost, and how far apart their ends are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pruning_utils import data, selection, similarity
from pruning_utils.engine import checks
from pruning_utils.studies import study
from pruning_utils.studies.recipes import Cut, Point, Recipe, layer_numbers


def place_points(block_sizes: Sequence[int], n_layers: int, seed: int = 0) -> list[dict]:
    """Points of a :class:`study.Study`: blocks removed at every place, unhealed.

    Args:
        block_sizes: Numbers of layers in a block.
        n_layers: Of the model, L.
        seed: Of the points.

    Returns:
        Plain values, by size and by first layer, from 0 to ``L - size``.

    Raises:
        ValueError: For a size outside ``[1, L - 1]``.
    """
    cuts: list[Cut] = []
    for size in block_sizes:
        if not 1 <= size < n_layers:
            raise ValueError(f"block_sizes must lie in [1, {n_layers - 1}], got {size}")
        starts = range(n_layers - size + 1)
        cuts += [Cut(layers=selection.Block(start, size, np.nan).layers) for start in starts]
    return [Point(cut, Recipe(), seed).text() for cut in cuts]


def random_points(block_size: int, n_layers: int, n_blocks: int, seed: int = 0) -> list[dict]:
    """Points of :func:`place_points` of one size at random places: a control for rules.

    Args:
        block_size: Layers in a block.
        n_layers: Of the model, L.
        n_blocks: How many different blocks, at least 1; all where there are fewer.
        seed: Of their places.

    Returns:
        Plain values by first layer. Their own seed is 0, since nothing is trained.

    Raises:
        ValueError: For a size outside ``[1, L - 1]``, or a number of blocks below 1.
    """
    every = place_points([block_size], n_layers)
    n_drawn = min(checks.whole_number("n_blocks", n_blocks, 1), len(every))
    drawn = np.random.default_rng(seed).choice(len(every), n_drawn, replace=False)
    return [every[start] for start in sorted(drawn)]


def with_sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of :func:`place_points` with ``block_size``, whose first layer is ``start``.

    Args:
        table: Column ``layers``, such as ``"4 5 6"``.
    """
    return table.assign(block_size=table["layers"].map(layer_numbers).map(len))


def minus_blocks(rules: pd.DataFrame, blocks: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """How much more often the model of each rule is right than models without random blocks.

    Args:
        rules: Columns ``rule``, ``dataset``, ``item`` and ``right``, one model a rule.
        blocks: Columns ``start``, ``dataset``, ``item`` and ``right``, one model a place; its
            questions are among those of every rule.

    Returns:
        By rule, a table with a question a row, ``(dataset, item)``, and a block a column.

    Raises:
        ValueError: If a rule lacks a question of the blocks.
    """
    on = ["dataset", "item"]
    grid = blocks.pivot(index=on, columns="start", values="right")
    found = {}
    for rule, rows in rules.groupby("rule", sort=False):
        own = rows.set_index(on)["right"].reindex(grid.index)
        if own.isna().any():
            raise ValueError(f"{rule} lacks {own.isna().sum()} of {len(own)} questions of blocks")
        found[str(rule)] = grid.rsub(own, axis=0)
    return found


def place_distances(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    block_sizes: Sequence[int],
    n_samples: int,
    seq_len: int,
    seed: int,
) -> list[dict]:
    """Angular distances between the ends of blocks at every place, at the last token.

    Args:
        point: ``source``, a calibration text.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        revision: See above.
        dtype: See above.
        block_sizes: Numbers of layers in a block.
        n_samples: Windows of the text.
        seq_len: Tokens in a window.
        seed: Of the text.

    Returns:
        Rows with ``block_size``, ``start`` (0-based layer) and ``distance`` in [0, 1].
    """
    network, tokenizer = study.loaded(model, revision, dtype)
    windows = data.calibration_windows(
        tokenizer, n_samples, seq_len, source=point["source"], seed=seed
    )
    distances = similarity.measure_similarity(network, windows).angular_distance
    rows = []
    for size in block_sizes:
        for start, distance in enumerate(selection.block_distances(distances, size)):
            rows.append({"block_size": size, "start": start, "distance": float(distance)})
    return rows


def nearest_without(layer: int, block: selection.Block, n_layers: int) -> selection.Block:
    """The block of the same size that is fewest layers away and does not hold a layer.

    Args:
        layer: 0-based number of the layer that stays.
        block: The block.
        n_layers: Of the model.

    Returns:
        The block; of two that are equally near, the first. Its distance is NaN.

    Raises:
        ValueError: If every block of this size holds the layer.
    """
    free = [
        start
        for start in range(n_layers - block.size + 1)
        if not start <= layer < start + block.size
    ]
    if not free:
        raise ValueError(
            f"layer must be outside of some block of {block.size} of {n_layers} layers, got {layer}"
        )
    start = min(free, key=lambda place: abs(place - block.start))
    return selection.Block(start, block.size, np.nan)
