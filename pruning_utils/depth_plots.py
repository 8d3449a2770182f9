"""Figures over the depth of pruning: curves, healing, paired differences, which layers go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pruning_utils.engine.checks import whole_number
from pruning_utils.engine.reader_names import LEVEL_LINES, style_of
from pruning_utils.plots import (
    NAMES,
    WIDE,
    colour_of,
    look_of,
    looks_of,
    need_columns,
    new_figure,
)


def with_ends(
    axis: Axes, rows: pd.DataFrame, places: np.ndarray | pd.Series, series: str, **look: Any
) -> ErrorbarContainer:
    """A curve of ``value`` with bars from ``low`` to ``high``.

    Args:
        axis: Where it is drawn.
        rows: Columns ``value``, ``low`` and ``high``.
        places: Where each row stands on the horizontal axis.
        series: Whose colour and marker it has.
        **look: Arguments of matplotlib's ``errorbar`` that are to be others.
    """
    colour, marker = look_of(series)
    own = {"markersize": 3, "linewidth": 0.9, "elinewidth": 0.8, "capsize": 1.5, **look}
    bars = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
    return axis.errorbar(places, rows["value"], bars, color=colour, marker=marker, **own)


def _thin_lines(axis: Axes, panel: str, baselines: pd.DataFrame, handles: dict) -> None:
    """The levels of a panel that are no curve, added to the legend's handles."""
    lines = baselines[baselines["panel"] == panel]
    for name, level in zip(lines["name"], lines["value"], strict=True):
        handles[name] = axis.axhline(
            level, color="0.35", linestyle=style_of(name), linewidth=0.7, zorder=0
        )


def _panels(n_panels: int, columns: int, height: float, margin: float) -> tuple[Figure, np.ndarray]:
    """A wide figure with at least ``n_panels`` axes as a flat array; those not needed are hidden.

    Rows are ``height`` inches high, beside a ``margin`` for the legend.
    """
    columns = min(columns, n_panels)
    rows = math.ceil(n_panels / columns)
    figure = Figure(figsize=(WIDE, margin + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axis in axes[n_panels:]:
        axis.set_visible(False)
    for axis in axes[max(n_panels - columns, 0) : n_panels]:
        axis.tick_params(labelbottom=True)  # also above a hidden one
    return figure, axes


def depth_curves(
    table: pd.DataFrame,
    *,
    n_layers: int | Mapping[str, int],
    baselines: pd.DataFrame | None = None,
    columns: int = 3,
    height: float = 1.75,
    label: str = "",
    dashed: Mapping[str, str] | None = None,
    more_questions: pd.DataFrame | None = None,
    legend_columns: int = 6,
    bands: bool = True,
) -> Figure:
    """Quantities against the fraction of layers removed, a panel each.

    Args:
        table: Columns ``panel``, ``series``, ``n_dropped`` (layers), ``value``, ``low`` and
            ``high``.
        n_layers: L of all panels, or by panel where they are of different models.
        baselines: Columns ``panel``, ``name`` and ``value``: thin lines, named in the legend.
        columns: Panels in a row.
        height: Of a row of panels, in inches.
        label: Of the vertical axes, where all panels share it.
        dashed: By name of a series, the series whose colour and marker it shares: such a series is
            dashed, with hollow markers.
        more_questions: As ``table``, of the same series, measured on more questions: large marks
            with bars, side by side.
        legend_columns: Most names in a row of the legend.
        bands: Whether each curve has its intervals as a band. Where bands would hide each other,
            a panel has one bar instead, as long as its widest interval.

    Returns:
        The figure: means with their intervals.
    """
    need_columns(table, "panel", "series", "n_dropped", "value", "low", "high")
    if baselines is None:
        baselines = pd.DataFrame(columns=["panel", "name", "value"])
    panels = list(table["panel"].unique())
    if more_questions is None:
        more_questions = table.iloc[:0]
    figure, axes = _panels(len(panels), columns, height, margin=0.35)
    handles: dict = {}
    twins = dashed or {}
    every_series = [*table["series"].unique(), *more_questions["series"].unique()]
    of_twins = looks_of(twins.get(name, name) for name in every_series)
    looks = {name: of_twins[twins.get(name, name)] for name in every_series}
    for axis, panel in zip(axes, panels, strict=False):
        shown = table[table["panel"] == panel].sort_values("n_dropped")
        of_all_layers = n_layers if isinstance(n_layers, int) else n_layers[panel]
        for series, points in shown.groupby("series", sort=False):
            twin = twins.get(series)
            colour, marker = looks[series]
            x = points["n_dropped"] / of_all_layers
            look = {"marker": marker, "color": colour, "markersize": 2.5, "linewidth": 0.8}
            if twin:  # large enough to be seen to be hollow
                look |= {"linestyle": "--", "markerfacecolor": "white"}
                look |= {"markersize": 3.5, "markeredgewidth": 0.6}
            (handles[series],) = axis.plot(x, points["value"], **look)
            if bands:
                _band(axis, x, points, colour, ":" if twin else "-")
        if not bands:
            handles["widest interval"] = _widest_interval(axis, shown, of_all_layers)
        more_here = more_questions[more_questions["panel"] == panel]
        if len(more_here):
            handles["more questions"] = _large_marks(axis, more_here, of_all_layers, looks)
        handles |= _level_lines(axis, baselines[baselines["panel"] == panel])
        axis.set_title(NAMES.get(panel, panel))
    of_all = f" ($L$ = {n_layers})" if isinstance(n_layers, int) else ""
    figure.supxlabel(f"layers removed $n / L${of_all}", fontsize=8)
    figure.supylabel(label, fontsize=8)
    names = _twins_behind(list(handles), twins)
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside upper center",
        ncols=min(len(names), legend_columns),
    )
    return figure


def _band(axis: Axes, x: pd.Series, points: pd.DataFrame, colour: str, linestyle: str) -> None:
    """Intervals of a curve. Bands lie over each other: edges tell them apart, in grey too."""
    axis.fill_between(
        x,
        points["low"],
        points["high"],
        facecolor=(colour, 0.1),
        edgecolor=(colour, 0.6),
        linewidth=0.5,
        linestyle=linestyle,
    )


def _level_lines(axis: Axes, levels: pd.DataFrame) -> dict[str, Line2D]:
    """Thin lines across a panel by their names, those of ``LEVEL_LINES`` first."""
    lines = {}
    for name in (*LEVEL_LINES, *sorted({*levels["name"]} - {*LEVEL_LINES})):
        for value in levels.loc[levels["name"] == name, "value"]:
            lines[name] = axis.axhline(
                value, color="0.35", linestyle=style_of(name), linewidth=0.7, zorder=0
            )
    return lines


def _widest_interval(axis: Axes, points: pd.DataFrame, n_layers: int) -> ErrorbarContainer:
    """A bar right of the curves, as long as the widest of their intervals."""
    middle = (points["value"].max() + points["value"].min()) / 2
    half = (points["high"] - points["low"]).max() / 2
    last = points["n_dropped"].max() / n_layers
    return axis.errorbar(1.12 * last, middle, yerr=half, color="0.35", linewidth=1.2, capsize=2.5)


def _twins_behind(names: list[str], twins: Mapping[str, str]) -> list[str]:
    """The names, each twin right behind the series that it belongs to."""
    for twin, series in twins.items():
        if twin in names and series in names:
            names.remove(twin)
            names.insert(names.index(series) + 1, twin)
    return names


def _large_marks(
    axis: Axes, levels: pd.DataFrame, n_layers: int, looks: Mapping[str, tuple[str, str]]
) -> Line2D:
    """Levels of series as large marks with bars, side by side; what stands for them in a legend."""
    levels = levels.reset_index(drop=True)
    at_same = levels.groupby("n_dropped")["series"]
    beside = 0.015 * (at_same.cumcount() - (at_same.transform("size") - 1) / 2)
    x = levels["n_dropped"] / n_layers + beside
    for series, points in levels.groupby("series", sort=False):
        colour, marker = looks[series]
        axis.errorbar(
            x[points.index],
            points["value"],
            yerr=[points["value"] - points["low"], points["high"] - points["value"]],
            fmt=marker,
            color=colour,
            markersize=5.5,
            markeredgecolor="black",
            markeredgewidth=0.6,
            elinewidth=1.4,
            zorder=3,
        )
    return Line2D(
        [],
        [],
        linestyle="none",
        marker="o",
        markersize=5.5,
        color="0.6",
        markeredgecolor="black",
        markeredgewidth=0.6,
    )


def place_losses(
    losses: pd.DataFrame,
    distances: pd.DataFrame,
    marked: Mapping[str, Mapping[str, int]],
    *,
    baselines: pd.DataFrame,
) -> Figure:
    """What blocks at every place cost, and below it how far apart their ends are.

    Args:
        losses: Columns ``panel`` (a model), ``row`` (the block, as a title), ``start`` (its first
            layer, 0-based), ``value`` (nats per token), ``low`` and ``high``.
        distances: Columns ``panel``, ``start`` and ``distance``, of the blocks of the last row.
        marked: By panel, names of blocks of the last row and where they start.
        baselines: Columns ``panel``, ``name`` and ``value``: thin lines among the losses.

    Returns:
        The figure: a column a panel, a row for each block size, the last two of the same blocks.
    """
    need_columns(losses, "panel", "row", "start", "value", "low", "high")
    need_columns(distances, "panel", "start", "distance")
    panels, rows = list(losses["panel"].unique()), list(losses["row"].unique())
    figure, axes = new_figure(
        WIDE, 0.5 + 1.3 * (len(rows) + 1), len(panels), rows=len(rows) + 1, sharex="col"
    )
    grid = axes.reshape(len(rows) + 1, len(panels))
    handles: dict = {}
    dark = colour_of("unpruned")
    look = {"marker": ".", "markersize": 4, "linewidth": 0.8, "color": dark}
    for column, panel in enumerate(panels):
        for row, title in enumerate(rows):
            axis = grid[row, column]
            shown = losses[(losses["panel"] == panel) & (losses["row"] == title)]
            axis.plot(shown["start"], shown["value"], **look)
            axis.fill_between(
                shown["start"], shown["low"], shown["high"], color=dark, alpha=0.2, linewidth=0
            )
            _thin_lines(axis, panel, baselines, handles)
            axis.set_title(f"{NAMES.get(panel, panel)}: {title}", fontsize=8)
        ends = distances[distances["panel"] == panel].sort_values("start")
        grid[-1, column].plot(ends["start"], ends["distance"], **look)
        grid[-1, column].set_xlabel("first removed layer (0-based)")
        last = losses[(losses["panel"] == panel) & (losses["row"] == rows[-1])]
        heights = (last.set_index("start")["value"], ends.set_index("start")["distance"])
        for name, place in marked[panel].items():
            colour, marker = look_of(name)
            for axis, height in zip(grid[-2:, column], heights, strict=True):
                (handles[name],) = axis.plot(
                    place, height[place], marker, color=colour, markersize=6, linestyle="none"
                )
    for row in grid[:-1, 0]:
        row.set_ylabel("loss (nats)")
    grid[-1, 0].set_ylabel("angular distance")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 5))
    return figure


def place_levels(table: pd.DataFrame, *, baselines: pd.DataFrame, label: str) -> Figure:
    """What single blocks leave, by the place of their first layer: a panel a model.

    Args:
        table: Columns ``panel``, ``series`` (what chose the block), ``start`` (its first layer,
            0-based), ``value``, ``low`` and ``high``.
        baselines: Columns ``panel``, ``name`` and ``value``: thin lines.
        label: What the value is, with its unit.
    """
    need_columns(table, "panel", "series", "start", "value", "low", "high")
    panels = list(table["panel"].unique())
    figure, axes = new_figure(WIDE, 2.4, len(panels), sharey=True)
    handles: dict = {}
    for axis, panel in zip(axes, panels, strict=True):
        shown = table[table["panel"] == panel]
        for series, points in shown.groupby("series", sort=False):
            look = {"markersize": 4.5, "linestyle": "none"}
            handles[series] = with_ends(axis, points, points["start"], str(series), **look)
        _thin_lines(axis, panel, baselines, handles)
        axis.set(title=NAMES.get(panel, panel), xlabel="first removed layer (0-based)")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes[0].set_ylabel(label)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3)
    return figure


def healing_curves(table: pd.DataFrame, *, unpruned: float | None = None) -> Figure:
    """Loss against healing tokens, a panel for each model, a curve for each number of layers.

    Args:
        table: Columns ``panel``, ``n_dropped`` (layers), ``tokens`` and ``loss`` (nats per token).
        unpruned: Loss of the unpruned model on the same text, a thin line; None: no line.
    """
    need_columns(table, "panel", "n_dropped", "tokens", "loss")
    panels = list(table["panel"].unique())
    depths = sorted(table["n_dropped"].unique())
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(depths)))
    figure, axes = new_figure(WIDE, 2.5, len(panels), sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        for depth, colour in zip(depths, colours, strict=True):
            rows = table[(table["panel"] == panel) & (table["n_dropped"] == depth)]
            axis.plot(
                rows["tokens"] / 1000,
                rows["loss"],
                color=colour,
                marker=".",
                linewidth=0.9,
                label=f"{depth}",
            )
        if unpruned is not None:
            look = {"color": "0.35", "linestyle": LEVEL_LINES["unpruned"], "linewidth": 0.7}
            axis.axhline(unpruned, label="0 (unpruned)", **look)
        axis.set(title=panel, xlabel="healing tokens (thousands)")
    axes[0].set(ylabel="validation loss (nats per token)")
    figure.legend(
        *axes[0].get_legend_handles_labels(), title="layers\nremoved", loc="outside right upper"
    )
    return figure


def differences(
    table: pd.DataFrame, *, margin: float, label: str, linear: float | None = None
) -> Figure:
    """Paired differences with their 95 and 90 % intervals, beside the margin for equality.

    Args:
        table: From :func:`evidence.paired_verdicts`.
        margin: Half the width of the grey band.
        label: What the difference is of, with its unit.
        linear: Differences further than this from 0 stand on a logarithmic scale; None: all on a
            linear one.
    """
    need_columns(table, "pair", "difference", "low", "high", "low_90", "high_90")
    figure, (axis,) = new_figure(WIDE, 0.7 + 0.24 * len(table))
    axis.axvspan(-margin, margin, color="0.9", zorder=0)
    axis.axvline(0, color="0.35", linewidth=0.7)
    places = np.arange(len(table))[::-1]
    axis.hlines(places, table["low"], table["high"], color=colour_of("healed"), linewidth=0.8)
    axis.hlines(places, table["low_90"], table["high_90"], color=colour_of("healed"), linewidth=2.6)
    axis.plot(
        table["difference"],
        places,
        "o",
        color="white",
        markeredgecolor=colour_of("healed"),
        markersize=4,
    )
    axis.set(xlabel=label, yticks=places, yticklabels=table["pair"])
    if linear:
        axis.set_xscale("symlog", linthresh=linear)
        axis.xaxis.set_major_formatter("{x:g}")
    return figure


def levels_and_differences(
    table: pd.DataFrame,
    *,
    level: str,
    label: str,
    sides: tuple[str, str] = ("first", "second"),
    references: pd.DataFrame | None = None,
    linear: float | None = None,
) -> Figure:
    """Levels of both sides of each pair, and beside them their paired difference.

    Args:
        table: Columns ``group`` (a heading for the rows below it, such as a model), ``pair``,
            ``first`` and ``second`` (levels), ``difference``, ``low``, ``high``, ``low_90``,
            ``high_90`` and ``margin``, a pair a row, rows of a group together.
        level: What the levels are of, with their unit.
        label: What the difference is of, with its unit.
        sides: What the two sides are called in the legend.
        references: Columns ``group``, ``name`` (of ``LEVEL_LINES``) and ``value``: thin lines
            among the levels of that group.
        linear: Differences further than this from 0 stand on a logarithmic scale; None: all on a
            linear one.

    Returns:
        The figure: filled markers are first sides, hollow ones second sides. Thin bars have 95 %,
        thick ones 90 %, and grey is the margin of equality of each row.
    """
    need_columns(table, "group", "pair", "first", "second", "difference", "margin")
    need_columns(table, "low", "high", "low_90", "high_90")
    new_group = table["group"].ne(table["group"].shift())
    places = -(np.arange(len(table)) + new_group.cumsum().to_numpy(float))
    figure, (levels, differences) = new_figure(
        WIDE, 0.75 + 0.2 * (len(table) + new_group.sum()), 2, sharey=True
    )
    levels.hlines(places, table["first"], table["second"], color="0.6", linewidth=0.7, zorder=0)
    look = {"color": colour_of("unpruned"), "markersize": 4, "linestyle": "none", "marker": "o"}
    levels.plot(table["second"], places, markerfacecolor="white", label=sides[1], **look)
    levels.plot(table["first"], places, label=sides[0], **look)
    if references is not None:
        _reference_lines(levels, table["group"], places, references)
    differences.barh(
        places, 2 * table["margin"], left=-table["margin"], height=0.8, color="0.9", zorder=0
    )
    differences.axvline(0, color="0.35", linewidth=0.7)
    differences.hlines(places, table["low"], table["high"], color="0", linewidth=0.8)
    differences.hlines(places, table["low_90"], table["high_90"], color="0", linewidth=2.4)
    differences.plot(
        table["difference"], places, markerfacecolor="white", **{**look, "marker": "d"}
    )
    headings = places[new_group] + 1
    levels.set(
        xlabel=level,
        yticks=[*places, *headings],
        yticklabels=[*table["pair"], *table.loc[new_group, "group"]],
        ylim=(places.min() - 0.7, places.max() + 1.6),
    )
    for text in levels.get_yticklabels()[len(table) :]:
        text.set_fontweight("bold")
    differences.set(xlabel=label)
    for axis in (levels, differences):
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=4)
    if linear:
        differences.set_xscale("symlog", linthresh=linear)
        differences.set_xlim(left=1.1 * differences.get_xlim()[0])
        differences.xaxis.set_major_formatter("{x:g}")
    shown = dict(zip(*reversed(levels.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown, loc="outside upper center", ncols=len(shown))
    return figure


def _reference_lines(
    axis: Axes, groups: pd.Series, places: np.ndarray, references: pd.DataFrame
) -> None:
    """Thin lines among levels, each along the rows of its group."""
    for line in references.itertuples():
        rows = places[(groups == line.group).to_numpy()]
        axis.vlines(
            line.value,
            rows.min() - 0.5,
            rows.max() + 0.5,
            color="0.35",
            linestyle=style_of(line.name),
            linewidth=0.7,
            zorder=0,
            label=line.name,
        )


def relative_starts(chosen: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Where the closest block begins against its size, beside choices that others made.

    Both are fractions of the depth.

    Args:
        chosen: Columns ``model``, ``n_layers``, ``block_size`` and ``start`` (0-based); one row a
            block size.
        published: The same columns; drawn as hollow markers.

    Returns:
        The figure; on the dashed line, a block would end with the last layer.
    """
    need_columns(chosen, "model", "n_layers", "block_size", "start")
    need_columns(published, "model", "n_layers", "block_size", "start")
    figure, (axis,) = new_figure(WIDE, 2.6)
    axis.plot([0, 1], [1, 0], "--", color="0.6", linewidth=0.8, label="ends with the last layer")
    for (model, rows), marker in zip(
        published.groupby("model", sort=False), "os^Dv" * len(published), strict=False
    ):
        axis.plot(
            rows["block_size"] / rows["n_layers"],
            rows["start"] / rows["n_layers"],
            marker,
            color="0.45",
            fillstyle="none",
            markersize=3,
            markeredgewidth=0.6,
            label=f"{model} (a public script)",
        )
    for model, rows in chosen.groupby("model", sort=False):
        axis.plot(
            rows["block_size"] / rows["n_layers"],
            rows["start"] / rows["n_layers"],
            marker=look_of(model)[1],
            markersize=3,
            label=NAMES.get(model, model),
            color=colour_of(model),
            linewidth=0.9,
        )
    axis.set(
        xlabel="layers removed $n / L$",
        ylabel=r"first removed layer $\ell^* / L$",
        xlim=(0, 1.02),
        ylim=(-0.02, 1),
    )
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return figure


def removed_layers(removed: dict[str, Sequence[int]], *, n_layers: int) -> Figure:
    """Which layers go: a row of squares for each name, with those of the removed layers filled.

    Args:
        removed: By name, the 0-based numbers of the removed layers.
        n_layers: L, the number of squares in a row.
    """
    for name, layers in removed.items():
        for layer in layers:
            whole_number(f"each layer of {name}", layer, 0, n_layers - 1)
    figure, (axis,) = new_figure(WIDE, 0.6 + 0.28 * len(removed))
    gone = np.array([np.isin(np.arange(n_layers), list(layers)) for layers in removed.values()])
    axis.pcolormesh(
        gone,
        cmap=matplotlib.colors.ListedColormap(["white", colour_of("pruned")]),
        vmin=0,
        vmax=1,
        edgecolors="0.5",
        linewidth=0.5,
    )
    axis.set_yticks(np.arange(len(removed)) + 0.5, list(removed))
    axis.set_xticks(np.arange(0, n_layers, 2) + 0.5, range(0, n_layers, 2))
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.set(xlabel=f"layer (0-based; {n_layers - 1} is the last)")
    return figure


def removed_by_criterion(table: pd.DataFrame, *, own: int = 1, missing: str = "") -> Figure:
    """Which layers each criterion removes from several models: a panel a criterion, a row a model.

    Args:
        table: Columns ``criterion``, ``model``, ``n_layers`` and ``blocks`` (removed layers,
            0-based, as a text such as ``"4 7 11"``).
        own: How many models, the last ones, are drawn in the colour of the criterion, those before
            in grey.
        missing: What stands where a criterion has no row of a model.

    Returns:
        The figure; layers lie at their fraction of the depth.
    """
    need_columns(table, "criterion", "model", "n_layers", "blocks")
    names = list(table["model"].unique())
    criteria = list(table["criterion"].unique())
    figure, axes = new_figure(WIDE * 1.15, 0.8 + 0.16 * len(names), len(criteria), sharey=True)
    for axis, criterion in zip(axes, criteria, strict=True):
        for row in table[table["criterion"] == criterion].itertuples():
            place = len(names) - names.index(row.model)
            width = 1 / row.n_layers
            axis.barh(place, 1, 0.7, color="none", edgecolor="0.75", linewidth=0.5)
            shade = colour_of(criterion) if row.model in names[-own:] else "0.45"
            for layer in map(int, str(row.blocks).split()):
                axis.barh(
                    place,
                    width,
                    0.7,
                    left=layer * width,
                    color=shade,
                    edgecolor="white",
                    linewidth=0.3,
                )
        shown = set(table.loc[table["criterion"] == criterion, "model"])
        for place, name in enumerate(reversed(names), 1):
            if missing and name not in shown:
                axis.text(0.5, place, missing, fontsize=6, color="0.45", ha="center", va="center")
        axis.set(title=criterion, xlabel="depth $l / L$", xlim=(0, 1))
        axis.set_yticks(range(1, len(names) + 1), names[::-1])
        axis.tick_params(axis="y", length=0)
    return figure
