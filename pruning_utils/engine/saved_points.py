"""The points of an unfinished sweep: computed, and kept on disk as they end, for
:func:`pruning_utils.results.sweep`.

``<table>.points/`` holds one small JSON file a point, named by a digest of the point. The folder
counts while its ``parameters.json`` is there: written last when a sweep begins, removed first when
it has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed, wait
from pathlib import Path

import pandas as pd

from pruning_utils.engine import definitions, records
from pruning_utils.engine.definitions import stamp_fault
from pruning_utils.engine.records import canonical, digest
from pruning_utils.runtime import atomic_path

log = logging.getLogger(__name__)


def checked_points(points: Sequence[Mapping]) -> list[dict]:
    """The points as dicts of JSON values.

    Raises:
        ValueError: If there are none, or one is empty, repeated, not plain, or has other keys than
            the first.
    """
    checked: list[dict] = []
    for number, point in enumerate(points):
        if not isinstance(point, Mapping) or not point:
            raise ValueError(
                f"point {number} must be a dict of plain values that is not empty, got {point!r}"
            )
        checked.append(_flat_row(point, f"point {number}"))
        if set(checked[-1]) != set(checked[0]):
            raise ValueError(
                f"points must have the same keys: point 0 has {sorted(checked[0])}, point {number} "
                f"has {sorted(checked[-1])}"
            )
    texts = [canonical(point) for point in checked]
    if not texts or len(set(texts)) < len(texts):
        repeated = sorted({text for text in texts if texts.count(text) > 1})
        raise ValueError(
            f"points must be at least one and all different, got {len(texts)}, repeated: {repeated}"
        )
    return checked


def _flat_row(row: Mapping, name: str) -> dict:
    flat = records.plain(row, name)
    if nested := {key: value for key, value in flat.items() if isinstance(value, (dict, list))}:
        raise ValueError(
            f"{name} must hold single values (write a list as a text such as '3 4 5'), got {nested}"
        )
    return flat


def unfinished(folder: Path) -> bool:
    """Whether a folder of points counts; what a kill left of one that does not is removed."""
    if not folder.exists() or (folder / "parameters.json").exists():
        return folder.exists()
    with _held(folder):
        shutil.rmtree(folder, ignore_errors=True)
    return False


def discard(folder: Path) -> None:
    """Remove a folder of points that this process holds. A kill in between leaves one that no
    longer counts."""
    (folder / "parameters.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    # A POSIX lock, as it ends with this very process: a worker that outlives a killed run does not
    # hold it.
    with open(folder / "lock", "w") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"another process is computing the points in {folder}; wait for it to end"
            ) from error
        yield


@contextlib.contextmanager
def opened(
    folder: Path, parameters: dict, seeds: list[dict], *, anew: bool = False
) -> Iterator[None]:
    """Begin a folder of points, or go on with the one that is there, and hold it for this process
    alone.

    Args:
        folder: The folder of points.
        parameters: The sweep's settings as JSON values.
        seeds: Outcomes that are known already, for a new folder.
        anew: Discard what is there.

    Raises:
        ValueError: If the folder belongs to other settings, or its ``parameters.json`` is damaged.
        RuntimeError: If another process holds the folder; nothing of it is discarded then.
    """
    settings = folder / "parameters.json"
    folder.mkdir(exist_ok=True)
    with _held(folder):
        if anew:
            settings.unlink(missing_ok=True)
            for saved in folder.glob("*.json"):
                saved.unlink()
        if not settings.exists():
            for seed in seeds:
                save(folder, seed)
            with atomic_path(settings) as target:
                target.write_text(json.dumps(parameters, indent=1) + "\n", encoding="utf-8")
        try:
            recorded = json.loads(settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{settings} is damaged ({error}); pass recompute=True to begin anew"
            ) from error
        records.refuse_differences(recorded, parameters, folder)
        yield


def _file(folder: Path, point: dict) -> Path:
    return folder / f"{digest(canonical(point))[:16]}.json"


def save(folder: Path, outcome: dict) -> None:
    """Write the outcome of one point, whole or not at all; the sha256 in the file tells damage
    later."""
    with atomic_path(_file(folder, outcome["point"])) as target:
        saved = {"sha256": digest(canonical(outcome)), "outcome": outcome}
        target.write_text(json.dumps(saved) + "\n", encoding="utf-8")


def read(folder: Path, point: dict, code: dict) -> dict | None:
    """A saved point; None when it is missing, damaged, or was computed by other code than this (a
    stamp)."""
    path = _file(folder, point)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        outcome = saved["outcome"]
        if saved["sha256"] != digest(canonical(outcome)):
            raise ValueError("its sha256 differs")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): computing the point again", path, error)
        return None
    then = outcome.get("code")
    if stamp_fault(then) or then["digest"] != code["digest"]:
        changed = records.shortened(definitions.INSTALLED.changes(then))
        warnings.warn(
            f"computing points in {folder.name} again, as this code has changed since: {changed}",
            records.StaleResult,
            stacklevel=3,
        )
        return None
    return outcome


def compute(
    points: list[dict], compute_point: Callable, executor: Executor | None
) -> Iterator[dict]:
    """Compute points and give each outcome as it ends: ``point``, ``rows`` and what it took.

    Raises:
        RuntimeError: If a point fails: no new one is started, those running are still given, then
            it is named.
    """
    if executor is None:
        for point in points:
            try:
                outcome = _outcome(compute_point, point)
            except Exception as error:
                raise _failure(point, error) from error
            yield outcome
        return
    waiting = {executor.submit(_outcome, compute_point, point): point for point in points}
    try:
        for future in as_completed(list(waiting)):
            if future.exception():
                break
            del waiting[future]
            yield future.result()
        running = [future for future in waiting if not future.cancel()]
        wait(running)
        yield from (future.result() for future in running if not future.exception())
        for future in running:
            if error := future.exception():
                raise _failure(waiting[future], error) from error
    finally:
        for future in waiting:
            future.cancel()


def prove(path: Path, record: dict, compute_point: Callable) -> dict:
    """Stamp a table as computed by today's code where its first and last point, computed again,
    have equal rows.

    Args:
        path: The table.
        record: Its record, with points.
        compute_point: What computes one point.

    Returns:
        The record, with its new stamp and the points that prove it; as it was where the table is
        fresh, or awaits recomputation.

    Raises:
        ValueError: If a row is another one now; the record stays as it was.
    """
    code = definitions.INSTALLED.stamp(compute_point)
    known = record.get("code")
    if records.awaiting(path) or (not stamp_fault(known) and known["digest"] == code["digest"]):
        return record
    table, first, kept = records.read_table(path, record), 0, {}
    for number, entry in enumerate(record["points"]):
        if number in (0, len(record["points"]) - 1):
            kept[canonical(entry["point"])] = table.iloc[first : first + entry["rows"]]
        first += entry["rows"]
    for entry in (record["points"][0], record["points"][-1]):
        point = entry["point"]
        again = pd.DataFrame(_outcome(compute_point, dict(point))["rows"])
        differing = records.differing_columns(kept[canonical(point)], again, record["columns"])
        if differing:
            raise ValueError(
                f"{path.name} cannot be stamped as today's: point {point} has other values in "
                f"{', '.join(differing)}; recompute the table"
            )
    proved = [json.loads(point) for point in kept]
    record = {
        **record,
        "code": code,
        "restamped": {
            "proof": "these points, computed again, had equal rows",
            "points": proved,
            "commit": records.package_commit(),
        },
    }
    records.replace_record(path, record)
    return record


def _failure(point: dict, error: BaseException) -> RuntimeError:
    return RuntimeError(f"point {point} failed with {type(error).__name__}: {error}")


def _outcome(compute_point: Callable, point: dict) -> dict:
    returned, cost = records.timed(compute_point, dict(point))
    rows = [returned] if isinstance(returned, Mapping) else returned
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"compute_point must return a dict or a list of dicts, got {returned!r}")
    rows = [_flat_row(row, f"row {number}") for number, row in enumerate(rows)]
    if clash := sorted(
        {key for row in rows for key in point if row.get(key, point[key]) != point[key]}
    ):
        raise ValueError(f"rows hold other values than the point for {', '.join(clash)}")
    return {"point": point, "rows": [{**point, **row} for row in rows], **cost}
