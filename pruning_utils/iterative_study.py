"""Layers removed a few at a time, with healing in between."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import torch

from pruning_utils import (
    data,
    depth_study,
    importance,
    importance_study,
    models,
    recipe_study,
    runtime,
    selection,
    similarity,
    surgery,
)
from pruning_utils.engine import records

CALIBRATION = {"n_samples": 10, "seq_len": 128}  # of every round, as for removal at once
METRICS = ("reverse order", "taylor", "block influence")
POINT = ["metric", "n_dropped", "per_round", "layers", "recipe", "seed"]  # what a point holds
REMOVED = "removed"  # the dataset under which the layers stand that a point removed


class IterativeStudy(recipe_study.RecipeStudy):
    """A :class:`recipe_study.RecipeStudy` whose layers are chosen again after each round of
    healing.

    A point has ``metric`` (one of ``METRICS``; scores are taken in float32), ``n_dropped`` (layers
    in all) and ``per_round`` (layers in each round), with ``layers`` empty and a ``recipe`` of one
    stage. Its steps are shared out evenly over the rounds, each with a learning-rate schedule of
    its own and on fresh text, so that all ways to ``n_dropped`` layers see the same tokens; of the
    warm-up steps each round has its share, rounded down. The loss on validation text is measured in
    the last round alone. With all in one round a point is removal at once, and its model that of a
    :class:`recipe_study.RecipeStudy`.
    """

    def __call__(self, point: dict) -> list[dict]:
        """Rows as there, with ``start`` L, and under the dataset ``removed`` a row for each layer
        that went (``item``, 0-based as in the unpruned model; ``nll``: the round, from 1)."""
        rows = super().__call__(point)
        return rows + [
            {
                **dict.fromkeys(depth_study.DEPTH_COLUMNS, np.nan),
                "start": rows[0]["start"],
                "dataset": REMOVED,
                "item": layer,
                "nll": turn,
            }
            for layer, turn in self.removed
        ]

    def _trained(
        self, current: torch.nn.Module, tokenizer, point: dict
    ) -> tuple[torch.nn.Module, pd.DataFrame]:
        rounds = point["n_dropped"] // point["per_round"]
        if rounds == 1:
            chosen = self._chosen(current, tokenizer, point)
            self.removed = [(layer, 1) for layer in chosen]
            at_once = {**point, "layers": " ".join(map(str, chosen))}
            return super()._trained(self.pruned(current, at_once), tokenizer, at_once)
        windows, histories = self._healing_windows(tokenizer, point["seed"]), []
        validation = data.evaluation_windows(tokenizer, 16, self.seq_len, split="validation")
        (settings,) = self._stages(point)
        settings |= {name: settings[name] // rounds for name in ("steps", "warmup_steps")}
        made = {
            "model": models.identity(self.model, self.revision),
            "data": data.identity(),
            "seq_len": self.seq_len,
            "dtype": runtime.dtype_name(current.dtype),
            "text": self.healing_source,
            "calibration": [self.calibration_source, self.seed],
            "settings": settings,
        }
        left, self.removed = [*range(len(models.decoder_layers(current)))], []
        for turn in range(rounds):
            chosen = self._chosen(current, tokenizer, point)
            self.removed += [(left[layer], turn + 1) for layer in chosen]
            left = [layer for place, layer in enumerate(left) if place not in chosen]
            weights = {id(weight): weight for weight in (*current.parameters(), *current.buffers())}
            current = surgery.drop_layers(copy.deepcopy(current, weights), chosen)
            made |= {"removed": self.removed, "validated": turn == rounds - 1}
            folder = self.checkpoints / f"iterative-{records.digest(records.canonical(made))[:16]}"
            size = settings["steps"] * settings["batch_size"]
            current, history = importance_study._healed_once(
                current,
                tokenizer,
                windows[turn * size : (turn + 1) * size],
                validation if made["validated"] else None,
                settings,
                folder,
            )
            histories.append(history.assign(tokens=history["tokens"] + turn * size * self.seq_len))
        return current, pd.concat(histories)

    def _chosen(self, model: torch.nn.Module, tokenizer, point: dict) -> tuple[int, ...]:
        """The layers of one round, 0-based in the model as it is now."""
        if point["metric"] == "reverse order":
            return selection.deepest(
                len(models.decoder_layers(model)), point["per_round"], keep_last=0
            )
        windows = data.calibration_windows(
            tokenizer, **CALIBRATION, source=self.calibration_source, seed=self.seed
        )
        exact = copy.deepcopy(model).float()
        scores = (
            importance.taylor(exact, windows)
            if point["metric"] == "taylor"
            else similarity.measure_similarity(exact, windows).block_influence
        )
        return selection.least_important(scores, point["per_round"])

    def _check(self, point: dict, network: torch.nn.Module) -> None:
        super()._check(point, network)
        if (
            point["metric"] not in METRICS
            or point["layers"]
            or " + " in point["recipe"]
            or not point["recipe"]
        ):
            raise ValueError(
                f"a point must have a metric of {', '.join(METRICS)}, no layers and a recipe of "
                f"one stage, got {point}"
            )
        selection.deepest(len(models.decoder_layers(network)), point["n_dropped"], keep_last=0)
        (settings,), per_round = self._stages(point), point["per_round"]
        if (
            not 1 <= per_round <= point["n_dropped"]
            or point["n_dropped"] % per_round
            or (settings["steps"] * per_round % point["n_dropped"])
        ):
            raise ValueError(
                f"per_round must divide n_dropped, and the rounds the {settings['steps']} steps, "
                f"got per_round {per_round} of {point['n_dropped']}"
            )

    def _n_dropped(self, point: dict) -> int:
        return point["n_dropped"]
