"""Figures of rounds, swaps and candidates: intervals in a grid of panels (11 and 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pruning_utils.engine.reader_names import style_of
from pruning_utils.plots import WIDE, colour_of, look_of, need_columns, new_figure

# --- levels and differences, names down the side --------------------------------------------------

# Marks of series, in the order in which they come: the first is hollow, so that grey tells them.
SERIES_MARKS = ("o", "s", "^", "D", "v", "P", "X")
# Mark of what is none of the series of a figure that has some, such as their difference.
OTHER_MARK = "d"
VOID = "0.62"  # shade of what has no content, such as a loss above ln V


def interval_grid(
    tables: Sequence[pd.DataFrame],
    *,
    references: pd.DataFrame | None = None,
    margins: Mapping[str, float] | None = None,
) -> Figure:
    """Values with their intervals, a name a row and a measure a panel.

    Rows that are void take no part in the limits of the axes: what lies beyond is an arrow at the
    edge with its value beside it.

    Args:
        tables: A row of panels each. Columns ``panel`` (its title), ``name`` and ``value``, and
            where they are needed ``group`` (a heading over its names), ``series`` (what the mark
            stands for; without one it is another mark), ``low`` and ``high`` (thin bars),
            ``low_90`` and ``high_90`` (thick bars), ``runs`` (a list of values, drawn as ticks, but
            beside an arrow at the edge) and ``is_void``. NaN draws no bar.
        references: Columns ``panel``, ``name`` (of ``LEVEL_LINES``) and ``value``: thin
            lines, named in the legend.
        margins: By panel, half the width of a grey band around 0, where a thin line stands too.

    Returns:
        The figure, as wide as the text.
    """
    filled = [_with_all_columns(table) for table in tables]
    lines = pd.DataFrame(columns=["panel", "name", "value"]) if references is None else references
    every_series = list(dict.fromkeys(name for table in filled for name in table["series"]))
    heights = [len(_rows_of(table)) + 2.2 for table in filled]
    columns = max(table["panel"].nunique() for table in filled)
    figure = Figure(figsize=(WIDE, 0.3 + 0.165 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(filled), columns, squeeze=False, sharey="row", height_ratios=heights)
    handles: dict = {}
    for table, row in zip(filled, axes, strict=True):
        panels = list(table["panel"].unique())
        for axis, panel in zip(row, panels, strict=False):
            shown = table[table["panel"] == panel]
            here = lines[lines["panel"] == panel]
            _draw_references(axis, here, (margins or {}).get(panel), handles)
            _set_limits(axis, shown, here)
            _draw_rows(axis, shown, _rows_of(table), handles, every_series)
            axis.set_title(panel, fontsize=7)
        _name_rows(row[0], _rows_of(table))
        for axis in row[len(panels) :]:
            axis.set_visible(False)
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 6)
        )
    return figure


def _with_all_columns(table: pd.DataFrame) -> pd.DataFrame:
    """A table of intervals with the columns that it may leave out."""
    need_columns(table, "panel", "name", "value")
    usual = {"group": "", "series": "", "runs": None, "is_void": False}
    ends = dict.fromkeys(("low", "high", "low_90", "high_90"), np.nan)
    lacking = {name: value for name, value in {**usual, **ends}.items() if name not in table}
    # Of tables that were joined, one may lack them.
    return table.assign(**lacking).fillna({"group": "", "series": "", "is_void": False})


def _rows_of(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The rows from top to bottom: ``(group, name)``, and ``(group, "")`` for its heading."""
    rows: list[tuple[str, str]] = []
    for group, names in table.groupby("group", sort=False)["name"]:
        rows += [(group, "")] if group else []
        rows += [(group, name) for name in names.unique()]
    return rows


def _draw_references(axis: Axes, lines: pd.DataFrame, margin: float | None, handles: dict) -> None:
    """Thin lines of levels, or the margin around 0."""
    if margin is not None:
        axis.axvspan(-margin, margin, color="0.88", zorder=0)
        axis.axvline(0, color="0.35", linewidth=0.7, zorder=0.5)
    for line in lines.itertuples():
        handles[line.name] = axis.axvline(
            line.value, color="0.35", linestyle=style_of(line.name), linewidth=0.8, zorder=0.5
        )


def _set_limits(axis: Axes, shown: pd.DataFrame, lines: pd.DataFrame) -> None:
    """Limits around all rows with content and all lines, with a little room."""
    full = shown[~shown["is_void"].astype(bool)]
    drawn = full if len(full) else shown
    ends = drawn[["value", "low", "high"]].to_numpy(dtype=float)
    ticks = [tick for runs in drawn["runs"] if isinstance(runs, list) for tick in runs]
    around = np.concatenate([ends.ravel(), lines["value"].to_numpy(dtype=float), ticks])
    low, high = np.nanmin(around), np.nanmax(around)
    room = 0.07 * (high - low) or 0.5
    axis.set_xlim(low - room, high + room)


def _draw_rows(
    axis: Axes,
    shown: pd.DataFrame,
    rows: list[tuple[str, str]],
    handles: dict,
    every_series: list[str],
) -> None:
    """Marks, bars and ticks of one panel, in a figure that has these series, or "" alone."""
    marked = [name for name in every_series if name]
    series = list(shown["series"].unique())
    shifts = dict(zip(series, np.linspace(0.17, -0.17, len(series)), strict=True))
    places = {row: len(rows) - place for place, row in enumerate(rows)}
    for row in shown.itertuples():
        shift = shifts[row.series] if len(series) > 1 else 0.0
        number = marked.index(row.series) if row.series else 0
        is_other = bool(marked) and not row.series
        marker = OTHER_MARK if is_other else SERIES_MARKS[number % len(SERIES_MARKS)]
        mark = _draw_interval(
            axis,
            row,
            places[row.group, row.name] + shift,
            marker,
            is_filled=is_other or number > 0,
        )
        if row.series and (row.series not in handles or not row.is_void):
            handles[row.series] = mark
    axis.tick_params(labelsize=7)
    axis.tick_params(axis="y", length=0)


def _name_rows(axis: Axes, rows: list[tuple[str, str]]) -> None:
    """Names beside the first panel of a row, headings in bold; no row lies on the frame."""
    axis.set_ylim(0.3, len(rows) + 0.7)
    axis.set_yticks(range(len(rows), 0, -1), [name or group for group, name in rows])
    for text, (_, name) in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_fontweight("normal" if name else "bold")


def _draw_interval(axis: Axes, row: Any, place: float, marker: str, *, is_filled: bool) -> Artist:
    """One mark with its bars and ticks; an arrow at the edge for one beyond it."""
    colour = VOID if row.is_void else colour_of("healed")
    low, high = axis.get_xlim()
    axis.hlines(place, row.low, row.high, color=colour, linewidth=0.8)
    axis.hlines(place, row.low_90, row.high_90, color=colour, linewidth=2.4)
    is_beyond = not low <= row.value <= high
    if isinstance(row.runs, list) and not is_beyond:  # an arrow would hide some of its ticks
        axis.plot(row.runs, np.full(len(row.runs), place), "|", color=colour, markersize=4)
    if is_beyond:
        marker = ">" if row.value > high else "<"
        axis.annotate(
            f"{row.value:.3g}",
            (np.clip(row.value, low, high), place),
            xytext=(-6 if row.value > high else 6, 0),
            textcoords="offset points",
            ha="right" if row.value > high else "left",
            va="center",
            fontsize=6,
            color="0.35",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    (mark,) = axis.plot(
        np.clip(row.value, low, high),
        place,
        marker,
        color=colour,
        markerfacecolor=colour if is_filled else "white",
        markersize=3.6,
        linestyle="none",
        clip_on=not is_beyond,
        zorder=3,
    )
    return mark


def drawn_sets(
    table: pd.DataFrame, *, n_layers: int, references: Mapping[str, float] | None = None
) -> Figure:
    """Which layers go for each draw of text, and the loss of what is left.

    Args:
        table: Columns ``criterion``, ``n_samples`` (windows), ``seed`` (of the draw), ``layers``
            (removed ones, 0-based, as a text such as ``"4 7 11"``) and ``loss`` (nats per token).
        n_layers: L.
        references: Levels of the loss by name (of ``LEVEL_LINES``): thin lines, named in the
            legend.

    Returns:
        The figure: for each criterion a panel of squares, a row a draw, and the losses beside it.
    """
    need_columns(table, "criterion", "n_samples", "seed", "layers", "loss")
    criteria = list(table["criterion"].unique())
    counts = list(table["n_samples"].unique())
    n_draws = table.groupby(["criterion", "n_samples"]).size().max()
    height = 0.75 + 0.125 * (n_draws + 0.6) * len(counts)
    figure = Figure(figsize=(WIDE, height), layout="constrained")
    axes = figure.subplots(
        1, 2 * len(criteria), squeeze=False, sharey=True, width_ratios=[1.9, 1] * len(criteria)
    )[0]
    handles: dict = {}
    losses = [*table["loss"], *(references or {}).values()]
    low, high = min(losses), max(losses)
    for number, criterion in enumerate(criteria):
        left, right = axes[2 * number : 2 * number + 2]
        shown = table[table["criterion"] == criterion]
        colour, marker = look_of(criterion)
        for row in shown.itertuples():
            turn = list(shown.loc[shown["n_samples"] == row.n_samples, "seed"]).index(row.seed)
            place = counts.index(row.n_samples) * (n_draws + 0.6) + turn
            layers = [int(layer) for layer in row.layers.split()]
            left.barh(place, n_layers, 0.82, left=-0.5, color="0.94")
            left.barh([place] * len(layers), 0.9, 0.82, left=np.array(layers) - 0.45, color=colour)
            right.plot(row.loss, place, marker, color=colour, markersize=3)
        for name, value in (references or {}).items():
            handles[name] = right.axvline(
                value, color="0.35", linestyle=style_of(name), linewidth=0.8, zorder=0.5
            )
        left.set_title(criterion.capitalize(), fontsize=8)
        left.set(xlabel="layer (0-based)", xlim=(-0.5, n_layers - 0.5))
        right.set(xlabel="loss (nats)", xlim=(low - 0.1 * (high - low), high + 0.1 * (high - low)))
    middles = np.arange(len(counts)) * (n_draws + 0.6) + (n_draws - 1) / 2
    axes[0].set_yticks(middles, counts)
    axes[0].set_ylim(len(counts) * (n_draws + 0.6) - 0.6, -1)
    axes[0].set_ylabel("windows of calibration text")
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    if handles:
        figure.legend(handles.values(), handles, loc="outside upper right", ncols=len(handles))
    return figure


def swap_losses(
    table: pd.DataFrame,
    *,
    levels: Mapping[str, float],
    references: Mapping[str, float],
    best: Mapping[str, tuple[int, int]],
) -> Figure:
    """The loss of every set that differs in one layer from a set, a panel for each set.

    Each panel has a logarithmic scale of its own, on which grey is as good as colour.

    Args:
        table: Columns ``panel``, ``spared`` and ``dropped`` (0-based layers), and ``loss`` (nats
            per token), which is the colour.
        levels: By panel, the loss of the set itself; swaps with a lower one have a dot.
        references: Further levels of the loss by name, marked beside the scales that reach them.
        best: By panel, the swap ``(spared, dropped)`` that has a frame.
    """
    need_columns(table, "panel", "spared", "dropped", "loss")
    panels = list(table["panel"].unique())
    figure, axes = new_figure(WIDE, 1.75 * len(panels), 1, rows=len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        shown = table[table["panel"] == panel]
        wide = shown.pivot(index="spared", columns="dropped", values="loss")
        losses = [*shown["loss"], levels[panel]]
        scale = matplotlib.colors.LogNorm(min(losses), max(losses))
        drawn = axis.pcolormesh(wide, cmap="viridis", norm=scale, edgecolors="white", linewidth=0.3)
        rows, columns = (wide.to_numpy() < levels[panel]).nonzero()
        axis.plot(columns + 0.5, rows + 0.5, "o", color="white", markersize=1.8)
        spared, dropped = best[panel]
        corner = (wide.columns.get_loc(dropped), wide.index.get_loc(spared))
        for shade, width in (("white", 3.2), ("black", 1.4)):  # seen on dark and on bright cells
            axis.add_patch(
                Rectangle(corner, 1, 1, fill=False, edgecolor=shade, linewidth=width, zorder=3)
            )
        axis.set_xticks(np.arange(wide.shape[1]) + 0.5, wide.columns)
        axis.set_yticks(np.arange(wide.shape[0]) + 0.5, wide.index)
        axis.tick_params(length=0, labelsize=6)
        axis.invert_yaxis()
        axis.set_title(f"{panel}, loss {levels[panel]:.1f}", fontsize=8)
        axis.set(ylabel="layer that stays")
        _draw_scale(figure, axis, drawn, references)
    axes[-1].set(xlabel="layer removed in its place (0-based)")
    return figure


def _draw_scale(figure: Figure, axis: Axes, drawn: Any, references: Mapping[str, float]) -> None:
    """The scale of one panel in plain numbers, with the levels that lie on it."""
    bar = figure.colorbar(drawn, ax=axis, label="loss (nats per token)", pad=0.05)
    low, high = drawn.get_clim()
    steps = (1, 2, 2.5, 5, 10)
    ticks = matplotlib.ticker.MaxNLocator(5, steps=steps).tick_values(low, high)
    bar.set_ticks([tick for tick in ticks if low <= tick <= high], minor=False)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    bar.ax.tick_params(labelsize=7)
    for name, value in references.items():
        if low <= value <= high:
            bar.ax.axhline(value, color="white", linewidth=1.2)
            bar.ax.annotate(
                f"{name} ",
                (0, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=6,
            )
