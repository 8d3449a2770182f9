"""Sets that differ from a set in one layer: what single layers of it matter (notebook 11)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from pruning_utils.studies.recipes import layer_text


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
    rows = []
    for out in spared:
        for other in sorted({*range(n_layers)} - chosen):
            swapped = tuple(sorted(chosen - {out} | {other}))
            rows.append({"spared": out, "dropped": other, "layers": layer_text(swapped)})
    return pd.DataFrame(rows)
