"""How firmly a set of layers is chosen: by how much text it is chosen on, and what single layers of
it matter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pruning_utils import data, importance, importance_study, models, results, selection, similarity


def score_sample(
    point: dict, *, model: str, revision: str | None, dtype: str, seq_len: int
) -> list[dict]:
    """The scores of all layers that depend on calibration text and cost a pass or two over it.

    Arguments and errors as for :func:`importance_study.score_layers`.

    Returns:
        Rows with ``criterion`` (``taylor``; ``block influence``, the mean over tokens), ``layer``
        (0-based) and ``score``; a layer with a low score goes first.
    """
    network, tokenizer = importance_study._load(model, revision, dtype)
    windows = data.calibration_windows(
        tokenizer, point["n_samples"], seq_len, source=point["source"], seed=point["seed"]
    )
    scores = {
        "taylor": importance.taylor(network, windows),
        "block influence": similarity.measure_similarity(network, windows).block_influence,
    }
    return [
        {"criterion": criterion, "layer": layer, "score": float(score)}
        for criterion, values in scores.items()
        for layer, score in enumerate(values)
    ]


def sample_table(
    draws: Sequence[Sequence],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    dtype: str,
    seq_len: int,
    recompute: bool = False,
) -> tuple[pd.DataFrame, Path]:
    """What :func:`score_sample` finds on each draw (text, windows, seed), read if it is there, and
    the file with it.

    Other arguments as there; ``notebook`` owns the table.
    """
    path = results.table_path(profile, notebook, f"{results.slug(model)}-samples")
    points = [dict(zip(("source", "n_samples", "seed"), draw, strict=True)) for draw in draws]
    compute = functools.partial(
        score_sample, model=model, revision=revision, dtype=dtype, seq_len=seq_len
    )
    return results.sweep(
        points,
        compute,
        path=path,
        recompute=recompute,
        parameters={
            "model": models.identity(model, revision),
            "data": data.identity(),
            "dtype": dtype,
            "seq_len": seq_len,
        },
    ), path


def sample_sets(scores: pd.DataFrame, n_dropped: int) -> pd.DataFrame:
    """The sets that each draw of text leads to, and how firmly.

    Args:
        scores: Of :func:`sample_table`, with at least two seeds of each number of windows.
        n_dropped: Number of layers that go.

    Returns:
        A row for each criterion and draw: ``criterion``, ``n_samples``, ``seed``, ``layers``
        (ascending 0-based numbers as a text, such as ``"4 7 11"``) and ``changed``, the layers in
        which the set differs from those of other seeds with the most windows, on average.

    Raises:
        ValueError: If the most windows have one seed only.
    """
    sets = {
        key: selection.least_important(group.sort_values("layer")["score"].to_numpy(), n_dropped)
        for key, group in scores.groupby(["criterion", "n_samples", "seed"], sort=False)
    }
    most, rows = scores["n_samples"].max(), []
    if (seeds := scores.loc[scores["n_samples"] == most, "seed"].nunique()) < 2:
        raise ValueError(
            f"the largest sample must have two seeds at least, got {seeds} of {most} windows"
        )
    for (criterion, n_samples, seed), layers in sets.items():
        changed = [
            len({*layers} - {*chosen})
            for (other, count, draw), chosen in sets.items()
            if (other, count) == (criterion, most) and draw != seed
        ]
        rows.append(
            {
                "criterion": criterion,
                "n_samples": n_samples,
                "seed": seed,
                "layers": " ".join(map(str, layers)),
                "changed": sum(changed) / len(changed),
            }
        )
    return pd.DataFrame(rows)


def single_swaps(
    layers: Sequence[int], n_layers: int, *, spared: Sequence[int] | None = None
) -> pd.DataFrame:
    """All sets that differ from a set in one layer.

    Args:
        layers: 0-based numbers of the layers that go.
        n_layers: Number of layers of the model, L.
        spared: Which of them stay instead, one at a time; None: each.

    Returns:
        A row for each of the ``len(spared) * (L - len(layers))`` sets: ``spared`` (the layer that
        stays), ``dropped`` (the one that goes in its place) and ``layers`` (ascending numbers as a
        text, such as ``"4 7 11"``).

    Raises:
        ValueError: If numbers are repeated or beyond the model, or ``spared`` is empty, repeats one
            or names layers that stay anyhow.
    """
    chosen = {*layers}
    spared = sorted(chosen) if spared is None else list(spared)
    if len(chosen) < len(layers) or not chosen <= {*range(n_layers)}:
        raise ValueError(
            f"layers must be different numbers from 0 to {n_layers - 1}, got {list(layers)}"
        )
    if not spared or len({*spared}) < len(spared) or not {*spared} <= chosen:
        raise ValueError(
            f"spared must be different ones of the layers that go, {sorted(chosen)}, got {spared}"
        )
    return pd.DataFrame(
        [
            {
                "spared": out,
                "dropped": other,
                "layers": " ".join(map(str, sorted(chosen - {out} | {other}))),
            }
            for out in spared
            for other in range(n_layers)
            if other not in chosen
        ]
    )
