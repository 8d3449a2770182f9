"""What the token that begins a text is worth to a model (03)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from pruning_utils import data, embedded, evaluation
from pruning_utils.studies.study import loaded, point_table, table_path

TABLE = "beginnings"
WITH, WITHOUT = "as a text", "in its middle"


def beginning_losses(
    point: dict, *, model: str, revision: str | None, dtype: str, n_windows: int, seq_len: int
) -> list[dict]:
    """Losses of the same tokens, in windows that begin as a text does and without that beginning.

    Args:
        point: ``text``, an evaluation text.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        n_windows: Number of windows.
        seq_len: Tokens in a window, those of the beginning included.

    Returns:
        Rows with ``begins``, ``item`` (number of the window) and ``nll``, the mean loss of its
        tokens in nats. A model whose tokenizer puts nothing before a text has windows of one kind.
    """
    network, tokenizer = loaded(model, revision, dtype)
    windows = data.evaluation_windows(tokenizer, n_windows, seq_len, source=point["text"])
    n_first = len(data.text_prefix(tokenizer))
    # The first token of the text has something before it in one kind of window only.
    losses = {WITH: evaluation.token_losses(network, windows)[:, n_first:]}
    if n_first:
        losses[WITHOUT] = evaluation.token_losses(network, windows[:, n_first:])
    rows = []
    for begins, found in losses.items():
        means = found.double().mean(1).tolist()
        rows += [{"begins": begins, "item": item, "nll": nll} for item, nll in enumerate(means)]
    return rows


def beginning_table(
    names: Sequence[str],
    *,
    profile: str,
    notebook: str,
    revision: str | None,
    text: str,
    recompute: bool = False,
    **settings: Any,
) -> tuple[pd.DataFrame, list[str]]:
    """:func:`beginning_losses` of several models, one table each.

    Args:
        names: Names for :func:`models.load_model`, with ``revision``.
        profile: Name of the profile.
        notebook: Name of the notebook that owns the tables.
        text: An evaluation text.
        recompute: Compute them anew, although they are there.
        settings: All others of :func:`beginning_losses`.

    Returns:
        The rows of all models, with ``model`` in front, and what is missing: models of which there
        is neither a table nor the package that holds them.
    """
    tables, missing = [], []
    for name in names:
        kept = table_path(profile, notebook, name, TABLE)
        if not kept.exists() and not embedded.is_installed(name):
            missing.append(name)
            continue
        found, _ = point_table(
            beginning_losses,
            [{"text": text}],
            profile=profile,
            notebook=notebook,
            model=name,
            revision=revision,
            table=TABLE,
            recompute=recompute,
            reads_text=True,
            **settings,
        )
        tables.append(found.assign(model=name))
    return pd.concat(tables).set_index("model").reset_index(), missing
