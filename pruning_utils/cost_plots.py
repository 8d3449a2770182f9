"""Figures of times, sizes and what they buy: levels, differences and their causes (07 and 08)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pruning_utils.depth_plots import with_ends
from pruning_utils.engine.reader_names import LEVEL_LINES, style_of
from pruning_utils.plots import NAMES, WIDE, colour_of, look_of, need_columns, new_figure

# --- levels beside differences, times, and sizes --------------------------------------------------

# What series are called in these figures, where their own names are short for a reader: the shapes
# of one size, and models that were not healed.
SERIES = {
    "depth": "fewer layers",
    "width": "narrower layers",
    "width, heads too": "narrower, fewer heads",
    "pruned": "unhealed",
}
# A thin line: what is no measured curve.
THIN: dict[str, Any] = {"color": "0.35", "linewidth": 0.7, "zorder": 0}
# Marker and name of each precision that weights are stored in.
PRECISIONS = {
    "bfloat16": ("o", "bfloat16"),
    "float32": ("o", "float32"),
    "int8": ("s", "LLM.int8"),
    "nf4": ("^", "NF4"),
}


def _thin_lines(axis: Axes, panel: str, baselines: pd.DataFrame | None, handles: dict) -> None:
    """The thin lines of a panel, those of one name alike, added to the legend's handles."""
    if baselines is None:
        return
    for row in baselines[baselines["panel"] == panel].itertuples():
        handles[row.name] = axis.axhline(row.value, linestyle=style_of(row.name), **THIN)


def token_times(table: pd.DataFrame, *, baselines: pd.DataFrame | None = None) -> Figure:
    """Times against the batch size: a row of panels for each quantity, a column for each prompt.

    Args:
        table: Columns ``panel`` (the row's axis label), ``column`` (its title), ``series`` (of
            :data:`SERIES`, or ``unpruned``, a thin black line), ``batch_size``, ``value``, ``low``
            and ``high``.
        baselines: Columns ``panel``, ``name`` and ``value``: further thin lines.
    """
    need_columns(table, "panel", "column", "series", "batch_size", "value", "low", "high")
    panels, columns = list(table["panel"].unique()), list(table["column"].unique())
    batches = sorted(table["batch_size"].unique())
    height = 0.7 + 1.35 * len(panels)
    figure, axes = new_figure(
        WIDE, height, len(columns), rows=len(panels), sharex=True, sharey="row"
    )
    handles: dict = {}
    for axis, (panel, column) in zip(axes, itertools.product(panels, columns), strict=True):
        shown = table[(table["panel"] == panel) & (table["column"] == column)]
        for number, (series, rows) in enumerate(shown.groupby("series", sort=False)):
            places = np.array([batches.index(batch) for batch in rows["batch_size"]])
            if series == "unpruned":
                (handles[series],) = axis.plot(places, rows["value"], color="black", linewidth=0.7)
            else:
                # Beside each other, so that no bar hides another.
                handles[SERIES.get(series, series)] = with_ends(
                    axis, rows, places + 0.07 * number, series
                )
        _thin_lines(axis, panel, baselines, handles)
        axis.set_xticks(range(len(batches)), batches)
        if panel == panels[0]:
            axis.set_title(column)
        if column == columns[0]:
            axis.set_ylabel(panel)
    figure.supxlabel("texts generated at once", fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3)
    return figure


def times_and_causes(
    table: pd.DataFrame, lines: pd.DataFrame, *, label: str, hollow: str = ""
) -> Figure:
    """A time against what may cause it, a panel for each cause.

    Where marks of a panel would lie above each other, they are moved apart sideways.

    Args:
        table: Columns ``panel`` (the cause, with its unit), ``series`` (of :data:`SERIES`, or
            ``unpruned``), ``size`` (one group of markers), ``x``, ``value``, ``low`` and ``high``.
        lines: Columns ``panel``, ``name``, ``x`` and ``value``: what a cause alone would give.
        label: Of the vertical axis, with its unit.
        hollow: The size whose markers are hollow.
    """
    need_columns(table, "panel", "series", "size", "x", "value", "low", "high")
    panels = list(table["panel"].unique())
    table = table.assign(x=_moved_apart(table["x"], table["panel"]))
    figure, axes = new_figure(WIDE, 2.7, len(panels), sharey=True)
    handles: dict = {}
    for axis, panel in zip(axes, panels, strict=True):
        for (series, size), rows in table[table["panel"] == panel].groupby(
            ["series", "size"], sort=False
        ):
            drawn = with_ends(axis, rows, rows["x"], series)
            if size == hollow:
                drawn.lines[0].set_markerfacecolor("white")
                handles.setdefault(SERIES.get(series, series), drawn)
            else:
                handles[SERIES.get(series, series)] = drawn
        for (name, rows), style in zip(
            lines[lines["panel"] == panel].groupby("name", sort=False),
            itertools.cycle(("--", ":", "-.")),
            strict=False,
        ):
            axis.plot(rows["x"], rows["value"], linestyle=style, **THIN)
            middle = rows.iloc[len(rows) // 2]
            axis.annotate(
                name,
                (middle["x"], middle["value"]),
                xytext=(8, -9),
                textcoords="offset points",
                fontsize=7,
            )
        axis.set(xlabel=panel, ylim=(0, None))
    axes[0].set(ylabel=label)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4)
    return figure


def _moved_apart(x: pd.Series, panels: pd.Series) -> pd.Series:
    """Places of marks, those of a panel that agree to 2 % of its largest a little apart."""
    largest = x.groupby(panels).transform("max")
    alike = [panels, (x / largest / 0.02).round()]
    number = x.groupby(alike).cumcount()
    middle = (x.groupby(alike).transform("size") - 1) / 2
    return x + 0.018 * largest * (number - middle)


def levels_and_differences(
    levels: pd.DataFrame,
    pairs: pd.DataFrame,
    *,
    ticks: Mapping[float, str],
    xlabel: str,
    labels: Mapping[str, tuple[str, str]],
    baselines: pd.DataFrame | None = None,
    tops: Mapping[str, float] | None = None,
) -> Figure:
    """Levels of models above, and the paired difference of two of them below, a column a measure.

    Args:
        levels: Columns ``panel``, ``series``, ``place``, ``value``, ``low`` and ``high``.
        pairs: Columns ``panel``, ``place`` and those of :func:`evidence.paired_verdicts`; thin bars
            are 95 %, thick ones 90 %, the grey band is the margin of equality.
        ticks: Names of places on the horizontal axis.
        xlabel: What the places are.
        labels: By panel, what the vertical axes say: of the levels, and of the differences.
        baselines: Columns ``panel``, ``name`` and ``value``: thin lines among the levels.
        tops: By panel, where the axis of levels ends; what lies above is marked at that edge.
    """
    need_columns(levels, "panel", "series", "place", "value", "low", "high")
    need_columns(pairs, "panel", "place", "difference", "low", "high", "low_90", "high_90")
    panels = list(levels["panel"].unique())
    figure, axes = new_figure(WIDE, 3.7, len(panels), rows=2, sharex=True)
    handles: dict = {}
    step = 0.03 * (max(ticks) - min(ticks)) if len(ticks) > 1 else 0.03
    for axis, below, panel in zip(axes, axes[len(panels) :], panels, strict=False):
        shown = levels[levels["panel"] == panel]
        _thin_lines(axis, panel, baselines, handles)
        by_series = list(shown.groupby("series", sort=False))
        for number, (series, rows) in enumerate(by_series):
            places = rows["place"] + 1.5 * step * (number - (len(by_series) - 1) / 2)
            handles[SERIES.get(series, series)] = with_ends(axis, rows, places, series)
        if tops and panel in tops:
            _mark_above(axis, shown, tops[panel])
        axis.set(title=NAMES.get(panel, panel), ylabel=labels[panel][0])
        _difference_bars(below, pairs[pairs["panel"] == panel], step)
        below.set(ylabel=labels[panel][1])
        below.set_xticks(list(ticks), list(ticks.values()))
        below.set_xlim(min(ticks) - 4 * step, max(ticks) + 4 * step)
        below.margins(y=0.12)
    figure.supxlabel(xlabel, fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5)
    return figure


def _mark_above(axis: Axes, shown: pd.DataFrame, top: float) -> None:
    """End an axis, and mark at its edge what lies above, with its value."""
    axis.set_ylim(None, top)
    for row in shown[shown["value"] > top].itertuples():
        colour, _ = look_of(row.series)
        axis.annotate(
            f"{row.value:.1f} \u2191",
            (row.place, top),
            xytext=(8, -8),
            textcoords="offset points",
            ha="center",
            fontsize=6,
            color=colour,
        )


def _difference_bars(axis: Axes, pairs: pd.DataFrame, step: float) -> None:
    """Paired differences upright, with their intervals and margin."""
    axis.axhline(0, **THIN)
    for row in pairs.itertuples():
        axis.fill_between(
            [row.place - 2 * step, row.place + 2 * step],
            -row.margin,
            row.margin,
            color="0.85",
            linewidth=0,
            zorder=-1,
        )
    axis.vlines(pairs["place"], pairs["low"], pairs["high"], color="black", linewidth=0.8)
    axis.vlines(pairs["place"], pairs["low_90"], pairs["high_90"], color="black", linewidth=2.4)
    axis.plot(
        pairs["place"],
        pairs["difference"],
        "o",
        color="white",
        markeredgecolor="black",
        markersize=3.5,
    )


def grouped_differences(
    table: pd.DataFrame, *, margin: float, label: str, gap: float = 1.2
) -> Figure:
    """Paired differences, a panel a text, rows in groups with a heading each.

    Args:
        table: Columns ``panel``, ``group``, ``row`` and those of :func:`evidence.paired_verdicts`.
            Every panel has the same rows.
        margin: Half the width of the grey band.
        label: What the difference is of, with its unit.
        gap: Between groups, in rows.
    """
    need_columns(table, "panel", "group", "row", "difference", "low", "high", "low_90", "high_90")
    panels = list(table["panel"].unique())
    keys = table[["group", "row"]].drop_duplicates()
    places: dict[tuple[str, str], float] = {}
    headings: dict[str, float] = {}
    place = 0.0
    for group, rows in keys.groupby("group", sort=False)["row"]:
        place -= gap if headings else 0
        headings[group] = place
        for row in rows:
            place -= 1
            places[group, row] = place
        place -= 1
    figure, axes = new_figure(WIDE, 0.7 + 0.17 * -place, len(panels), sharey=True, sharex=True)
    for axis, panel in zip(axes, panels, strict=True):
        shown = table[table["panel"] == panel]
        at = [places[group, row] for group, row in zip(shown["group"], shown["row"], strict=True)]
        axis.axvspan(-margin, margin, color="0.88", zorder=-1)
        axis.axvline(0, **THIN)
        axis.hlines(at, shown["low"], shown["high"], color="black", linewidth=0.8)
        axis.hlines(at, shown["low_90"], shown["high_90"], color="black", linewidth=2.4)
        axis.plot(
            shown["difference"], at, "o", color="white", markeredgecolor="black", markersize=3.5
        )
        axis.set(title=panel, ylim=(place + 0.3, 0.8))
        axis.tick_params(axis="y", length=0)
    ticks = {at: group for group, at in headings.items()}
    ticks |= {at: row for (_, row), at in places.items()}
    axes[0].set_yticks(list(ticks), list(ticks.values()))
    for text in axes[0].get_yticklabels():
        text.set_fontstyle("italic" if text.get_text() in headings else "normal")
    figure.supxlabel(label, fontsize=8)
    return figure


def training_pairs(
    table: pd.DataFrame, *, first: str, second: str, floor: float | None = None
) -> Figure:
    """Loss of two ways of training against tokens, and below it their difference.

    Args:
        table: Columns ``panel``, ``series``, ``run``, ``tokens`` and ``loss`` (nats per token).
        first: The series that the other is subtracted from.
        second: The other one.
        floor: Loss of a uniform guess, a thin line in the panels that reach it.

    Returns:
        The figure: thick lines are means over runs, thin ones single runs. Scales differ.
    """
    need_columns(table, "panel", "series", "run", "tokens", "loss")
    panels = list(table["panel"].unique())
    figure, axes = new_figure(WIDE, 3.3, len(panels), rows=2, sharex=True)
    wide = table.pivot(index=["panel", "tokens", "run"], columns="series", values="loss")
    handles: dict = {}
    for axis, below, panel in zip(axes, axes[len(panels) :], panels, strict=False):
        losses = wide.loc[panel].unstack("run")
        tokens = losses.index / 1000
        for series in (first, second):
            colour, marker = look_of(series)
            axis.plot(tokens, losses[series], color=colour, linewidth=0.5, alpha=0.7)
            (handles[series],) = axis.plot(
                tokens,
                losses[series].mean(axis=1),
                color=colour,
                marker=marker,
                markersize=2.5,
                linewidth=1.2,
            )
        if floor is not None and losses.to_numpy().max() > floor:
            handles["ln V"] = axis.axhline(floor, linestyle=LEVEL_LINES["ln V"], **THIN)
        gap = losses[first] - losses[second]
        most = 1.1 * gap.abs().to_numpy().max() or 1.0
        below.axhline(0, **THIN)
        below.plot(tokens, gap, color="0.5", linewidth=0.6)
        below.plot(tokens, gap.mean(axis=1), color="black", linewidth=1.4)
        below.set_ylim(-most, most)
        axis.set(title=panel)
    axes[0].set(ylabel="validation loss\n(nats per token)")
    axes[len(panels)].set(ylabel=f"{first}\nminus {second} (nats)")
    figure.supxlabel("training tokens (thousands)", fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4)
    return figure


def sizes_and_losses(table: pd.DataFrame, *, xlabel: str, guess: float) -> Figure:
    """Loss against the size of the stored model, a panel a text, a curve a number of layers.

    Args:
        table: Columns ``panel``, ``n_dropped`` (layers), ``precision`` (of :data:`PRECISIONS`),
            ``size``, ``value`` (nats per token), ``low`` and ``high``.
        xlabel: What the size is, with its unit.
        guess: Loss of a uniform guess, ln V: a thin line if an interval comes within a nat of it.
    """
    need_columns(table, "panel", "n_dropped", "precision", "size", "value", "low", "high")
    panels = list(table["panel"].unique())
    depths = sorted(table["n_dropped"].unique())
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, len(depths)))
    figure, axes = new_figure(WIDE, 2.6, len(panels), sharey=True)
    depth_handles: dict = {}
    marks: dict = {}
    for axis, panel in zip(axes, panels, strict=True):
        for depth, colour in zip(depths, colours, strict=True):
            rows = table[(table["panel"] == panel) & (table["n_dropped"] == depth)]
            (depth_handles[f"{depth} layers removed"],) = axis.plot(
                rows["size"], rows["value"], color=colour, linewidth=0.9
            )
            axis.vlines(rows["size"], rows["low"], rows["high"], color=colour, linewidth=0.8)
            for precision, row in rows.groupby("precision", sort=False):
                marker, name = PRECISIONS[precision]
                axis.plot(row["size"], row["value"], marker, color=colour, markersize=4)
                marks[name] = Line2D([], [], marker=marker, color="0.35", linestyle="")
        axis.set(title=panel, xlabel=xlabel)
        if table["high"].max() > guess - 1:
            marks["ln V"] = axis.axhline(
                guess, color="0.35", linestyle=LEVEL_LINES["ln V"], linewidth=0.8
            )
    axes[0].set(ylabel="loss (nats per token)")
    handles = depth_handles | marks
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)
    return figure


def shares_of_limits(shares: pd.DataFrame) -> Figure:
    """What a smaller model loses of each measure, as a share of its limit.

    Args:
        shares: Columns ``measure``, ``judgement``, ``value``, ``low`` and ``high``, where 1 is the
            limit; as of :func:`shrinking.judgements.shares`.
    """
    need_columns(shares, "measure", "judgement", "value", "low", "high")
    figure, (axis,) = new_figure(WIDE, 0.7 + 0.3 * len(shares))
    places = -np.arange(len(shares))
    colour = colour_of("healed")
    axis.hlines(places, shares["low"], shares["high"], color=colour, linewidth=1.2)
    axis.plot(shares["value"], places, "o", color=colour, markersize=4)
    axis.axvline(1, color="0", linewidth=0.9)
    axis.axvline(0, color="0.6", linewidth=0.7)
    names = [f"{row.measure}: {row.judgement}" for row in shares.itertuples()]
    axis.set(xlabel="share of the limit", yticks=places, yticklabels=names)
    axis.set_ylim(places.min() - 0.6, 0.6)
    axis.set_xlim(min(shares["low"].min(), 0) - 0.05, max(shares["high"].max(), 1) + 0.05)
    return figure
