"""What quantising costs a model, whole and with layers removed, beside the bytes it saves (08)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pruning_utils import evidence
from pruning_utils.studies.depth import SMALLEST_EFFECT
from pruning_utils.studies.recipes import layer_numbers

MEGABYTE = 1e6


def stored_losses(
    losses: pd.DataFrame, sizes: pd.DataFrame, titles: Mapping[str, str]
) -> pd.DataFrame:
    """Mean losses of stored models, beside their sizes.

    Args:
        losses: Rows of a study of one run: ``layers`` (those removed, "" for none), ``precision``,
            ``dataset`` and ``nll``.
        sizes: Rows of :func:`costs.measure_storage` for the same models.
        titles: By text what it is called.

    Returns:
        A row for each text and model: ``panel`` (the title), ``layers``, ``n_dropped``,
        ``precision``, ``size`` (megabytes on disk), and ``value``, ``low``, ``high`` and ``n`` of
        :func:`evidence.group_intervals`.

    Raises:
        KeyError: If the size of a model is not given.
    """
    on_disk = sizes.set_index(["layers", "precision"])["disk"] / MEGABYTE
    by = ["panel", "layers", "precision"]
    of_texts = losses[losses["dataset"].isin([*titles])]
    found = evidence.group_intervals(
        of_texts.assign(panel=of_texts["dataset"].map(titles)), by, "nll"
    )
    keys = found[["layers", "precision"]].itertuples(index=False)
    return found.assign(
        size=[on_disk[tuple(key)] for key in keys],
        n_dropped=found["layers"].map(layer_numbers).map(len),
    )


def added_losses(losses: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """Verdicts on the loss that quantising adds, and on whether it adds more to pruned models.

    All pairs are one family. The margin is a quarter of what a precision adds to the unpruned
    model, where that is at least :data:`depth.SMALLEST_EFFECT`.

    Args:
        losses: As for :func:`stored_losses`. The first precision is what the others are compared
            to, and the unpruned model is among the rows.
        titles: By text what it is called.
    """
    base, *others = losses["precision"].unique()
    pairs: dict[str, np.ndarray] = {}
    effects: dict[str, float] = {}
    for name, title in titles.items():
        rows = _by_model(losses, name)
        for precision in others:
            added = {
                len(layer_numbers(layers)): (
                    rows[layers][precision] - rows[layers][base]
                ).to_numpy()
                for layers in losses["layers"].unique()
            }
            label = f"{title}, {precision}"
            of_label = {
                f"{label}: added with {n} layers removed": found for n, found in added.items()
            } | {
                f"{label}: {n} layers, more than unpruned": found - added[0]
                for n, found in added.items()
                if n
            }
            pairs |= of_label
            effects |= dict.fromkeys(of_label, max(abs(added[0].mean()), SMALLEST_EFFECT))
    return evidence.paired_verdicts(pairs, effect=effects)


def quantised_or_pruned(
    losses: pd.DataFrame, levels: pd.DataFrame, titles: Mapping[str, str], *, than: str
) -> pd.DataFrame:
    """The unpruned model in its smallest precision against pruned models in another one.

    Args:
        losses: As for :func:`stored_losses`; the last precision is the smallest.
        levels: What it gave for these.
        titles: By text what it is called.
        than: Precision of the pruned models.

    Returns:
        A row for each text and pruned model: ``text``, ``layers removed``, ``difference`` (the loss
        of the unpruned model minus that of the pruned one), ``low`` and ``high`` (95 %, t over
        documents), and the whole megabytes of both.
    """
    smallest = losses["precision"].unique()[-1]
    sizes = levels.drop_duplicates(["layers", "precision"])
    size = sizes.set_index(["layers", "precision"])["size"].to_dict()
    found = []
    for name, title in titles.items():
        rows = _by_model(losses, name)
        for layers in losses["layers"].unique():
            if layers:
                value, low, high = evidence.mean_interval(rows["", smallest] - rows[layers, than])
                found.append(
                    {
                        "text": title,
                        "layers removed": len(layer_numbers(layers)),
                        "difference": value,
                        "low": low,
                        "high": high,
                        f"MB, whole in {smallest}": round(size["", smallest]),
                        f"MB, fewer layers in {than}": round(size[layers, than]),
                    }
                )
    return pd.DataFrame(found)


def _by_model(losses: pd.DataFrame, text: str) -> pd.DataFrame:
    """Losses on a text, a row a document and a column for each set of layers and precision.

    Raises:
        ValueError: If the models were measured on different documents.
    """
    rows = losses[losses["dataset"] == text]
    wide = rows.pivot(index="item", columns=["layers", "precision"], values="nll")
    if wide.isna().any(axis=None):
        raise ValueError(f"models must be measured on the same documents of {text}")
    return wide
