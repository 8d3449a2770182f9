"""The machine under the experiments: seeds, devices, precision, folders, versions, peak memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pruning_utils.engine import checks, later, precisions
from pruning_utils.engine.later import torch

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "lm-eval",
    "numpy",
    "pandas",
    "matplotlib",
    "seaborn",
    "papermill",
)
AUTO = "auto"  # bfloat16 where the device multiplies it natively, float32 elsewhere
# Parts of values of ONEDNN_MAX_CPU_ISA under which oneDNN uses such instructions. Without the
# variable it uses what there is.
NATIVE_LIMITS = ("BF16", "FP16", "AMX", "AVX10", "DEFAULT", "ALL")


class EmulatedPrecision(UserWarning):
    """A precision was asked for by name that the processor has no instructions for."""


def setup(seed: int = 0, *, at_once: bool = True) -> None:
    """Fix every random state, ask for deterministic kernels, and keep libraries quiet.

    Args:
        seed: Seed of the Python, NumPy and torch generators, in [0, 2**32).
        at_once: Whether torch is imported for it. If not, and it is not imported yet, it is set up
            as soon as this package first uses it.

    Raises:
        ValueError: If ``seed`` is no whole number in that range.
    """
    seed = checks.whole_number("seed", seed, 0, 2**32 - 1)
    random.seed(seed)
    np.random.seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lm_eval", "datasets", "papermill", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
    if at_once:
        _set_up_torch(seed)
    else:
        later.when_torch_is_imported(functools.partial(_set_up_torch, seed))


def _set_up_torch(seed: int) -> None:
    """What :func:`setup` asks of torch and transformers."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that takes a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


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
        raise ValueError(
            f"device must be a torch device of this machine, such as 'cpu', with "
            f"{torch.cuda.device_count()} CUDA GPUs here, got {device!r}"
        ) from error
    if chosen.type == "meta":
        raise ValueError("device must be one that can compute, got 'meta'")
    return chosen


def resolve_dtype(
    dtype: str | torch.dtype = AUTO, device: str | torch.device | None = None
) -> torch.dtype:
    """The precision to compute with: the one place where the project decides it.

    Args:
        dtype: ``auto`` (bfloat16 where the device multiplies it natively, float32 elsewhere),
            ``bfloat16``, ``float16`` or ``float32``, or one of these as a torch dtype. One that the
            device can only emulate is obeyed, with one :class:`EmulatedPrecision` warning in a
            process that says how many times slower than float32 it is.
        device: A torch device; None takes the first CUDA GPU, or the CPU.

    Raises:
        ValueError: For any other dtype or device.
    """
    device = choose_device(device)
    if isinstance(dtype, str) and dtype == AUTO:
        return torch.bfloat16 if multiplies_natively(torch.bfloat16, device) else torch.float32
    if not isinstance(dtype, str | torch.dtype) or dtype not in {
        *precisions.DTYPES,
        *precisions.DTYPES.values(),
    }:
        raise ValueError(
            f"dtype must be one of {', '.join([AUTO, *precisions.DTYPES])}, got {dtype!r}"
        )
    chosen = precisions.DTYPES.get(dtype, dtype)
    if not multiplies_natively(chosen, device):
        _warn_of_emulation(chosen, device)
    return chosen


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def multiplies_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for products of this type.

    For float32 and wider types the answer is always yes. A CUDA GPU multiplies bfloat16 from
    compute capability 8.0 on, float16 from 7.0 on. For a CPU torch names its instructions. Limits
    that the environment sets (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA) count, so that a better
    machine can play a weaker one.
    """
    if dtype not in precisions.NATIVE_FLAGS:
        return True
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (
            (8, 0) if dtype == torch.bfloat16 else (7, 0)
        )
    if device.type != "cpu":
        # Apple's GPUs and others: their makers' word differs from release to release.
        return dtype == torch.float16
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    torch_allows = torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")
    onednn_allows = any(name in limit for name in NATIVE_LIMITS)
    flags = torch.cpu.get_capabilities()
    return torch_allows and onednn_allows and any(map(flags.get, precisions.NATIVE_FLAGS[dtype]))


@functools.cache
def _warn_of_emulation(dtype: torch.dtype, device: torch.device) -> None:
    """Warn, once in a process, with a measurement of a fraction of a second."""
    times = _product_seconds(dtype, device) / _product_seconds(torch.float32, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    warnings.warn(
        f"{dtype_name(dtype)} is emulated here: {name} has no instructions for it. A product and "
        f"its gradients take {times:.0f} times as long as in float32; dtype='auto' would take "
        "another precision.",
        EmulatedPrecision,
        stacklevel=4,
    )


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Least of two times of a linear layer on 128 tokens, forwards and backwards.

    The layer has the size of one of the embedded model.
    """
    seconds = []
    with torch.enable_grad():
        weight, states = (
            torch.ones(size, 576, dtype=dtype, device=device, requires_grad=True)
            for size in (1536, 128)
        )
        for _ in range(2):
            started = time.perf_counter()
            torch.nn.functional.linear(states, weight).sum().backward()
            weight.grad.sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def is_rehearsal() -> bool:
    """Whether random models stand in for real ones, so that no check of what a model knows holds.

    ``make rehearse`` sets ``$PRUNING_UTILS_REHEARSAL`` for its notebooks.
    """
    return os.environ.get("PRUNING_UTILS_REHEARSAL") == "1"


def processor() -> str:
    """The processor and its instructions that decide speed, such as ``AMD EPYC (AVX2)``."""
    flags = torch.cpu.get_capabilities()
    found = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if flags.get(name)]
    name = flags.get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join([torch.backends.cpu.get_cpu_capability(), *found])})"


def cache_dir() -> Path:
    """Folder of the user for what is derived once: ``$PRUNING_UTILS_CACHE``, else the XDG cache."""
    if configured := os.environ.get("PRUNING_UTILS_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pruning_utils"


def project_root() -> Path:
    """The checkout this package is installed from, or the working directory when it is not one."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "notebooks").is_dir() else Path.cwd()


def output_root(profile: str) -> Path:
    """Folder under which ``results/`` and ``figures/`` of a profile are written.

    ``$PRUNING_UTILS_OUTPUT`` where it is set; else the checkout. The smoke profile is never a
    result: without the variable it writes to a temporary folder.
    """
    if configured := os.environ.get("PRUNING_UTILS_OUTPUT"):
        return Path(configured).expanduser().absolute()
    if profile == "smoke":
        # Windows has no numbers of users, and a temporary folder for each of them.
        return Path(tempfile.gettempdir()) / f"pruning_utils_smoke_{getattr(os, 'getuid', int)()}"
    return project_root()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed ones of the packages that a number can depend on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_name() -> str:
    """Name of the GPU that :func:`choose_device` takes, or ``cpu`` with the number of threads."""
    has_gpu = torch.cuda.is_available()
    return torch.cuda.get_device_name() if has_gpu else f"cpu ({torch.get_num_threads()} threads)"


def clock(device: torch.device) -> float:
    """Seconds on the clock, once everything that was asked of a device is done.

    Args:
        device: Where the work is done.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Peak memory of this process in bytes.

    On a GPU it is the CUDA memory that torch allocated there, else resident memory. On Linux the
    kernel's own mark is read: what ``getrusage`` reports begins, in a process started by another,
    at the size that the other had. Windows keeps no such mark that Python reads: there, without a
    GPU, it is 0.

    Args:
        device: Whose memory; None: that of the GPU in use, where there is one.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file() and (
        mark := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    ):
        return 1024 * int(mark[1])
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write a file to; rename it if the block succeeds.

    A reader sees the old file or the whole new one, never a half; on any error the temporary file
    is removed.

    Raises:
        ValueError: If ``path`` is none.
        OSError: When writing fails (a full disk, say), with the target named.
    """
    path = checks.file_path("path", path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(checks.file_mode())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def tensor_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hexadecimal sha256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
