"""What a machine computes in a second, stated or by a short probe."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch

from pruning_utils import efficiency, runtime

# Of the rate of a matrix product that whole steps reach: of PaLM's training 46 % were products that
# the model needs (arXiv:2204.02311, Table 3). No A100 was measured here.
SHARE = 0.4
# On a processor, whose caches hold what is between two products, it is more: LoRA's steps on two
# AVX2 cores reached 73 %.
SHARE_HERE = 0.7


class Machine(NamedTuple):
    """A device that work is planned for.

    Attributes:
        name: As a person calls it.
        kind: ``cuda`` or ``cpu``.
        flops: Floating-point operations of matrix products in a second, by type.
        bytes_read: Bytes of memory that are read in a second.
        share: Of ``flops`` that whole passes reach, in (0, 1].
        memory: Bytes that it has.
        is_native: Whether it multiplies bfloat16 natively.
    """

    name: str
    kind: str
    flops: Mapping[torch.dtype, float]
    bytes_read: float
    share: float
    memory: float
    is_native: bool = True

    def auto(self) -> torch.dtype:
        """The type that ``dtype="auto"`` takes there."""
        return torch.bfloat16 if self.is_native else torch.float32

    def seconds(self, flops: float, dtype: torch.dtype, *, n_read: float = 0) -> float:
        """Seconds of work, whichever bounds it: arithmetic, or reading memory once.

        Args:
            flops: Floating-point operations.
            dtype: Of the products.
            n_read: Bytes that are read.
        """
        return max(flops / (self.share * self.flops[dtype]), n_read / self.bytes_read)


# NVIDIA A100 80 GB, data sheet of June 2021: dense products of the tensor cores, float32 without
# them (torch leaves TF32 off), and memory of at least 1,935 GB/s.
A100 = Machine(
    "A100 80 GB",
    "cuda",
    {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12},
    2.0e12,
    SHARE,
    80e9,
)


def here() -> Machine:
    """This machine, by a probe of about a second for each type that it multiplies natively.

    Others, which notebooks may ask for by name, are probed on smaller matrices.
    """
    device = runtime.choose_device()
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    native = {kind for kind in kinds if runtime.multiplies_natively(kind, device)}
    with warnings.catch_warnings(action="ignore"):  # that a type is slow here is what is measured
        limits = {
            kind: efficiency.machine_limits(
                dtype=runtime.dtype_name(kind), size=2048 if kind in native else 256, repeats=2
            )
            for kind in kinds
        }
    flops = {kind: float(found["flops_per_second"]) for kind, found in limits.items()}
    read = max(float(limits[kind]["bytes_per_second"]) for kind in native)
    share = SHARE if device.type == "cuda" else SHARE_HERE
    is_native = torch.bfloat16 in native
    return Machine(
        runtime.device_name(), device.type, flops, read, share, memory_of(device), is_native
    )


def memory_of(device: torch.device) -> float:
    """Bytes of memory of a GPU, or of this machine; infinity where its system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows has none
        return math.inf
