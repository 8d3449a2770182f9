"""What 00 and 01 compute: each function takes plain values, so that it can be saved, and returns tidy rows."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from pruning_utils import data, evaluation, evidence, healing, models, selection, similarity, surgery

DISTANCES = {"last token": "angular_distance", "all tokens": "angular_distance_all_tokens"}
INFLUENCES = {"mean over tokens": "block_influence", "flattened": "block_influence_flattened"}


def scan_layers(point: dict, *, model: str, revision: str | None, dtype: str, n_samples: int, seq_len: int, block_sizes: list[int],
                sample_counts: list[int], draws: int, seed: int) -> list[dict]:
    """Similarity of layers on one text in one precision, and how the choice of the block moves when text is redrawn.

    Args:
        point: ``source`` (a calibration text) and ``precision`` (``bfloat16``, ``float32``, ``nf4`` or ``int8``).
        model: Name for :func:`models.load_model`, with ``revision``.
        dtype: What quantised weights are multiplied in.
        n_samples: Windows of ``seq_len`` tokens.
        block_sizes: Sizes n whose chosen block is resampled.
        sample_counts: Numbers of windows in a draw.
        draws: Draws with replacement for each of them.
        seed: Seed of the text and of the draws.

    Returns:
        Rows with ``quantity``, ``start`` (first layer of the block, or the layer), ``block_size``, ``n_samples``,
        ``value``, ``stderr``, ``low`` and ``high``: the distances under both token rules for every block, both
        influences for every layer, under ``chosen`` the share of draws in which a block is the closest of its size,
        and for each size the claims of arXiv:2403.17887, Sec. 4.3, with ends of intervals: ``depth correlation``
        (Spearman, of distance and place, over blocks with neither first nor last layer) and ``last block minus
        median``.
    """
    quantized = point["precision"] in ("nf4", "int8")
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2 for intervals, got {n_samples}")
    network, tokenizer = _load(model, revision, dtype if quantized else point["precision"],
                               point["precision"] if quantized else None)
    for size in block_sizes:  # refused before the pass, not after it
        selection.best_block(np.zeros(2 * [len(models.decoder_layers(network)) + 1]), size)
    windows = data.calibration_windows(tokenizer, n_samples, seq_len, source=point["source"], seed=seed)
    found = similarity.measure_similarity(network, windows)
    n_layers, samples = len(found.block_influence), found.last_token_samples
    stderr = samples.std(0, ddof=1) / np.sqrt(n_samples)
    rows = []
    for quantity, attribute in DISTANCES.items():
        values = getattr(found, attribute)
        rows += [{"quantity": quantity, "start": start, "block_size": size, "n_samples": n_samples,
                  "value": values[start, start + size],
                  "stderr": stderr[start, start + size] if quantity == "last token" else np.nan}
                 for size in range(1, n_layers + 1) for start in range(n_layers - size + 1)]
    for quantity, attribute in INFLUENCES.items():
        rows += [{"quantity": quantity, "start": layer, "block_size": 1, "n_samples": n_samples, "value": value,
                  "stderr": np.nan} for layer, value in enumerate(getattr(found, attribute))]
    for size in block_sizes:
        blocks = np.diagonal(samples, size, axis1=1, axis2=2)
        claims = {"depth correlation": evidence.statistic_interval(blocks[:, 1:-1], evidence.depth_correlation),
                  "last block minus median": evidence.statistic_interval(
                      blocks, lambda means: means[..., -1] - np.median(means, axis=-1))}
        rows += [{"quantity": claim, "start": 0, "block_size": size, "n_samples": n_samples, "value": found.value,
                  "stderr": np.nan, "low": found.low, "high": found.high} for claim, found in claims.items()]
        for count in sample_counts:
            starts = selection.resampled_starts(samples, size, n_samples=count, draws=draws, seed=seed)
            rows += [{"quantity": "chosen", "start": int(start), "block_size": size, "n_samples": count,
                      "value": times / draws, "stderr": np.nan}
                     for start, times in zip(*np.unique(starts, return_counts=True), strict=True)]
    return [{**row, "low": row.get("low", np.nan), "high": row.get("high", np.nan)} for row in rows]


@functools.lru_cache(maxsize=1)
def _load(model: str, revision: str | None, dtype: str, quantize: str | None):
    """The points of one sweep that follow each other share the loaded weights."""
    return models.load_model(model, revision=revision, dtype=dtype, quantize=quantize)


def prune_and_heal(*, model: str, revision: str | None, dtype: str, block_size: int, n_calibration: int, n_evaluation: int,
                   seq_len: int, task: str, limit: int | None, prompt: str, healing_settings: dict, seed: int,
                   checkpoint: str | Path) -> list[dict]:
    """The whole path once: scan, choose the closest block, drop it, heal, and measure the model at each stage.

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
        Rows with ``stage`` (``unpruned``, ``pruned``, ``healed``, and ``reloaded`` from the checkpoint), ``quantity``,
        ``item``, ``value`` and ``text``: ``distance`` of every block of the size (item: its first layer), ``loss`` of
        every evaluation window (nats per token), ``correct_norm`` and ``p_right`` of every question, the continued
        ``sentence``, ``train`` and ``eval`` losses of healing (item: tokens), and ``parameters``.
    """
    network, tokenizer = models.load_model(model, revision=revision, dtype=dtype)
    windows = data.calibration_windows(tokenizer, n_calibration, seq_len, seed=seed)
    evaluation_ids = data.evaluation_windows(tokenizer, n_evaluation, seq_len)

    def measured(stage: str, current: torch.nn.Module) -> list[dict]:
        losses = evaluation.token_losses(current, evaluation_ids).mean(1).tolist()
        questions = evaluation.evaluate_tasks(current, tokenizer, [task], limit=limit).questions
        rows = [("loss", item, loss, "") for item, loss in enumerate(losses)]
        rows += [(quantity, int(question["question_id"]), float(question[quantity]), "")
                 for question in questions.to_dict("records") for quantity in ("correct_norm", "p_right")]
        rows += [("sentence", 0, np.nan, continue_text(current, tokenizer, prompt)),
                 ("parameters", 0, float(sum(weight.numel() for weight in current.parameters())), "")]
        return [dict(zip(("stage", "quantity", "item", "value", "text"), (stage, *row), strict=True)) for row in rows]

    found = similarity.measure_similarity(network, windows)
    distances = selection.block_distances(found.angular_distance, block_size)
    rows = [{"stage": "unpruned", "quantity": "distance", "item": start, "value": distance, "text": ""}
            for start, distance in enumerate(distances)]
    rows += measured("unpruned", network)
    surgery.drop_layers(network, selection.best_block(found.angular_distance, block_size).layers)
    rows += measured("pruned", network)
    steps, batch_size = healing_settings["steps"], healing_settings["batch_size"]
    healed = healing.heal(
        network, tokenizer, data.healing_windows(tokenizer, steps * batch_size, seq_len, seed=seed),
        eval_ids=data.evaluation_windows(tokenizer, 8, seq_len, split="validation"), merge=True, seed=seed,
        **healing_settings)
    rows += [{"stage": "healed", "quantity": split, "item": int(tokens), "value": loss, "text": ""}
             for tokens, split, loss in healed.history[["tokens", "split", "loss"]].itertuples(index=False)]
    rows += measured("healed", healed.model)
    surgery.save(healed.model, tokenizer, checkpoint)
    reloaded, _ = models.load_model(checkpoint, dtype=healed.model.dtype)
    return rows + [{"stage": "reloaded", "quantity": "loss", "item": item, "value": loss, "text": ""} for item, loss in
                   enumerate(evaluation.token_losses(reloaded, evaluation_ids).mean(1).tolist())]


def continue_text(model: torch.nn.Module, tokenizer, prompt: str, *, n_tokens: int = 24) -> str:
    """Greedy continuation of a prompt by ``n_tokens`` tokens, on one line, without the prompt."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(**encoded, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False,
                                pad_token_id=tokenizer.pad_token_id)
    continuation = tokenizer.decode(output[0, encoded["input_ids"].shape[1]:], skip_special_tokens=True)
    return " ".join(continuation.split())
