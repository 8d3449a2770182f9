"""Learning rates tried on validation text, and the best of them (notebooks 04, 06 to 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from pruning_utils.studies.recipes import recipe_at

TRIAL_SEED = 100  # of the trainings that choose a rate; what is reported has other seeds


def rate_grid(
    grids: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    recipes: Mapping[str, str],
    layers: Mapping[str, str],
    steps: int,
) -> pd.DataFrame:
    """All rates that are tried.

    Args:
        grids: By the rule that chose the layers and the name of a recipe, the rates: at least one,
            none twice.
        recipes: The recipes by name, as for :func:`recipes.recipe_at`.
        layers: By rule, the layers that go (ascending 0-based numbers as a text).
        steps: Of each training.

    Returns:
        A row for each: ``rule``, ``method`` (the name of the recipe), ``rate``, ``layers`` and
        ``recipe``, in the order of the grids.

    Raises:
        ValueError: If there is no grid or an empty one, a rate stands twice or is no number above
            0, or a name is unknown.
    """
    rows = []
    for rule, grid in grids.items():
        if rule not in layers:
            raise ValueError(f"grids must be for {', '.join(layers)}, got {rule!r}")
        for method, rates in grid.items():
            if method not in recipes:
                raise ValueError(
                    f"recipes of {rule} must be of {', '.join(recipes)}, got {method!r}"
                )
            _check_rates(rates, f"{method} for {rule}")
            for rate in rates:
                rows.append(
                    {
                        "rule": rule,
                        "method": method,
                        "rate": rate,
                        "layers": layers[rule],
                        "recipe": recipe_at(recipes[method], rate, steps),
                    }
                )
    if not rows:
        raise ValueError("grids must hold the rates of one recipe at least, got none")
    return pd.DataFrame(rows)


def _check_rates(rates: Sequence[float], whose: str) -> None:
    numbers = isinstance(rates, Sequence) and all(isinstance(rate, int | float) for rate in rates)
    if not numbers or not rates or len({*rates}) < len(rates) or min(rates) <= 0:
        raise ValueError(
            f"rates of {whose} must be a list of different numbers above 0, at least one, "
            f"got {rates!r}"
        )


def trial_points(tried: pd.DataFrame, columns: Sequence[str] = ("layers",)) -> list[dict]:
    """Points of a :class:`study.Study` that train what is tried, each model once.

    Args:
        tried: Rows of a grid, with ``recipe`` and what else these columns say of the cut.
        columns: What says the cut.
    """
    different = tried[[*columns, "recipe"]].drop_duplicates()
    return different.assign(seed=TRIAL_SEED).to_dict("records")


def last_losses(trials: pd.DataFrame, *, by: Sequence[str] = ("layers", "recipe")) -> pd.Series:
    """The loss on validation text at the end of training (nats per token).

    Args:
        trials: What a :class:`study.Study` found.
        by: Columns that tell its points apart (seeds too where there are more).

    Returns:
        ``loss`` for each value of these columns.
    """
    losses = trials[trials["dataset"] == "healing eval"].sort_values("item")
    return losses.groupby([*by], sort=False)["nll"].last(skipna=False).rename("loss")


def best_rates(tried: pd.DataFrame, *, within: Sequence[str] = (), ends: bool = False) -> pd.Series:
    """The rate of the lowest ``loss`` of each ``rule`` and ``method``.

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
    keys = [*within, "rule", "method"]
    groups = tried.groupby(keys, sort=False)
    best = tried.loc[groups["loss"].idxmin()].set_index(keys)["rate"]
    outer = best[best.eq(groups["rate"].min()) | best.eq(groups["rate"].max())]
    if len(outer) and not ends:
        named = [_named(within, index, rate) for index, rate in outer.items()]
        raise ValueError(
            "the best rate must lie inside its grid; more rates are needed for " + ", ".join(named)
        )
    return best


def _named(within: Sequence[str], index: tuple, rate: float) -> str:
    *values, rule, method = index
    further = f" with {dict(zip(within, values, strict=True))}" if values else ""
    return f"{method} on {rule}{further} (best: {rate:g})"
