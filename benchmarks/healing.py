"""What a step of healing costs: with all logits at once, without kept activations, compiled.

    .venv/bin/python benchmarks/healing.py
    .venv/bin/python benchmarks/healing.py --windows 1 --seq-len 16 --rounds 1    # seconds

Each line is one way, in a process of its own, so that its peak of memory is its own. Targets: at
least as fast as naive, and less memory the larger the vocabulary. Nothing is asserted.

naive    all logits at once, of which the loss takes a few tokens at a time
in parts head and loss on a few tokens at a time, see engine/head_losses.py
again    the same, with activations computed again on the way back instead of kept
compiled the same as in parts, each layer compiled as accelerate does it (needs a C++ compiler)

Healing itself is compiled by accelerate's own variables, ACCELERATE_DYNAMO_BACKEND=inductor and
ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true. Measure here first whether it pays.
"""

import argparse
import multiprocessing
import statistics
import time

import torch
from accelerate.utils import compile_regions

from pruning_utils import data, healing, models, runtime, surgery
from pruning_utils.engine import head_losses


def naive(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return head_losses.loss_of_logits(logits, ids) / ids[:, 1:].numel()


WAYS = {
    "naive": naive,
    "in parts": head_losses.mean_loss,
    "again": head_losses.mean_loss,
    "compiled": head_losses.mean_loss,
}


def measure(way: str, asked: argparse.Namespace) -> None:
    """Print what forward and backward passes with one loss cost; the first is told apart."""
    runtime.setup(0)
    head_losses.TOKENS_AT_ONCE = asked.at_once
    model, tokenizer = models.load_model(asked.model, dtype="float32")
    n_layers = len(models.decoder_layers(model))
    n_dropped = n_layers // 4
    model = surgery.drop_layers(model, range(n_layers - 1 - n_dropped, n_layers - 1))
    settings = healing.check_settings(model, {"method": asked.method, "last_k": 1})
    trained = healing.trainable_copy(model, settings).train()
    if way == "again":
        trained.activation_checkpointing_enable()
    if way == "compiled":
        trained = compile_regions(trained)
    ids = data.calibration_windows(tokenizer, asked.windows, asked.seq_len)
    del model
    before, seconds = _peak(), []
    for _ in range(asked.rounds + 1):
        started = time.perf_counter()
        loss = WAYS[way](trained, ids)
        loss.backward()
        seconds.append(time.perf_counter() - started)
        trained.zero_grad()
    print(
        f"{way:>9}: {statistics.median(seconds[1:]):6.2f} s, the first {seconds[0]:.2f} s; "
        f"{_peak():.2f} GiB at most, {before:.2f} before the first step; loss {loss.item():.5f}",
        flush=True,
    )


def _peak() -> float:
    """Most memory that this process has held, in GiB."""
    return runtime.peak_memory_bytes() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--method", default="lora", choices=healing.METHODS)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--at-once",
        type=int,
        default=head_losses.TOKENS_AT_ONCE,
        help="tokens in a part (default: %(default)s)",
    )
    asked = parser.parse_args()
    for way in WAYS:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(way, asked))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"the process for {way} ended with {process.exitcode}")


if __name__ == "__main__":
    main()
