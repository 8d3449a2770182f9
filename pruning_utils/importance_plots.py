"""Figures of scores, and of levels beside differences, for choices of layers (05 and 06)."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from pruning_utils.engine.reader_names import LEVEL_LINES, style_of
from pruning_utils.plots import WIDE, look_of, need_columns, new_figure

# --- levels beside differences --------------------------------------------------------------------

# What a measure is multiplied by, and the units of its levels and of its differences.
MEASURES = {
    "accuracy": (100, "accuracy (%)", "points"),
    "loss": (1, "loss (nats per token)", "nats per token"),
}
ARROW = r"$\uparrow$"  # stands for a level beyond the upper edge
CRITERIA = {
    "magnitude": "Magnitude",
    "magnitude+": "Magnitude+",
    "taylor": "Taylor",
    "taylor+": "Taylor+",
    "perplexity": "Perplexity",
}


def level_panels(
    levels: pd.DataFrame, *, baselines: pd.DataFrame | None = None, columns: int = 2
) -> Figure:
    """Levels of a measure at several choices, a panel for each ``panel``.

    Neighbours of one measure share their vertical axis. Levels that lie far out, above a "ln V" or
    more than three interquartile ranges above the upper quartile of their panel, are arrows at its
    upper edge, with their value.

    Args:
        levels: Columns ``panel`` (the title), ``measure`` (of :data:`MEASURES`), ``label`` (of the
            horizontal axis), ``series``, ``choice`` (in order of appearance), ``joined`` (whether a
            line joins the choices), ``value``, ``low`` and ``high`` (NaN: no interval). A series
            such as ``rank 32, own rate`` has the colour and marker of ``rank 32``, hollow.
        baselines: Columns ``panel``, ``name`` (of ``LEVEL_LINES``) and ``value``: thin lines.
        columns: Panels in a row.
    """
    _need_levels(levels)
    n_panels = levels["panel"].nunique()
    rows = math.ceil(n_panels / columns)
    figure, axes = new_figure(WIDE, 0.6 + 1.5 * rows, columns, rows=rows)
    handles = _draw_levels(axes[:n_panels], levels, baselines, columns)
    for axis in axes[n_panels:]:
        axis.set_visible(False)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 4))
    return figure


def levels_and_differences(
    levels: pd.DataFrame, differences: pd.DataFrame, *, baselines: pd.DataFrame | None = None
) -> Figure:
    """Levels at several choices, and below them the paired differences between choices.

    Args:
        levels: As for :func:`level_panels`; all panels stand in one row.
        differences: Columns ``panel`` (the title), ``measure`` (of :data:`MEASURES`), and from
            :func:`evidence.paired_verdicts` ``pair``, ``difference``, ``low``, ``high``,
            ``low_90``, ``high_90`` and ``margin`` (NaN: none). Panels stand below each other.
        baselines: As for :func:`level_panels`.

    Returns:
        The figure: differences with their 95 % (thin) and 90 % (thick) intervals, and the margin
        for equality in grey.
    """
    _need_levels(levels)
    columns = ("panel", "measure", "pair", "difference", "low", "high", "low_90", "high_90")
    need_columns(differences, *columns, "margin")
    sizes = differences.groupby("panel", sort=False).size()
    heights = [2.3, 0.62 * len(sizes) + 0.17 * sizes.sum()]
    figure = Figure(figsize=(WIDE, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts
    above = upper.subplots(1, levels["panel"].nunique(), squeeze=False).ravel()
    handles = _draw_levels(above, levels, baselines, len(above))
    upper.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 6))
    below = lower.subplots(len(sizes), 1, squeeze=False, height_ratios=sizes + 1).ravel()
    for axis, panel in zip(below, sizes.index, strict=True):
        _draw_differences(axis, differences[differences["panel"] == panel])
        axis.set_title(panel)
    return figure


def _need_levels(levels: pd.DataFrame) -> None:
    columns = ("panel", "measure", "label", "series", "choice", "joined", "value", "low", "high")
    need_columns(levels, *columns)


def _draw_levels(
    axes: np.ndarray, levels: pd.DataFrame, baselines: pd.DataFrame | None, columns: int
) -> dict:
    """Draw a panel on each of the axes; returns the handles of the legend by name, lines last."""
    if baselines is None:
        baselines = pd.DataFrame(columns=["panel", "name", "value"])
    handles: dict = {}
    measures: list[str] = []
    groups = levels.groupby("panel", sort=False)
    tops = _upper_edges(list(groups), baselines)
    for place, (axis, (panel, rows)) in enumerate(zip(axes, groups, strict=True)):
        measure = rows["measure"].iloc[0]
        factor, unit, _ = MEASURES[measure]
        here = baselines[baselines["panel"] == panel]
        _draw_series(axis, rows, factor, tops[place], handles)
        for name, value in zip(here["name"], factor * here["value"], strict=True):
            handles[name] = axis.axhline(
                value, color="0.35", linestyle=style_of(name), linewidth=0.7, zorder=0
            )
        axis.set(title=panel, xlabel=rows["label"].iloc[0], ylabel=unit)
        if place and measure == measures[-1]:
            axis.sharey(axes[place - 1])
            if place % columns:
                axis.set_ylabel("")
        measures.append(measure)
    # Setting an end stops the other from following what is drawn later.
    for axis, top in zip(axes, tops, strict=True):
        if math.isfinite(top):
            axis.set_ylim(top=top)
    return {name: handles[name] for name in sorted(handles, key=lambda name: name in LEVEL_LINES)}


def _upper_edges(
    panels: Sequence[tuple[str, pd.DataFrame]], baselines: pd.DataFrame
) -> list[float]:
    """Where each panel ends, infinity if no level lies far out; neighbours of a measure alike."""
    tops: list[float] = []
    for measure, alike in itertools.groupby(panels, key=lambda one: one[1]["measure"].iloc[0]):
        factor = MEASURES[measure][0]
        found, largest = [], []
        for panel, rows in alike:
            here = baselines[(baselines["panel"] == panel) & (baselines["name"] == "ln V")]
            found.append(factor * _upper_edge(rows["value"], here["value"]))
            largest.append(1.02 * factor * rows[["value", "high"]].max().max())
        if any(map(math.isfinite, found)):
            # One axis holds all of them: it must not cut what another panel does not mark.
            ends = zip(found, largest, strict=True)
            found = [max(end if math.isfinite(end) else most for end, most in ends)] * len(found)
        tops += found
    return tops


def _upper_edge(values: pd.Series, guess: pd.Series) -> float:
    """Where a panel ends if a level lies far out, else infinity."""
    largest = values.max()
    if len(guess):
        return 1.12 * guess.iloc[0] if largest > guess.iloc[0] else math.inf
    low, high = values.quantile([0.25, 0.75])
    edge = high + 3 * (high - low)
    if not low < high or largest <= edge:
        return math.inf
    inside = values[values <= edge]
    return float(inside.max() + 0.15 * (inside.max() - inside.min()))


def _draw_series(axis: Axes, rows: pd.DataFrame, factor: float, top: float, handles: dict) -> None:
    """Levels of all series of a panel, beside each other where they have intervals."""
    choices = list(dict.fromkeys(rows["choice"]))
    names = list(dict.fromkeys(rows["series"]))
    step = 0.07 if rows["high"].notna().any() else 0.0
    arrows: Counter[int] = Counter()
    for number, name in enumerate(names):
        points = rows[rows["series"] == name]
        colour, marker = look_of(name.split(", ")[0])
        places = np.array([choices.index(choice) for choice in points["choice"]], dtype=float)
        places += step * (number - (len(names) - 1) / 2)
        value, low, high = (factor * points[column] for column in ("value", "low", "high"))
        is_inside = (value <= top).to_numpy()
        handles[CRITERIA.get(name, name)] = axis.errorbar(
            places[is_inside],
            value[is_inside],
            [(value - low)[is_inside], (high - value)[is_inside]],
            color=colour,
            marker=marker,
            markersize=4,
            fillstyle="none" if ", " in name else "full",
            linestyle="-" if points["joined"].all() else "none",
            linewidth=0.9,
            elinewidth=0.8,
            capsize=0,
        )
        for place, beyond in zip(places[~is_inside], value[~is_inside], strict=True):
            # Another series may have an arrow at this choice: this one stands below it.
            down = 9 * arrows[round(place)]
            arrows[round(place)] += 1
            figure: Any = axis.get_figure()
            at = offset_copy(axis.transData, figure, y=-down, units="points")
            (arrow,) = axis.plot(place, top, marker=ARROW, color=colour, markersize=6)
            arrow.set(transform=at, clip_on=False)
            axis.annotate(
                f"{beyond:.1f}",
                (place, top),
                xytext=(-4, -3 - down),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=6,
                color=colour,
            )
    axis.set_xticks(range(len(choices)), choices)
    axis.set_xlim(-0.5, len(choices) - 0.5)


def _draw_differences(axis: Axes, rows: pd.DataFrame) -> None:
    """Paired differences of one measure, a row each, with room above the first and the last."""
    factor, _, unit = MEASURES[rows["measure"].iloc[0]]
    places = np.arange(len(rows))[::-1]
    margin = factor * rows["margin"].max()
    if math.isfinite(margin):
        axis.axvspan(-margin, margin, color="0.88", zorder=0)
    axis.axvline(0, color="0.35", linewidth=0.7)
    ends = {name: factor * rows[name] for name in ("low", "high", "low_90", "high_90")}
    axis.hlines(places, ends["low"], ends["high"], color="0.1", linewidth=0.8)
    axis.hlines(places, ends["low_90"], ends["high_90"], color="0.1", linewidth=2.4)
    axis.plot(
        factor * rows["difference"],
        places,
        "o",
        color="white",
        markeredgecolor="0.1",
        markersize=3.5,
    )
    axis.set(xlabel=unit, yticks=places, yticklabels=rows["pair"], ylim=(-0.7, len(rows) - 0.3))


def score_profiles(scores: pd.DataFrame, *, own: str) -> Figure:
    """Scores of single layers over their median, against the depth, a panel for each ``criterion``.

    A panel ends at twice the largest score of the own model; others beyond are arrows at its edge.

    Args:
        scores: Columns ``criterion``, ``model``, ``layer`` (0-based), ``n_layers`` and ``score``
            (above 0, perhaps infinite).
        own: The model in the colour of the criterion; its layers with more than twice the median
            are numbered. All others are thin and grey.
    """
    need_columns(scores, "criterion", "model", "layer", "n_layers", "score")
    scores = scores.sort_values("layer", ignore_index=True)
    medians = scores.groupby(["criterion", "model"])["score"].transform("median")
    scores = scores.assign(
        depth=scores["layer"] / scores["n_layers"], ratio=scores["score"] / medians
    )
    criteria = list(dict.fromkeys(scores["criterion"]))
    figure, axes = new_figure(WIDE, 2.3, len(criteria))
    for axis, criterion in zip(axes, criteria, strict=True):
        shown = scores[scores["criterion"] == criterion]
        mine = shown[shown["model"] == own]
        edge = 2 * mine.loc[np.isfinite(mine["ratio"]), "ratio"].max()
        is_beyond = shown["ratio"] > edge
        for _, rows in shown[~is_beyond & (shown["model"] != own)].groupby("model"):
            axis.plot(rows["depth"], rows["ratio"], color="0.7", linewidth=0.6)
        for depth in shown.loc[is_beyond, "depth"]:
            axis.plot(depth, 0.97, marker=ARROW, color="0.5", transform=axis.get_xaxis_transform())
        colour, marker = look_of(criterion)
        axis.plot(
            mine["depth"], mine["ratio"], color=colour, marker=marker, markersize=2.5, linewidth=0.9
        )
        for row in mine[mine["ratio"] > 2].itertuples():
            # On the free side of its mark; neighbours stand at two heights.
            is_late = row.depth > 0.5
            axis.annotate(
                f"{row.layer}",
                (row.depth, row.ratio),
                xytext=(-3 if is_late else 3, 1 + 5 * (row.layer % 2)),
                textcoords="offset points",
                ha="right" if is_late else "left",
                fontsize=6,
            )
        axis.axhline(1, color="0.35", linewidth=0.5, zorder=0)
        axis.set(title=CRITERIA.get(criterion, criterion), xlabel="depth $l / L$")
        if edge > 20:
            axis.set(yscale="log", ylim=(0.5, edge))
    axes[0].set_ylabel("score / median of the layers")
    return figure
