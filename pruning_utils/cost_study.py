"""What ways of training cost, and how large the models are that they leave behind: Table 4 of
arXiv:2411.15558."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pruning_utils import efficiency, models, recipe_study, results, shape_study, surgery


def measure_cost(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    seq_len: int,
    steps: int,
    healing_settings: dict,
) -> dict:
    """What training costs at a point.

    Args:
        point: ``layers`` dropped (a text of 0-based numbers), and ``recipe``, a method of
            :func:`healing.heal` and perhaps settings as for :func:`recipe_study.further_settings`:
            ``"last_layers last_k=2 untie=false"``.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        seq_len: Tokens in a window.
        steps: Steps that are measured, after one that is not.
        healing_settings: What the recipe does not say; ``batch_size`` in windows.

    Returns:
        ``trainable`` parameters, ``step_seconds`` (mean), ``tokens_per_second``, ``peak_bytes`` of
        the process, and ``stored``, the parameters of the trained model as it is saved, adapters
        merged: an untied head is one more matrix.

    Raises:
        ValueError: If the recipe, or a setting, is out of range.
    """
    method, *words = point["recipe"].split()
    settings = {**healing_settings, **recipe_study.further_settings(words)}
    for count in (
        1,
        steps,
    ):  # libraries are imported by the first training of a process, which is not measured
        found = shape_study.measure_training(
            {**point, "method": method},
            model=model,
            revision=revision,
            dtype=dtype,
            seq_len=seq_len,
            steps=count,
            healing_settings=settings,
        )
    network, _ = models.load_model(model, revision=revision, dtype=dtype)
    network = surgery.drop_layers(network, [int(layer) for layer in point["layers"].split()])
    if method == "last_layers" and settings.get("untie", True):
        models.untie_head(network)
    return {**found, "stored": efficiency.stored_parameters(network)["total"]}


def cost_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    own_process: bool = True,
    recompute: bool = False,
    **settings,
) -> tuple[pd.DataFrame, Path]:
    """What :func:`measure_cost` finds at these points, read if it is there, and the file that holds
    it; with ``own_process`` each is measured in a fresh one, so that its peak of memory is its
    own."""
    path = results.table_path(profile, notebook, f"{results.slug(model)}-costs")
    compute = functools.partial(measure_cost, model=model, revision=revision, **settings)
    return results.sweep(
        points,
        compute,
        path=path,
        recompute=recompute,
        executor=shape_study.fresh_processes() if own_process else None,
        parameters={"model": models.identity(model, revision), **settings},
    ), path
