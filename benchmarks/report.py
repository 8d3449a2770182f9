"""Ours against the naive way and against what arithmetic needs at least, all in one run.

    .venv/bin/python benchmarks/report.py              # make bench: about 20 minutes, two cores
    .venv/bin/python benchmarks/report.py --quick --out trial    # a minute, numbers of no use

It writes results.csv, growth.csv and RESULTS.md. In each round every way runs once, in turn, so
that a busy machine slows all of them alike; a first round warms up. The floor is the number of
floating-point operations over the rate of this machine's matrix products, or the bytes of the
weights over the rate at which memory is read, whichever takes longer.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import healing as healing_ways
import importance as importance_ways
import lm_eval
import numpy as np
import pandas as pd
import scoring as scoring_ways
import similarity as similarity_ways
import torch
from lm_eval.models.huggingface import HFLM

from pruning_utils import (
    data,
    efficiency,
    evaluation,
    healing,
    importance,
    models,
    runtime,
    surgery,
)
from pruning_utils import similarity as scans
from pruning_utils.engine import memory, prefixes
from pruning_utils.planning import stages

Ways = Mapping[str, Callable[[], object]]
OURS, NAIVE = "ours", "naive"
DTYPE = "float32"
BATCH = 8
# What is said of a stage: what ours does, and what the naive way does.
STAGES = {
    "scan": ("distances of all blocks in one pass", "all states kept, then compared"),
    "perplexity": ("each layer left out, in one sweep", "a copy of the model for each layer"),
    "healing, lora": ("head and loss on a few tokens at a time", "the logits of a whole batch"),
    "healing, qlora": ("the same over NF4", "the same"),
    "healing, dora": ("the same with norms", "the same"),
    "healing, last_layers": ("the same, last three layers", "the same"),
    "healing, full": ("the same, all weights", "the same"),
    "healing, kept": ("LoRA, activations kept for the way back", "computed again on the way back"),
    "five shots": ("what prompts share is read once", "lm-eval's own backend"),
    "generation": ("with the cache of keys and values", "every token read again"),
}
# Sizes for --quick, and otherwise.
SIZES = {
    True: {"windows": 2, "seq_len": 16, "questions": 2, "new_tokens": 3, "rounds": 1},
    False: {"windows": 8, "seq_len": 256, "questions": 12, "new_tokens": 32, "rounds": 5},
}
# MMLU is 57 tasks, which take seconds to make.
SHOTS_OF = {True: "openbookqa", False: "mmlu_continuation"}


# --- measuring ------------------------------------------------------------------------------------


def timed(ways: Ways, rounds: int) -> pd.DataFrame:
    """Seconds of each way in each round, a row a round; one more before them is not counted."""
    return pd.DataFrame(
        similarity_ways.seconds({name: (run, 1) for name, run in ways.items()}, rounds)
    )


def compared(stage: str, seconds: pd.DataFrame, floor: float) -> dict:
    """A row of results.csv."""
    ratio = seconds[NAIVE] / seconds[OURS]
    over = seconds[OURS] / floor
    return {
        "stage": stage,
        "rounds": len(seconds),
        "ours_seconds": seconds[OURS].median(),
        "naive_seconds": seconds[NAIVE].median(),
        "times_as_fast": ratio.median(),
        "least": ratio.min(),
        "most": ratio.max(),
        "floor_seconds": floor,
        "over_floor": over.median(),
    }


def slope(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """Slope of seconds over sizes in logarithms: 1 where time grows as the size does."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(seconds)), 1)[0])


# --- ways -----------------------------------------------------------------------------------------


def scan_ways(model: torch.nn.Module, ids: torch.Tensor) -> Ways:
    batches = ids.split(BATCH)
    return {
        OURS: partial(scans.measure_similarity, model, ids, batch_size=BATCH),
        NAIVE: partial(similarity_ways.stored, model, batches),
    }


def perplexity_ways(model: torch.nn.Module, ids: torch.Tensor) -> Ways:
    return {
        OURS: partial(importance.perplexity_without_layer, model, ids),
        NAIVE: partial(importance_ways.rebuilt, model, ids),
    }


def healing_step(trained: torch.nn.Module, ids: torch.Tensor, way: str) -> None:
    healing_ways.WAYS[way](trained, ids).backward()
    trained.zero_grad()


def step_ways(model: torch.nn.Module, ids: torch.Tensor, method: str) -> Ways:
    settings = healing.check_settings(model, {"method": method})
    trained = healing.trainable_copy(model, settings).train()
    return {
        OURS: partial(healing_step, trained, ids, "in parts"),
        NAIVE: partial(healing_step, trained, ids, "naive"),
    }


def kept_ways(model: torch.nn.Module, ids: torch.Tensor) -> Ways:
    settings = healing.check_settings(model, {"method": "lora"})
    kept, again = (healing.trainable_copy(model, settings).train() for _ in range(2))
    again.activation_checkpointing_enable()
    return {
        OURS: partial(healing_step, kept, ids, "in parts"),
        NAIVE: partial(healing_step, again, ids, "again"),
    }


def without_cache(model: torch.nn.Module, tokens: torch.Tensor, new_tokens: int) -> None:
    for _ in range(new_tokens):
        logits = model(tokens, use_cache=False, logits_to_keep=1).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)


def generation_ways(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> Ways:
    return {
        OURS: partial(efficiency._generation_moments, model, prompt, new_tokens),
        NAIVE: partial(without_cache, model, prompt, new_tokens),
    }


class Listened:
    """A language model of lm-eval's that keeps what it is asked."""

    def __init__(self, scorer: object):
        self.scorer = scorer
        self.asked: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.scorer, name)

    def loglikelihood(self, requests: list, **named: object) -> list:
        self.asked += [request.args for request in requests]
        return self.scorer.loglikelihood(requests, **named)


def tokens_at_least(tokenizer: object, asked: list[tuple[str, str]]) -> int:
    """Tokens that have to be read if no beginning is read twice."""
    prefixes_seen: set[tuple] = set()
    for context, answer in asked:
        ids = tokenizer(context + answer, add_special_tokens=False)["input_ids"]
        prefixes_seen |= {tuple(ids[:end]) for end in range(1, len(ids) + 1)}
    return len(prefixes_seen)


# --- the report -----------------------------------------------------------------------------------


class Bench:
    """All measurements of one run.

    Args:
        name: Of the model.
        quick: Whether sizes are so small that numbers say nothing.
    """

    def __init__(self, name: str, *, quick: bool):
        self.quick, self.sizes, self.rounds = quick, SIZES[quick], SIZES[quick]["rounds"]
        self.model, self.tokenizer = models.load_model(name, dtype=DTYPE)
        self.config = self.model.config
        self.limits = efficiency.machine_limits(dtype=DTYPE, **({"size": 256} if quick else {}))
        self.n_layers = len(models.decoder_layers(self.model))
        self.rows: list[dict] = []
        self.growth: list[dict] = []

    def floor(self, flops: float, n_read: float = 0.0) -> float:
        """Seconds that arithmetic, or reading, needs at least."""
        by_arithmetic = flops / float(self.limits["flops_per_second"])
        return max(by_arithmetic, n_read / float(self.limits["bytes_per_second"]))

    def windows(self, count: int, seq_len: int) -> torch.Tensor:
        return data.calibration_windows(self.tokenizer, count, seq_len)

    def add(self, stage: str, ways: Ways, floor: float) -> None:
        self.rows.append(compared(stage, timed(ways, self.rounds), floor))
        row = self.rows[-1]
        print(
            f"{stage}: ours {row['ours_seconds']:.2f} s, naive {row['naive_seconds']:.2f} s, "
            f"{row['times_as_fast']:.2f} times as fast, {row['over_floor']:.1f} times the floor",
            flush=True,
        )

    def scan(self) -> None:
        count, seq_len = self.sizes["windows"], self.sizes["seq_len"]
        need = stages.scan(self.config, torch.float32, seq_len=seq_len, batch_size=count)
        with torch.no_grad():
            self.add(
                "scan", scan_ways(self.model, self.windows(count, seq_len)), self.floor(need.flops)
            )

    def perplexity(self) -> None:
        count, seq_len = self.sizes["windows"] // 2, self.sizes["seq_len"] // 4
        need = stages.perplexity_without_layer(self.config, torch.float32, seq_len=seq_len)
        at_once = max(1, memory.TOKENS_AT_ONCE["cpu"] // ((self.n_layers + 1) * seq_len))
        ids = self.windows(count, seq_len)
        self.add(
            "perplexity",
            perplexity_ways(self.model, ids),
            self.floor(need.flops * count / at_once),
        )

    def healing(self) -> None:
        count, seq_len = self.sizes["windows"] // 2, self.sizes["seq_len"] // 2
        ids = self.windows(count, seq_len)
        floors = {}
        for method in ("lora", "qlora", "dora", "last_layers", "full"):
            settings = {"method": method, "batch_size": count}
            passes, *_ = stages.heal(self.config, torch.float32, seq_len=seq_len, **settings)
            ways = step_ways(self.model, ids, method)
            floors[method] = self.floor(passes.flops)
            self.add(f"healing, {method}", ways, floors[method])
        self.add("healing, kept", kept_ways(self.model, ids), floors["lora"])

    def five_shots(self) -> None:
        task, limit = SHOTS_OF[self.quick], self.sizes["questions"]
        stock = HFLM(
            pretrained=self.model,
            tokenizer=copy.deepcopy(self.tokenizer),
            batch_size=BATCH,
            softmax_dtype="float32",
        )
        ours = prefixes.language_model(self.model, self.tokenizer, BATCH)
        whole = evaluation.load_tasks([task], num_fewshot=5)[task]["tasks"]
        label = next(iter(whole))
        listened = Listened(ours)
        with evaluation.quiet_libraries():
            asked = {"tasks": {label: copy.deepcopy(whole[label])}}
            lm_eval.evaluate(lm=listened, task_dict=asked, limit=limit, bootstrap_iters=0)
        n_tokens = tokens_at_least(self.tokenizer, listened.asked)
        # Only answers need the head.
        per_token = efficiency.forward_flops(self.model, batch_size=1, n_tokens=256) / 256
        per_token -= 2 * self.model.get_output_embeddings().weight.numel()
        ways = {
            name: partial(scoring_ways.scored, scorer, task, 5, limit)
            for name, scorer in ((OURS, ours), (NAIVE, stock))
        }
        self.add("five shots", ways, self.floor(n_tokens * per_token))

    def generation(self) -> None:
        new = self.sizes["new_tokens"]
        prompt = self.windows(1, self.sizes["seq_len"] // 8 + 2)
        read = efficiency.weight_bytes(self.model) * new
        with torch.no_grad():
            self.add("generation", generation_ways(self.model, prompt, new), self.floor(0, read))

    # --- growth -----------------------------------------------------------------------------------

    def grow(self) -> None:
        """How seconds grow with layers, windows, tokens of a window and new tokens."""
        count, seq_len = self.sizes["windows"], self.sizes["seq_len"]
        cuts = {
            n: surgery.drop_layers(copy.deepcopy(self.model), range(n - 1, self.n_layers - 1))
            for n in (max(2, self.n_layers // 4), max(3, self.n_layers // 2))
        }
        cuts[self.n_layers] = self.model
        shrunk = [count // 4, count // 2, count] if not self.quick else [1, 2]
        shorter = [seq_len // 4, seq_len // 2, seq_len]
        few = max(1, count // 4)
        scanned = partial(self.windows, count)
        swept = partial(self.windows, few)
        self.line(
            "scan", "layers", {n: scan_ways(cut, scanned(seq_len)) for n, cut in cuts.items()}
        )
        self.line(
            "scan", "windows", {n: scan_ways(self.model, self.windows(n, seq_len)) for n in shrunk}
        )
        self.line("scan", "tokens", {n: scan_ways(self.model, scanned(n)) for n in shorter})
        short = seq_len // 4
        self.line(
            "perplexity",
            "layers",
            {n: perplexity_ways(cut, swept(short)) for n, cut in cuts.items()},
        )
        self.line(
            "perplexity",
            "windows",
            {n: perplexity_ways(self.model, self.windows(n, short)) for n in shrunk},
        )
        self.line(
            "healing, lora",
            "layers",
            {n: step_ways(cut, swept(seq_len), "lora") for n, cut in cuts.items()},
        )
        self.line(
            "healing, lora", "tokens", {n: step_ways(self.model, swept(n), "lora") for n in shorter}
        )
        prompt, new = self.windows(1, 4), self.sizes["new_tokens"]
        self.line(
            "generation",
            "layers",
            {n: generation_ways(cut, prompt, new) for n, cut in cuts.items()},
        )
        self.line(
            "generation",
            "new tokens",
            {n: generation_ways(self.model, prompt, n) for n in (new, 2 * new, 4 * new)},
        )

    def line(self, stage: str, along: str, ways_of: Mapping[int, Ways]) -> None:
        """Measure a stage at some sizes, and keep the slopes of both ways."""
        is_training = stage.startswith("healing")
        found = {}
        for size, ways in ways_of.items():
            with torch.set_grad_enabled(is_training):
                found[size] = timed(ways, 1 if self.quick else 2).min()
        row = {"stage": stage, "along": along, "sizes": " ".join(map(str, found))}
        for way in (OURS, NAIVE):
            row[f"{way}_slope"] = slope(found, [seconds[way] for seconds in found.values()])
        self.growth.append(row)
        said = f"{stage} along {along}: {row['ours_slope']:.2f}, naive {row['naive_slope']:.2f}"
        print(said, flush=True)

    def whole(self) -> None:
        """Everything, in the order of :data:`STAGES`."""
        self.scan()
        self.perplexity()
        self.healing()
        self.five_shots()
        self.generation()
        self.grow()


def rounded(rows: list[dict]) -> pd.DataFrame:
    """A table of rows whose numbers have five digits."""
    table = pd.DataFrame(rows)
    for name in table.select_dtypes("float"):
        table[name] = [float(f"{value:.5g}") for value in table[name]]
    return table


def page(rows: pd.DataFrame, growth: pd.DataFrame, machine: str) -> str:
    """The text of RESULTS.md."""
    lines = [
        "# What our way costs, beside the naive way and beside arithmetic",
        "",
        f"`make bench` wrote this page on {machine}, with SmolLM2-135M-Instruct in {DTYPE}. Ratios "
        f"are medians over {rows['rounds'].max()} rounds, in each of which both ways ran in turn.",
        "Behind them stand the lowest and the highest. The floor is the arithmetic of our way at "
        "the rate of this machine's matrix products. For generation it is reading the weights "
        "once a token.",
        "",
        "| Stage | Ours | Naive | Ours, s | Naive, s | Times as fast | Times the floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows.itertuples():
        lines.append(
            f"| {row.stage} | {STAGES[row.stage][0]} | {STAGES[row.stage][1]} | "
            f"{row.ours_seconds:.2f} | {row.naive_seconds:.2f} | {row.times_as_fast:.2f} "
            f"({row.least:.2f} to {row.most:.2f}) | {row.over_floor:.1f} |"
        )
    lines += [
        "",
        "## How time grows",
        "",
        "Slopes of seconds over size, in logarithms: 1 where twice the size takes twice the time.",
        "",
        "| Stage | Along | Sizes | Ours | Naive |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in growth.itertuples():
        lines.append(
            f"| {row.stage} | {row.along} | {row.sizes} | {row.ours_slope:.2f} | "
            f"{row.naive_slope:.2f} |"
        )
    return "\n".join(lines) + "\n"


def short_table(rows: pd.DataFrame) -> str:
    """The table of the README."""
    lines = ["| Stage | Times as fast as the naive way | Times the floor |", "| --- | --- | --- |"]
    for row in rows.itertuples():
        lines.append(
            f"| {row.stage} | {row.times_as_fast:.2f} ({row.least:.2f} to {row.most:.2f}) | "
            f"{row.over_floor:.1f} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing")
    asked = parser.parse_args(words)
    if asked.quick and asked.out.resolve() == Path(__file__).resolve().parent:
        parser.error("--quick needs --out: its numbers must not replace the committed ones")
    runtime.setup(0)
    bench = Bench(asked.model, quick=asked.quick)
    bench.whole()
    rows, growth = rounded(bench.rows), rounded(bench.growth)
    device = runtime.processor() if bench.model.device.type == "cpu" else runtime.device_name()
    machine = f"{device} with {torch.get_num_threads()} threads"
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, table in (("results", rows), ("growth", growth)):
        with runtime.atomic_path(asked.out / f"{name}.csv") as target:
            table.to_csv(target, index=False, lineterminator="\n")
    with runtime.atomic_path(asked.out / "RESULTS.md") as target:
        target.write_text(page(rows, growth, machine), encoding="utf-8")
    print(f"written: {asked.out / 'RESULTS.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
