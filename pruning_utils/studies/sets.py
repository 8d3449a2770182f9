"""Sets of layers that rules remove at once, from scores of all layers.

A set is a text of ascending 0-based numbers, such as ``"4 7 11"``, as a table can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pruning_utils import selection
from pruning_utils.engine import variances
from pruning_utils.studies.recipes import layer_text
from pruning_utils.studies.scores import BLOCKS

PLUS = {"keep_first": 4, "keep_last": 2}  # what the "+" rule never removes
PROTECTED = ("magnitude+", "magnitude L2+", "taylor+")  # of which 09 shows the "+" rule
# The paper's average: of plain accuracy for some tasks, of accuracy per character for the others.
SEVEN_TASKS = {
    "boolq": "correct",
    "piqa": "correct",
    "hellaswag": "correct_norm",
    "winogrande": "correct",
    "arc_easy": "correct",
    "arc_challenge": "correct_norm",
    "openbookqa": "correct_norm",
}


def removed_sets(scores: pd.DataFrame, depths: Sequence[int]) -> pd.DataFrame:
    """The one-shot sets that scores lead to, with and without the "+" rule.

    With it, the first four layers and the last two stay.

    Args:
        scores: Columns ``criterion``, ``layer`` and ``score``, one draw of text.
        depths: Numbers of layers to drop.

    Returns:
        A row for each criterion, with and without "+", and depth: ``rule`` (the criterion, with
        ``+`` where layers are protected), ``n_dropped`` and ``layers``.
    """
    rows = []
    for criterion, group in scores.groupby("criterion", sort=False):
        values = group.sort_values("layer")["score"].to_numpy()
        for mark, kept in (("", {}), ("+", PLUS)):
            for n_dropped in depths:
                layers = selection.least_important(values, n_dropped, **kept)
                rows.append(_row(f"{criterion}{mark}", n_dropped, layers))
    return pd.DataFrame(rows)


def metric_sets(scores: pd.DataFrame, depths: Sequence[int], *, n_random: int) -> pd.DataFrame:
    """The layers that every rule of arXiv:2411.15558 removes at once.

    Args:
        scores: From :func:`scores.score_metrics`, one draw of text, with the blocks of every size
            in ``depths``.
        depths: Numbers of layers to drop.
        n_random: Random sets of each size, drawn with the seeds from 0 on.

    Returns:
        A row for each rule and depth: ``rule``, ``n_dropped`` and ``layers``. ``reverse order``
        removes the last layers, ``deepest but last`` keeps the last one.

    Raises:
        ValueError: If the blocks of a size are not among the scores.
    """
    blocks = scores["criterion"].str.startswith(BLOCKS)
    n_layers = scores.loc[~blocks, "layer"].max() + 1
    ranked = removed_sets(scores[~blocks], depths)
    ranked = ranked[~ranked["rule"].str.endswith("+") | ranked["rule"].isin(PROTECTED)]
    rows = []
    for n_dropped in depths:
        sizes = scores[scores["criterion"] == f"{BLOCKS}{n_dropped}"]
        if sizes.empty:
            raise ValueError(
                f"the scores hold no distances of blocks of {n_dropped}: name it among block_sizes"
            )
        start = int(sizes.sort_values("layer")["score"].to_numpy().argmin())
        chosen = {
            "closest block": tuple(range(start, start + n_dropped)),
            "reverse order": selection.deepest(n_layers, n_dropped, keep_last=0),
            "deepest but last": selection.deepest(n_layers, n_dropped),
            "alternate": selection.alternate(n_layers, n_dropped),
        }
        for seed in range(n_random):
            chosen[f"random {seed}"] = selection.random_layers(n_layers, n_dropped, seed=seed)
        rows += [_row(rule, n_dropped, layers) for rule, layers in chosen.items()]
    return pd.concat([ranked, pd.DataFrame(rows)], ignore_index=True)


def _row(rule: str, n_dropped: int, layers: tuple[int, ...]) -> dict:
    return {"rule": rule, "n_dropped": n_dropped, "layers": layer_text(layers)}


def sample_sets(scores: pd.DataFrame, n_dropped: int) -> pd.DataFrame:
    """The sets that each draw of text leads to, and how firmly.

    Args:
        scores: Of :func:`scores.sample_table`, with at least two seeds of each number of windows.
        n_dropped: Number of layers that go.

    Returns:
        A row for each criterion and draw: ``criterion``, ``n_samples``, ``seed``, ``layers`` and
        ``changed``, the layers in which the set differs from those of other seeds with the most
        windows, on average.

    Raises:
        ValueError: If the most windows have one seed only.
    """
    most = scores["n_samples"].max()
    seeds = scores.loc[scores["n_samples"] == most, "seed"].nunique()
    if seeds < 2:
        raise ValueError(
            f"the largest sample must have two seeds at least, got {seeds} of {most} windows"
        )
    chosen = {}
    for draw, group in scores.groupby(["criterion", "n_samples", "seed"], sort=False):
        values = group.sort_values("layer")["score"].to_numpy()
        chosen[draw] = selection.least_important(values, n_dropped)
    rows = []
    for (criterion, n_samples, seed), layers in chosen.items():
        changed = [
            len({*layers} - {*others})
            for (other, count, draw), others in chosen.items()
            if (other, count) == (criterion, most) and draw != seed
        ]
        rows.append(
            {
                "criterion": criterion,
                "n_samples": n_samples,
                "seed": seed,
                "layers": layer_text(layers),
                "changed": sum(changed) / len(changed),
            }
        )
    return pd.DataFrame(rows)


def rank_agreement(means: np.ndarray) -> np.ndarray:
    """Spearman's correlation between the two rows of ``means``, shape ``(..., 2, n)``.

    n is at least 2, the result from -1 to 1.
    """
    return variances.rank_correlation(means[..., 0, :], means[..., 1, :])
