"""Scans a saved model, of which a number of bytes may stay in memory or all of it.

Prints the most memory that it held beyond what it held before, and the numbers of the scan.
"""

import json
import os
import sys
from pathlib import Path

import accelerate  # noqa: F401  what loading imports is in memory before it is measured
import torch

from pruning_utils import models, offload, runtime, similarity

folder, warm_up, memory = sys.argv[1:]


def scanned(path: str) -> similarity.Similarity:
    if memory == "all":
        model, _ = models.load_model(path, dtype="float32", device="cpu")
    else:
        model, _ = offload.load_model(path, int(memory), dtype="float32", device="cpu")
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    return similarity.measure_similarity(model, ids)


scanned(warm_up)
Path("/proc/self/clear_refs").write_text("5")  # the mark of the most memory begins anew
before = runtime.peak_memory_bytes()
found = scanned(folder)
print(
    json.dumps(
        {
            "held": runtime.peak_memory_bytes() - before,
            "influence": found.block_influence.tolist(),
            "distance": found.angular_distance.tolist(),
        }
    ),
    flush=True,
)
os._exit(0)
