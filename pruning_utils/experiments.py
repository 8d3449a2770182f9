"""What the notebooks compute: each function takes plain values, so that a sweep can save it, and returns tidy rows."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pruning_utils import data, evaluation, evidence, healing, models, selection, sharing, similarity, surgery

DISTANCES = {"last token": "angular_distance", "all tokens": "angular_distance_all_tokens"}
INFLUENCES = {"mean over tokens": "block_influence", "flattened": "block_influence_flattened"}


def scan_layers(point: dict, *, model: str, revision: str | None, n_samples: int, seq_len: int, block_sizes: list[int],
                sample_counts: list[int], draws: int, seed: int) -> list[dict]:
    """Similarity of layers on one text in one precision, and how the choice of the block moves when text is redrawn.

    Args:
        point: ``source`` (a calibration text) and ``precision`` (``bfloat16``, ``float32``, ``nf4`` or ``int8``).
        model: Name for :func:`models.load_model`, with ``revision``.
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
    network, tokenizer = _load(model, revision, "bfloat16" if quantized else point["precision"],
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
                      blocks, lambda draws, axis: draws.mean(axis)[..., -1] - np.median(draws.mean(axis), axis=-1))}
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


def prune_and_heal(*, model: str, revision: str | None, block_size: int, n_calibration: int, n_evaluation: int,
                   seq_len: int, task: str, limit: int | None, prompt: str, healing_settings: dict, seed: int,
                   checkpoint: str | Path) -> list[dict]:
    """The whole path once: scan, choose the closest block, drop it, heal, and measure the model at each stage.

    Args:
        model: Name for :func:`models.load_model`, with ``revision``.
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
    network, tokenizer = models.load_model(model, revision=revision)
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
    reloaded, _ = models.load_model(checkpoint, dtype=str(healed.model.dtype).removeprefix("torch."))
    return rows + [{"stage": "reloaded", "quantity": "loss", "item": item, "value": loss, "text": ""} for item, loss in
                   enumerate(evaluation.token_losses(reloaded, evaluation_ids).mean(1).tolist())]


RULES = ("none", "similarity", "deepest")
ADAPTERS = ("method", "rank", "learning_rate", "seed")  # settings that name a folder of healed adapters
# Modules that decide what a healed model is: adapters that another version of them made are not used again.
HEALING_CODE = ("data", "models", "similarity", "selection", "surgery", "healing")
DEPTH_COLUMNS = ("start", "dataset", "item", "correct", "correct_norm", "p_right", "nll")


def depth_points(depths: Sequence[int], healed_depths: Sequence[int], seed: int) -> list[dict]:
    """Points of a :class:`DepthStudy` at these numbers of dropped layers, under both rules where there are any."""
    return [{"rule": rule, "n_dropped": n_dropped, "healed": healed, "seed": seed}
            for healed, chosen in ((False, depths), (True, healed_depths)) for n_dropped in chosen
            for rule in (RULES[1:] if n_dropped else RULES[:1])]


class DepthStudy:
    """A model at many depths of pruning, unhealed and healed: what a sweep calls with one point after the other.

    A point is a dict of ``rule`` (``similarity``, Sec. 3.2 of arXiv:2403.17887, or ``deepest``, its Sec. 4.4, which
    keeps the last layer; ``none`` at depth 0), ``n_dropped`` (layers), ``healed`` and ``seed`` (of the healing text,
    the adapters and the order of windows). It may also hold any setting of healing (``rank``, say), ``num_fewshot`` and
    ``shot_order``. All models share one copy of the loaded weights, the unhealed ones also the outputs of the layers in
    front of the block, and healed adapters are kept for whoever asks for the same again.

    Args:
        points: All points that will be asked, checked before the first is computed.
        model: Name for :func:`models.load_model`, with ``revision``.
        seq_len: Tokens in a window of any text.
        n_calibration: Windows of ``calibration_source`` that the blocks are chosen on.
        texts: Evaluation texts by name with their number of windows.
        tasks: Benchmarks for :func:`evaluation.evaluate_tasks` by name with their number of shots; none is fine.
        limit: Questions of each task; None takes all.
        healing_settings: Keywords for :func:`healing.heal`, ``steps`` and ``batch_size`` among them.
        checkpoints: Folder of the healed adapters, ``results.checkpoint_path(profile, experiments.HEALING_CODE)``.
        seed: Seed of the calibration text.
        calibration_source: A text of :func:`data.calibration_windows`.
        healing_source: A text of :func:`data.healing_windows`.

    Raises:
        ValueError: At the first point, before it is computed, if any point or setting is out of range, or if a text
            holds fewer windows than asked.
    """

    def __init__(self, points: Sequence[dict], *, model: str, revision: str | None, seq_len: int, n_calibration: int,
                 texts: dict[str, int], tasks: dict[str, int], limit: int | None, healing_settings: dict,
                 checkpoints: str | Path, seed: int, calibration_source: str = "xsum",
                 healing_source: str | None = None):
        self.points, self.model, self.revision, self.checkpoints = points, model, revision, Path(checkpoints)
        self.seq_len, self.n_calibration, self.texts, self.seed = seq_len, n_calibration, texts, seed
        self.tasks, self.limit, self.healing_settings = tasks, limit, healing_settings
        self.calibration_source, self.healing_source = calibration_source, healing_source

    @functools.cached_property
    def loaded(self) -> tuple:
        """The model, its tokenizer, the distances of its layers, and what unhealed points share."""
        network, tokenizer = models.load_model(self.model, revision=self.revision)
        for point in self.points:
            self._check(point, network)
        for task, shots in {(task, tuple(self._shots(point, num_fewshot).items())) for point in self.points
                            for task, num_fewshot in self.tasks.items()}:
            for found in evaluation.load_tasks([task], limit=self.limit, **dict(shots))[task]["tasks"].values():
                if found.OUTPUT_TYPE != "multiple_choice":
                    raise ValueError(f"tasks must have choices of which one is right, but {task} is of the kind "
                                     f"{found.OUTPUT_TYPE}")
        for seed in {point["seed"] for point in self.points if point["healed"]}:
            self._healing_windows(tokenizer, seed)
        for name, n_windows in self.texts.items():
            data.evaluation_windows(tokenizer, n_windows, self.seq_len, source=name)
        windows = data.calibration_windows(tokenizer, self.n_calibration, self.seq_len, source=self.calibration_source,
                                           seed=self.seed)
        distances = similarity.measure_similarity(network, windows).angular_distance
        blocks = [self._block(distances, point) for point in self.points if not point["healed"]]
        return network, tokenizer, distances, sharing.SharedLayers([block[0] for block in blocks if block])

    def __call__(self, point: dict) -> list[dict]:
        """Rows with ``start`` (first dropped layer; L where none is), ``dataset``, ``item`` and scores.

        A row is a window of a text (``nll``: nats per token), a question of a task (scores as there), or a loss while
        healing (dataset ``healing train`` or ``healing eval``, item: tokens).
        """
        network, tokenizer, distances, shared = self.loaded
        block, n_layers, rows = self._block(distances, point), len(models.decoder_layers(network)), []
        start = block[0] if block else n_layers
        weights = {id(weight): weight for weight in (*network.parameters(), *network.buffers())}
        current = surgery.drop_layers(copy.deepcopy(network, weights), block) if block else network
        if point["healed"]:
            settings = self._settings(point)
            name = f"{point['rule']}-{point['n_dropped']}-" + "-".join(
                f"{key}-{value}" for key, value in healing.check_settings(current, settings).items() if key in ADAPTERS)
            healed = healing.heal(
                current, tokenizer, self._healing_windows(tokenizer, point["seed"]), merge=True,
                eval_ids=data.evaluation_windows(tokenizer, 16, self.seq_len, split="validation"),
                output_dir=self.checkpoints / name, **settings)
            current = healed.model
            rows += [{"dataset": f"healing {row.split}", "item": int(row.tokens), "nll": row.loss}
                     for row in healed.history.itertuples() if row.split == "eval" or row.step % 4 == 0]
        with contextlib.nullcontext() if point["healed"] else shared.used_by(current, start):
            for name, n_windows in self.texts.items():
                windows = data.evaluation_windows(tokenizer, n_windows, self.seq_len, source=name)
                losses = evaluation.token_losses(current, windows).mean(1).tolist()
                rows += [{"dataset": name, "item": item, "nll": loss} for item, loss in enumerate(losses)]
            for task, num_fewshot in self.tasks.items():
                found = evaluation.evaluate_tasks(current, tokenizer, [task], limit=self.limit,
                                                  **self._shots(point, num_fewshot)).questions
                rows += found.rename(columns={"task": "dataset", "question_id": "item"}).to_dict("records")
        return [{key: {"start": start, **row}.get(key, np.nan) for key in DEPTH_COLUMNS} for row in rows]

    def _check(self, point: dict, network: torch.nn.Module) -> None:
        n_layers, n_dropped = len(models.decoder_layers(network)), point["n_dropped"]
        if point["rule"] not in RULES or (point["rule"] == "none") != (n_dropped == 0):
            raise ValueError(f"rule must be one of {', '.join(RULES)}, 'none' at n_dropped 0 only, got {point}")
        selection.deepest(n_layers, n_dropped)
        if point["healed"]:
            healing.check_settings(network, self._settings(point))

    def _block(self, distances: np.ndarray, point: dict) -> tuple[int, ...]:
        if point["rule"] == "similarity":
            return selection.best_block(distances, point["n_dropped"]).layers
        return selection.deepest(len(distances) - 1, point["n_dropped"])

    def _settings(self, point: dict) -> dict:
        return self.healing_settings | {"seed": point["seed"]} | {
            key: value for key, value in point.items() if key in self.healing_settings}

    def _shots(self, point: dict, num_fewshot: int) -> dict:
        return {"num_fewshot": num_fewshot} | {key: point[key] for key in ("num_fewshot", "shot_order") if key in point}

    def _healing_windows(self, tokenizer, seed: int) -> torch.Tensor:
        return data.healing_windows(tokenizer, self.healing_settings["steps"] * self.healing_settings["batch_size"],
                                    self.seq_len, source=self.healing_source, seed=seed)


def continue_text(model: torch.nn.Module, tokenizer, prompt: str, *, n_tokens: int = 24) -> str:
    """Greedy continuation of a prompt by ``n_tokens`` tokens, on one line, without the prompt."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(**encoded, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False,
                                pad_token_id=tokenizer.pad_token_id)
    continuation = tokenizer.decode(output[0, encoded["input_ids"].shape[1]:], skip_special_tokens=True)
    return " ".join(continuation.split())
