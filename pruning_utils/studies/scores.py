"""Scores of all layers by every criterion, on draws of calibration text: what 06, 09 and 11 ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pruning_utils import data, importance, models, selection, similarity
from pruning_utils.engine.later import torch
from pruning_utils.studies import study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CRITERIA = ("magnitude", "magnitude L2", "taylor", "perplexity")
INFLUENCES = {
    "block influence": "block_influence",
    "block influence, flattened": "block_influence_flattened",
}
BLOCKS = "block of "  # how the criterion begins whose scores are the distances of blocks
DRAW = ("source", "n_samples", "seed")  # what a draw of text is named by


def score_layers(
    point: dict, *, model: str, revision: str | None, dtype: str, seq_len: int
) -> list[dict]:
    """Scores of all layers by the criteria of arXiv:2402.02834 on one draw of calibration text.

    Args:
        point: ``source`` (a calibration text), ``n_samples`` (windows) and ``seed`` (of the draw).
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        seq_len: Tokens in a window.

    Returns:
        Rows with ``criterion``, ``layer`` (0-based) and ``score``; a layer with a low score goes
        first. Magnitudes do not depend on the text.
    """
    network, tokenizer = study.loaded(model, revision, dtype)
    windows = drawn(tokenizer, point, seq_len)
    return score_rows(
        {
            "magnitude": importance.magnitude(network),
            "magnitude L2": importance.magnitude(network, norm=2),
            "taylor": importance.taylor(network, windows),
            "perplexity": importance.perplexity_without_layer(network, windows),
        }
    )


def score_metrics(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    seq_len: int,
    block_sizes: Sequence[int],
) -> list[dict]:
    """Scores by every criterion of arXiv:2411.15558 too, and the distances of blocks.

    Arguments as for :func:`score_layers`, with the sizes of blocks.

    Returns:
        Its rows, those of block influence (mean over tokens, and one cosine over all of them), and
        under the criterion ``block of n`` the angular distance between the ends of the block of n
        layers that starts at ``layer``.
    """
    network, tokenizer = study.loaded(model, revision, dtype)
    for size in block_sizes:  # refused before the passes, not after them
        selection.best_block(np.zeros(2 * [len(models.decoder_layers(network)) + 1]), size)
    rows = score_layers(point, model=model, revision=revision, dtype=dtype, seq_len=seq_len)
    found = similarity.measure_similarity(network, drawn(tokenizer, point, seq_len))
    scores = {name: getattr(found, attribute) for name, attribute in INFLUENCES.items()}
    for size in block_sizes:
        scores[f"{BLOCKS}{size}"] = selection.block_distances(found.angular_distance, size)
    return rows + score_rows(scores)


def score_sample(
    point: dict, *, model: str, revision: str | None, dtype: str, seq_len: int
) -> list[dict]:
    """Scores by the criteria that depend on calibration text and cost a pass or two over it.

    Arguments, rows and errors as for :func:`score_layers`; the criteria are ``taylor`` and
    ``block influence`` (mean over tokens).
    """
    network, tokenizer = study.loaded(model, revision, dtype)
    windows = drawn(tokenizer, point, seq_len)
    return score_rows(
        {
            "taylor": importance.taylor(network, windows),
            "block influence": similarity.measure_similarity(network, windows).block_influence,
        }
    )


def drawn(tokenizer: PreTrainedTokenizerBase, point: dict, seq_len: int) -> torch.Tensor:
    """The calibration windows of a draw, ``(n_samples, seq_len)``."""
    return data.calibration_windows(
        tokenizer, point["n_samples"], seq_len, source=point["source"], seed=point["seed"]
    )


def score_rows(scores: Mapping[str, np.ndarray]) -> list[dict]:
    """Scores ``(L,)`` by criterion, as rows of a table."""
    rows = []
    for criterion, values in scores.items():
        for layer, score in enumerate(values):
            rows.append({"criterion": criterion, "layer": layer, "score": float(score)})
    return rows


def draw_points(draws: Sequence[Sequence]) -> list[dict]:
    """Points of the functions here from ``[text, windows, seed]`` each."""
    return [dict(zip(DRAW, draw, strict=True)) for draw in draws]


def score_table(draws: Sequence[Sequence], **given: Any) -> tuple[pd.DataFrame, Path]:
    """What :func:`score_layers` finds on draws, and the file with it: a table of notebook 06.

    Args:
        draws: ``[text, windows, seed]`` each.
        given: ``profile``, ``model``, ``revision``, ``dtype``, ``seq_len`` and perhaps
            ``recompute``, as for :func:`study.point_table`.
    """
    return study.point_table(
        score_layers,
        draw_points(draws),
        notebook="06_block_importance",
        table="scores",
        reads_text=True,
        **given,
    )


def metric_table(
    draws: Sequence[Sequence], *, block_sizes: Sequence[int], **given: Any
) -> tuple[pd.DataFrame, Path]:
    """What :func:`score_metrics` finds on draws, and the file with it: a table of notebook 09.

    Arguments as for :func:`score_table`, with the sizes of blocks.
    """
    return study.point_table(
        score_metrics,
        draw_points(draws),
        notebook="09_seven_metrics",
        table="scores",
        reads_text=True,
        block_sizes=list(block_sizes),
        **given,
    )


def sample_table(draws: Sequence[Sequence], **given: Any) -> tuple[pd.DataFrame, Path]:
    """What :func:`score_sample` finds on draws, and the file with it.

    Arguments as for :func:`score_table`, with the ``notebook`` that owns the table.
    """
    return study.point_table(
        score_sample, draw_points(draws), table="samples", reads_text=True, **given
    )


def of_draw(scores: pd.DataFrame, draw: Sequence) -> pd.DataFrame:
    """The scores of one draw of text."""
    return scores[(scores[list(DRAW)] == list(draw)).all(axis=1)]
