"""Learning rates that are compared on validation text: what is tried, and what is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd


def recipe_at(way: str, rate: float, steps: int) -> str:
    """The recipe of a :class:`recipe_study.RecipeStudy` that trains in a way, a method of
    :func:`healing.heal` and perhaps settings (``"last_layers last_k=2 untie=false"``), at a peak
    learning rate for a number of steps."""
    method, *words = way.split()
    return " ".join([method, f"{rate:g}", str(steps), *words])


def rate_grid(
    grids: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    ways: Mapping[str, str],
    layers: Mapping[str, str],
    steps: int,
) -> pd.DataFrame:
    """All rates that are tried.

    Args:
        grids: By the name of a model and that of a way to train it, the rates: at least one, none
            twice.
        ways: The ways by name, as for :func:`recipe_at`.
        layers: By the name of a model, the layers that it lacks (ascending 0-based numbers as a
            text).
        steps: Of each training.

    Returns:
        A row for each: ``model``, ``method``, ``rate``, ``layers`` and ``recipe``, in the order of
        the grids.

    Raises:
        ValueError: If there is no grid or an empty one, a rate stands twice or is no number above
            0, or a name is unknown.
    """
    rows = []
    for model, grid in grids.items():
        if model not in layers:
            raise ValueError(f"grids must be for {', '.join(layers)}, got {model!r}")
        for method, rates in grid.items():
            if method not in ways:
                raise ValueError(f"methods of {model} must be of {', '.join(ways)}, got {method!r}")
            numbers = isinstance(rates, Sequence) and all(
                isinstance(rate, (int, float)) for rate in rates
            )
            if not numbers or not rates or len({*rates}) < len(rates) or min(rates) <= 0:
                raise ValueError(
                    f"rates of {method} for {model} must be a list of different numbers above 0, "
                    f"at least one, got {rates!r}"
                )
            rows += [
                {
                    "model": model,
                    "method": method,
                    "rate": rate,
                    "layers": layers[model],
                    "recipe": recipe_at(ways[method], rate, steps),
                }
                for rate in rates
            ]
    if not rows:
        raise ValueError("grids must hold the rates of one method at least, got none")
    return pd.DataFrame(rows)


def last_losses(trials: pd.DataFrame, *, by: Sequence[str] = ("layers", "recipe")) -> pd.Series:
    """The loss on validation text at the end of training (nats per token), of what
    :func:`recipe_study.recipe_table` found, for each value of the columns ``by``, which must tell
    its points apart (seeds too where there are more)."""
    losses = trials[trials["dataset"] == "healing eval"].sort_values("item")
    return losses.groupby([*by], sort=False)["nll"].last(skipna=False).rename("loss")


def best_rates(tried: pd.DataFrame, *, within: Sequence[str] = (), ends: bool = False) -> pd.Series:
    """The rate of the lowest ``loss`` of each ``model`` and ``method``.

    Args:
        tried: Rows of :func:`rate_grid` with their ``loss``.
        within: Further columns, for each value of which there is a grid; they come first in the
            index.
        ends: Whether the best may be the lowest or the highest of its grid; else a better one may
            lie beyond.

    Raises:
        ValueError: If it is and may not be, with the methods that need more rates, or if a loss is
            missing.
    """
    if tried["loss"].isna().any():
        raise ValueError(f"each rate must have a loss, {int(tried['loss'].isna().sum())} have none")
    groups = tried.groupby([*within, "model", "method"], sort=False)
    best = tried.loc[groups["loss"].idxmin()].set_index([*within, "model", "method"])["rate"]
    outer = best[best.eq(groups["rate"].min()) | best.eq(groups["rate"].max())]
    if len(outer) and not ends:
        raise ValueError(
            "the best rate must lie inside its grid; more rates are needed for "
            + ", ".join(
                f"{method} on "
                f"{model}{f' with {dict(zip(within, values, strict=True))}' if values else ''} "
                f"(best: {rate:g})"
                for (*values, model, method), rate in outer.items()
            )
        )
    return best
