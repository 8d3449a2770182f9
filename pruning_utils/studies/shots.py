"""How much the number of shots and their order matter to the answers (notebook 05)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pruning_utils import evidence


class Compared(NamedTuple):
    """A model with several numbers of shots, and with several orders of the most.

    Attributes:
        levels: Rows with ``panel``, ``choice`` (the number, or the order), ``joined`` (whether a
            line joins the choices), ``series`` and a :class:`evidence.FactorInterval`.
        numbers: Differences by question: each number of shots minus the fewest, by name.
        orders: The most shots in each other order minus as they stand, by name.
    """

    levels: list[dict]
    numbers: dict[str, np.ndarray]
    orders: dict[str, np.ndarray]


def ends_of(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The fewest and the most shots of ``(number, order)``."""
    numbers = [number for number, _ in counts]
    return min(numbers), max(numbers)


def answers_by_shots(asked: pd.DataFrame) -> pd.DataFrame:
    """What stands above the floor, of questions that were asked with every number and order.

    Args:
        asked: Rows of one model with ``dataset`` (the task), ``item``, ``num_fewshot``,
            ``shot_order`` and ``above_floor``.

    Returns:
        A row for each ``(dataset, item)``, a column for each ``(num_fewshot, shot_order)``.
    """
    columns = ["num_fewshot", "shot_order"]
    wide = asked.pivot(index=["dataset", "item"], columns=columns, values="above_floor")
    return wide.dropna()


def compared_shots(
    answers: pd.DataFrame, counts: Sequence[tuple[int, int]], *, series: str, name: str
) -> Compared:
    """Levels and paired differences of a model.

    Args:
        answers: Of :func:`answers_by_shots`.
        counts: Numbers of shots with the seed of their order, 0 for as they stand.
        series: The model, in a figure.
        name: The model, in the names of differences.
    """
    of_tasks = answers.index.get_level_values("dataset")
    fewest, most = ends_of(counts)
    levels, numbers, orders = [], {}, {}
    for count, order in counts:
        found = evidence.two_factor_interval(answers[count, order], strata=of_tasks)
        row = {"series": series, **found._asdict()}
        if order == 0:
            levels.append({**row, "panel": "number of shots", "choice": count, "joined": True})
        if count == most:
            panel = f"order of {most} shots"
            levels.append({**row, "panel": panel, "choice": order, "joined": False})
        if order and count == most:
            change = answers[count, order] - answers[count, 0]
            orders[f"{name}: {count} shots, order {order} - 0"] = change.to_numpy()
        elif not order and count != fewest:
            change = answers[count, 0] - answers[fewest, 0]
            numbers[f"{name}: {count} - {fewest} shots"] = change.to_numpy()
    return Compared(levels, numbers, orders)


def drawn_shots(levels: Sequence[dict], decided: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The arguments of :func:`importance_plots.levels_and_differences`.

    Args:
        levels: As in :class:`Compared`, of one model or of several.
        decided: Of :func:`decided_shots`.
    """
    rows = pd.DataFrame(levels).assign(measure="accuracy", label="")
    lines = [{"panel": panel, "name": "floor", "value": 0.0} for panel in rows["panel"].unique()]
    pairs = decided.assign(
        panel="differences of accuracy",
        measure="accuracy",
        pair=decided["pair"].str.replace(" - ", " minus "),
    )
    return {"levels": rows, "differences": pairs, "baselines": pd.DataFrame(lines)}


def decided_shots(
    numbers: Mapping[str, np.ndarray],
    orders: Mapping[str, np.ndarray],
    *,
    margin: float,
    of_tasks: Sequence[str],
) -> pd.DataFrame:
    """Verdicts of :func:`evidence.paired_verdicts`, numbers before orders.

    The numbers are a family of their own, as no claim is about them.

    Args:
        numbers: As in :class:`Compared`, of one model or of several.
        orders: As there.
        margin: Of equality.
        of_tasks: The task of each question.

    Raises:
        ValueError: If there are neither.
    """
    if not numbers and not orders:
        raise ValueError("shots must be compared in two numbers or two orders, got one way alone")
    found = [
        evidence.paired_verdicts(pairs, margin=margin, strata=dict.fromkeys(pairs, of_tasks))
        for pairs in (numbers, orders)
        if pairs
    ]
    return pd.concat(found, ignore_index=True)
