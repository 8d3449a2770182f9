"""Compute a table once and keep it, in one call or in a sweep point by point.

A table lives in ``results/<profile>/<NN_slug>/<table>.csv`` with its record in ``run.json`` beside
it. It is read only while the recorded parameters equal the asked ones; what is returned after
computing is what any later call returns.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pandas as pd

from pruning_utils import runtime
from pruning_utils.engine import checks, definitions, records, saved_points, workers
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.records import StaleResult, read_record

__all__ = [
    "StaleResult",
    "checkpoint_path",
    "load_or_compute",
    "read_record",
    "slug",
    "stale",
    "sweep",
    "table_path",
]
NO_COMPUTE = "PRUNING_UTILS_NO_COMPUTE"
PROVE = "PRUNING_UTILS_PROVE"
SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")


def slug(name: str | os.PathLike) -> str:
    """A file name for a model: ``org/Name`` becomes ``org--name``, a path its last part.

    Raises:
        ValueError: If nothing of the name can be kept.
    """
    text = os.fspath(name)
    if text.count("/") > 1 or text.startswith((".", "~", "/")) or os.path.isdir(text):
        text = os.path.basename(os.path.abspath(os.path.expanduser(text)))
    plain = re.sub(r"[^a-z0-9._-]+", "-", text.lower().replace("/", "--")).strip("-._")
    # What ends in .measured or .points lies beside a table.
    kept = re.sub(r"\.(?=(measured|points)$)", "-", plain)
    if not kept:
        raise ValueError(f"no file name can be made of the model name {name!r}")
    return kept


def table_path(profile: str, notebook: str, table: str) -> Path:
    """Where a notebook's table is kept under the profile's output root.

    It is ``results/<profile>/<notebook>/<table>.csv``.

    Args:
        profile: Name of the profile, such as ``cpu``.
        notebook: The notebook's file name without ending, such as ``01_layer_similarity``.
        table: Name of the table; for a model's table its :func:`slug`.

    Raises:
        ValueError: If a name is not made of lower-case letters, digits, ``-``, ``_`` and ``.``, or
            ends like a file that this module keeps beside a table.
    """
    for kind, name in (("profile", profile), ("notebook", notebook), ("table", table)):
        if (
            not isinstance(name, str)
            or not SLUG.fullmatch(name)
            or name.endswith((".measured", ".points", "."))
        ):
            raise ValueError(
                f"{kind} must be a plain name (a-z, 0-9, '-', '_', '.', first a letter or digit, "
                f"not ending in .measured or .points; results.slug makes one), got {name!r}"
            )
    return runtime.output_root(profile) / "results" / profile / notebook / f"{table}.csv"


def checkpoint_path(profile: str, trained_by: Sequence[Callable]) -> Path:
    """Folder for the weights that these functions train; other code has another folder."""
    return runtime.output_root(profile).joinpath(
        "checkpoints", definitions.INSTALLED.stamp(*trained_by)["digest"]
    )


def stale(path: str | os.PathLike) -> list[str]:
    """Definitions (``module.name``) that have changed since a table was computed.

    The list of a fresh table is empty. A table without a stamp of its code, or with one that cannot
    be read, is never fresh: the list says so instead.

    Raises:
        ValueError: If the table has no record.
    """
    return definitions.INSTALLED.changes(records.recorded(Path(path)).get("code"))


def load_or_compute(
    path: str | os.PathLike,
    compute: Callable[[], pd.DataFrame],
    *,
    parameters: Mapping,
    recompute: bool = False,
) -> pd.DataFrame:
    """Read a table, or compute and keep it.

    Floats are kept to six digits, whole ones as they are. Columns named ``...seconds``,
    ``...per_second`` or ``...peak_bytes`` differ from run to run and go to
    ``<table>.measured.csv``; they come back joined where that file exists.

    Args:
        path: The table's file, from :func:`table_path`.
        compute: Called without arguments when there is no table; returns a tidy DataFrame, or its
            rows as dicts. What it reaches in this package is recorded with the table, see
            :mod:`pruning_utils.engine.definitions`.
        parameters: Everything that decides the numbers, model and data included: plain values,
            nested as you like.
        recompute: Compute and replace the table even when it is there.

    Returns:
        The table as its file holds it, with columns in the order that ``compute`` gave.

    Raises:
        ValueError: If the stored table was made with other parameters (the differing keys are
            named), has no record, or is not the file recorded; or if ``compute`` returns no tidy
            table.
        FileNotFoundError: If the table is missing and the environment variable
            PRUNING_UTILS_NO_COMPUTE is set.
    """
    anew = checks.true_or_false("recompute", recompute)
    path, asked = records.table_file(path), records.settings_of(parameters)
    if not anew and records.is_there(path):
        return records.read_table(path, records.checked_record(path, asked))
    code = _before_computing(path, compute, asked, anew=anew)
    commit = records.package_commit()
    table, cost = records.timed(compute)
    _keep(
        path,
        records.as_table(table, path),
        asked,
        commit,
        {"code": code, **cost},
        saved_points.machine(),
    )
    return records.read_table(path, read_record(path))


def sweep(
    points: Sequence[Mapping],
    compute_point: Callable[[dict], dict | list[dict]],
    *,
    path: str | os.PathLike,
    parameters: Mapping,
    executor: Executor | None = None,
    recompute: bool = False,
) -> pd.DataFrame:
    """Compute a table point by point and save each point as it ends.

    A run that is killed at any moment goes on where it was. Saved points lie in
    ``<table>.points/`` until the table is written. A saved point counts only while the code that it
    was computed with is unchanged, as :mod:`pruning_utils.engine.definitions` tells. Of code
    outside the package nothing is known: after changing such a function, pass ``recompute``.

    Points may be added to a finished sweep later. Only the new ones are computed; the others are
    kept as the table holds them, to six digits but for whole numbers.

    With the environment variable PRUNING_UTILS_PROVE set, a table that other code computed is
    stamped as today's where the first and the last of its points, computed again, have equal rows;
    nothing else of it is computed.

    Args:
        points: What to compute: dicts of plain values, all with the same keys, none twice. Rows
            follow their order.
        compute_point: Called with a copy of one point; returns a row, or a list of rows, as dicts
            of plain values. The point's own values are put in front of each row.
        path: The table's file, from :func:`table_path`.
        parameters: Everything else that decides the numbers, as in :func:`load_or_compute`.
        executor: Any ``concurrent.futures`` executor to spread the points over; threads of one
            process take turns. By default as many processes as the environment variable
            PRUNING_UTILS_WORKERS says, which is one.
        recompute: Discard the table's saved points, compute all and replace it. If that is killed,
            go on without it.

    Returns:
        The table, as :func:`load_or_compute` returns it.

    Raises:
        ValueError: Before any work, for points that are no such list, and as in
            :func:`load_or_compute`; also if the stored table holds points that are not asked for,
            or cannot be proved.
        RuntimeError: If a point fails (named, after those running beside it were saved), or if
            another process or thread is computing the same table.
    """
    anew = checks.true_or_false("recompute", recompute)
    path, asked = records.table_file(path), records.settings_of(parameters)
    points, folder = saved_points.checked_points(points), path.with_suffix(".points")
    seeds: list[dict] = []
    before = saved_points.seen(path)
    # Where nothing may be computed, a run that was stopped midway hides no finished table.
    computes = anew or (not os.environ.get(NO_COMPUTE) and saved_points.unfinished(folder))
    if not computes and path.exists():
        record = records.checked_record(path, asked)
        if [entry["point"] for entry in record.get("points", [])] == points:
            if os.environ.get(PROVE):
                record = saved_points.prove(path, record, compute_point)
            return records.read_table(path, record)
        seeds = saved_points.reusable(path, record, points)
    executor = executor or workers.asked_for()
    code = _before_computing(path, compute_point, asked, anew=anew)
    with saved_points.opened(path, before, asked, seeds, anew=anew):
        commit = records.package_commit()
        missing, kinds = saved_points.missing(points, folder, code)
        with (
            contextlib.closing(saved_points.compute(missing, compute_point, executor)) as outcomes,
            tqdm(
                total=len(points), initial=len(points) - len(missing), desc=path.stem, unit="point"
            ) as progress,
        ):
            for outcome in outcomes:
                kinds.add(outcome)
                saved_points.save(folder, {**outcome, "code": code})
                progress.update()
        kept = [saved_points.read(folder, point, code) for point in points]
        _keep_points(path, kept, asked, commit, code)
        saved_points.discard(folder)
    return records.read_table(path, read_record(path))


def _before_computing(path: Path, compute: Callable, parameters: dict, *, anew: bool) -> dict:
    """The stamp of the code that computes.

    What would fail when the table is written fails now.
    """
    if os.environ.get(NO_COMPUTE):
        why = (
            "is to be computed anew (recompute=True)"
            if anew
            else "has no finished table with these settings"
        )
        raise FileNotFoundError(
            f"{path} {why}, but {NO_COMPUTE} is set: run its notebook without that variable"
        )
    code = definitions.INSTALLED.stamp(compute)
    if "dtype" in parameters:
        runtime.resolve_dtype(parameters["dtype"])
    records.refuse_unwritable(path)
    return code


def _keep(
    path: Path,
    table: pd.DataFrame,
    parameters: dict,
    commit: str | None,
    cost: dict,
    machine: dict[str, str],
) -> None:
    """Write a table with its record; ``machine`` is what computed it."""
    record = {"parameters": parameters, "commit": commit, "versions": runtime.versions(), **machine}
    # "auto" is another precision on another machine.
    dtype = parameters.get("dtype")
    if dtype is None:
        record.pop("precision", None)
    elif dtype != runtime.AUTO or "precision" not in machine:
        record["precision"] = runtime.dtype_name(runtime.resolve_dtype(dtype))
    records.write_table(path, table, record | cost)


def _keep_points(
    path: Path, outcomes: list[Any], parameters: dict, commit: str | None, code: dict
) -> None:
    """Write the table of a sweep from the outcomes of its points, of which none is missing."""
    cost = {
        "code": code,
        "seconds": round(sum(outcome["seconds"] for outcome in outcomes), 3),
        "peak_memory_bytes": max(outcome["peak_memory_bytes"] for outcome in outcomes),
        "points": [
            {"point": outcome["point"], "rows": len(outcome["rows"]), "seconds": outcome["seconds"]}
            for outcome in outcomes
        ],
    }
    table = pd.DataFrame([row for outcome in outcomes for row in outcome["rows"]])
    _keep(path, table, parameters, commit, cost, saved_points.machines_of(outcomes))
