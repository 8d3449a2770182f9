"""Which shape of a model is faster, by how much, and what that says of a claim (notebook 07)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pruning_utils import evidence
from pruning_utils.engine.later import stats

KEYS = ["prompt_tokens", "batch_size", "n_dropped", "shape"]
UNPRUNED = (0, "unpruned")


class Ratios(NamedTuple):
    """Times of a token as ratios to that of the unpruned model.

    Attributes:
        rows: One for each ``prompt``, ``batch``, size (``removed``) and ``shape``, with the
            ``ratio``, its 95 % interval (``low``, ``high``) and the number ``n`` of rounds.
        logarithms: Of the ratio in each round, by the same four.
    """

    rows: pd.DataFrame
    logarithms: dict[tuple, pd.Series]


def run_ratios(times: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over the runs of one process for each shape; intervals are Welch's.

    Runs of two processes have nothing to do with each other, so that they are not paired. What
    another process would show is in no interval: see :func:`round_ratios`.

    Args:
        times: Rows of :func:`costs.measure_speed` with their points: ``prompt_tokens``,
            ``batch_size``, ``n_dropped``, ``shape``, ``run`` (at least 2 of each point) and
            ``per_token_seconds``. The unpruned model is among them at each prompt and batch.

    Returns:
        Rows as in :class:`Ratios`, where ``n`` is the number of runs.

    Raises:
        ValueError: For a single run.
    """
    seconds = _logarithms(times, "run")
    rows = []
    for key, own in seconds.items():
        whole = seconds[*key[:2], *UNPRUNED]
        if key[2:] != UNPRUNED:
            ends = stats.ttest_ind(own, whole, equal_var=False).confidence_interval(0.95)
            rows.append(_ratio_row(key, (own.mean() - whole.mean(), *ends), len(own)))
    return pd.DataFrame(rows)


def round_ratios(times: pd.DataFrame) -> Ratios:
    """Geometric means over rounds, in each of which every shape is timed; intervals are Student's.

    In a round each shape has a process of its own, one soon after the other, and is compared with
    the unpruned model of the same round.

    Args:
        times: As for :func:`run_ratios`, with ``round`` (at least 2). Several runs of a process
            count as their mean.

    Raises:
        ValueError: For a single round.
    """
    seconds = _logarithms(times, "round")
    rows, logarithms = [], {}
    for key, own in seconds.items():
        if key[2:] != UNPRUNED:
            change = own - seconds[*key[:2], *UNPRUNED]
            logarithms[key] = change
            rows.append(_ratio_row(key, evidence.mean_interval(change), len(change)))
    return Ratios(pd.DataFrame(rows), logarithms)


def _logarithms(times: pd.DataFrame, sample: str) -> dict[tuple, pd.Series]:
    """By prompt, batch, layers removed and shape, the logarithms of the times, by ``sample``."""
    logarithms = times.assign(logarithm=np.log(times["per_token_seconds"]))
    found = {}
    for key, part in logarithms.groupby(KEYS, sort=False):
        found[key] = part.groupby(sample)["logarithm"].mean()
        if len(found[key]) < 2:
            raise ValueError(f"times need at least 2 {sample}s of each shape, got one")
    return found


def _ratio_row(key: tuple, interval: Sequence[float], n: int) -> dict:
    """A row of :class:`Ratios` from an interval of logarithms."""
    ratio, low, high = np.exp(interval)
    row = dict(zip(("prompt", "batch", "removed", "shape"), key, strict=True))
    return {**row, "ratio": ratio, "low": low, "high": high, "n": n}


def judged_ratios(
    ratios: Ratios,
    *,
    batch: int,
    bound: float,
    n_layers: int,
    sizes: Mapping[int, str],
    names: Mapping[str, str],
    cell: str,
    **kept: Any,
) -> list[dict]:
    """Rows of :func:`evidence.judge` for claim B2: fewer layers are faster, narrower ones are not.

    All ratios at one number of texts are a family, decided after Holm on their logarithms.

    Args:
        ratios: Of :func:`round_ratios`, of one model.
        batch: Texts at once.
        bound: A ratio below it is faster; in (0, 1).
        n_layers: Layers of the unpruned model.
        sizes: What readers call each size, by the layers that it is smaller by.
        names: What readers call each shape.
        cell: Heading above the times.
        kept: ``model`` and ``notebook`` of the rows.

    Returns:
        The rows, whose value and ends are those of the ratio, uncorrected.
    """
    asked = ratios.rows[ratios.rows["batch"] == batch]
    keys = [(row.prompt, batch, row.removed, row.shape) for row in asked.itertuples()]
    # How far each logarithm lies from that of the bound, by round. The bound has a margin already.
    beyond = {
        " ".join(map(str, key)): (ratios.logarithms[key] - np.log(bound)).to_numpy() for key in keys
    }
    texts = "one text" if batch == 1 else f"{batch} texts"
    family = evidence.paired_verdicts(beyond, margin=1e-9)
    rows = []
    for row, (_, pair) in zip(asked.itertuples(), family.iterrows(), strict=True):
        is_depth = row.shape == "depth"
        named, faster = names.get(row.shape, row.shape), f"over {100 * (1 - bound):.0f} % faster"
        judgement = evidence.judge(
            "B2",
            f"{named}, {sizes[row.removed]}: {faster if is_depth else f'not {faster}'}",
            pair,
            claimed="below 0" if is_depth else "above 0",
            measure="ratio of times",
            data=f"{texts}, prompt of {row.prompt} tokens",
            depth=f"size of {n_layers - row.removed} of {n_layers} layers",
            recipe="unhealed",
            cell=cell,
            kind="t over rounds, each shape in a process; decided after Holm",
            **kept,
        )
        # It was judged by the distance from the bound; a reader wants the ratio.
        rows.append({**judgement, "value": row.ratio, "low": row.low, "high": row.high})
    return rows


def causes_of_time(
    times: pd.DataFrame, sizes: pd.DataFrame, *, n_layers: int, bytes_per_second: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Times of a token beside the bytes and the layers that may explain them.

    Args:
        times: Of one text and one prompt, with ``n_dropped``, ``series`` (the shape), ``value``,
            ``low`` and ``high`` in milliseconds.
        sizes: Rows of :func:`shapes.equal_shape` with their points; ``weights`` in bytes.
        n_layers: Of the unpruned model.
        bytes_per_second: That the machine reads.

    Returns:
        The table and the lines for :func:`cost_plots.times_and_causes`: the time that reading the
        weights alone would take, and a time in proportion to the layers.
    """
    single = times.merge(sizes.rename(columns={"shape": "series"}), on=["n_dropped", "series"])
    single = single.rename(columns={"n_dropped": "size"})
    gone = single["size"].where(single["series"] == "depth", 0)
    bytes_read, in_a_row = "weights that are read (MB)", "layers one after the other"
    causes = pd.concat(
        [
            single.assign(panel=bytes_read, x=single["weights"] / 1e6),
            single.assign(panel=in_a_row, x=n_layers - gone),
        ]
    )
    whole = single[single["series"] == "unpruned"].iloc[0]
    reading = 1000 * whole["weights"] / bytes_per_second
    ends = (
        (bytes_read, "reading alone", whole["weights"] / 1e6, reading),
        (in_a_row, "in proportion", n_layers, whole["value"]),
    )
    lines = [
        {"panel": panel, "name": name, "x": share * end, "value": share * value}
        for (panel, name, end, value), share in itertools.product(ends, (0, 0.5, 1))
    ]
    return causes, pd.DataFrame(lines)
