"""What perplexity without each layer costs in one sweep, beside two naive ways; and what memory
Taylor scores take.

    .venv/bin/python benchmarks/importance.py
    .venv/bin/python benchmarks/importance.py --samples 2 --seq-len 16 --rounds 1    # seconds

Each round runs every way once over the same windows, in turn. Targets on two otherwise idle cores:
one sweep at least 1.4 times as fast as removal in place (2 on models with a small head), 2.5 times
as fast as rebuilding; Taylor's memory at most weights, gradients of one layer and activations.
Nothing is asserted.

sweep     importance.perplexity_without_layer
in place  each layer taken out of the loaded model in turn, the same batches
rebuilt   a copy of the model for each layer, batch 1, as released code does
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pruning_utils import data, evaluation, importance, models, runtime, surgery
from pruning_utils.engine import passes


def in_place(model: torch.nn.Module, ids: torch.Tensor, batch_size: int) -> np.ndarray:
    found = []
    for layer in models.decoder_layers(model):
        with passes.replaced(layer, "forward", lambda states, *_, **__: states):
            found.append(evaluation.perplexity(model, ids, batch_size=batch_size))
    return np.array(found)


def rebuilt(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    found = []
    for layer in range(len(models.decoder_layers(model))):
        found.append(
            evaluation.perplexity(
                surgery.drop_layers(copy.deepcopy(model), [layer]), ids, batch_size=1
            )
        )
    return np.array(found)


def allocated(run: Callable[[], object]) -> int:
    """Most bytes of tensors that a call holds at once, beside those that were there."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [
        event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(
        np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    )


def plain_gradients(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Taylor scores with the gradients of all weights at once."""
    model.requires_grad_()
    model(ids, labels=ids).loss.backward()
    [
        sum((weight * weight.grad).abs().sum() for weight in layer.parameters())
        for layer in models.decoder_layers(model)
    ]
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    runtime.setup(0)
    model, tokenizer = models.load_model(asked.model, dtype="float32")
    ids = data.calibration_windows(tokenizer, asked.samples, asked.seq_len)
    ways = {
        "sweep": lambda: importance.perplexity_without_layer(model, ids),
        "in place": lambda: in_place(model, ids, asked.samples),
        "rebuilt": lambda: rebuilt(model, ids),
    }
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
        print(
            f"{way:>9}: {median:7.1f} s ({median / fastest:.2f} times the sweep), differs by "
            f"{worst:.1e} at most"
        )
    layer_bytes = sum(weight.nbytes for weight in models.decoder_layers(model)[0].parameters())
    inputs = (
        len(models.decoder_layers(model)) * ids.numel() * models.text_config(model).hidden_size * 4
    )
    print(
        f"   Taylor: one layer's gradients are {layer_bytes / 2**20:.0f} MiB, the inputs of all "
        f"layers {inputs / 2**20:.0f} MiB"
    )
    for name, run in (
        ("one sample at a time", lambda: importance.taylor(model, ids, batch_size=1)),
        ("all at once", lambda: importance.taylor(model, ids, batch_size=asked.samples)),
        ("plainly, every gradient kept", lambda: plain_gradients(model, ids)),
    ):
        print(f"   Taylor, {name}: {allocated(run) / 2**20:.0f} MiB at most beside the weights")


if __name__ == "__main__":
    main()
