"""One function a kind of figure: a tidy table in, a Figure out, saved with its numbers' origin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from pruning_utils import evidence, runtime
from pruning_utils.engine import records
from pruning_utils.engine.checks import need_columns
from pruning_utils.engine.reader_names import NAMES

STYLE = Path(__file__).with_name("paper.mplstyle")
# Widths of the text and of a column, in inches.
WIDE, NARROW = 5.5, 3.25
# An entity has one colour and one marker everywhere. The colours are those of Okabe and Ito, which
# colour-blind readers can tell apart.
ENTITIES = {
    "unpruned": ("#000000", "o"),
    "pruned": ("#D55E00", "s"),
    "healed": ("#0072B2", "^"),
    "train": ("#999999", "."),
    "eval": ("#0072B2", "^"),
    "last token": ("#0072B2", "o"),
    "all tokens": ("#E69F00", "D"),
    "mean over tokens": ("#009E73", "o"),
    "flattened": ("#CC79A7", "s"),
    "xsum": ("#0072B2", "o"),
    "boolq": ("#E69F00", "s"),
    "quac": ("#009E73", "^"),
    "similarity": ("#0072B2", "o"),
    "deepest": ("#D55E00", "s"),
    "magnitude": ("#D55E00", "s"),
    "magnitude+": ("#E69F00", "v"),
    "taylor": ("#009E73", "D"),
    "taylor+": ("#CC79A7", "P"),
    "perplexity": ("#0072B2", "o"),
    "depth": ("#0072B2", "o"),
    "width": ("#CC79A7", "s"),
    "width, heads too": ("#D55E00", "D"),
    "reverse order": ("#000000", "o"),
    "block influence": ("#E69F00", "v"),
    "closest block": ("#CC79A7", "P"),
    "deepest but last": ("#D55E00", "s"),
    "LoRA": ("#0072B2", "^"),
    "all weights": ("#E69F00", "D"),
    "QLoRA": ("#56B4E9", "v"),
    "DoRA": ("#009E73", "P"),
    "random block": ("#999999", "d"),
    "head": ("#999999", "X"),
    "head + 1": ("#882255", "p"),
    "head + 2": ("#CC79A7", "d"),
    "head + 3": ("#D55E00", "o"),
    "head + 3, tied": ("#000000", "s"),
    "smollm2-135m": ("#0072B2", "o"),
    "gemma-3-270m": ("#D55E00", "s"),
    "rank 2": ("#56B4E9", "o"),
    "rank 8": ("#0072B2", "^"),
    "rank 32": ("#CC79A7", "s"),
}
# For names that are no entity, in the order in which a figure meets them; colours of Paul Tol.
OF_FREE = (
    ("#56B4E9", "v"),
    ("#882255", "X"),
    ("#117733", "d"),
    ("#DDAA33", "<"),
    ("#332288", ">"),
    ("#44AA99", "p"),
)
# The same, and then each colour with the markers of the others.
FREE = [
    (colour, OF_FREE[(place + turn) % len(OF_FREE)][1])
    for turn in range(len(OF_FREE))
    for place, (colour, _) in enumerate(OF_FREE)
]
# Nothing of the user's own settings, so that figures are alike everywhere: importing this module
# sets those of the process.
matplotlib.style.use(["default", STYLE])


# The looks of other names, as this process has met them.
MET: dict[str, tuple[str, str]] = {}


def look_of(entity: str) -> tuple[str, str]:
    """Colour and marker of an entity; of other names free ones, in the order of their first use."""
    if entity in ENTITIES:
        return ENTITIES[entity]
    return MET.setdefault(entity, FREE[len(MET) % len(FREE)])


def colour_of(entity: str) -> str:
    """Colour of an entity, as of :func:`look_of`."""
    return look_of(entity)[0]


def looks_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by name, for one figure: an entity's own, and free ones for other names.

    Of two entities with the same look, which seldom meet, the later one has a free one.
    """
    looks: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(names):
        own = [ENTITIES[name]] if name in ENTITIES else []
        untaken = [look for look in (*own, *FREE) if look not in looks.values()]
        looks[name] = untaken[0] if untaken else FREE[len(looks) % len(FREE)]
    return looks


def new_figure(
    width: float, height: float, columns: int = 1, *, rows: int = 1, **grid: Any
) -> tuple[Figure, np.ndarray]:
    """A figure that no interactive window owns, with its axes as a flat array, row by row.

    Args:
        width: In inches.
        height: In inches.
        columns: Axes in a row.
        rows: Rows of axes.
        **grid: Further arguments of matplotlib's ``Figure.subplots``.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, **grid)).ravel()


def in_points(axis: Axis) -> None:
    """Let an axis of shares, such as accuracies, name percentage points: 0.05 stands there as 5."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:g}".replace("-", "\N{MINUS SIGN}"))


def _by_model(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each model by its name, in the order of the table; "" where none is named."""
    if "model" not in table:
        return {"": table}
    return {str(name): rows for name, rows in table.groupby("model", sort=False)}


def distance_map(table: pd.DataFrame, *, value: str = "angular_distance") -> Figure:
    """Map of block distances, start against block size, as in Figure 4 of arXiv:2403.17887.

    Each row is scaled to 0..1, and yellow is 0, the closest block.

    Args:
        table: Columns ``start`` (0-based), ``block_size`` (layers) and ``value``; one row a block.
            A column ``model`` gives each model a panel.
        value: Column with the distance, in [0, 1].

    Returns:
        The figure; a cross marks each row's minimum.
    """
    import seaborn as sns  # importing it takes a second

    need_columns(table, "start", "block_size", value)
    by_model = _by_model(table)
    figure, axes = new_figure(max(NARROW, WIDE / 2 * len(by_model)), 2.5, len(by_model))
    for axis, (model, rows) in zip(axes, by_model.items(), strict=True):
        raw = rows.pivot(index="block_size", columns="start", values=value).sort_index()
        low, high = raw.min(axis=1), raw.max(axis=1)
        spread = (high - low).where(high > low, 1)
        sns.heatmap(
            raw.sub(low, axis=0).div(spread, axis=0),
            ax=axis,
            vmin=0,
            vmax=1,
            cmap="viridis_r",
            xticklabels=5,
            yticklabels=False,
            rasterized=True,
            cbar=axis is axes[-1],
            cbar_kws={"label": "distance, each row from 0 to 1"},
        )
        axis.plot(
            raw.columns.get_indexer(raw.idxmin(axis=1)) + 0.5,
            np.arange(len(raw)) + 0.5,
            "x",
            color="black",
            markersize=3,
            markeredgewidth=0.8,
        )
        axis.set_yticks(np.arange(4, len(raw), 5) + 0.5, raw.index[4::5])
        axis.invert_yaxis()
        axis.set(
            title=NAMES.get(model, model),
            xlabel=r"first layer of the block $\ell$ (0-based)",
            ylabel="",
        )
        axis.tick_params(rotation=0)
    axes[0].set(ylabel="block size $n$ (layers)")
    return figure


def distance_curves(
    table: pd.DataFrame,
    *,
    value: str = "angular_distance",
    block_sizes: Sequence[int] | None = None,
) -> Figure:
    """Distance against the first layer, one curve a block size, the minima joined by a black line.

    Args:
        table: Columns ``start`` (0-based), ``block_size`` (layers) and ``value``; one row a block.
            A column ``model`` gives each model a panel, and a column ``<value>_stderr`` bands of
            two standard errors.
        value: Column with the distance, in [0, 1].
        block_sizes: Curves to draw; None draws all.

    Returns:
        The figure.

    Raises:
        ValueError: If the table lacks rows, a column, or one of the sizes.
    """
    need_columns(table, "start", "block_size", value)
    known = sorted(table["block_size"].unique().tolist())
    sizes = known if block_sizes is None else list(block_sizes)
    if not sizes or {*sizes} - {*known}:
        raise ValueError(f"block_sizes must be among those of the table, {known}, got {sizes}")
    by_model = _by_model(table)
    figure, axes = new_figure(WIDE, 2.8, len(by_model), sharey=True)
    scale = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(min(sizes), max(sizes)), "viridis"
    )
    for axis, (model, rows) in zip(axes, by_model.items(), strict=True):
        _curves_of_sizes(axis, rows[rows["block_size"].isin(sizes)], value, scale)
        axis.set(title=NAMES.get(model, model), xlabel=r"first layer of the block $\ell$ (0-based)")
    figure.colorbar(scale, ax=list(axes), label="block size $n$ (layers)")
    axes[0].set(ylabel=r"angular distance $d(h_\ell, h_{\ell+n})$", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center")
    return figure


def _curves_of_sizes(
    axis: Axes, table: pd.DataFrame, value: str, scale: matplotlib.cm.ScalarMappable
) -> None:
    """One curve a block size, coloured by it, and the line through their minima."""
    minima = []
    for size, rows in table.sort_values("start").groupby("block_size"):
        colour = scale.to_rgba(size)
        axis.plot(rows["start"], rows[value], color=colour, linewidth=0.9)
        if f"{value}_stderr" in rows:
            margin = 2 * rows[f"{value}_stderr"]
            low, high = rows[value] - margin, rows[value] + margin
            axis.fill_between(rows["start"], low, high, color=colour, alpha=0.3, linewidth=0)
        minima.append(rows.iloc[rows[value].argmin()][["start", value]].to_list())
    axis.plot(
        *zip(*minima, strict=True), "k.-", markersize=4, linewidth=0.8, label=r"minimum $\ell^*(n)$"
    )


def layer_scores(table: pd.DataFrame, *, label: str = "score", log: bool = True) -> Figure:
    """Scores of single layers, one curve a definition.

    Args:
        table: Columns ``layer`` (0-based), ``definition`` and ``value``. A column ``model`` gives
            each model a panel.
        label: Label of the score's axis, with its symbol.
        log: Whether that axis is logarithmic.
    """
    need_columns(table, "layer", "definition", "value")
    by_model = _by_model(table)
    figure, axes = new_figure(WIDE, 2.4, len(by_model), sharey=True)
    looks, handles = looks_of(table["definition"].unique()), {}
    for axis, (model, of_model) in zip(axes, by_model.items(), strict=True):
        for definition, rows in of_model.sort_values("layer").groupby("definition", sort=False):
            colour, marker = looks[definition]
            (handles[definition],) = axis.plot(
                rows["layer"],
                rows["value"],
                marker=marker,
                color=colour,
                linewidth=0.9,
            )
        axis.set(
            title=NAMES.get(model, model),
            xlabel="layer (0-based)",
            yscale="log" if log else "linear",
        )
        axis.locator_params(axis="x", integer=True)
    axes[0].set(ylabel=label)
    axes[0].legend(handles.values(), handles)
    return figure


def choice_agreement(table: pd.DataFrame) -> Figure:
    """How often a few windows choose the block that all windows choose.

    Args:
        table: Columns ``model``, ``removed`` (how much is removed, as a title), ``source``,
            ``n_samples`` (windows in a draw) and ``share`` (of the draws that agree, in [0, 1]).

    Returns:
        The figure: a row of panels a model, a panel for how much is removed, a curve a text.
    """
    need_columns(table, "model", "removed", "source", "n_samples", "share")
    by_model = _by_model(table)
    titles = [list(rows["removed"].unique()) for rows in by_model.values()]
    figure, axes = new_figure(
        WIDE,
        0.4 + 1.35 * len(by_model),
        max(map(len, titles)),
        rows=len(by_model),
        sharex=True,
        sharey=True,
    )
    rows_of_axes = axes.reshape(len(by_model), -1)
    looks, handles = looks_of(table["source"].unique()), {}
    for row, (model, of_model), removed in zip(rows_of_axes, by_model.items(), titles, strict=True):
        for axis in row[len(removed) :]:
            axis.set_visible(False)
        for axis, title in zip(row, removed, strict=False):
            here = of_model[of_model["removed"] == title]
            for source, points in here.groupby("source", sort=False):
                colour, marker = looks[source]
                (handles[NAMES.get(source, source)],) = axis.plot(
                    points["n_samples"],
                    points["share"],
                    color=colour,
                    marker=marker,
                    markersize=3,
                    linewidth=0.9,
                )
            counts = sorted(here["n_samples"].unique())
            axis.set(title=title, xscale="log", ylim=(0, 1.05))
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
        row[0].set(ylabel=NAMES.get(model, model))
    figure.supxlabel("windows in a draw", fontsize=8)
    figure.supylabel("share of draws", fontsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3)
    return figure


def stages(distances: pd.DataFrame, losses: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """The whole path in one row: choice of a block, loss before and after, and healing.

    Args:
        distances: Columns ``start`` (0-based) and ``angular_distance``, of the blocks of one size.
        losses: Columns ``stage`` and ``loss`` (nats per token); a row is a window of evaluation
            text.
        history: Columns ``tokens``, ``split`` (``train`` or ``eval``) and ``loss``.

    Returns:
        The figure: distances with the chosen block, means with 95 % intervals over windows, loss
        against tokens.
    """
    need_columns(distances, "start", "angular_distance")
    need_columns(losses, "stage", "loss")
    need_columns(history, "tokens", "split", "loss")
    figure, (first, left, right) = new_figure(WIDE * 1.2, 2.2, 3)
    best = distances.iloc[distances["angular_distance"].argmin()]
    first.plot(distances["start"], distances["angular_distance"], color="0.4", linewidth=0.9)
    first.plot(best["start"], best["angular_distance"], "s", color=colour_of("pruned"))
    first.set(
        xlabel="first layer of the block (0-based)",
        ylabel="angular distance",
        ylim=(0, None),
        title="choose",
    )
    for place, (stage, rows) in enumerate(losses.groupby("stage", sort=False)):
        mean, low, high = evidence.mean_interval(rows["loss"])
        colour, marker = look_of(stage)
        left.errorbar(place, mean, [[mean - low], [high - mean]], fmt=marker, color=colour)
        left.annotate(
            f"{np.exp(mean):,.0f}",
            (place, mean),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
        )
    names = list(losses["stage"].unique())
    left.set_xticks(range(len(names)), names)
    left.set(
        ylabel="loss (nats per token)",
        xlim=(-0.5, len(names) - 0.1),
        title="measure (perplexity beside)",
    )
    for split, rows in history.groupby("split", sort=False):
        colour, marker = ENTITIES[split]
        right.plot(
            rows["tokens"],
            rows["loss"],
            color=colour,
            marker=marker,
            linewidth=0.8,
            label={"train": "training batch", "eval": "validation text"}[split],
        )
    right.set(xlabel="healing tokens", ylabel="loss (nats per token)", title="heal")
    right.legend()
    return figure


def save_figure(figure: Figure, name: str, *, tables: Sequence[str | Path], profile: str) -> Path:
    """Write a figure as PDF and PNG under ``figures/``, with the origin of its numbers inside.

    The same figure gives the same bytes.

    Args:
        figure: Any figure of this module.
        name: File name without suffix: that of the notebook, with the name of the part where it
            has several figures.
        tables: Result tables that the figure was drawn from. Their sha256 and commit are written
            into the files.
        profile: Profile of the tables. A figure of the smoke profile is stamped, for it is no
            result.

    Returns:
        Path of the PNG.
    """
    records_read = {Path(table).name: records.read_record(table) for table in tables}
    origin = "; ".join(
        f"{table} sha256 {record['sha256']} commit {record['commit']}"
        for table, record in records_read.items()
    )
    folder = (
        runtime.output_root(profile) / "figures" / ("" if profile in ("cpu", "smoke") else profile)
    )
    with contextlib.ExitStack() as undo:
        if profile == "smoke":
            stamp = figure.text(
                0.5,
                0.5,
                "smoke profile: not a result",
                fontsize=16,
                color="0.6",
                alpha=0.6,
                rotation=20,
                ha="center",
                va="center",
                in_layout=False,
            )
            undo.callback(stamp.remove)  # the caller's figure is left as it was
        return write_figure(figure, folder / name, origin=origin)


def write_figure(figure: Figure, path: Path, *, origin: str) -> Path:
    """Write a figure as PDF and PNG; the same figure gives the same bytes.

    Args:
        figure: Any figure.
        path: Of both files, without their suffixes.
        origin: What is written into them of where the numbers come from.

    Returns:
        Path of the PNG.
    """
    for suffix, metadata in (
        ("pdf", {"Title": path.name, "Subject": origin, "CreationDate": None}),
        ("png", {"Title": path.name, "Source": origin, "Software": None}),
    ):
        with runtime.atomic_path(path.with_name(f"{path.name}.{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, metadata=metadata)
    return path.with_name(f"{path.name}.png")
