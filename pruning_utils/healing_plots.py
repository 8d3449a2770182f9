"""Figures of what healing leaves, by metric and method: levels, differences, rates and runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pruning_utils.engine.reader_names import style_of
from pruning_utils.plots import WIDE, look_of, need_columns, new_figure

# --- levels beside differences, ranks, rates, trainings -------------------------------------------

SECOND = "0.6"  # grey of what is not spoken of


def levels_beside_differences(
    levels: pd.DataFrame,
    differences: pd.DataFrame,
    *,
    labels: tuple[str, str],
    references: pd.DataFrame,
    margin: float | Mapping[str, float] = 0.0,
    limits: tuple[float, float] | None = None,
    difference_limits: tuple[float, float] | None = None,
) -> Figure:
    """Levels on the left, and what they differ from one of their rows on the right, row by row.

    Args:
        levels: Columns ``panel``, ``name`` (of the row), ``series`` (whose colour and marker it
            has), ``value``, ``low`` and ``high``. Rows stand in the order of the table.
        differences: Columns ``panel``, ``name``, ``series``, ``difference``, ``low``, ``high``
            (thin bars), ``low_90`` and ``high_90`` (thick bars).
        labels: What the levels and the differences are, with their units.
        references: Columns ``panel``, ``name`` (of ``LEVEL_LINES``) and ``value``: thin
            lines among the levels.
        margin: Half the width of the grey band of equality, or one by panel; 0 for none.
        limits: Ends of the axis of levels; a level beyond stands at the edge with its number.
        difference_limits: The same of the differences.
    """
    need_columns(levels, "panel", "name", "series", "value", "low", "high")
    need_columns(
        differences, "panel", "name", "series", "difference", "low", "high", "low_90", "high_90"
    )
    need_columns(references, "panel", "name", "value")
    names = {
        panel: list(rows["name"].unique()) for panel, rows in levels.groupby("panel", sort=False)
    }
    counts = [len(rows) for rows in names.values()]
    figure, axes = new_figure(
        WIDE,
        0.85 + 0.24 * len(counts) + 0.15 * sum(counts),
        2,
        rows=len(counts),
        sharex="col",
        height_ratios=[count + 0.4 for count in counts],
    )
    handles: dict = {}
    for panel, left, right in zip(names, axes[::2], axes[1::2], strict=True):
        places = {name: -place for place, name in enumerate(names[panel])}
        shown = levels[levels["panel"] == panel]
        compared = differences[differences["panel"] == panel]
        handles |= _draw_levels(left, shown, places, limits)
        lines = references[references["panel"] == panel]
        for name, level in zip(lines["name"], lines["value"], strict=True):
            handles[name] = left.axvline(
                level, color="0.35", linestyle=style_of(name), linewidth=0.7, zorder=0
            )
        own_margin = margin[panel] if isinstance(margin, Mapping) else margin
        _draw_differences(right, compared, places, own_margin, difference_limits)
        left.set_yticks(list(places.values()), list(places))
        right.set_yticks(list(places.values()), [])
        left.set_title(panel, loc="left")
        for axis in (left, right):
            axis.set_ylim(0.6 - len(places), 0.6)
            axis.tick_params(axis="y", length=0)
    axes[-2].set_xlabel(labels[0])
    axes[-1].set_xlabel(labels[1])
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 5))
    return figure


def _draw_levels(
    axis: Axes,
    table: pd.DataFrame,
    places: Mapping[str, int],
    limits: tuple[float, float] | None,
) -> dict:
    """Levels with their intervals at the places of their rows.

    Returns:
        A legend's handle for each series.
    """
    handles = {}
    # Several of one row stand a little apart, so that no interval hides another.
    rows_of = table.groupby("name", sort=False)["series"]
    aside = 0.24 * ((rows_of.transform("size") - 1) / 2 - rows_of.cumcount())
    table = table.assign(height=table["name"].map(places) + aside)
    for series, rows in table.groupby("series", sort=False):
        colour, marker = look_of(series)
        heights = rows["height"].tolist()
        axis.hlines(heights, rows["low"], rows["high"], color=colour, linewidth=0.8)
        is_unhealed = series == "pruned"
        (handles["unhealed" if is_unhealed else series],) = axis.plot(
            rows["value"],
            heights,
            marker,
            color=colour,
            markersize=3.5,
            fillstyle="none" if is_unhealed else "full",
        )
        _mark_beyond(axis, rows["value"], heights, limits, colour)
    return handles


def _draw_differences(
    axis: Axes,
    table: pd.DataFrame,
    places: Mapping[str, int],
    margin: float,
    limits: tuple[float, float] | None,
) -> None:
    """Differences with their two intervals at the places of their rows."""
    axis.axvspan(-margin, margin, color="0.88", zorder=0, linewidth=0)
    axis.axvline(0, color="0.35", linewidth=0.7, zorder=0)
    for series, rows in table.groupby("series", sort=False):
        colour, marker = look_of(series)
        heights = [places[name] for name in rows["name"]]
        axis.hlines(heights, rows["low"], rows["high"], color=colour, linewidth=0.8)
        axis.hlines(heights, rows["low_90"], rows["high_90"], color=colour, linewidth=2.2)
        axis.plot(
            rows["difference"],
            heights,
            marker,
            color="white",
            markeredgecolor=colour,
            markersize=3.5,
            markeredgewidth=0.8,
        )
        _mark_beyond(axis, rows["difference"], heights, limits, colour)


def _mark_beyond(
    axis: Axes,
    values: Sequence[float],
    heights: Sequence[float],
    limits: tuple[float, float] | None,
    colour: str,
) -> None:
    """Keep an axis within its limits, and name at its edge what lies beyond."""
    if limits is None:
        return
    low, high = limits
    axis.set_xlim(low, high)
    for value, height in zip(values, heights, strict=True):
        if low <= value <= high or np.isnan(value):
            continue
        is_right = value > high
        axis.annotate(
            f"{value:.1f} \u2192" if is_right else f"\u2190 {value:.1f}".replace("-", "\u2212"),
            (high if is_right else low, height),
            ha="right" if is_right else "left",
            va="center",
            size=6,
            color=colour,
            annotation_clip=False,
        )


def removed_at_depths(table: pd.DataFrame, *, n_layers: int) -> Figure:
    """Which layers each rule removes, a panel for each number of removed layers.

    Args:
        table: Columns ``rule``, ``n_dropped`` and ``layers`` (0-based, as a text such as
            ``"4 7 11"``); each rule stands once at each number.
        n_layers: L, the number of squares in a row.
    """
    need_columns(table, "rule", "n_dropped", "layers")
    rules = list(table["rule"].unique())
    panels = list(table.groupby("n_dropped", sort=True))
    figure, axes = new_figure(WIDE, 0.75 + 0.17 * len(rules), len(panels), sharey=True)
    for axis, (n_dropped, rows) in zip(axes, panels, strict=True):
        gone = np.zeros((len(rules), n_layers))
        for row in rows.itertuples():
            gone[rules.index(row.rule), [int(layer) for layer in str(row.layers).split()]] = 1
        axis.pcolormesh(
            gone, cmap="Greys", vmin=0, vmax=1.4, edgecolors="0.75", linewidth=0.3, clip_on=False
        )
        axis.set_yticks(np.arange(len(rules)) + 0.5, rules)
        axis.set_xticks(np.arange(0, n_layers, 5) + 0.5, range(0, n_layers, 5))
        axis.tick_params(length=0)
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.set(title=f"{n_dropped} of {n_layers} layers", xlabel="layer (0-based)")
    axes[0].invert_yaxis()
    return figure


def rank_levels(
    table: pd.DataFrame, *, before: str, after: str, marked: Sequence[str] = ()
) -> Figure:
    """How an order changes, with the values that make it: lines from rank to rank, panels stacked.

    The lowest value is on top. Of equal values the first in the table ranks higher.

    Args:
        table: Columns ``panel``, ``name`` and the two of the names ``before`` and ``after``.
        before: Column of the values on the left.
        after: Column of the values on the right.
        marked: Names with a colour and a marker of their own; the others are grey.
    """
    need_columns(table, "panel", "name", before, after)
    panels = list(table["panel"].unique())
    most = table.groupby("panel").size().max()
    height = (0.35 + 0.13 * most) * len(panels) + 0.2
    figure, axes = new_figure(WIDE, height, 1, rows=len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        rows = table[table["panel"] == panel]
        ranks = [rows[column].rank(method="first") for column in (before, after)]
        for row, left, right in zip(rows.to_dict("records"), *ranks, strict=True):
            name = row["name"]
            colour, marker = look_of(name) if name in marked else (SECOND, ".")
            axis.plot(
                [0, 1],
                [left, right],
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=1.2 if name in marked else 0.7,
            )
            for end, place, text, side in (
                (0, left, f"{name}  {row[before]:.2f}", "right"),
                (1, right, f"{row[after]:.2f}  {name}", "left"),
            ):
                axis.annotate(
                    text,
                    (end, place),
                    xytext=(-5 if end == 0 else 5, 0),
                    textcoords="offset points",
                    ha=side,
                    va="center",
                    size=6,
                    color=colour if name in marked else "black",
                )
        axis.set(title=panel, xlim=(-1.1, 2.1), ylim=(most + 0.5, 0.5), yticks=[])
        axis.set_xticks([0, 1], [before, after])
        axis.tick_params(axis="x", length=0)
        axis.spines[["left", "bottom"]].set_visible(False)
    return figure


def rate_panels(table: pd.DataFrame) -> Figure:
    """Loss against the learning rate where it is near its lowest, a panel for each ``panel``.

    A panel shows losses to 2.5 times as far above its lowest as their median lies. What is above
    stands at the upper edge: its number, or the lowest and the highest of several at one rate. The
    lowest point of a curve is filled.

    Args:
        table: Columns ``panel``, ``series``, ``rate`` and ``loss`` (nats per token).
    """
    need_columns(table, "panel", "series", "rate", "loss")
    panels = list(table["panel"].unique())
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(WIDE, 1.75 * rows + 0.6, columns, rows=rows)
    handles: dict = {}
    for axis, panel in zip(axes, panels, strict=False):
        shown = table[table["panel"] == panel].sort_values("rate")
        finite = shown.loc[np.isfinite(shown["loss"]), "loss"]
        lowest = finite.min()
        reach = 2.5 * (finite.median() - lowest) or 1.0
        top = lowest + 1.06 * reach  # room for a mark at the end
        for series, line in shown.groupby("series", sort=False):
            colour, marker = look_of(series)
            look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 0.9}
            (handles[series],) = axis.plot(line["rate"], line["loss"], fillstyle="none", **look)
            best = line[line["loss"] == line["loss"].min()]
            axis.plot(best["rate"][:1], best["loss"][:1], **look)
        beyond = shown[shown["loss"] > lowest + reach]
        for rate, losses in beyond.groupby("rate")["loss"]:
            ends = dict.fromkeys(f"{loss:.1f}" for loss in (losses.min(), losses.max()))
            axis.annotate(
                f"{' to '.join(ends)} \u2192",
                (rate, top),
                rotation=90,
                ha="center",
                va="top",
                size=5.5,
                color="0.3",
            )
        axis.margins(x=0.1)
        axis.set(title=panel, xscale="log")
        if len(finite):
            axis.set_ylim(lowest - 0.08 * reach, top)
    for place, axis in enumerate(axes):
        axis.set_visible(place < len(panels))
    figure.supxlabel("peak learning rate", fontsize=8)
    figure.supylabel("validation loss (nats per token)", fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4)
    return figure


def training_runs(table: pd.DataFrame, *, references: Mapping[str, float]) -> Figure:
    """Loss against training tokens, a line for each run, a panel for each ``panel``.

    Args:
        table: Columns ``panel``, ``series``, ``run``, ``tokens`` and ``loss`` (nats per token).
        references: Levels of thin lines by name, ``unpruned`` or ``ln V``; a panel has those that
            its losses pass.
    """
    need_columns(table, "panel", "series", "run", "tokens", "loss")
    panels = list(table["panel"].unique())
    figure, axes = new_figure(WIDE, 2.3, len(panels), sharex=True)
    handles: dict = {}
    for axis, panel in zip(axes, panels, strict=True):
        shown = table[table["panel"] == panel].sort_values("tokens")
        for (series, _), line in shown.groupby(["series", "run"], sort=False):
            colour, marker = look_of(series)
            (handles[series],) = axis.plot(
                line["tokens"] / 1000,
                line["loss"],
                color=colour,
                marker=marker,
                markersize=2.5,
                linewidth=0.8,
            )
        for name, level in references.items():
            if shown["loss"].min() <= level <= shown["loss"].max():
                handles[name] = axis.axhline(
                    level, color="0.35", linestyle=style_of(name), linewidth=0.7, zorder=0
                )
        axis.set(title=panel)
    axes[0].set(ylabel="validation loss (nats per token)")
    figure.supxlabel("training tokens (thousands)", fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5)
    return figure
