"""What perplexity without each layer costs in one sweep, beside two naive ways; and what memory Taylor scores take.

    .venv/bin/python benchmarks/importance.py
    .venv/bin/python benchmarks/importance.py --samples 2 --seq-len 16 --rounds 1    # seconds

Each round runs every way once over the same windows, in turn. Targets on two otherwise idle cores: one sweep at least
1.4 times as fast as removal in place (2 on models with a small head), 2.5 times as fast as rebuilding; Taylor's memory
at most weights, gradients of one layer and activations. Nothing is asserted.

sweep     importance.perplexity_without_layer
in place  each layer taken out of the loaded model in turn, the same batches
rebuilt   a copy of the model for each layer, batch 1, as released code does
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from pruning_utils import data, evaluation, importance, models, runtime, sharing, surgery


def in_place(model: torch.nn.Module, ids: torch.Tensor, batch_size: int) -> np.ndarray:
    found = []
    for layer in models.decoder_layers(model):
        with sharing.replaced(layer, "forward", lambda states, *_, **__: states):
            found.append(evaluation.perplexity(model, ids, batch_size=batch_size))
    return np.array(found)


def rebuilt(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    found = []
    for layer in range(len(models.decoder_layers(model))):
        found.append(evaluation.perplexity(surgery.drop_layers(copy.deepcopy(model), [layer]), ids, batch_size=1))
    return np.array(found)


def layer_bytes(model: torch.nn.Module) -> int:
    return sum(weight.nbytes for weight in models.decoder_layers(model)[0].parameters())


def taylor_memory(asked: argparse.Namespace, batch_size: int) -> None:
    """Peak memory above the loaded model, in a process of its own, because a process's peak never falls."""
    model, tokenizer = models.load_model(asked.model, dtype="float32")
    ids = data.calibration_windows(tokenizer, asked.samples, asked.seq_len)
    evaluation.token_losses(model, ids[:1, :2])  # libraries and thread pools are part of neither
    before = runtime.peak_memory_bytes()
    importance.taylor(model, ids, batch_size=batch_size)
    weights = sum(weight.nbytes for weight in model.parameters())
    print(f"Taylor, {batch_size:>2} of {asked.samples} samples at a time: peak "
            f"{(runtime.peak_memory_bytes() - before) / 2**20:.0f} MiB above the loaded model; all gradients would "
          f"be {weights / 2**20:.0f} MiB, one layer's are {layer_bytes(model) / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--taylor", type=int, help="only the memory of Taylor scores, so many samples at a time")
    asked = parser.parse_args()
    if asked.taylor:
        return taylor_memory(asked, asked.taylor)
    runtime.setup(0)
    model, tokenizer = models.load_model(asked.model, dtype="float32")
    ids = data.calibration_windows(tokenizer, asked.samples, asked.seq_len)
    ways = {"sweep": lambda: importance.perplexity_without_layer(model, ids),
            "in place": lambda: in_place(model, ids, asked.samples), "rebuilt": lambda: rebuilt(model, ids)}
    seconds, found = {way: [] for way in ways}, {}
    for _ in range(asked.rounds):
        for way, run in ways.items():
            started = time.perf_counter()
            found[way] = run()
            seconds[way].append(time.perf_counter() - started)
    fastest = statistics.median(seconds["sweep"])
    for way, values in seconds.items():
        worst = np.max(np.abs(found[way] / found["sweep"] - 1))
        median = statistics.median(values)
        print(f"{way:>9}: {median:7.1f} s ({median / fastest:.2f} times the sweep), differs by {worst:.1e} at most")
    for batch_size in sorted({1, asked.samples}):
        subprocess.run([sys.executable, __file__, "--model", asked.model, "--samples", str(asked.samples), "--seq-len",
                        str(asked.seq_len), "--taylor", str(batch_size)], check=True)


if __name__ == "__main__":
    main()
