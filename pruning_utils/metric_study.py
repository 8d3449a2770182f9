"""All ways to choose layers, side by side: what notebooks on Reassessing Layer Pruning
(arXiv:2411.15558) compute."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pruning_utils import data, importance_study, models, results, selection, similarity

INFLUENCES = {
    "block influence": "block_influence",
    "block influence, flattened": "block_influence_flattened",
}
PROTECTED = ("magnitude+", "magnitude L2+", "taylor+")  # what the "+" rule is shown for


def score_metrics(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    seq_len: int,
    block_sizes: Sequence[int],
) -> list[dict]:
    """Scores of all layers by every metric of one draw of calibration text, and the distances of
    blocks.

    Arguments as for :func:`importance_study.score_layers`, with the sizes of blocks.

    Returns:
        Its rows, those of block influence (mean over tokens, and one cosine over all of them), and
        under the criterion ``block of n`` the angular distance between the ends of the block of n
        layers that starts at ``layer``.
    """
    network, tokenizer = importance_study._load(model, revision, dtype)
    for size in block_sizes:  # refused before the passes, not after them
        selection.best_block(np.zeros(2 * [len(models.decoder_layers(network)) + 1]), size)
    rows = importance_study.score_layers(
        point, model=model, revision=revision, dtype=dtype, seq_len=seq_len
    )
    windows = data.calibration_windows(
        tokenizer, point["n_samples"], seq_len, source=point["source"], seed=point["seed"]
    )
    found = similarity.measure_similarity(network, windows)
    scores = {name: getattr(found, attribute) for name, attribute in INFLUENCES.items()}
    scores |= {
        f"block of {size}": selection.block_distances(found.angular_distance, size)
        for size in block_sizes
    }
    return rows + [
        {"criterion": name, "layer": layer, "score": float(score)}
        for name, values in scores.items()
        for layer, score in enumerate(values)
    ]


def metric_sets(scores: pd.DataFrame, depths: Sequence[int], *, n_random: int) -> pd.DataFrame:
    """The layers that every metric removes at once.

    Args:
        scores: From :func:`score_metrics`, one draw of text, with the blocks of every size in
            ``depths``.
        depths: Numbers of layers to drop.
        n_random: Random sets of each size, drawn with the seeds from 0 on.

    Returns:
        A row for each metric and depth: ``metric``, ``n_dropped`` and ``layers`` (ascending 0-based
        numbers as a text, such as ``"4 7 11"``). ``reverse order`` removes the last layers,
        ``deepest but last`` keeps the last one.

    Raises:
        ValueError: If the blocks of a size are not among the scores.
    """
    blocks = scores["criterion"].str.startswith("block of ")
    n_layers = scores.loc[~blocks, "layer"].max() + 1
    ranked = importance_study.removed_sets(scores[~blocks], depths).rename(
        columns={"rule": "metric"}
    )
    ranked = ranked[~ranked["metric"].str.endswith("+") | ranked["metric"].isin(PROTECTED)]
    rows = []
    for n_dropped in depths:
        distances = (
            scores[scores["criterion"] == f"block of {n_dropped}"]
            .sort_values("layer")["score"]
            .to_numpy()
        )
        if not len(distances):
            raise ValueError(
                f"the scores hold no distances of blocks of {n_dropped}: name it among block_sizes"
            )
        start = int(distances.argmin())
        chosen = {
            "closest block": tuple(range(start, start + n_dropped)),
            "reverse order": selection.deepest(n_layers, n_dropped, keep_last=0),
            "deepest but last": selection.deepest(n_layers, n_dropped),
            "alternate": selection.alternate(n_layers, n_dropped),
        }
        chosen |= {
            f"random {seed}": selection.random_layers(n_layers, n_dropped, seed=seed)
            for seed in range(n_random)
        }
        rows += [
            {"metric": metric, "n_dropped": n_dropped, "layers": " ".join(map(str, layers))}
            for metric, layers in chosen.items()
        ]
    return pd.concat([ranked, pd.DataFrame(rows)], ignore_index=True)


def metric_table(
    draws: Sequence[Sequence],
    *,
    profile: str,
    model: str,
    revision: str | None,
    dtype: str,
    seq_len: int,
    block_sizes: Sequence[int],
    recompute: bool = False,
) -> tuple[pd.DataFrame, Path]:
    """What :func:`score_metrics` finds on each draw (text, windows, seed), read if it is there, and
    the file of it."""
    path = results.table_path(profile, "09_seven_metrics", f"{results.slug(model)}-scores")
    points = [dict(zip(("source", "n_samples", "seed"), draw, strict=True)) for draw in draws]
    settings = {"dtype": dtype, "seq_len": seq_len, "block_sizes": list(block_sizes)}
    compute = functools.partial(score_metrics, model=model, revision=revision, **settings)
    return results.sweep(
        points,
        compute,
        path=path,
        recompute=recompute,
        parameters={"model": models.identity(model, revision), "data": data.identity(), **settings},
    ), path


def rank_agreement(means: np.ndarray) -> np.ndarray:
    """Spearman's correlation between the two rows of ``means``, shape ``(..., 2, n)`` with n of at
    least 2: from -1 to 1. Of equal values the first ranks lower."""
    ranks = np.asarray(means).argsort(-1).argsort(-1)
    n = ranks.shape[-1]
    return 1 - 6 * ((ranks[..., 0, :] - ranks[..., 1, :]) ** 2).sum(-1) / (n * (n**2 - 1))
