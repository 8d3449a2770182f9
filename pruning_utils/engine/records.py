"""Tidy tables and their run records on disk: the file formats behind
:mod:`pruning_utils.results`."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from pruning_utils.engine import definitions
from pruning_utils.runtime import atomic_path, peak_memory_bytes

# Endings of column names whose values differ from run to run.
VOLATILE = (
    "seconds",
    "per_second",
    "peak_bytes",
)


class StaleResult(UserWarning):
    """A stored result was computed by other package code than today's."""


def plain(value: object, name: str = "value") -> object:
    """What JSON can hold of a value: tuples as lists, NumPy and torch scalars as numbers, paths as
    text.

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
    old, new = (
        {key: canonical(value) for key, value in values.items()} for values in (recorded, asked)
    )
    differing = [
        f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} asked"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise ValueError(
            f"{where} was made with other parameters ({'; '.join(differing)}); "
            "pass recompute=True to replace it, or another path to keep both"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that only one process or thread at a time changes its record.
    No file is left."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def package_commit() -> str | None:
    """Commit of the checkout that this package runs from; None when its sources are changed or in
    no checkout."""
    git = ["git", "-C", str(definitions.PACKAGE)]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "records.py"], capture_output=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", "."], capture_output=True, check=True
        ).stdout
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return None if changes else head


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
    """The record of a table that is sound and was made with these parameters; warns where the code
    has changed.

    A table that stands in the list of :func:`awaiting` is read without a warning, though one
    parameter differs as the list says.

    Raises:
        ValueError: If the table has no record, is not the file recorded, or was made with other
            parameters.
    """
    record, listed = read_record(path), awaiting(path)
    recorded, key = record["parameters"], listed and listed["parameter"]
    if key and canonical(recorded.get(key)) == canonical(listed["made_with"]):
        if canonical(parameters.get(key)) == canonical(listed["asked"]):
            recorded = {**recorded, key: parameters[key]}
    refuse_differences(recorded, parameters, path)
    for file, expected in (
        (path, record["sha256"]),
        (measured_path(path), record.get("measured_sha256")),
    ):
        if expected and file.exists() and digest(file.read_bytes()) != expected:
            raise ValueError(
                f"{file} is not the file that run.json records (sha256 differs): it was edited or "
                "damaged; restore it, or pass recompute=True to replace it"
            )
    changed = [] if listed else definitions.INSTALLED.changes(record.get("code"))
    if changed:
        warnings.warn(
            f"{path.name} was computed by other code than today's: {shortened(changed)}",
            StaleResult,
            stacklevel=3,
        )
    return record


def shortened(names: list[str], most: int = 8) -> str:
    """Names as one text, of a long list the first and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more)


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
    rows = pd.read_csv(listed, dtype=str, keep_default_na=False).to_dict("records")
    wanted = (folder.parent.name, folder.name, Path(path).stem)
    return next(
        (row for row in rows if (row["profile"], row["notebook"], row["table"]) == wanted), None
    )


def measured_path(path: Path) -> Path:
    """The file beside a table that holds its times, rates and memory."""
    return path.with_name(f"{path.stem}.measured.csv")


def write_table(path: Path, table: pd.DataFrame, record: dict) -> None:
    """Write a table, its measured columns beside it, and its record; each file is replaced whole or
    not at all.

    The table is renamed into place last, so a first run that is killed here leaves no table that
    counts.

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
        for name in os.listdir(path.parent):  # what a killed run left half-written
            if name.startswith((f".{path.name}.", f".{beside.name}.", ".run.json.")):
                (path.parent / name).unlink(missing_ok=True)
        with (
            atomic_path(path) as main,
            atomic_path(beside) if volatile else contextlib.nullcontext() as measured,
        ):
            record = {**record, "columns": kinds, "sha256": _write_csv(table[stable], kinds, main)}
            if volatile:
                record["measured_sha256"] = _write_csv(table[keys + volatile], kinds, measured)
            records = {**read_records(path.parent), path.stem: record}
            with atomic_path(path.parent / "run.json") as target:
                target.write_text(
                    json.dumps(dict(sorted(records.items())), indent=1) + "\n", encoding="utf-8"
                )
        if not volatile:
            beside.unlink(missing_ok=True)


def replace_record(path: Path, record: dict) -> None:
    """Replace the record of a table that stays as it is."""
    with locked(path.parent):
        changed = {**read_records(path.parent), path.stem: record}
        with atomic_path(path.parent / "run.json") as target:
            target.write_text(
                json.dumps(dict(sorted(changed.items())), indent=1) + "\n", encoding="utf-8"
            )


def differing_columns(
    stored: pd.DataFrame, computed: pd.DataFrame, kinds: dict[str, str]
) -> list[str]:
    """Columns in which computed rows, as a file would hold them, are not the stored ones; measured
    ones left out."""
    stable = [name for name in kinds if not name.endswith(VOLATILE)]
    if not set(stable) <= set(computed.columns) or len(stored) != len(computed):
        return stable
    texts = []
    for table in (stored, computed):
        with tempfile.TemporaryDirectory() as folder:
            _write_csv(table[stable], kinds, Path(folder) / "rows.csv")
            texts.append(pd.read_csv(Path(folder) / "rows.csv", dtype=str, keep_default_na=False))
    return [name for name in stable if not texts[0][name].equals(texts[1][name])]


def column_kinds(table: pd.DataFrame) -> dict[str, str]:
    """``int``, ``float``, ``bool`` or ``text`` for every column. Missing values make numbers floats
    and are "" in text.

    Raises:
        ValueError: If the frame is no tidy table.
    """
    names = list(table.columns)
    if (
        table.empty
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) < len(names)
    ):
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
    found = {
        "str" if isinstance(value, str) else type(value).__name__ for value in column[~missing]
    }
    if found == {"str"}:
        return "text"
    raise ValueError(
        f"column {column.name!r} must hold numbers or texts, or True and False without a gap, got "
        f"{sorted(found)}" + " and missing values" * bool(missing.any())
    )


def _write_csv(table: pd.DataFrame, kinds: dict[str, str], path: Path) -> str:
    numbers = {name: "float64" for name in table if kinds[name] == "float"}
    with open(path, "w", encoding="utf-8", newline="") as file:
        table.astype(numbers).to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
        file.flush()
        os.fsync(file.fileno())  # a disk that is full must say so before the record is changed
    return digest(path.read_bytes())


def read_table(path: Path, record: dict) -> pd.DataFrame:
    """The table of a record, its measured columns joined back where their file exists, in the order
    first given."""
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
