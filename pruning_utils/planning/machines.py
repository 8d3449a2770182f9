"""What a machine computes in a second, stated or by a short probe."""

from __future__ import annotations

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
    """

    name: str
    kind: str
    flops: Mapping[torch.dtype, float]
    bytes_read: float
    share: float

    def auto(self) -> torch.dtype:
        """The type that ``dtype="auto"`` takes there."""
        is_native = torch.bfloat16 in self.flops
        return torch.bfloat16 if is_native else torch.float32

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
)


def here() -> Machine:
    """This machine, by a probe of about a second for each type that it multiplies natively."""
    device = runtime.choose_device()
    kinds = {torch.float32, runtime.resolve_dtype(runtime.AUTO, device)}
    limits = {kind: efficiency.machine_limits(dtype=runtime.dtype_name(kind)) for kind in kinds}
    flops = {kind: float(found["flops_per_second"]) for kind, found in limits.items()}
    read = max(float(found["bytes_per_second"]) for found in limits.values())
    share = SHARE if device.type == "cuda" else SHARE_HERE
    return Machine(runtime.device_name(), device.type, flops, read, share)
