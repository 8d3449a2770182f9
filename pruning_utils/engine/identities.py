"""What a directory loads as: one digest of every file of a model and its tokenizer.

Files are read whole. The digest of a large one is remembered, in this process and in the user's
cache, by what a file system says of a file whenever its content changes: reading gigabytes takes
seconds to minutes once, and milliseconds from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pruning_utils import runtime

WEIGHTS = ".safetensors"
INDEX = f"{WEIGHTS}.index.json"
TEMPLATES = "additional_chat_templates"
# Files beside a model that neither its weights nor its tokenizer come from, small letters: weights
# of forms that are never read, code that is never run, and what people and programs note down.
UNREAD_ENDINGS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".npz"),
    *(".py", ".pyc", ".sh", ".ipynb"),
    *(
        ".md",
        ".rst",
        ".html",
        ".pdf",
        ".png",
        ".jpg",
        ".jpeg",
        ".gif",
        ".svg",
        ".csv",
        ".log",
        ".lock",
    ),
)
UNREAD = (
    *("generation_config.json", "trainer_state.json", "license", "license.txt", "notice"),
    "pruning_utils.json",  # in which surgery.save notes what it wrote
)
REMEMBERED = "digests.json"
# Smaller files are read each time: nothing is gained by remembering them.
REMEMBERED_FROM_BYTES = 2**20
# Two changes within this time may get one time stamp: on the file systems of today, and on those
# whose stamps are whole seconds.
TICK_NS = 50_000_000
COARSE_TICK_NS = 2_000_000_000

# By path: size, times of the last change of content and of the entry, inode, and the sha256.
Known = dict[str, list]
KNOWN: Known = {}


def directory_digest(folder: Path) -> str:
    """Hexadecimal sha256 over names and contents of the files that a directory loads as.

    These are the configuration, weights as safetensors, their index and the shards that it names,
    adapters, and whatever a tokenizer may read; not the settings of generation.

    Raises:
        ValueError: If the configuration or an index is damaged, or names a file that is not below
            the directory.
    """
    paths = [folder / name for name in files_read(folder)]
    digests = _file_digests(paths)
    found = [(path.relative_to(folder).as_posix(), digests[path]) for path in paths]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def files_read(folder: Path) -> list[str]:
    """The files that a model and its tokenizer are loaded from.

    Args:
        folder: Their directory.

    Returns:
        Names below the directory, sorted.

    Raises:
        ValueError: As for :func:`directory_digest`.
    """
    names = {path.name for path in folder.iterdir() if _is_read(path.name)}
    names |= {f"{TEMPLATES}/{path.name}" for path in folder.glob(f"{TEMPLATES}/*.jinja")}
    # An adapter has none.
    has_configuration = (folder / "config.json").is_file()
    configuration = _object(folder / "config.json") if has_configuration else {}
    chosen = configuration.get("transformers_weights")
    if chosen is not None:
        names.add(_inside(chosen, folder / "config.json"))
    for index in [name for name in names if name.endswith(INDEX)]:
        names |= _shards(folder / index)
    return sorted(name for name in names if (folder / name).is_file())


def _is_read(name: str) -> bool:
    """Whether a file of this name may decide what a directory loads as."""
    small = name.lower()
    return not small.startswith(".") and not small.endswith(UNREAD_ENDINGS) and small not in UNREAD


def _shards(index: Path) -> set[str]:
    """The files that an index of weights names, which may be none."""
    if not index.is_file():
        return set()
    shards = _object(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index} is damaged: it has no weight_map; save the model again")
    return {_inside(shard, index) for shard in shards.values()}


def _inside(name: Any, where: Path) -> str:
    """A file's name as it was given, refused where it leads out of the model's directory."""
    parts = PureWindowsPath(name).parts if isinstance(name, str) else ()
    leads_out = ".." in parts or PurePosixPath(str(name)).is_absolute()
    if not parts or leads_out or PureWindowsPath(name).anchor:
        raise ValueError(
            f"{where} names {name!r} as weights, and they must lie below the model's directory"
        )
    return name


def _object(path: Path) -> dict:
    """The object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it must be an object; save the model again")
    return found


# --- digests that are remembered ------------------------------------------------------------------


def _file_digests(paths: list[Path]) -> dict[Path, str]:
    """Hexadecimal sha256 of files."""
    found, read = {}, False
    for path in paths:
        if path.stat().st_size < REMEMBERED_FROM_BYTES:
            found[path] = _sha256(path)
            continue
        place = str(path.resolve())
        if not read and not _is_known(place):
            KNOWN.update(_remembered())
            read = True
        if not _is_known(place):
            _learn(place)
        found[path] = KNOWN[place][-1]
    return found


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marks(place: str) -> list[int]:
    """What changes whenever a file's content does, its name being the same."""
    found = os.stat(place)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _is_known(place: str) -> bool:
    return place in KNOWN and KNOWN[place][:-1] == _marks(place)


def _learn(place: str) -> None:
    """Read a file, and remember its digest with the marks that it had before.

    A file that has just been written could be written again without another mark, so reading waits
    for the next tick of the clock.
    """
    marks = _marks(place)
    changed = max(marks[1:3])
    tick = TICK_NS if changed % 10**9 else COARSE_TICK_NS
    age = time.time_ns() - changed
    if 0 <= age < tick:
        time.sleep((tick - age) / 1e9)
    KNOWN[place] = [*marks, _sha256(place)]
    # The cache of another user, or a full disk, costs time and nothing else.
    with contextlib.suppress(OSError, ValueError):
        _remember()


def _remembered() -> Known:
    """What the user's cache knows; nothing where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        kept = json.loads((runtime.cache_dir() / REMEMBERED).read_text(encoding="utf-8"))
        if isinstance(kept, dict):
            return {place: entry for place, entry in kept.items() if _is_entry(entry)}
    return {}


def _is_entry(entry: Any) -> bool:
    """Whether an entry of the cache is four marks and a sha256."""
    if not isinstance(entry, list) or len(entry) != 5:
        return False
    return all(isinstance(mark, int) for mark in entry[:-1]) and isinstance(entry[-1], str)


def _remember() -> None:
    """Write what is known to the user's cache, without files that have gone."""
    kept = {**_remembered(), **KNOWN}
    there = {place: entry for place, entry in kept.items() if os.path.exists(place)}
    with runtime.atomic_path(runtime.cache_dir() / REMEMBERED) as target:
        target.write_text(json.dumps(there, indent=0) + "\n", encoding="utf-8")
