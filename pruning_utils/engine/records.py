"""Tidy tables and their run records on disk: the formats behind :mod:`pruning_utils.results`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from pruning_utils.engine import definitions
from pruning_utils.runtime import atomic_path, peak_memory_bytes

# Endings of column names whose values differ from run to run.
VOLATILE = ("seconds", "per_second", "peak_bytes")
# In a folder of tables while one of its files is replaced; a kill may leave it until the next time.
LOCK = ".lock"


class StaleResult(UserWarning):
    """A stored result was computed by other package code than today's."""


def plain(value: Any, name: str = "value") -> Any:
    """What JSON can hold of a value.

    Tuples become lists, scalars of NumPy and torch numbers, and paths texts.

    Raises:
        ValueError: If a part of the value is nothing of that kind; ``name`` and the part's key are
            in the message.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, f"{name}[{place}]") for place, part in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(
        f"{name} must be plain (text, number, bool, None, or lists and dicts of them), got "
        f"{type(value).__name__}: {value!r}"
    )


def canonical(value: object) -> str:
    """The one JSON text of a plain value, by which values are compared and digested."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(content: str | bytes) -> str:
    """Hexadecimal sha256 of text (as UTF-8) or bytes."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def refuse_differences(recorded: dict, asked: dict, where: Path) -> None:
    """Raise unless both dicts of plain values are equal.

    Raises:
        ValueError: Naming every key that differs, with both values.
    """
    old = {key: canonical(value) for key, value in recorded.items()}
    new = {key: canonical(value) for key, value in asked.items()}
    differing = []
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            there = old.get(key, "absent")
            wanted = new.get(key, "absent")
            differing.append(f"{key}: {there} there, {wanted} asked")
    if differing:
        raise ValueError(
            f"{where} was made with other parameters ({'; '.join(differing)}); "
            "pass recompute=True to replace it, or another path to keep both"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that only one process or thread changes its records at once.

    Another one waits. No file is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with FileLock(path):
        try:
            yield
        finally:
            # One that waits sees that the file it has opened is gone, and makes a new one. Windows
            # does not remove an open file, and filelock removes it there when it lets go.
            with contextlib.suppress(OSError):
                path.unlink()


def package_commit() -> str | None:
    """Commit of the checkout that this package runs from.

    None where its sources have changed since, or lie in no checkout.
    """
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        changes = _git("status", "--porcelain", "--", ".")
        head = _git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    return None if changes else head


def _git(*words: str) -> str:
    """What git says of the package's folder."""
    command = ["git", "-C", str(definitions.PACKAGE), *words]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def read_record(path: str | os.PathLike) -> dict:
    """The record of a table in the ``run.json`` beside it, as it was written.

    Raises:
        ValueError: If there is none, or the file is damaged.
    """
    path = Path(path)
    record = read_records(path.parent).get(path.stem)
    if record is None:
        raise ValueError(
            f"{path} has no record in {path.parent / 'run.json'}, so what it holds is unknown; "
            "pass recompute=True to replace it"
        )
    return record


def read_records(folder: Path) -> dict:
    """All records of a folder of tables by table name; none where there is no ``run.json``.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or delete it and compute again"
        ) from error


def checked_record(path: Path, parameters: dict) -> dict:
    """The record of a table that is sound and was made with these parameters.

    A warning says where the code has changed. A table in the list of :func:`awaiting` is read
    without one, though one parameter differs as the list says.

    Raises:
        ValueError: If the table has no record, is not the file recorded, or was made with other
            parameters.
    """
    record = read_record(path)
    listed = awaiting(path)
    refuse_differences(_as_listed(record["parameters"], parameters, listed), parameters, path)
    _refuse_edited(path, record["sha256"])
    _refuse_edited(measured_path(path), record.get("measured_sha256"))
    changed = [] if listed else definitions.INSTALLED.changes(record.get("code"))
    if changed:
        warnings.warn(
            f"{path.name} was computed by other code than today's: {shortened(changed)}",
            StaleResult,
            stacklevel=3,
        )
    return record


def _as_listed(recorded: dict, asked: dict, listed: dict | None) -> dict:
    """Recorded parameters, with the one that may differ as it is asked for."""
    key = listed["parameter"] if listed else ""
    if not listed or not key:
        return recorded
    made_so = canonical(recorded.get(key)) == canonical(listed["made_with"])
    asked_so = canonical(asked.get(key)) == canonical(listed["asked"])
    return {**recorded, key: asked[key]} if made_so and asked_so else recorded


def _refuse_edited(file: Path, expected: str | None) -> None:
    """Raise if a file is there and has another sha256 than the one recorded."""
    if expected and file.exists() and digest(file.read_bytes()) != expected:
        raise ValueError(
            f"{file} is not the file that run.json records (sha256 differs): it was edited or "
            "damaged; restore it, or pass recompute=True to replace it"
        )


def shortened(names: list[str], most: int = 8) -> str:
    """Names as one text; of a long list the first ones, and how many more there are."""
    if len(names) <= most:
        return ", ".join(names)
    return ", ".join([*names[:most], f"and {len(names) - most} more"])


def awaiting(path: Path) -> dict | None:
    """The row of ``awaiting.csv`` for a table, None where it has none.

    The file lies in ``results/`` and lists tables that stay until their notebook is recomputed:
    ``profile``, ``notebook``, ``table``, the ``parameter`` in which they differ from what is asked
    today ("" for none), the value that they were ``made_with`` and the one ``asked``, and the
    ``reason``.
    """
    folder = Path(path).parent
    listed = folder.parent.parent / "awaiting.csv"
    if not listed.is_file():
        return None
    wanted = (folder.parent.name, folder.name, Path(path).stem)
    for row in pd.read_csv(listed, dtype=str, keep_default_na=False).to_dict("records"):
        if (row["profile"], row["notebook"], row["table"]) == wanted:
            return row
    return None


def measured_path(path: Path) -> Path:
    """The file beside a table that holds its times, rates and memory."""
    return path.with_name(f"{path.stem}.measured.csv")


def write_table(path: Path, table: pd.DataFrame, record: dict) -> None:
    """Write a table, its measured columns beside it, and its record.

    Each file is replaced whole or not at all. The table is renamed into place last, so a first run
    that is killed here leaves no table that counts.

    Raises:
        ValueError: If the frame is no tidy table: no rows, a named index, repeated or unnamed
            columns, mixed values.
        OSError: When the disk refuses; the old files stay.
    """
    kinds = column_kinds(table)
    volatile = [name for name in kinds if name.endswith(VOLATILE)]
    stable = [name for name in kinds if name not in volatile]
    if not stable:
        raise ValueError(
            f"a table needs a column beside the measured ones {volatile}, to say what was measured"
        )
    keys = [name for name in stable if kinds[name] != "float"]
    beside = measured_path(path)
    with locked(path.parent):
        _remove_half_written(path.parent, [path.name, beside.name, "run.json"])
        # The files are renamed in the reverse of this order, when the block ends.
        with contextlib.ExitStack() as written:
            target = written.enter_context(atomic_path(path))
            record = {**record, "columns": kinds}
            record["sha256"] = _write_csv(table[stable], kinds, target)
            if volatile:
                target = written.enter_context(atomic_path(beside))
                record["measured_sha256"] = _write_csv(table[keys + volatile], kinds, target)
            _write_record(path, record)
        if not volatile:
            beside.unlink(missing_ok=True)


def _remove_half_written(folder: Path, names: list[str]) -> None:
    """Remove what a killed run has left of files that were about to be replaced."""
    beginnings = tuple(f".{name}." for name in names)
    for name in os.listdir(folder):
        if name.startswith(beginnings):
            (folder / name).unlink(missing_ok=True)


def _write_record(path: Path, record: dict) -> None:
    """Write the record of a table into the ``run.json`` of a folder that is locked."""
    changed = {**read_records(path.parent), path.stem: record}
    write_records(path.parent, changed)


def write_records(folder: Path, found: dict) -> None:
    """Replace the ``run.json`` of a folder that is locked by records, by the names of tables."""
    text = json.dumps(dict(sorted(found.items())), indent=1)
    with atomic_path(folder / "run.json") as target:
        target.write_text(text + "\n", encoding="utf-8")


def replace_record(path: Path, record: dict) -> None:
    """Replace the record of a table that stays as it is."""
    with locked(path.parent):
        _write_record(path, record)


def differing_columns(
    stored: pd.DataFrame, computed: pd.DataFrame, kinds: dict[str, str]
) -> list[str]:
    """Columns in which computed rows are not the stored ones, as a file would hold them.

    Measured columns are left out.
    """
    stable = [name for name in kinds if not name.endswith(VOLATILE)]
    if not set(stable) <= set(computed.columns) or len(stored) != len(computed):
        return stable
    before = _as_in_a_file(stored[stable], kinds)
    after = _as_in_a_file(computed[stable], kinds)
    return [name for name in stable if not before[name].equals(after[name])]


def _as_in_a_file(table: pd.DataFrame, kinds: dict[str, str]) -> pd.DataFrame:
    """The texts that a table's file would hold."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        _write_csv(table, kinds, path)
        return pd.read_csv(path, dtype=str, keep_default_na=False)


def column_kinds(table: pd.DataFrame) -> dict[str, str]:
    """``int``, ``float``, ``bool`` or ``text`` for every column.

    Missing values make numbers floats, and are "" in text.

    Raises:
        ValueError: If the frame is no tidy table.
    """
    names = list(table.columns)
    named = all(isinstance(name, str) and name for name in names)
    if table.empty or not named or len(set(names)) < len(names):
        raise ValueError(
            f"a table needs rows and columns of different names, got {len(table)} rows and {names}"
        )
    if any(name is not None for name in table.index.names):
        raise ValueError(
            f"the index {list(table.index.names)} would be lost: make it columns with reset_index()"
        )
    return {name: _kind(table[name].infer_objects()) for name in names}


def _kind(column: pd.Series) -> str:
    missing = column.isna()
    if missing.all():
        return "float"
    if pd.api.types.is_bool_dtype(column) and not missing.any():
        return "bool"
    if pd.api.types.is_integer_dtype(column) and not missing.any():
        return "int"
    if pd.api.types.is_float_dtype(column) or pd.api.types.is_integer_dtype(column):
        return "float"
    present = column[~missing]
    if all(isinstance(value, str) for value in present):
        return "text"
    found = {"str" if isinstance(value, str) else type(value).__name__ for value in present}
    gaps = " and missing values" if missing.any() else ""
    raise ValueError(
        f"column {column.name!r} must hold numbers or texts, or True and False without a gap, got "
        f"{sorted(found)}{gaps}"
    )


def _write_csv(table: pd.DataFrame, kinds: dict[str, str], path: Path) -> str:
    """Write a table's file and give its sha256."""
    numbers = {name: "float64" for name in table if kinds[name] == "float"}
    with open(path, "w", encoding="utf-8", newline="") as file:
        table.astype(numbers).to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
        file.flush()
        # A disk that is full must say so before the record is changed.
        os.fsync(file.fileno())
    return digest(path.read_bytes())


def read_table(path: Path, record: dict) -> pd.DataFrame:
    """The table of a record, with its columns in the order first given.

    Measured columns are joined back where their file exists.
    """
    kinds = record["columns"]
    table = _read_csv(path, kinds)
    beside = measured_path(path)
    if "measured_sha256" in record and beside.exists():
        measured = _read_csv(beside, kinds)
        table = table.join(measured[[name for name in measured if name not in table]])
    return table[[name for name in kinds if name in table]]


def _read_csv(path: Path, kinds: dict[str, str]) -> pd.DataFrame:
    types = {"int": "int64", "float": "float64", "bool": "bool", "text": "str"}
    floats = {name: [""] for name, kind in kinds.items() if kind == "float"}
    return pd.read_csv(
        path,
        dtype={name: types[kind] for name, kind in kinds.items()},
        keep_default_na=False,
        na_values=floats,
    )


def timed(compute: Callable, *inputs: object) -> tuple[object, dict]:
    """What ``compute`` returns, and what it took: ``seconds`` and ``peak_memory_bytes``."""
    started = time.perf_counter()
    value = compute(*inputs)
    seconds = round(time.perf_counter() - started, 3)
    return value, {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
