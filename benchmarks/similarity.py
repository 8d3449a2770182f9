"""What the distances of all blocks cost beside one bare pass of the backbone, and beside two naive
ways.

    .venv/bin/python benchmarks/similarity.py
    .venv/bin/python benchmarks/similarity.py --samples 2 --seq-len 32 --rounds 1 --sizes 1

The second takes seconds.

Each round runs every way once over the same batches, in turn, so that a busy machine slows all of
them alike. Targets on two otherwise idle cores: at most 5 % over the bare pass in float32, 12 % in
bfloat16. Nothing is asserted.

    bare      the backbone alone, without the head: what no measurement of the states can go below
    one pass  similarity.measure_similarity: every block size, both token rules, both influences
    stored    the model's own forward with all states kept until the end, then the same distances
    by size   the model's own forward once for each block size; --sizes of them are run, and the
              time scaled to all
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from pruning_utils import data, models, runtime, similarity

TARGETS = {"float32": 5, "bfloat16": 12}


def bare(model: nn.Module, batches: tuple[torch.Tensor, ...]) -> None:
    for batch in batches:
        models.backbone(model)(input_ids=batch, use_cache=False)


def angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    cosine = nn.functional.cosine_similarity(first.float(), second.float(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / math.pi


def stored(model: nn.Module, batches: tuple[torch.Tensor, ...]) -> None:
    kept = [
        model(batch, output_hidden_states=True, use_cache=False).hidden_states for batch in batches
    ]
    states = [torch.cat(parts) for parts in zip(*kept, strict=True)]
    for size in range(1, len(states)):
        for first, second in zip(states, states[size:], strict=False):
            angles(first, second).mean()
    for first, second in zip(states, states[1:], strict=False):
        nn.functional.cosine_similarity(first.float().flatten(), second.float().flatten(), dim=0)


def by_size(model: nn.Module, batches: tuple[torch.Tensor, ...], sizes: int) -> None:
    for size in range(1, sizes + 1):
        for batch in batches:
            states = model(batch, output_hidden_states=True, use_cache=False).hidden_states
            for first, second in zip(states, states[size:], strict=False):
                angles(first[:, -1], second[:, -1]).mean()


def seconds(
    ways: dict[str, tuple[Callable[[], object], float]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every way in every round, scaled by its factor; a first round warms up and is not
    counted."""
    measured = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (run, factor) in ways.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                measured[name].append((time.perf_counter() - started) * factor)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--dtypes", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--sizes", type=int, default=1, help="block sizes that 'by size' runs; 0 leaves it out"
    )
    options = parser.parse_args()
    runtime.setup(0)
    print(
        f"{runtime.device_name()}, {options.samples} windows of {options.seq_len} tokens in "
        f"batches of {options.batch_size}, {options.rounds} rounds; seconds, and percent over the "
        "bare pass"
    )
    print("dtype     way          median  minimum  % median % minimum % of pairs  target")
    for dtype in options.dtypes:
        model, tokenizer = models.load_model(options.model, dtype=dtype)
        ids = data.calibration_windows(tokenizer, options.samples, options.seq_len)
        batches = ids.to(model.device).split(options.batch_size)
        ways = {
            "bare": (partial(bare, model, batches), 1),
            "one pass": (
                partial(similarity.measure_similarity, model, ids, batch_size=options.batch_size),
                1,
            ),
            "stored": (partial(stored, model, batches), 1),
        }
        if options.sizes:
            n_layers = len(models.decoder_layers(model))
            ways["by size"] = (
                partial(by_size, model, batches, options.sizes),
                n_layers / options.sizes,
            )
        with torch.no_grad():
            measured = seconds(ways, options.rounds)
        floor = measured["bare"]
        for name, times in measured.items():
            over = [
                100 * (value - 1)
                for value in (
                    statistics.median(times) / statistics.median(floor),
                    min(times) / min(floor),
                    statistics.median(
                        time / least for time, least in zip(times, floor, strict=True)
                    ),
                )
            ]
            print(
                f"{dtype:10}{name:10}{statistics.median(times):9.3f}{min(times):9.3f}{over[0]:10.1f}{over[1]:10.1f}"
                f"{over[2]:11.1f}  {f'{TARGETS[dtype]} %' if name == 'one pass' else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
