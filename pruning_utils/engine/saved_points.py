"""The points of an unfinished :func:`pruning_utils.results.sweep`, kept on disk as they end.

``<table>.points/`` holds one small JSON file a point, named by a digest of the point. The folder
counts while its ``parameters.json`` is there: written last when a sweep begins, removed first when
it has ended.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from pruning_utils import runtime
from pruning_utils.engine import definitions, later, records
from pruning_utils.engine.records import canonical, digest
from pruning_utils.runtime import atomic_path

log = logging.getLogger(__name__)
SETTINGS = "parameters.json"
MACHINE = ("device", "processor", "precision")  # of a record
AND = " and "  # between several of them
LOCK = "lock"


def checked_points(points: Sequence[Mapping]) -> list[dict]:
    """The points as dicts of JSON values.

    Raises:
        ValueError: If they are no list or none, or if one is empty, repeated, not plain, holds NaN,
            or has other keys than the first; or if a table's file would not give them back, as
            with fractions of more than six digits.
    """
    if isinstance(points, Mapping | str) or not isinstance(points, Iterable):
        raise ValueError(f"points must be a list of dicts, got {points!r}")
    checked: list[dict] = []
    for number, point in enumerate(points):
        if not isinstance(point, Mapping) or not point:
            raise ValueError(
                f"point {number} must be a dict of plain values that is not empty, got {point!r}"
            )
        checked.append(_checked_point(point, f"point {number}"))
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
    records.refuse_what_is_lost(checked, "points")
    _refuse_lost_digits(checked)
    return checked


def _checked_point(point: Mapping, name: str) -> dict:
    checked = records.flat_row(point, name)
    measured = [key for key in checked if key.endswith(records.VOLATILE)]
    if measured:
        raise ValueError(
            f"a key of {name} must not end in {' or '.join(records.VOLATILE)}, which name what is "
            f"measured anew in each run, got {measured[0]!r}"
        )
    for key, value in checked.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name}[{key!r}] must be a number or a text, got {value}")
    return checked


def _refuse_lost_digits(points: list[dict]) -> None:
    """Raise for numbers that a table's file would give back with other digits.

    These are fractions of more than six digits, and integers beside gaps or fractions that are no
    floats, as their column is then.
    """
    kinds = records.column_kinds(pd.DataFrame(points))
    for number, point in enumerate(points):
        for key, value in point.items():
            if (
                isinstance(value, float)
                and not value.is_integer()
                and float(f"{value:.6g}") != value
            ):
                raise ValueError(
                    f"point {number}[{key!r}] must have at most six digits, as tables keep them, "
                    f"got {value!r}"
                )
            if isinstance(value, int) and kinds[key] == "float" and abs(value) >= 2**53:
                raise ValueError(
                    f"point {number}[{key!r}] must be an integer below 2**53 beside points "
                    f"without one, got {value}"
                )


def seen(path: Path) -> tuple[int, ...]:
    """By what a table's file is known again; nothing where there is none."""
    if not records.is_there(path):
        return ()
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def unfinished(folder: Path) -> bool:
    """Whether a folder of points counts; what a kill left of one that does not is removed.

    Raises:
        RuntimeError: If another process or thread is about to begin or to end it.
    """
    settings = folder / SETTINGS
    if not folder.exists():
        return False
    if not settings.exists():
        with _held(folder):
            # Another one may have begun it before it was held here.
            if not settings.exists():
                _empty(folder)
    return settings.exists()


def discard(folder: Path) -> None:
    """Remove the points of a folder that this process holds; letting it go removes the folder.

    A kill in between leaves one that no longer counts.
    """
    (folder / SETTINGS).unlink(missing_ok=True)
    _empty(folder)


def _empty(folder: Path) -> None:
    """Remove what lies in a folder that is held, but for its lock."""
    for name in os.listdir(folder):
        if name != LOCK:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    # The lock ends with this very process: filelock closes it in processes that are forked, so a
    # worker that outlives a killed run does not hold it. It is another one for each thread.
    lock = FileLock(folder / LOCK)
    while not lock.is_locked:
        folder.mkdir(exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except FileNotFoundError:
            continue  # the one that held it has just removed the folder
        except Timeout as error:
            raise RuntimeError(
                f"another process or thread is computing the points in {folder}; wait for it to end"
            ) from error
    try:
        yield
    finally:
        # Removed while it is held, so that nobody else's is. Windows does not remove an open file,
        # and filelock removes it there when it lets go.
        if not (folder / SETTINGS).exists():
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
        lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def opened(
    path: Path, before: tuple, parameters: dict, seeds: list[dict], *, anew: bool = False
) -> Iterator[None]:
    """Begin a folder of points, or go on with the one that is there, and hold it.

    Args:
        path: The table whose points they are.
        before: What :func:`seen` said of it when it was found to lack points.
        parameters: The sweep's settings as JSON values.
        seeds: Outcomes that are known already, for a new folder.
        anew: Discard what is there.

    Raises:
        ValueError: If the folder belongs to other settings, or its ``parameters.json`` is damaged.
        RuntimeError: If another process or thread holds the folder, or has ended it since; nothing
            of it is discarded then.
    """
    folder = path.with_suffix(".points")
    settings = folder / SETTINGS
    with _held(folder):
        if seen(path) != before and not anew:
            raise RuntimeError(
                f"another process or thread has just computed the points in {folder}; ask again "
                "for the table"
            )
        if anew:
            discard(folder)
        if not settings.exists():
            for seed in seeds:
                save(folder, seed)
            with atomic_path(settings) as target:
                target.write_text(json.dumps(parameters, indent=1) + "\n", encoding="utf-8")
        try:
            recorded = records.read_json(settings)
            if not isinstance(recorded, dict):
                raise ValueError(f"it must be an object, got {type(recorded).__name__}")
        except ValueError as error:
            raise ValueError(
                f"{settings} is damaged ({error}); pass recompute=True to begin anew"
            ) from error
        records.refuse_differences(recorded, parameters, folder)
        yield


def _file(folder: Path, point: dict) -> Path:
    return folder / f"{digest(canonical(point))[:16]}.json"


def save(folder: Path, outcome: dict) -> None:
    """Write the outcome of one point, whole or not at all.

    The sha256 in the file tells damage later.
    """
    with atomic_path(_file(folder, outcome["point"])) as target:
        saved = {"sha256": digest(canonical(outcome)), "outcome": outcome}
        target.write_text(json.dumps(saved) + "\n", encoding="utf-8")


def read(folder: Path, point: dict, code: dict) -> dict | None:
    """A saved point; None where it is missing, damaged, or computed by other code.

    Args:
        folder: The folder of points.
        point: What was to be computed.
        code: The stamp of today's code.
    """
    path = _file(folder, point)
    try:
        saved = records.read_json(path)
        outcome = saved["outcome"]
        if saved["sha256"] != digest(canonical(outcome)):
            raise ValueError("its sha256 differs")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): computing the point again", path, error)
        return None
    then = outcome.get("code")
    if not definitions.is_fresh(then, code):
        changed = records.shortened(definitions.INSTALLED.changes(then))
        warnings.warn(
            f"computing points in {folder.name} again, as this code has changed since: {changed}",
            records.StaleResult,
            stacklevel=3,
        )
        return None
    return outcome


class Kinds:
    """What the columns of a sweep hold so far, of which one table is to be made.

    Args:
        outcomes: Of points that were saved before.
    """

    def __init__(self, outcomes: Iterable[dict]) -> None:
        # A row for each different set of kinds.
        self._rows: dict[tuple, dict] = {}
        for outcome in outcomes:
            row = _first_values(outcome["rows"])
            self._rows[_kinds_of(row)] = row

    def add(self, outcome: dict) -> None:
        """Take in what a point gave.

        Raises:
            ValueError: If a column would hold what no table's column can, such as numbers and
                texts.
        """
        row = _first_values(outcome["rows"])
        kinds = _kinds_of(row)
        if kinds in self._rows:
            return
        try:
            records.column_kinds(pd.DataFrame([*self._rows.values(), row]))
        except ValueError as error:
            raise ValueError(
                f"point {canonical(outcome['point'])} does not go with the others, and is not "
                f"saved: {error}"
            ) from error
        self._rows[kinds] = row


def _kinds_of(row: dict) -> tuple:
    return tuple((name, type(row[name])) for name in sorted(row))


def missing(points: list[dict], folder: Path, code: dict) -> tuple[list[dict], Kinds]:
    """Those of a sweep's points that are not saved, and what the saved ones hold.

    Arguments are those of :func:`read`, for all points.
    """
    found = [read(folder, point, code) for point in points]
    left = [point for point, kept in zip(points, found, strict=True) if kept is None]
    return left, Kinds(filter(None, found))


def _first_values(rows: list[dict]) -> dict:
    """The first value of each column that is not missing."""
    found: dict[str, Any] = {}
    for row in rows:
        found |= {name: value for name, value in row.items() if found.get(name) is None}
    return found


def compute(
    points: list[dict], compute_point: Callable, executor: Executor | None
) -> Generator[dict, None, None]:
    """Compute points and give each outcome as it ends: ``point``, ``rows`` and what it took.

    Args:
        points: What to compute.
        compute_point: What computes one of them.
        executor: What to spread them over; None: one after the other.

    Raises:
        RuntimeError: If a point fails; it is named. No new one is started, and those that run are
            still given before.
    """
    if executor is None:
        return _one_by_one(points, compute_point)
    return _spread(points, compute_point, executor)


def _one_by_one(points: list[dict], compute_point: Callable) -> Generator[dict, None, None]:
    for point in points:
        try:
            outcome = _outcome(compute_point, point)
        except Exception as error:
            raise _failure(point, error) from error
        yield outcome


def _spread(
    points: list[dict], compute_point: Callable, executor: Executor
) -> Generator[dict, None, None]:
    # Threads share the random state of a process, and models that a point changes for a time.
    is_of_threads = isinstance(executor, ThreadPoolExecutor)
    outcome_of = functools.partial(_in_turn, threading.Lock()) if is_of_threads else _outcome
    waiting = {executor.submit(outcome_of, compute_point, point): point for point in points}
    try:
        for future in as_completed(list(waiting)):
            if _error_of(future):
                break
            del waiting[future]
            yield future.result()
        # A cluster cancels what it has lost.
        running = [future for future in waiting if future.cancelled() or not future.cancel()]
        wait(running)
        yield from (future.result() for future in running if not _error_of(future))
        for future in running:
            error = _error_of(future)
            if isinstance(error, BrokenExecutor):
                lost = [waiting[future] for future in running if _error_of(future)]
                raise _failure(lost[0], _loss(error, len(lost))) from error
            if error:
                raise _failure(waiting[future], error) from error
    finally:
        for future in waiting:
            future.cancel()


def reusable(path: Path, record: dict, points: list[dict]) -> list[dict]:
    """The points of a finished table as saved points, from which a longer sweep goes on.

    Args:
        path: The table.
        record: Its record.
        points: What the longer sweep asks for.

    Raises:
        ValueError: If the table holds points that are not asked for, or none of a sweep, or other
            rows than its record counts.
    """
    asked = {canonical(point) for point in points}
    entries = record.get("points", [])
    lost = [
        canonical(entry["point"]) for entry in entries if canonical(entry["point"]) not in asked
    ]
    if lost or "points" not in record:
        held = (
            f"{len(lost)} points that are not asked for, the first {lost[0]}"
            if lost
            else "no points of a sweep"
        )
        raise ValueError(
            f"{path} holds {held}; ask for them too, pass recompute=True to replace the table, or "
            "set PRUNING_UTILS_OUTPUT to keep both"
        )
    table = _table_of_points(path, record)
    rows = iter(table.to_dict("records"))
    computed_by = {name: record[name] for name in MACHINE if name in record}
    return [
        {
            "point": entry["point"],
            "rows": list(itertools.islice(rows, entry["rows"])),
            "seconds": entry["seconds"],
            "code": record.get("code"),
            "peak_memory_bytes": record.get("peak_memory_bytes", 0),
            "machine": computed_by,
        }
        for entry in entries
    ]


def _table_of_points(path: Path, record: dict) -> pd.DataFrame:
    """The table of a sweep, which has as many rows as the record counts of its points."""
    table = records.read_table(path, record)
    counts = [entry["rows"] for entry in record["points"]]
    if sum(counts) != len(table) or min(counts, default=0) < 1:
        raise ValueError(
            f"{path} has {len(table)} rows, and run.json is damaged: it records {counts} of its "
            "points; restore it, or pass recompute=True to replace the table"
        )
    return table


def prove(path: Path, record: dict, compute_point: Callable) -> dict:
    """Stamp a table as computed by today's code where that can be proved.

    Args:
        path: The table.
        record: Its record, with points.
        compute_point: What computes one point.

    Returns:
        The record, with its new stamp and the proof. It is as it was where the table is fresh.

    Raises:
        ValueError: If a row is another one now; the record stays as it was.
    """
    code = definitions.INSTALLED.stamp(compute_point)
    if definitions.is_fresh(record.get("code"), code):
        return record
    proof = _proof_by_points(path, record, compute_point)
    restamped = {**proof, "commit": records.package_commit()}
    record = {**record, "code": code, "restamped": restamped}
    records.replace_record(path, record)
    return record


def _proof_by_points(path: Path, record: dict, compute_point: Callable) -> dict:
    """Compute the first and the last point of a table again, and give what that proves.

    Raises:
        ValueError: If a row is another one now.
    """
    table = _table_of_points(path, record)
    first, *others = record["points"]
    kept = [(first["point"], table.iloc[: first["rows"]])]
    if others:
        last = others[-1]
        kept.append((last["point"], table.iloc[len(table) - last["rows"] :]))
    for point, stored in kept:
        again = pd.DataFrame(_outcome(compute_point, point)["rows"])
        differing = records.differing_columns(stored, again, record["columns"])
        if differing:
            raise ValueError(
                f"{path.name} cannot be stamped as today's: point {point} has other values in "
                f"{', '.join(differing)}; recompute the table"
            )
    return {
        "proof": "these points, computed again, had equal rows",
        "points": [point for point, _ in kept],
    }


def _in_turn(turns: threading.Lock, compute_point: Callable, point: dict) -> dict:
    """The outcome of a point, while no other thread of its sweep computes one."""
    with turns:
        return _outcome(compute_point, point)


def _error_of(future: Future) -> BaseException | None:
    """What a future failed with, if it did."""
    if future.cancelled():  # by a cluster: here none is cancelled that is asked
        return RuntimeError("it was cancelled: is the connection to the scheduler lost?")
    return future.exception()


def _loss(error: BrokenExecutor, n_lost: int) -> BrokenExecutor:
    """The same error in other words: a process that is lost takes the others' points along."""
    return type(error)(
        "a process was lost, perhaps for want of memory, and with it all points that ran or waited "
        f"then ({n_lost}). Those that had ended are saved: ask again, with fewer workers"
    )


def _failure(point: dict, error: BaseException) -> RuntimeError:
    return RuntimeError(f"point {point} failed with {type(error).__name__}: {error}")


def _outcome(compute_point: Callable, point: dict) -> dict:
    returned, cost = records.timed(compute_point, dict(point))
    rows = [returned] if isinstance(returned, Mapping) else returned
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"compute_point must return a dict or a list of dicts, got {returned!r}")
    rows = [records.flat_row(row, f"row {number}") for number, row in enumerate(rows)]
    for row in rows:
        clash = sorted(key for key in point if row.get(key, point[key]) != point[key])
        if clash:
            raise ValueError(f"rows hold other values than the point for {', '.join(clash)}")
    rows = [{**point, **row} for row in rows]
    # A table is written when all points are there: what it could not hold is refused by then.
    records.refuse_what_is_lost(rows, "the rows")
    return {"point": point, "rows": rows, **cost, "machine": _machine()}


def machine() -> dict[str, str]:
    """What computes in this process: ``device`` and ``processor``."""
    return {"device": runtime.device_name(), "processor": runtime.processor()}


def _machine() -> dict[str, str]:
    """The same, and the ``precision`` that ``auto`` means; nothing where torch does not compute."""
    if not later.torch_is_imported():
        return {}
    precision = runtime.dtype_name(runtime.resolve_dtype(runtime.AUTO))
    return {**machine(), "precision": precision}


def machines_of(outcomes: list[dict]) -> dict[str, str]:
    """What computed the points: those of a cluster's workers may differ, from here and each other.

    Returns:
        ``device``, ``processor`` and, where it is known, ``precision`` (what ``auto`` means there),
        with " and " where points have several. What is not known of a point is that of this
        process.
    """
    here = machine()
    found: dict[str, set[str]] = {}
    for outcome in outcomes:
        for name, text in (here | outcome.get("machine", {})).items():
            # A record may have named several.
            found.setdefault(name, set()).update(text.split(AND))
    return {name: AND.join(sorted(names)) for name, names in found.items()}
