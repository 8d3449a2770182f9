"""Tidy tables and their run records on disk: the formats behind :mod:`pruning_utils.results`.

A table and its record are replaced together. The new files are written beside the old ones as
``.<file>.next``, then ``run.json`` is renamed into place: from that moment on the new table counts,
for its record holds the sha256 of what is next. A run that is killed before leaves the old table,
one that is killed after leaves the new one, whose last renames are made up for by whoever reads or
writes it next.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from pruning_utils.engine import definitions
from pruning_utils.engine.checks import file_path
from pruning_utils.runtime import atomic_path, peak_memory_bytes

# Endings of column names whose values differ from run to run.
VOLATILE = ("seconds", "per_second", "peak_bytes")
# In a folder of tables while one of its files is replaced; a kill may leave it until the next time.
LOCK = ".lock"
# The content that a file of a table is about to get.
NEXT = re.compile(r"\.(?P<file>.+\.csv)\.next", re.DOTALL)
# What a run that was killed leaves of `atomic_path`: for run.json, in earlier releases for tables.
HALF_WRITTEN = re.compile(r"\.(?P<file>.+\.(?:csv|json))\.[a-z0-9_]{8}\.(?:csv|json)", re.DOTALL)
KINDS = {"int": "int64", "float": "float64", "bool": "bool", "text": "str"}
# Integers that a table's file gives back.
INTEGERS = range(-(2**63), 2**63)
# Of an integer among parameters; Python refuses to write out much longer ones.
LONGEST_INTEGER_BITS = 4096
# Far more than the records of any folder take.
LARGEST_RECORDS_BYTES = 2**27
# Fields of a record: one that is there has its type, and the first four are always there.
FIELDS: dict[str, Any] = {
    "parameters": dict,
    "sha256": str,
    "columns": dict,
    "commit": (str, type(None)),
    "measured_sha256": str,
    "seconds": (int, float),
    "peak_memory_bytes": int,
    "points": list,
}
NEEDED = tuple(FIELDS)[:4]


class StaleResult(UserWarning):
    """A stored result was computed by other package code than today's."""


def table_file(path: Any) -> Path:
    """The file of a table.

    Raises:
        ValueError: If no table can be kept there: it is no path, has another ending, or is a
            folder.
    """
    # What computes may go to another folder.
    path = file_path("path", path).absolute()
    if path.suffix != ".csv" or path.stem.endswith((".measured", ".points")) or path.is_dir():
        raise ValueError(
            "path must be a table's .csv file, no folder and not a .measured or .points one, got "
            f"{path}"
        )
    return path


def refuse_unwritable(path: Path) -> None:
    """Refuse, before a table is computed, what would fail when it is written. Its folder is made.

    Raises:
        ValueError: If the ``run.json`` in its folder is damaged.
        OSError: If the folder cannot be made or written, or the table's name is too long.
    """
    with locked(path.parent):
        read_records(path.parent)
        # The longest name of a file of the table.
        next_path(measured_path(path)).exists()


def settings_of(parameters: Any) -> dict:
    """Parameters as JSON values.

    Raises:
        ValueError: If they are no mapping of plain values.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(
            f"parameters must be a dict of plain values, got {type(parameters).__name__}"
        )
    return plain(parameters, "parameters")


def plain(value: Any, name: str = "value") -> Any:
    """What JSON can hold of a value.

    Tuples become lists, scalars of NumPy and torch numbers, and paths texts.

    Raises:
        ValueError: If a part of the value is nothing of that kind, a key of a dict is no text, an
            integer has more than 4,096 bits, or it is nested too deeply; ``name`` and the part's
            key are in the message.
    """
    try:
        return _plain(value, name)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply, or holds itself") from None


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        _refuse_other_keys(value, name)
        return {str(key): _plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{name}[{place}]") for place, part in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int) and value.bit_length() > LONGEST_INTEGER_BITS:
        raise ValueError(
            f"{name} must be an integer of at most {LONGEST_INTEGER_BITS} bits, got "
            f"{_written_out(value)}"
        )
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(
        f"{name} must be plain (text, number, bool, None, or lists and dicts of them), got "
        f"{type(value).__name__}: {value!r}"
    )


def _refuse_other_keys(value: Mapping, name: str) -> None:
    """Raise unless all keys are texts: 1 and "1" would become one key."""
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{name} must have texts as keys, got {key!r}")


def _written_out(value: int) -> str:
    """An integer in a message; Python does not write out a very long one."""
    bits = value.bit_length()
    return str(value) if bits <= LONGEST_INTEGER_BITS else f"one of {bits} bits"


def flat_row(row: Mapping, name: str) -> dict:
    """A row of a table as a dict of single JSON values.

    Raises:
        ValueError: If a value is none of them, or an integer that no file of a table gives back;
            ``name`` is in the message.
    """
    flat = plain(row, name)
    for key, value in flat.items():
        if isinstance(value, (dict, list)):
            raise ValueError(
                f"{name} must hold single values (write a list as a text such as '3 4 5'), got "
                f"{ {key: value} }"
            )
        if isinstance(value, int) and value not in INTEGERS:
            raise ValueError(
                f"{name}[{key!r}] must be an integer in [-2**63, 2**63), or written as a text, got "
                f"{_written_out(value)}"
            )
    return flat


def canonical(value: object) -> str:
    """The one JSON text of a plain value, by which values are compared and digested."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise ValueError("a value is nested too deeply to be compared") from None


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
            "pass recompute=True (the driver: --recompute) to replace it, or set "
            "PRUNING_UTILS_OUTPUT (the driver: another --output) to keep both"
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
    record = recorded(path)
    lacking = [key for key in NEEDED if key not in record]
    if lacking:
        raise ValueError(
            f"{path.parent / 'run.json'} is damaged: the record of {path.stem!r} has no "
            f"{', '.join(lacking)}; restore it, or pass recompute=True to replace the table"
        )
    return record


def recorded(path: Path) -> dict:
    """What ``run.json`` holds of a table, of which anything may be lacking.

    Raises:
        ValueError: As for :func:`read_record`.
    """
    record = read_records(path.parent).get(path.stem)
    if record is None:
        raise ValueError(
            f"{path} has no record in {path.parent / 'run.json'}, so what it holds is unknown; "
            "pass recompute=True to replace it"
        )
    return record


def read_records(folder: Path) -> dict:
    """All records of a folder of tables by table name; none where there is no ``run.json``.

    What a later release may add to a record is read along.

    Raises:
        ValueError: If the file is damaged: no JSON, or no object of objects whose fields are of
            their types.
    """
    path = folder / "run.json"
    try:
        found = read_json(path)
        fault = _fault_of_records(found)
        if fault:
            raise ValueError(fault)
        return found
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or delete it and compute again"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: If the file is none, is nested too deeply or larger than any that this package
            writes, or if a folder lies in its place.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_RECORDS_BYTES:
            raise ValueError(f"it has {size} bytes, more than {LARGEST_RECORDS_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except IsADirectoryError:
        raise ValueError("it is a folder") from None


def _fault_of_records(found: Any) -> str:
    """What is wrong with the content of a ``run.json``, "" if it is sound."""
    if not isinstance(found, dict):
        return f"it must be an object, got {type(found).__name__}"
    for table, record in found.items():
        fault = _fault_of_record(record)
        if fault:
            return f"the record of {table!r} {fault}"
    return ""


def _fault_of_record(record: Any) -> str:
    if not isinstance(record, dict):
        return f"must be an object, got {type(record).__name__}"
    for key, kind in FIELDS.items():
        if key in record and not _is_of(record[key], kind):
            return f"has a {key} of type {type(record[key]).__name__}"
    unknown = [kind for kind in record.get("columns", {}).values() if kind not in [*KINDS]]
    if unknown:
        return f"has a column of the kind {unknown[0]!r}"
    if not all(map(_is_point, record.get("points", []))):
        return "has points that are no objects with point, rows and seconds"
    return ""


def _is_of(value: object, kind: type | tuple[type, ...]) -> bool:
    """Whether a value is of a type; True and False are no numbers here."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_point(entry: Any) -> bool:
    """Whether a record's entry of a point is sound."""
    kinds: dict[str, Any] = {"point": dict, "rows": int, "seconds": (int, float)}
    is_object = isinstance(entry, dict)
    return is_object and all(_is_of(entry.get(key), kind) for key, kind in kinds.items())


def is_there(path: Path) -> bool:
    """Whether a table is there, after what a killed run had still to rename was renamed."""
    _settle(path)
    return path.exists()


def _settle(path: Path) -> None:
    """Make up for what a killed run had still to do, or wait for one that is about to end.

    A folder that cannot be written stays as it is.
    """
    if any(next_path(file).exists() for file in (path, measured_path(path))):
        with contextlib.suppress(OSError), locked(path.parent):
            finish(path.parent)


def checked_record(path: Path, parameters: dict) -> dict:
    """The record of a table that is sound and was made with these parameters.

    A warning says where the code has changed.

    Raises:
        ValueError: If the table has no record, is not the file recorded, or was made with other
            parameters.
    """
    record, _ = _read_whole(path)
    refuse_differences(record["parameters"], parameters, path)
    changed = definitions.INSTALLED.changes(record.get("code"))
    if changed:
        warnings.warn(
            f"{path.name} was computed by other code than today's: {shortened(changed)}",
            StaleResult,
            stacklevel=3,
        )
    return record


def _read_whole(path: Path) -> tuple[dict, dict[Path, bytes]]:
    """A table's record, and what its files hold as that record says.

    Raises:
        ValueError: If a file is another one than recorded.
    """
    record, contents = read_record(path), _contents(path)
    if _edited(path, record, contents):
        # A run that goes on beside this one may just replace them, or a killed one has begun to.
        with contextlib.suppress(OSError), locked(path.parent):
            finish(path.parent)
            record, contents = read_record(path), _contents(path)
    edited = _edited(path, record, contents)
    if edited:
        raise ValueError(
            f"{edited[0]} is not the file that run.json records (sha256 differs): it was edited or "
            "damaged; restore it, or pass recompute=True to replace it"
        )
    return record, contents


def _contents(path: Path) -> dict[Path, bytes]:
    """What the files of a table hold that are there."""
    found = {}
    for file in (path, measured_path(path)):
        with contextlib.suppress(FileNotFoundError):
            found[file] = file.read_bytes()
    return found


def _edited(path: Path, record: dict, contents: dict[Path, bytes]) -> list[Path]:
    """The files of a table that have another sha256 than the one recorded."""
    expected = {path: record["sha256"], measured_path(path): record.get("measured_sha256")}
    return [
        file
        for file, content in contents.items()
        if expected[file] and digest(content) != expected[file]
    ]


def shortened(names: list[str], most: int = 8) -> str:
    """Names as one text; of a long list the first ones, and how many more there are."""
    if len(names) <= most:
        return ", ".join(names)
    return ", ".join([*names[:most], f"and {len(names) - most} more"])


def measured_path(path: Path) -> Path:
    """The file beside a table that holds its times, rates and memory."""
    return path.with_name(f"{path.stem}.measured.csv")


def next_path(file: Path) -> Path:
    """Where the next content of a table's file lies until its record is written."""
    return file.with_name(f".{file.name}.next")


def write_table(path: Path, table: pd.DataFrame, record: dict) -> None:
    """Write a table, its measured columns beside it, and its record.

    All of them are replaced, or none: see the module's first lines.

    Raises:
        ValueError: If the frame is no tidy table: no rows, a named index, repeated or unnamed
            columns, mixed values; or if it holds what a file would not give back.
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
    parts = {path: table[stable]}
    if volatile:
        parts[beside] = table[keys + volatile]
    contents = {file: _kept_csv(part, kinds) for file, part in parts.items()}
    record = {**record, "columns": kinds, "sha256": digest(contents[path])}
    if volatile:
        record["measured_sha256"] = digest(contents[beside])
    with locked(path.parent):
        finish(path.parent)
        try:
            for file, content in contents.items():
                _write_next(file, content)
            _write_record(path, record)
        finally:
            finish(path.parent)
        if not volatile:
            beside.unlink(missing_ok=True)


def _write_next(file: Path, content: bytes) -> None:
    """Write what a file is about to hold."""
    beside = next_path(file)
    try:
        with open(beside, "wb") as target:
            target.write(content)
            target.flush()
            # A disk that is full must say so before the record is changed.
            os.fsync(target.fileno())
    except OSError as error:
        raise OSError(error.errno, f"could not write {file}: {error.strerror or error}") from error


def finish(folder: Path) -> None:
    """End what runs that were killed have left in a folder that is locked.

    What is next is renamed where the record says so. All else that was half written is removed.
    """
    found = read_records(folder)
    for name in os.listdir(folder):
        begun = NEXT.fullmatch(name)
        if begun and _is_recorded(folder / name, begun["file"], found):
            os.replace(folder / name, folder / begun["file"])
        elif begun or _is_half_written(name, found):
            (folder / name).unlink(missing_ok=True)


def _is_recorded(content: Path, file: str, found: dict) -> bool:
    """Whether content is what a record says of a file of its table."""
    table = file.removesuffix(".csv")
    key = "measured_sha256" if table.endswith(".measured") else "sha256"
    record = found.get(table.removesuffix(".measured"), {})
    return record.get(key) == digest(content.read_bytes())


def _is_half_written(name: str, found: dict) -> bool:
    """Whether a name is that of a temporary file of ``run.json`` or of a recorded table."""
    match = HALF_WRITTEN.fullmatch(name)
    table = match["file"].removesuffix(".csv").removesuffix(".measured") if match else ""
    return table == "run.json" or table in found


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
    return pd.read_csv(io.BytesIO(_csv(table, kinds)), dtype=str, **AS_WRITTEN)


def as_table(computed: Any, path: Path) -> pd.DataFrame:
    """What a computation returned as a table.

    Args:
        computed: A DataFrame, a row or a list of rows as dicts.
        path: The table's file, for a message.

    Raises:
        ValueError: If it is none of them, or a row is not as :func:`flat_row` says.
    """
    if isinstance(computed, pd.DataFrame):
        return computed
    rows = [computed] if isinstance(computed, Mapping) else computed
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"compute must return a DataFrame, or its rows as dicts, for {path}, got "
            f"{type(computed).__name__}"
        )
    return as_rows(rows, path.name)


def as_rows(rows: list, name: str) -> pd.DataFrame:
    """Rows that are dicts as a table; what no table's file gives back is refused."""
    flat = [flat_row(row, f"row {number} of {name}") for number, row in enumerate(rows)]
    with _utf8(name):
        return pd.DataFrame(flat)


def refuse_what_is_lost(rows: list[dict], name: str) -> None:
    """Raise unless rows make a tidy table that its file gives back.

    Raises:
        ValueError: As for :func:`write_table`.
    """
    table = as_rows(rows, name)
    _kept_csv(table, column_kinds(table))


@contextlib.contextmanager
def _utf8(name: str) -> Iterator[None]:
    """Name what holds half a character, which pandas may refuse wherever it meets it."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must hold texts that UTF-8 can write: {error}") from error


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
    with _utf8("a table"):
        return {name: _kind(table[name].infer_objects()) for name in names}


def _kind(column: pd.Series) -> str:
    missing = column.isna()
    holds_times = column.dtype.kind in "mM"
    if missing.all() and not holds_times:
        return "float"
    if pd.api.types.is_bool_dtype(column) and not missing.any():
        return "bool"
    if pd.api.types.is_integer_dtype(column) and not missing.any():
        _refuse_large(column, [int(column.min()), int(column.max())])
        return "int"
    if pd.api.types.is_float_dtype(column) or pd.api.types.is_integer_dtype(column):
        return "float"
    present = column[~missing]
    if all(isinstance(value, str) for value in present) and not holds_times:
        return "text"
    _refuse_large(column, [value for value in present if _is_of(value, int)])
    found = {"str" if isinstance(value, str) else type(value).__name__ for value in present}
    found = found or {str(column.dtype)}
    gaps = " and missing values" if missing.any() else ""
    raise ValueError(
        f"column {column.name!r} must hold numbers or texts, or True and False without a gap, got "
        f"{sorted(found)}{gaps}"
    )


def _refuse_large(column: pd.Series, values: list[int]) -> None:
    """Raise if one of a column's integers is none that a file gives back."""
    for value in values:
        if value not in INTEGERS:
            raise ValueError(
                f"column {column.name!r} must hold integers in [-2**63, 2**63), or texts, got "
                f"{_written_out(value)}"
            )


def _csv(table: pd.DataFrame, kinds: dict[str, str]) -> bytes:
    """The content of a table's file."""
    numbers = {name: "float64" for name in table if kinds[name] == "float"}
    typed = table.astype(numbers)
    with _utf8("a table"):
        return typed.to_csv(index=False, float_format=_six_digits, lineterminator="\n").encode()


def _six_digits(value: float) -> str:
    """Six significant digits of a number; all of a whole one, which may count something."""
    is_whole = float(value).is_integer() and abs(value) < 2**53
    return f"{value:.0f}" if is_whole else f"{value:.6g}"


def _kept_csv(table: pd.DataFrame, kinds: dict[str, str]) -> bytes:
    """The content of a table's file, which is known to give the table back.

    Raises:
        ValueError: If a name, a text or an integer would come back as another one.
    """
    content = _csv(table, kinds)
    back = _read_csv(content, kinds)
    if list(back.columns) != list(table.columns):
        raise ValueError(
            f"columns {list(table.columns)} would come back from a file as {list(back.columns)}"
        )
    for name in table:
        if kinds[name] == "float":
            continue
        before = table[name].astype(object).where(table[name].notna(), "")
        for value, other in zip(before, back[name], strict=True):
            if value != other:
                raise ValueError(
                    f"column {name!r} holds {value!r}, which would come back from a file as "
                    f"{other!r}"
                )
    return content


def read_table(path: Path, record: dict) -> pd.DataFrame:
    """The table of a record, with its columns in the order first given.

    Measured columns are joined back where their file exists. A table that was replaced since, by
    one with the same parameters, is read as it is now.

    Raises:
        ValueError: If a file is another one than recorded, or does not hold the columns that the
            record says.
    """
    now, contents = _read_whole(path)
    refuse_differences(now["parameters"], record["parameters"], path)
    kinds = now["columns"]
    stable = [name for name in kinds if not name.endswith(VOLATILE)]
    table = _read_recorded(path, contents, kinds)
    if list(table.columns) != stable:
        raise ValueError(
            f"{path} has the columns {list(table.columns)}, and run.json records {stable}; restore "
            "both, or pass recompute=True to replace them"
        )
    beside = measured_path(path)
    if "measured_sha256" in now and beside in contents:
        measured = _read_recorded(beside, contents, kinds)
        table = table.join(measured[[name for name in measured if name not in table]])
    return table[[name for name in kinds if name in table]]


def _read_recorded(path: Path, contents: dict[Path, bytes], kinds: dict[str, str]) -> pd.DataFrame:
    """The table in a file that was read, or an error that names the file."""
    try:
        return _read_csv(contents[path], kinds)
    except ValueError as error:
        raise ValueError(
            f"{path} is not as run.json records its columns ({error}); restore both, or pass "
            "recompute=True to replace them"
        ) from error


# A line ends with a line feed and nothing else, whatever it holds: a carriage return within a text,
# or blanks alone, are values.
AS_WRITTEN: dict[str, Any] = {
    "keep_default_na": False,
    "lineterminator": "\n",
    "skip_blank_lines": False,
}


def _read_csv(content: bytes, kinds: dict[str, str]) -> pd.DataFrame:
    floats = {name: [""] for name, kind in kinds.items() if kind == "float"}
    return pd.read_csv(
        io.BytesIO(content),
        dtype={name: KINDS[kind] for name, kind in kinds.items()},
        na_values=floats,
        **AS_WRITTEN,
    )


def timed(compute: Callable, *inputs: object) -> tuple[object, dict]:
    """What ``compute`` returns, and what it took: ``seconds`` and ``peak_memory_bytes``."""
    started = time.perf_counter()
    value = compute(*inputs)
    seconds = round(time.perf_counter() - started, 3)
    return value, {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
