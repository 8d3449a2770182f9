"""The whole path once: scan, choose, drop, heal, measure at each stage (notebook 00)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pruning_utils import (
    data,
    evaluation,
    healing,
    models,
    runtime,
    selection,
    similarity,
    surgery,
)
from pruning_utils.engine import benchmarks, passes
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.later import nn, torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_VALIDATION = 4  # windows that healing is watched on
N_RELOADED = 4  # windows that the saved model is compared on
N_GENERATED = 24  # tokens after a prompt
COLUMNS = ("stage", "quantity", "item", "value", "text")


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
        seq_len: Tokens in a window.
        task: Benchmark for :func:`evaluation.evaluate_tasks`, with ``limit`` questions.
        limit: Questions of it; None takes all.
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
    n_windows = healing_settings["steps"] * healing_settings["batch_size"]
    train_ids = data.healing_windows(tokenizer, n_windows, seq_len, seed=seed)
    foretell(
        network,
        windows,
        block_size=block_size,
        evaluation_tokens=evaluation_ids.numel(),
        question_tokens=question_tokens(tokenizer, task, limit),
        validation_tokens=validation_ids.numel(),
        training_tokens=train_ids.numel(),
    )

    def measured(stage: str, current: nn.Module) -> list[dict]:
        """Rows of what a stage's model loses, answers, writes and holds."""
        return [
            *_loss_rows(stage, current, evaluation_ids),
            *_answer_rows(stage, current, tokenizer, task, limit),
            _row(stage, "sentence", text=continue_text(current, tokenizer, prompt)),
            _row(stage, "parameters", value=float(models.n_parameters(current))),
        ]

    # Scan every block, and choose the one whose ends are closest.
    found = similarity.measure_similarity(network, windows)
    distances = selection.block_distances(found.angular_distance, block_size)
    closest = selection.best_block(found.angular_distance, block_size)
    rows = [
        _row("unpruned", "distance", start, distance) for start, distance in enumerate(distances)
    ]
    rows += measured("unpruned", network)

    # Drop it.
    pruned = surgery.drop_layers(network, closest.layers)
    rows += measured("pruned", pruned)

    # Heal what is left.
    healed = healing.heal(
        pruned,
        tokenizer,
        train_ids,
        eval_ids=validation_ids,
        merge=True,
        seed=seed,
        **healing_settings,
    )
    for loss in healed.history.itertuples():
        rows.append(_row("healed", loss.split, int(loss.tokens), loss.loss))
    rows += measured("healed", healed.model)

    # Save it, and see that the same model is loaded again.
    surgery.save(healed.model, tokenizer, checkpoint)
    reloaded, _ = models.load_model(checkpoint, dtype=healed.model.dtype)
    return rows + _loss_rows("reloaded", reloaded, evaluation_ids[:N_RELOADED])


def _row(stage: str, quantity: str, item: int = 0, value: float = np.nan, text: str = "") -> dict:
    return dict(zip(COLUMNS, (stage, quantity, item, value, text), strict=True))


def _loss_rows(stage: str, model: nn.Module, windows: torch.Tensor) -> list[dict]:
    losses = evaluation.token_losses(model, windows).mean(1).tolist()
    return [_row(stage, "loss", item, loss) for item, loss in enumerate(losses)]


def _answer_rows(
    stage: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    limit: int | None,
) -> list[dict]:
    rows = []
    questions = evaluation.evaluate_tasks(model, tokenizer, [task], limit=limit).questions
    for question in questions.to_dict("records"):
        number = int(question["question_id"])
        for quantity in ("correct_norm", "p_right"):
            rows.append(_row(stage, quantity, number, float(question[quantity])))
    return rows


def foretell(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    block_size: int,
    evaluation_tokens: int,
    question_tokens: int,
    validation_tokens: int,
    training_tokens: int,
) -> dict[str, float]:
    """Say on the terminal what each stage of :func:`prune_and_heal` will take on this machine,
    before any is begun.

    One window is run forwards, and forwards and backwards, which takes a second or two; the rest is
    arithmetic.

    Args:
        model: The unpruned model.
        windows: Calibration windows, ``(n, seq_len)``.
        block_size: Layers that will be dropped: what comes afterwards is that much cheaper.
        evaluation_tokens: Of text, at each of three stages.
        question_tokens: Of questions with their answers, at each of three stages.
        validation_tokens: Of text that healing is watched on, before it and eight times on the way.
        training_tokens: Of text that healing trains on.

    Returns:
        Seconds by stage, in order.
    """
    forward, training, one_token = _token_seconds(model, windows[:1])
    left = 1 - block_size / len(models.decoder_layers(model))
    measuring = forward * (evaluation_tokens + question_tokens) + one_token * N_GENERATED
    watching = forward * validation_tokens * (healing.EVALUATIONS + 1)
    reloading = forward * N_RELOADED * windows.shape[1]
    seconds = {
        "scan": forward * windows.numel(),
        "measure": measuring,
        "measure the pruned model": left * measuring,
        "heal": left * (training * training_tokens + watching),
        "measure the healed model": left * (measuring + reloading),
    }
    stages = ", ".join(f"{stage} {took:.0f} s" for stage, took in seconds.items())
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' * (threads > 1)}"
    where = f"{runtime.dtype_name(model.dtype)}, {runtime.processor()}, {counted}"
    minutes = sum(seconds.values()) / 60
    tqdm.write(f"about {minutes:.1f} minutes here ({where}): {stages}", file=sys.stderr)
    return seconds


def _token_seconds(model: nn.Module, window: torch.Tensor) -> tuple[float, float, float]:
    """Seconds a token forwards, forwards and backwards through frozen weights, and of one token
    alone."""
    ids = window.to(model.device)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, given, states: states.detach().requires_grad_()
    )

    def training() -> None:
        """A forward and a backward pass."""
        with torch.enable_grad():
            healing.mean_loss(model, ids).backward()

    def generating() -> None:
        """A forward pass of one token."""
        with torch.no_grad():
            model(ids[:, :1], use_cache=False)

    try:
        with passes.frozen_weights(model):
            training_seconds = _seconds(training, ids.device)
    finally:
        hook.remove()
    forward_seconds = _seconds(lambda: evaluation.token_losses(model, ids), ids.device)
    generating_seconds = _seconds(generating, ids.device)
    return forward_seconds / ids.numel(), training_seconds / ids.numel(), generating_seconds


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The second of two runs: the first prepares kernels."""
    run()
    started = runtime.clock(device)
    run()
    return runtime.clock(device) - started


def question_tokens(tokenizer: PreTrainedTokenizerBase, task: str, limit: int | None) -> int:
    """Tokens that pass through a model for the questions of an embedded task: prompts once, then
    each answer; 0 for another task."""
    if not benchmarks.is_embedded(task):
        return 0
    texts = []
    for asked in evaluation.load_tasks([task], limit=limit)[task]["tasks"].values():
        for question in asked.eval_docs:
            has_choices = asked.OUTPUT_TYPE == "multiple_choice"
            answers = (
                asked.doc_to_choice(question) if has_choices else [asked.doc_to_target(question)]
            )
            texts += [str(asked.doc_to_text(question)), *answers]
    return sum(map(len, tokenizer(texts)["input_ids"]))


def continue_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    n_tokens: int = N_GENERATED,
) -> str:
    """Greedy continuation of a prompt by ``n_tokens`` tokens, on one line, without the prompt."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad(), passes.greedily(model):
        output = model.generate(
            **encoded,
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    new_tokens = output[0, encoded["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(new_tokens, skip_special_tokens=True).split())
