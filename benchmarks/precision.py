"""What each stage of the work costs in float32 and in bfloat16 on this machine.

    .venv/bin/python benchmarks/precision.py
    .venv/bin/python benchmarks/precision.py --tokens 64 --stages scan    # seconds

Each line is one stage of the quickstart, in both precisions, with the same bf16-rounded weights;
each is run once before it is timed. `dtype="auto"` takes the precision that the processor
multiplies natively. Nothing is asserted.
"""

import argparse
import time
import warnings

import torch

from pruning_utils import data, evaluation, healing, models, runtime, similarity, surgery

PRECISIONS = ("float32", "bfloat16")
METHODS = ("lora", "qlora", "last_layers", "full")


def scan(model, tokenizer, windows: torch.Tensor) -> None:
    similarity.measure_similarity(model, windows)


def loss(model, tokenizer, windows: torch.Tensor) -> None:
    evaluation.token_losses(model, windows)


def training(method: str):
    """A stage of one optimiser step; what happens once in a training is in it."""

    def step(model, tokenizer, windows: torch.Tensor) -> None:
        healing.heal(
            model,
            tokenizer,
            windows,
            method=method,
            steps=1,
            batch_size=len(windows),
            warmup_steps=0,
        )

    return step


STAGES = {"scan": scan, "loss": loss, **{f"{method} step": training(method) for method in METHODS}}


def seconds(stage, *given) -> float:
    """Of the second of two runs: the first prepares kernels and imports libraries."""
    stage(*given)
    started = time.perf_counter()
    stage(*given)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument(
        "--tokens", type=int, default=512, help="in all, in windows of 64 (default: %(default)s)"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        default=list(STAGES),
        choices=list(STAGES),
        metavar="STAGE",
        help=f"of {', '.join(STAGES)}",
    )
    asked = parser.parse_args()
    runtime.setup(0)
    warnings.simplefilter("ignore", runtime.EmulatedPrecision)  # which is what is measured
    print(
        f"{runtime.processor()}, {torch.get_num_threads()} threads, {asked.tokens} tokens; "
        f"auto is {runtime.dtype_name(runtime.resolve_dtype())}"
    )
    networks = {}
    for precision in PRECISIONS:
        model, tokenizer = models.load_model(asked.model, dtype=precision)
        n_layers = len(models.decoder_layers(model))
        networks[precision] = surgery.drop_layers(
            model, range(n_layers // 2, n_layers // 2 + n_layers // 4)
        )
    windows = data.evaluation_windows(tokenizer, max(1, asked.tokens // 64), 64)
    for name in asked.stages:
        took = {
            precision: seconds(STAGES[name], network, tokenizer, windows)
            for precision, network in networks.items()
        }
        print(
            f"{name:>16}: float32 {took['float32']:7.2f} s, bfloat16 {took['bfloat16']:7.2f} s, "
            f"{took['bfloat16'] / took['float32']:.1f} times as long",
            flush=True,
        )


if __name__ == "__main__":
    main()
