"""Figures over the depth of pruning: curves, healing, paired differences, which layers go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pruning_utils.plots import ENTITIES, NAMES, WIDE, colour_of, need_columns, new_figure

# Line style of each level that is no curve.
BASELINES = {"unpruned": "-", "chance": ":", "floor": ":", "majority": "--"}


def _look(entity: str) -> tuple[str, str]:
    """Colour and marker of an entity; the same for all that have none of their own."""
    return ENTITIES.get(entity, ("#56B4E9", "v"))


def _panels(n_panels: int, columns: int, height: float, margin: float) -> tuple[Figure, np.ndarray]:
    """A wide figure with at least ``n_panels`` axes as a flat array; those not needed are hidden.

    Rows are ``height`` inches high, beside a ``margin`` for the legend.
    """
    rows = math.ceil(n_panels / columns)
    figure = Figure(figsize=(WIDE * 1.15, margin + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axis in axes[n_panels:]:
        axis.set_visible(False)
    return figure, axes


def depth_curves(
    table: pd.DataFrame,
    *,
    n_layers: int,
    baselines: pd.DataFrame | None = None,
    columns: int = 3,
    height: float = 1.75,
    label: str = "",
) -> Figure:
    """Quantities against the fraction of layers removed, a panel each.

    Args:
        table: Columns ``panel``, ``series``, ``n_dropped`` (layers), ``value``, ``low`` and
            ``high``.
        n_layers: L.
        baselines: Columns ``panel``, ``name`` and ``value``: thin lines, named in the legend.
        columns: Panels in a row.
        height: Of a row of panels, in inches.
        label: Of the vertical axes, where all panels share it.

    Returns:
        The figure: means with their intervals as bands.
    """
    need_columns(table, "panel", "series", "n_dropped", "value", "low", "high")
    if baselines is None:
        baselines = pd.DataFrame(columns=["panel", "name", "value"])
    panels = list(table["panel"].unique())
    figure, axes = _panels(len(panels), columns, height, margin=0.35)
    handles: dict = {}
    for axis, panel in zip(axes, panels, strict=False):
        shown = table[table["panel"] == panel].sort_values("n_dropped")
        for series, points in shown.groupby("series", sort=False):
            colour, marker = _look(series)
            x = points["n_dropped"] / n_layers
            (handles[series],) = axis.plot(
                x, points["value"], marker=marker, color=colour, markersize=2.5, linewidth=0.8
            )
            axis.fill_between(
                x, points["low"], points["high"], color=colour, alpha=0.18, linewidth=0
            )
        for name, style in BASELINES.items():
            is_here = (baselines["panel"] == panel) & (baselines["name"] == name)
            for value in baselines.loc[is_here, "value"]:
                handles[name] = axis.axhline(
                    value, color="0.35", linestyle=style, linewidth=0.7, zorder=0
                )
        axis.set_title(NAMES.get(panel, panel))
    figure.supxlabel(f"layers removed $n / L$ ($L$ = {n_layers})", fontsize=8)
    figure.supylabel(label, fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 6))
    return figure


def healing_curves(table: pd.DataFrame) -> Figure:
    """Loss against healing tokens, a panel for each model, a curve for each number of layers.

    Args:
        table: Columns ``panel``, ``n_dropped`` (layers), ``tokens`` and ``loss`` (nats per token).
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
        axis.set(title=panel, xlabel="healing tokens (thousands)")
    axes[0].set(ylabel="validation loss (nats per token)")
    figure.legend(
        *axes[0].get_legend_handles_labels(), title="layers\nremoved", loc="outside right upper"
    )
    return figure


def training_curves(table: pd.DataFrame) -> Figure:
    """Loss against training tokens, a panel for each ``panel``, a curve for each ``series``.

    Args:
        table: Columns ``panel``, ``series``, ``tokens`` and ``loss`` (nats per token).
    """
    need_columns(table, "panel", "series", "tokens", "loss")
    panels = list(table["panel"].unique())
    figure, axes = new_figure(WIDE * 1.15, 2.2, len(panels), sharex=True)
    handles: dict = {}
    for axis, panel in zip(axes, panels, strict=True):
        for series, rows in table[table["panel"] == panel].groupby("series", sort=False):
            colour, marker = _look(series)
            (handles[series],) = axis.plot(
                rows["tokens"] / 1000,
                rows["loss"],
                color=colour,
                marker=marker,
                markersize=2.5,
                linewidth=0.9,
            )
        axis.set(title=panel)
    axes[0].set(ylabel="validation loss (nats per token)")
    figure.supxlabel("training tokens (thousands)", fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4)
    return figure


def rate_curves(table: pd.DataFrame) -> Figure:
    """Loss against the learning rate, a panel for each ``panel``, a curve for each ``series``.

    The lowest point of a curve is filled. Curves may leave a panel at its top: that is twice as far
    above the best series as the worst one is at its own best.

    Args:
        table: Columns ``panel``, ``series``, ``rate`` and ``loss`` (nats per token).
    """
    need_columns(table, "panel", "series", "rate", "loss")
    panels = list(table["panel"].unique())
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(WIDE, 2.1 * rows + 0.5, columns, rows=rows)
    handles: dict = {}
    for axis, panel in zip(axes, panels, strict=False):
        shown = table[table["panel"] == panel]
        for series, line in shown.groupby("series", sort=False):
            line = line.sort_values("rate")
            colour, marker = _look(series)
            (handles[series],) = axis.plot(
                line["rate"],
                line["loss"],
                color=colour,
                marker=marker,
                markersize=4,
                fillstyle="none",
                linewidth=0.9,
            )
            lowest = line.iloc[line["loss"].argmin()]
            axis.plot(lowest["rate"], lowest["loss"], color=colour, marker=marker, markersize=4)
        ends = shown.groupby("series")["loss"].min().agg(["min", "max"])
        top = 2 * ends["max"] - ends["min"]
        if ends["max"] < top < shown["loss"].max():
            axis.set_ylim(ends["min"] - 0.06 * (top - ends["min"]), top)
        axis.set(title=panel, xscale="log", xlabel="peak learning rate")
    for place, axis in enumerate(axes):
        axis.set(ylabel="" if place % columns else "validation loss (nats per token)")
        axis.set_visible(place < len(panels))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5)
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


def rank_changes(table: pd.DataFrame, *, before: str, after: str) -> Figure:
    """How an order changes: a line from each name's rank in one column to its rank in another.

    The lowest value is on top. Of equal values the first in the table ranks higher.

    Args:
        table: Columns ``panel``, ``name`` and the two of the names ``before`` and ``after``.
        before: Column of the values on the left.
        after: Column of the values on the right.
    """
    need_columns(table, "panel", "name", before, after)
    panels = list(table["panel"].unique())
    most = table.groupby("panel").size().max()
    figure, axes = new_figure(WIDE * 1.25, 0.6 + 0.17 * most, len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        rows = table[table["panel"] == panel]
        ranks = [rows[column].rank(method="first") for column in (before, after)]
        for name, left, right in zip(rows["name"], *ranks, strict=True):
            colour, marker = _look(name)
            axis.plot(
                [0, 1], [left, right], color=colour, marker=marker, markersize=2.5, linewidth=0.9
            )
            axis.annotate(
                name,
                (0, left),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                size=6,
            )
            axis.annotate(
                name, (1, right), xytext=(4, 0), textcoords="offset points", va="center", size=6
            )
        axis.set(title=panel, xlim=(-1.1, 2.1), ylim=(most + 0.5, 0.5), yticks=[])
        axis.set_xticks([0, 1], [before, after])
        axis.spines[["left", "right", "top", "bottom"]].set_visible(False)
    return figure


def swap_map(table: pd.DataFrame) -> Figure:
    """What it changes to remove one layer instead of another, a panel for each ``panel``.

    Args:
        table: Columns ``panel``, ``spared`` and ``dropped`` (0-based layers), and ``change`` (of
            the loss, nats per token), which is the colour.
    """
    need_columns(table, "panel", "spared", "dropped", "change")
    panels = list(table["panel"].unique())
    figure, axes = new_figure(WIDE * 1.15, 2.0 * len(panels), 1, rows=len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        shown = table[table["panel"] == panel]
        wide = shown.pivot(index="spared", columns="dropped", values="change")
        most = np.abs(wide.to_numpy()).max()
        mesh = axis.pcolormesh(
            wide, cmap="PuOr_r", vmin=-most, vmax=most, edgecolors="white", linewidth=0.3
        )
        axis.set_xticks(np.arange(wide.shape[1]) + 0.5, wide.columns)
        axis.set_yticks(np.arange(wide.shape[0]) + 0.5, wide.index)
        axis.tick_params(length=0, labelsize=6)
        axis.invert_yaxis()
        axis.set(
            title=panel, ylabel="layer that stays", xlabel="layer removed in its place (0-based)"
        )
        figure.colorbar(mesh, ax=axis, label="change of loss\n(nats per token)")
    return figure


def removed_layers(removed: dict[str, Sequence[int]], *, n_layers: int) -> Figure:
    """Which layers go: a row of squares for each name, with those of the removed layers filled.

    Args:
        removed: By name, the 0-based numbers of the removed layers.
        n_layers: L, the number of squares in a row.
    """
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


def removed_by_criterion(table: pd.DataFrame, *, own: int = 1) -> Figure:
    """Which layers each criterion removes from several models: a panel a criterion, a row a model.

    Args:
        table: Columns ``criterion``, ``model``, ``n_layers`` and ``blocks`` (removed layers,
            0-based, as a text such as ``"4 7 11"``).
        own: How many models, the last ones, are drawn in the colour of the criterion, those before
            in grey.

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
            for layer in map(int, row.blocks.split()):
                axis.barh(
                    place,
                    width,
                    0.7,
                    left=layer * width,
                    color=shade,
                    edgecolor="white",
                    linewidth=0.3,
                )
        axis.set(title=criterion, xlabel="depth $l / L$", xlim=(0, 1))
        axis.set_yticks(range(1, len(names) + 1), names[::-1])
        axis.tick_params(axis="y", length=0)
    return figure


def speed_curves(table: pd.DataFrame, *, label: str = "", columns: int = 4) -> Figure:
    """Measured quantities against the batch size, a panel for each ``panel``, curves by ``series``.

    Args:
        table: Columns ``panel``, ``series``, ``batch_size``, ``value``, ``low`` and ``high`` (ends
            of the spread).
        label: Of the vertical axes.
        columns: Panels in a row.
    """
    need_columns(table, "panel", "series", "batch_size", "value", "low", "high")
    panels = list(table["panel"].unique())
    batches = sorted(table["batch_size"].unique())
    figure, axes = _panels(len(panels), columns, height=1.7, margin=0.5)
    handles: dict = {}
    for axis, panel in zip(axes, panels, strict=False):
        for series, rows in table[table["panel"] == panel].groupby("series", sort=False):
            colour, marker = _look(series)
            places = [batches.index(batch) for batch in rows["batch_size"]]
            spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            handles[series] = axis.errorbar(
                places,
                rows["value"],
                spread,
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=0.9,
            )
        axis.axhline(1, color="0.35", linewidth=0.7, zorder=0)
        axis.set_xticks(range(len(batches)), batches)
        axis.set(title=panel)
    figure.supxlabel("texts generated at once", fontsize=8)
    figure.supylabel(label, fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 4))
    return figure


def roofline(table: pd.DataFrame, *, flops_per_second: float, bytes_per_second: float) -> Figure:
    """What models attain below the roof of a machine's arithmetic and memory.

    The form of the figure is that of Williams et al. (2009).

    Args:
        table: Columns ``series``, ``stage``, ``intensity`` (operations per byte of weights) and
            ``attained`` (operations per second).
        flops_per_second: The flat roof.
        bytes_per_second: The slope of the other.
    """
    need_columns(table, "series", "stage", "intensity", "attained")
    figure, (axis,) = new_figure(WIDE, 2.9)
    low = table["intensity"].min() / 2
    high = max(table["intensity"].max(), flops_per_second / bytes_per_second) * 2
    across = np.geomspace(low, high, 200)
    roof = np.minimum(across * bytes_per_second, flops_per_second)
    axis.plot(across, roof / 1e9, color="0.35", linewidth=1)
    for series, rows in table.groupby("series", sort=False):
        colour, marker = _look(series)
        axis.plot(
            rows["intensity"],
            rows["attained"] / 1e9,
            marker,
            color=colour,
            markersize=4,
            fillstyle="none",
            label=series,
        )
    for stage, rows in table.groupby("stage", sort=False):
        lowest = rows.loc[rows["attained"].idxmin()]
        axis.annotate(
            stage,
            (lowest["intensity"], lowest["attained"] / 1e9),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=7,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte of weights",
        ylabel="billion operations per second",
        ylim=(table["attained"].min() / 3e9, None),
    )
    axis.legend(loc="lower right")
    return figure
