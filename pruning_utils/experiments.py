"""What 00 and 01 compute: each function takes plain values, so that it can be saved, and returns
tidy rows."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pruning_utils import (
    data,
    evaluation,
    evidence,
    healing,
    models,
    runtime,
    selection,
    similarity,
    surgery,
)
from pruning_utils.engine.bars import tqdm

DISTANCES = {"last token": "angular_distance", "all tokens": "angular_distance_all_tokens"}
# Windows that healing is watched on; windows that the saved model is compared on.
N_VALIDATION = 4
N_RELOADED = 4
N_GENERATED = 24  # tokens after a prompt
INFLUENCES = {"mean over tokens": "block_influence", "flattened": "block_influence_flattened"}


def scan_layers(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    n_samples: int,
    seq_len: int,
    block_sizes: list[int],
    sample_counts: list[int],
    draws: int,
    seed: int,
) -> list[dict]:
    """Similarity of layers on one text in one precision, and how the choice of the block moves when
    text is redrawn.

    Args:
        point: ``source`` (a calibration text) and ``precision`` (``bfloat16``, ``float32``, ``nf4``
            or ``int8``).
        model: Name for :func:`models.load_model`, with ``revision``.
        dtype: What quantised weights are multiplied in.
        n_samples: Windows of ``seq_len`` tokens.
        block_sizes: Sizes n whose chosen block is resampled.
        sample_counts: Numbers of windows in a draw.
        draws: Draws with replacement for each of them.
        seed: Seed of the text and of the draws.

    Returns:
        Rows with ``quantity``, ``start`` (first layer of the block, or the layer), ``block_size``,
        ``n_samples``, ``value``, ``stderr``, ``low`` and ``high``: the distances under both token
        rules for every block, both influences for every layer, under ``chosen`` the share of draws
        in which a block is the closest of its size, and for each size the claims of
        arXiv:2403.17887, Sec. 4.3, with ends of intervals: ``depth correlation`` (Spearman, of
        distance and place, over blocks with neither first nor last layer) and ``last block minus
        median``.
    """
    quantized = point["precision"] in ("nf4", "int8")
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2 for intervals, got {n_samples}")
    network, tokenizer = _load(
        model,
        revision,
        dtype if quantized else point["precision"],
        point["precision"] if quantized else None,
    )
    for size in block_sizes:  # refused before the pass, not after it
        selection.best_block(np.zeros(2 * [len(models.decoder_layers(network)) + 1]), size)
    windows = data.calibration_windows(
        tokenizer, n_samples, seq_len, source=point["source"], seed=seed
    )
    found = similarity.measure_similarity(network, windows)
    n_layers, samples = len(found.block_influence), found.last_token_samples
    stderr = samples.std(0, ddof=1) / np.sqrt(n_samples)
    rows = []
    for quantity, attribute in DISTANCES.items():
        values = getattr(found, attribute)
        rows += [
            {
                "quantity": quantity,
                "start": start,
                "block_size": size,
                "n_samples": n_samples,
                "value": values[start, start + size],
                "stderr": stderr[start, start + size] if quantity == "last token" else np.nan,
            }
            for size in range(1, n_layers + 1)
            for start in range(n_layers - size + 1)
        ]
    for quantity, attribute in INFLUENCES.items():
        rows += [
            {
                "quantity": quantity,
                "start": layer,
                "block_size": 1,
                "n_samples": n_samples,
                "value": value,
                "stderr": np.nan,
            }
            for layer, value in enumerate(getattr(found, attribute))
        ]
    for size in block_sizes:
        blocks = np.diagonal(samples, size, axis1=1, axis2=2)
        claims = {
            "depth correlation": evidence.statistic_interval(
                blocks[:, 1:-1], evidence.depth_correlation
            ),
            "last block minus median": evidence.statistic_interval(
                blocks, lambda means: means[..., -1] - np.median(means, axis=-1)
            ),
        }
        rows += [
            {
                "quantity": claim,
                "start": 0,
                "block_size": size,
                "n_samples": n_samples,
                "value": found.value,
                "stderr": np.nan,
                "low": found.low,
                "high": found.high,
            }
            for claim, found in claims.items()
        ]
        for count in sample_counts:
            starts = selection.resampled_starts(
                samples, size, n_samples=count, draws=draws, seed=seed
            )
            rows += [
                {
                    "quantity": "chosen",
                    "start": int(start),
                    "block_size": size,
                    "n_samples": count,
                    "value": times / draws,
                    "stderr": np.nan,
                }
                for start, times in zip(*np.unique(starts, return_counts=True), strict=True)
            ]
    return [{**row, "low": row.get("low", np.nan), "high": row.get("high", np.nan)} for row in rows]


@functools.lru_cache(maxsize=1)
def _load(model: str, revision: str | None, dtype: str, quantize: str | None):
    """The points of one sweep that follow each other share the loaded weights."""
    return models.load_model(model, revision=revision, dtype=dtype, quantize=quantize)


def prune_and_heal(
    *,
    model: str,
    revision: str | None,
    dtype: str,
    block_size: int,
    n_calibration: int,
    n_evaluation: int,
    seq_len: int,
    task: str,
    limit: int | None,
    prompt: str,
    healing_settings: dict,
    seed: int,
    checkpoint: str | Path,
) -> list[dict]:
    """The whole path once: scan, choose the closest block, drop it, heal, and measure the model at
    each stage.

    Args:
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        block_size: Layers to drop, in one block.
        n_calibration: Windows of ``seq_len`` tokens that the block is chosen on.
        n_evaluation: Windows of evaluation text.
        task: Benchmark for :func:`evaluation.evaluate_tasks`, with ``limit`` questions.
        prompt: Text to continue, greedily, by 24 tokens.
        healing_settings: Keywords for :func:`healing.heal`.
        seed: Seed of all draws.
        checkpoint: Folder for the healed model, which plain transformers loads.

    Returns:
        Rows with ``stage`` (``unpruned``, ``pruned``, ``healed``, and ``reloaded`` from the
        checkpoint), ``quantity``, ``item``, ``value`` and ``text``: ``distance`` of every block of
        the size (item: its first layer), ``loss`` of every evaluation window (nats per token),
        ``correct_norm`` and ``p_right`` of every question, the continued ``sentence``, ``train``
        and ``eval`` losses of healing (item: tokens), and ``parameters``.
    """
    network, tokenizer = models.load_model(model, revision=revision, dtype=dtype)
    windows = data.calibration_windows(tokenizer, n_calibration, seq_len, seed=seed)
    evaluation_ids = data.evaluation_windows(tokenizer, n_evaluation, seq_len)
    validation_ids = data.evaluation_windows(tokenizer, N_VALIDATION, seq_len, split="validation")
    foretell(
        network,
        tokenizer,
        windows,
        block_size=block_size,
        evaluation_tokens=evaluation_ids.numel(),
        question_tokens=_question_tokens(tokenizer, task, limit),
        validation_tokens=validation_ids.numel(),
        steps=healing_settings["steps"],
        batch_size=healing_settings["batch_size"],
    )

    def measured(stage: str, current: torch.nn.Module) -> list[dict]:
        losses = evaluation.token_losses(current, evaluation_ids).mean(1).tolist()
        questions = evaluation.evaluate_tasks(current, tokenizer, [task], limit=limit).questions
        rows = [("loss", item, loss, "") for item, loss in enumerate(losses)]
        rows += [
            (quantity, int(question["question_id"]), float(question[quantity]), "")
            for question in questions.to_dict("records")
            for quantity in ("correct_norm", "p_right")
        ]
        rows += [
            ("sentence", 0, np.nan, continue_text(current, tokenizer, prompt)),
            ("parameters", 0, float(sum(weight.numel() for weight in current.parameters())), ""),
        ]
        return [
            dict(zip(("stage", "quantity", "item", "value", "text"), (stage, *row), strict=True))
            for row in rows
        ]

    found = similarity.measure_similarity(network, windows)
    distances = selection.block_distances(found.angular_distance, block_size)
    rows = [
        {"stage": "unpruned", "quantity": "distance", "item": start, "value": distance, "text": ""}
        for start, distance in enumerate(distances)
    ]
    rows += measured("unpruned", network)
    surgery.drop_layers(network, selection.best_block(found.angular_distance, block_size).layers)
    rows += measured("pruned", network)
    steps, batch_size = healing_settings["steps"], healing_settings["batch_size"]
    healed = healing.heal(
        network,
        tokenizer,
        data.healing_windows(tokenizer, steps * batch_size, seq_len, seed=seed),
        eval_ids=validation_ids,
        merge=True,
        seed=seed,
        **healing_settings,
    )
    rows += [
        {"stage": "healed", "quantity": split, "item": int(tokens), "value": loss, "text": ""}
        for tokens, split, loss in healed.history[["tokens", "split", "loss"]].itertuples(
            index=False
        )
    ]
    rows += measured("healed", healed.model)
    surgery.save(healed.model, tokenizer, checkpoint)
    reloaded, _ = models.load_model(checkpoint, dtype=healed.model.dtype)
    again = evaluation.token_losses(reloaded, evaluation_ids[:N_RELOADED]).mean(1).tolist()
    return rows + [
        {"stage": "reloaded", "quantity": "loss", "item": item, "value": loss, "text": ""}
        for item, loss in enumerate(again)
    ]


def foretell(
    model: torch.nn.Module,
    tokenizer,
    windows: torch.Tensor,
    *,
    block_size: int,
    evaluation_tokens: int,
    question_tokens: int,
    validation_tokens: int,
    steps: int,
    batch_size: int,
) -> dict[str, float]:
    """Say on the terminal what each stage of :func:`prune_and_heal` will take on this machine,
    before any is begun.

    One window is run forwards, and forwards and backwards, which takes a second or two; the rest is
    arithmetic.

    Args:
        model: The unpruned model.
        tokenizer: Its tokenizer.
        windows: Calibration windows, ``(n, seq_len)``.
        block_size: Layers that will be dropped: what comes afterwards is that much cheaper.
        evaluation_tokens: Of text, at each of three stages.
        question_tokens: Of questions with their answers, at each of three stages.
        validation_tokens: Of text that healing is watched on, before it and eight times on the way.
        steps: Of healing.
        batch_size: Windows in each.

    Returns:
        Seconds by stage, in order.
    """
    forward, training, one_token = _token_seconds(model, windows[:1])
    left = 1 - block_size / len(models.decoder_layers(model))
    measuring = forward * (evaluation_tokens + question_tokens) + one_token * N_GENERATED
    heal = training * steps * batch_size * windows.shape[1]
    watching = forward * validation_tokens * (healing.EVALUATIONS + 1)
    reloading = forward * N_RELOADED * windows.shape[1]
    seconds = {
        "scan": forward * windows.numel(),
        "measure": measuring,
        "measure the pruned model": left * measuring,
        "heal": left * (heal + watching),
        "measure the healed model": left * (measuring + reloading),
    }
    stages = ", ".join(f"{stage} {took:.0f} s" for stage, took in seconds.items())
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' * (threads > 1)}"
    where = f"{runtime.dtype_name(model.dtype)}, {runtime.processor()}, {counted}"
    tqdm.write(
        f"about {sum(seconds.values()) / 60:.1f} minutes here ({where}): {stages}", file=sys.stderr
    )
    return seconds


def _token_seconds(model: torch.nn.Module, window: torch.Tensor) -> tuple[float, float, float]:
    """Seconds a token forwards, forwards and backwards through frozen weights, and of one token
    alone."""
    ids = window.to(model.device)
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trainable:
        weight.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, given, states: states.detach().requires_grad_()
    )

    def training() -> None:
        with torch.enable_grad():
            healing._mean_loss(model(ids, use_cache=False).logits, ids).backward()

    def generating() -> None:
        with torch.no_grad():
            model(ids[:, :1], use_cache=False)

    try:
        training_seconds = _seconds(training)
    finally:
        hook.remove()
        for weight in trainable:
            weight.requires_grad_(True)
    forward_seconds = _seconds(lambda: evaluation.token_losses(model, ids))
    return forward_seconds / ids.numel(), training_seconds / ids.numel(), _seconds(generating)


def _seconds(run: Callable[[], object]) -> float:
    """The second of two runs: the first prepares kernels."""
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _question_tokens(tokenizer, task: str, limit: int | None) -> int:
    """Tokens that pass through a model for the questions of an embedded task: prompts once, then
    each answer."""
    questions = data.load_questions(task)[:limit] if task in data.BENCHMARKS else []
    texts = [
        text
        for question in questions
        for text in (question.passage + question.question, *question.choices)
    ]
    return sum(map(len, tokenizer(texts)["input_ids"])) if texts else 0


def continue_text(
    model: torch.nn.Module, tokenizer, prompt: str, *, n_tokens: int = N_GENERATED
) -> str:
    """Greedy continuation of a prompt by ``n_tokens`` tokens, on one line, without the prompt."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(
            **encoded,
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    continuation = tokenizer.decode(
        output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return " ".join(continuation.split())
