"""A figure of all verdicts: each part of each claim as a mark."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pruning_utils.engine.verdict_rows import FAILS, HOLDS, UNTESTABLE, UNTOLD, WORDS
from pruning_utils.plots import NAMES, WIDE, need_columns, new_figure

# Marker, its size in points, colour of its face and of its edge. They differ in shape and in
# darkness, so that they are told apart in grey and by colour-blind readers.
MARKS = {
    HOLDS: ("o", 5.0, "#0072B2", "#0072B2"),
    FAILS: ("X", 5.5, "#D55E00", "#D55E00"),
    UNTOLD: ("D", 4.0, "white", "black"),
    UNTESTABLE: (".", 5.0, "0.75", "0.75"),
}
IN_A_LINE = 9  # marks at least; a claim has up to two lines of them
LETTERS = 55  # of a claim, in a line
ROW = 0.32  # inches; holds three lines of a claim
BETWEEN = 0.42  # of a row, from one line of marks to the next
SEPARATOR = {"color": "0.88", "linewidth": 0.5}


def verdict_marks(verdicts: pd.DataFrame, claims: pd.DataFrame) -> Figure:
    """A row for each claim and a column for each model; each part of the claim is one mark there.

    Args:
        verdicts: Columns ``claim``, ``model`` and ``verdict`` (of :data:`MARKS`), a row a part.
            Models stand in the order of the table.
        claims: Columns ``id``, ``paper`` (the heading of its claims) and ``claim``, in the order of
            the figure. Claims without verdicts are left out.

    Raises:
        ValueError: If a column is missing or a table empty, or a verdict or its claim is unknown.
    """
    need_columns(verdicts, "claim", "model", "verdict")
    need_columns(claims, "id", "paper", "claim")
    _need_known("verdict", verdicts["verdict"], WORDS)
    _need_known("claim", verdicts["claim"], [*claims["id"]])
    asked = claims[claims["id"].isin(verdicts["claim"])]
    places, headings = _places(asked)
    models = list(dict.fromkeys(verdicts["model"]))
    most = verdicts.groupby(["claim", "model"]).size().max()
    in_a_line = max(IN_A_LINE, math.ceil(most / 2))
    figure, (words, *columns) = new_figure(
        WIDE,
        0.5 + ROW * (len(places) + len(headings)),
        1 + len(models),
        sharey=True,
        width_ratios=[2.6] + [1.0] * len(models),
    )
    for paper, place in headings.items():
        words.text(0, place, paper, va="center", weight="bold")
    for row in asked.itertuples():
        words.text(0, places[row.id], row.id, va="center", fontsize=6.5)
        said = textwrap.fill(row.claim, LETTERS)
        words.text(0.075, places[row.id], said, va="center", fontsize=6.5, linespacing=1.0)
    for column, model in zip(columns, models, strict=True):
        column.set_title(NAMES.get(model, model))
        column.set_xlim(-0.7, in_a_line - 0.3)
        _draw_marks(column, verdicts[verdicts["model"] == model], places, in_a_line)
    for axis in (words, *columns):
        for place in places.values():
            axis.axhline(place + 0.5, **SEPARATOR)
        axis.set_axis_off()
    words.set_ylim(len(places) + len(headings) - 0.5, -0.5)
    handles = [_mark(word) for word in WORDS]
    figure.legend(handles, [*WORDS], loc="outside upper center", ncols=len(WORDS))
    return figure


def _need_known(name: str, values: pd.Series, allowed: Sequence[str]) -> None:
    unknown = sorted({*values} - {*allowed})
    if unknown:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {unknown[0]!r}")


def _places(claims: pd.DataFrame) -> tuple[dict[str, int], dict[str, int]]:
    """The row of each claim, and of the heading above those of each paper; from 0, downwards."""
    places: dict[str, int] = {}
    headings: dict[str, int] = {}
    for row in claims.itertuples():
        if row.paper not in headings:
            headings[row.paper] = len(places) + len(headings)
        places[row.id] = len(places) + len(headings)
    return places, headings


def _draw_marks(axis: Axes, verdicts: pd.DataFrame, places: dict[str, int], in_a_line: int) -> None:
    """A model's marks, in each row in the order of the legend, from the left."""
    rank = {word: number for number, word in enumerate(WORDS)}
    for claim, found in verdicts.groupby("claim"):
        words = sorted(found["verdict"], key=rank.__getitem__)
        lines = [words[start : start + in_a_line] for start in range(0, len(words), in_a_line)]
        for number, line in enumerate(lines):
            height = places[claim] + (number - (len(lines) - 1) / 2) * BETWEEN
            for across, word in enumerate(line):
                mark = _mark(word)
                mark.set_data([across], [height])
                axis.add_line(mark)


def _mark(word: str) -> Line2D:
    marker, size, face, edge = MARKS[word]
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=size,
        markerfacecolor=face,
        markeredgecolor=edge,
        markeredgewidth=0.7,
    )
