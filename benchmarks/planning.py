"""Peak memory that a plan predicts from a configuration alone, and what a process really held.

    .venv/bin/python benchmarks/planning.py
    .venv/bin/python benchmarks/planning.py --methods scan lora --shapes 2x128-20    # a minute

A shape is windows x tokens - layers that the model lacks. Each measurement is a process of its own.
Its libraries, which a tiny model has used before, are measured apart and taken off. Nothing is
asserted here; tests/test_planning.py does so on a small model.

glibc keeps freed blocks of up to 32 MiB in its heap, where large ones often do not fit again. So
the children give each block of 64 KiB or more back when it is freed (mallopt(3),
M_MMAP_THRESHOLD); --default-allocator leaves glibc as it is and shows what its heap adds.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import re
import sys
from pathlib import Path

import torch

from pruning_utils import healing, importance, models, similarity
from pruning_utils.engine import model_files
from pruning_utils.planning import stages
from pruning_utils.studies.study import without_layers

METHODS = ("scan", "taylor", "lora", "qlora", "last_layers", "full")
SHAPES = ("2x128-0", "4x256-8", "8x128-15", "2x512-20")
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


def read_shape(text: str) -> tuple[int, int, int]:
    """Windows, tokens in each, and layers that are dropped."""
    found = re.fullmatch(r"(\d+)x(\d+)-(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be such as {SHAPES[1]}, got {text!r}")
    windows, tokens, dropped = map(int, found.groups())
    return windows, tokens, dropped


def predicted(config, method: str, shape: tuple[int, int, int]) -> int:
    """Bytes by the plan; the whole model stays in memory beside what lacks layers."""
    windows, tokens, dropped = shape
    dtype = torch.float32
    if method == "scan":
        return stages.scan(
            config, dtype, seq_len=tokens, batch_size=windows, n_dropped=dropped
        ).peak
    if method == "taylor":
        found = stages.taylor(config, dtype, n_samples=windows, seq_len=tokens, n_dropped=dropped)
        return found.peak
    needs = stages.heal(
        config, dtype, seq_len=tokens, n_dropped=dropped, method=method, batch_size=windows
    )
    return max(need.peak for need in needs)


def carry_out(model: torch.nn.Module, method: str, ids: torch.Tensor) -> None:
    """The work itself, on a model and token ids."""
    if method == "scan":
        similarity.measure_similarity(model, ids, batch_size=len(ids))
    elif method == "taylor":
        importance.taylor(model, ids)
    else:
        settings = {"method": method, "steps": 2, "batch_size": len(ids), "warmup_steps": 0}
        healing.heal(model, None, ids, merge=True, **settings)


def measure(name: str, method: str, shape: tuple[int, int, int], answers) -> None:
    """Put on a queue the bytes that this process held beside its libraries, at most."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    tiny = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=2))
    carry_out(tiny.eval(), method, torch.zeros(2, 8, dtype=torch.long))
    del tiny
    # Its tokenizer stays, and counts with the libraries: it is in no plan.
    tokenizer = models.load_model(name, dtype="float32")[1]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    libraries = held("VmRSS")
    model = models.load_model(name, dtype="float32")[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, see proc(5)
    windows, tokens, dropped = shape
    n_layers = len(models.decoder_layers(model))
    pruned = without_layers(model, range(n_layers - dropped, n_layers)) if dropped else model
    drawn = torch.randint(1000, (windows, tokens), generator=torch.Generator().manual_seed(0))
    carry_out(pruned, method, drawn)
    answers.put(held("VmHWM") - libraries)
    del tokenizer


def held(mark: str) -> int:
    """A mark of this process's memory in bytes, as Linux keeps it."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{mark}:\s+(\d+) kB", text)[1])


def measured(name: str, method: str, shape: tuple[int, int, int]) -> int:
    """Bytes that a new process holds at most, beside its libraries."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=measure, args=(name, method, shape, answers))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the process for {method} ended with {process.exitcode}")
    return answers.get()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--shapes", nargs="+", default=list(map(read_shape, SHAPES)), type=read_shape
    )
    parser.add_argument("--default-allocator", action="store_true")
    asked = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise SystemExit("the peak of a process is read from Linux's /proc")
    if not asked.default_allocator:
        os.environ[THRESHOLD] = str(2**16)
    config = model_files.configuration(models.resolve(asked.model, None), {})
    print(f"{'method':>12} {'shape':>9} {'plan':>9} {'held':>9} {'plan/held':>9}")
    for method in asked.methods:
        for shape in asked.shapes:
            plan = predicted(config, method, shape)
            real = measured(asked.model, method, shape)
            text = "{}x{}-{}".format(*shape)
            row = f"{plan / 1e6:6.0f} MB {real / 1e6:6.0f} MB {plan / real - 1:+9.1%}"
            print(f"{method:>12} {text:>9} {row}", flush=True)


if __name__ == "__main__":
    main()
