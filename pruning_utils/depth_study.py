"""A model at many depths of pruning, unhealed and healed, from one copy of its weights: what 02 to
05 compute."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pruning_utils import (
    data,
    evaluation,
    healing,
    models,
    results,
    runtime,
    selection,
    similarity,
    surgery,
)
from pruning_utils.engine import passes

RULES = ("none", "similarity", "deepest")
# Settings that name a folder of healed adapters.
ADAPTERS = (
    "method",
    "rank",
    "learning_rate",
    "seed",
)
# What decides which model a training leaves: adapters that other code of these made are not used
# again.
HEALED_BY = (
    models.load_model,
    data.calibration_windows,
    similarity.measure_similarity,
    selection.best_block,
    selection.deepest,
    surgery.drop_layers,
    data.healing_windows,
    data.evaluation_windows,
    healing.heal,
)
DEPTH_COLUMNS = ("start", "dataset", "item", "correct", "correct_norm", "p_right", "nll")


def depth_points(
    depths: Sequence[int],
    healed_depths: Sequence[int],
    seed: int,
    *,
    rules: Sequence[str] = RULES[1:],
    healing_seeds: Sequence[int] | None = None,
) -> list[dict]:
    """Points of a :class:`DepthStudy` at these numbers of dropped layers: under each of the rules
    where layers go, and healed with each of the healing seeds (by default with ``seed``)."""
    seeds = [seed] if healing_seeds is None else healing_seeds
    return [
        {"rule": rule, "n_dropped": n_dropped, "healed": healed, "seed": draw}
        for healed, chosen in ((False, depths), (True, healed_depths))
        for n_dropped in chosen
        for rule in (rules if n_dropped else RULES[:1])
        for draw in (seeds if healed else [seed])
    ]


def depth_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    table: str = "",
    recompute: bool = False,
    **settings,
) -> tuple[pd.DataFrame, Path]:
    """What a :class:`DepthStudy` finds at these points, read if it is there, and the file that
    holds it.

    Args:
        points: As for the study.
        profile: Name of the profile, which decides the folders of results and of healed adapters.
        notebook: Name of the notebook that owns the table.
        model: Name for :func:`models.load_model`, with ``revision``; it names the table.
        table: What follows the model in that name, if a notebook has several tables.
        recompute: Compute it anew.
        settings: All others of the study.
    """
    study = DepthStudy(
        points,
        model=model,
        revision=revision,
        checkpoints=results.checkpoint_path(profile, HEALED_BY),
        **settings,
    )
    path = results.table_path(
        profile, notebook, "-".join(filter(None, (results.slug(model), table)))
    )
    return results.sweep(
        points,
        study,
        path=path,
        recompute=recompute,
        parameters={"model": models.identity(model, revision), "data": data.identity(), **settings},
    ), path


class DepthStudy:
    """A model at many depths of pruning, unhealed and healed: what a sweep calls with one point
    after the other.

    A point is a dict of ``rule`` (``similarity``, Sec. 3.2 of arXiv:2403.17887, or ``deepest``, its
    Sec. 4.4, which keeps the last layer; ``none`` at depth 0), ``n_dropped`` (layers), ``healed``
    and ``seed`` (of the healing text, the adapters and the order of windows). It may also hold any
    setting of healing (``rank``, say), ``num_fewshot`` and ``shot_order``. All models share one
    copy of the loaded weights, the unhealed ones also the outputs of the layers in front of the
    block, and healed adapters are kept for whoever asks for the same again.

    Args:
        points: All points that will be asked, checked before the first is computed.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        seq_len: Tokens in a window of any text.
        n_calibration: Windows of ``calibration_source`` that the blocks are chosen on.
        texts: Evaluation texts by name with their number of windows.
        tasks: Benchmarks for :func:`evaluation.evaluate_tasks` by name with their number of shots;
            none is fine.
        limit: Questions of each task; None takes all.
        healing_settings: Keywords for :func:`healing.heal`, ``steps`` and ``batch_size`` among
            them.
        checkpoints: Folder of the healed adapters, ``results.checkpoint_path(profile, HEALED_BY)``.
        seed: Seed of the calibration text.
        calibration_source: A text of :func:`data.calibration_windows`.
        healing_source: A text of :func:`data.healing_windows`.

    Raises:
        ValueError: At the first point, before it is computed, if any point or setting is out of
            range, or if a text holds fewer windows than asked.
    """

    def __init__(
        self,
        points: Sequence[dict],
        *,
        model: str,
        revision: str | None,
        dtype: str = runtime.AUTO,
        seq_len: int,
        n_calibration: int,
        texts: dict[str, int],
        tasks: dict[str, int],
        limit: int | None,
        healing_settings: dict,
        checkpoints: str | Path,
        seed: int,
        calibration_source: str = "xsum",
        healing_source: str | None = None,
    ):
        self.points = points
        self.model = model
        self.revision = revision
        self.checkpoints = Path(checkpoints)
        self.dtype = dtype
        self.seq_len = seq_len
        self.n_calibration = n_calibration
        self.texts = texts
        self.seed = seed
        self.tasks, self.limit, self.healing_settings = tasks, limit, healing_settings
        self.calibration_source, self.healing_source = calibration_source, healing_source

    @functools.cached_property
    def loaded(self) -> tuple:
        """The model, its tokenizer, the distances of its layers, and what unhealed points share."""
        network, tokenizer = models.load_model(self.model, revision=self.revision, dtype=self.dtype)
        for point in self.points:
            self._check(point, network)
        for task, shots in {
            (task, tuple(self._shots(point, num_fewshot).items()))
            for point in self.points
            for task, num_fewshot in self.tasks.items()
        }:
            for found in evaluation.load_tasks([task], limit=self.limit, **dict(shots))[task][
                "tasks"
            ].values():
                if found.OUTPUT_TYPE != "multiple_choice":
                    raise ValueError(
                        f"tasks must have choices of which one is right, but {task} is of the kind "
                        f"{found.OUTPUT_TYPE}"
                    )
        for seed in {point["seed"] for point in self.points if point["healed"]}:
            self._healing_windows(tokenizer, seed)
        for name, n_windows in self.texts.items():
            data.evaluation_windows(tokenizer, n_windows, self.seq_len, source=name)
        windows = data.calibration_windows(
            tokenizer,
            self.n_calibration,
            self.seq_len,
            source=self.calibration_source,
            seed=self.seed,
        )
        distances = similarity.measure_similarity(network, windows).angular_distance
        blocks = [self._block(distances, point) for point in self.points if not point["healed"]]
        return (
            network,
            tokenizer,
            distances,
            passes.SharedLayers([block[0] for block in blocks if block]),
        )

    def __call__(self, point: dict) -> list[dict]:
        """Rows with ``start`` (first dropped layer; L where none is), ``dataset``, ``item`` and
        scores.

        A row is a window of a text (``nll``: nats per token), a question of a task (scores as
        there), or a loss while healing (dataset ``healing train`` or ``healing eval``, item:
        tokens).
        """
        network, tokenizer, distances, shared = self.loaded
        block = self._block(distances, point)
        n_layers = len(models.decoder_layers(network))
        rows = []
        start = block[0] if block else n_layers
        weights = {id(weight): weight for weight in (*network.parameters(), *network.buffers())}
        current = surgery.drop_layers(copy.deepcopy(network, weights), block) if block else network
        if point["healed"]:
            settings = self._settings(point)
            name = (
                f"{runtime.dtype_name(current.dtype)}-{point['rule']}-{point['n_dropped']}-"
                + "-".join(
                    f"{key}-{value}"
                    for key, value in healing.check_settings(current, settings).items()
                    if key in ADAPTERS
                )
            )
            healed = healing.heal(
                current,
                tokenizer,
                self._healing_windows(tokenizer, point["seed"]),
                merge=True,
                eval_ids=data.evaluation_windows(tokenizer, 16, self.seq_len, split="validation"),
                output_dir=self.checkpoints / name,
                **settings,
            )
            current = healed.model
            rows += [
                {"dataset": f"healing {row.split}", "item": int(row.tokens), "nll": row.loss}
                for row in healed.history.itertuples()
                if row.split == "eval" or row.step % 4 == 0
            ]
        with contextlib.nullcontext() if point["healed"] else shared.used_by(current, start):
            for name, n_windows in self.texts.items():
                windows = data.evaluation_windows(tokenizer, n_windows, self.seq_len, source=name)
                losses = evaluation.token_losses(current, windows).mean(1).tolist()
                rows += [
                    {"dataset": name, "item": item, "nll": loss} for item, loss in enumerate(losses)
                ]
            for task, num_fewshot in self.tasks.items():
                found = evaluation.evaluate_tasks(
                    current, tokenizer, [task], limit=self.limit, **self._shots(point, num_fewshot)
                ).questions
                rows += found.rename(columns={"task": "dataset", "question_id": "item"}).to_dict(
                    "records"
                )
        return [
            {key: {"start": start, **row}.get(key, np.nan) for key in DEPTH_COLUMNS} for row in rows
        ]

    def _check(self, point: dict, network: torch.nn.Module) -> None:
        n_layers, n_dropped = len(models.decoder_layers(network)), point["n_dropped"]
        if point["rule"] not in RULES or (point["rule"] == "none") != (n_dropped == 0):
            raise ValueError(
                f"rule must be one of {', '.join(RULES)}, 'none' at n_dropped 0 only, got {point}"
            )
        selection.deepest(n_layers, n_dropped)
        if point["healed"]:
            healing.check_settings(network, self._settings(point))

    def _block(self, distances: np.ndarray, point: dict) -> tuple[int, ...]:
        if point["rule"] == "similarity":
            return selection.best_block(distances, point["n_dropped"]).layers
        return selection.deepest(len(distances) - 1, point["n_dropped"])

    def _settings(self, point: dict) -> dict:
        return (
            self.healing_settings
            | {"seed": point["seed"]}
            | {key: value for key, value in point.items() if key in self.healing_settings}
        )

    def _shots(self, point: dict, num_fewshot: int) -> dict:
        return {"num_fewshot": num_fewshot} | {
            key: point[key] for key in ("num_fewshot", "shot_order") if key in point
        }

    def _healing_windows(self, tokenizer, seed: int) -> torch.Tensor:
        return data.healing_windows(
            tokenizer,
            self.healing_settings["steps"] * self.healing_settings["batch_size"],
            self.seq_len,
            source=self.healing_source,
            seed=seed,
        )
