"""What the token that begins a text is worth to a model (03)."""

from __future__ import annotations

from typing import Any

import pandas as pd

from pruning_utils import data, evaluation
from pruning_utils.studies.study import joined, loaded, models_at_hand, point_table

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
    model: str,
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
        model: A name for :func:`models.load_model`, with ``revision``; ``embedded`` stands for all
            embedded models.
        profile: Name of the profile.
        notebook: Name of the notebook that owns the tables.
        text: An evaluation text.
        recompute: Compute them anew, although they are there.
        settings: All others of :func:`beginning_losses`.

    Returns:
        The rows of all models, with ``model`` in front, and names of embedded models that are
        missing, as :func:`study.models_at_hand` says.
    """
    names, missing = models_at_hand(model, profile=profile, notebook=notebook, table=TABLE)
    tables = {
        name: point_table(
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
        for name in names
    }
    return joined(tables)[0], missing
