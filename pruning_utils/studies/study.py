"""Models that are cut, trained and measured: what a sweep calls with one point after the other.

A study is a cut, a recipe and measurements (:mod:`~pruning_utils.studies.recipes`). Here stands
what all notebooks share: one loaded model, the windows of a point, models that are trained once for
whoever asks for them, the rows of a measured model, and the tables that keep them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from pruning_utils import (
    data,
    embedded,
    evaluation,
    healing,
    importance,
    instructions,
    models,
    results,
    runtime,
    selection,
    similarity,
    surgery,
    width,
)
from pruning_utils.engine import later, memory, passes, records, wrappers
from pruning_utils.engine.later import nn, safetensors_torch, torch
from pruning_utils.studies.recipes import Cut, Point, Stage, layer_text, unties_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rules that a cut may name: at once, and in rounds.
RULES = ("none", "similarity", "deepest", "reverse order")
ROUND_RULES = ("reverse order", "taylor", "block influence")
PRECISIONS = ("bfloat16", "int8", "nf4")  # of stored weights; the study's dtype computes with them
COLUMNS = ("start", "dataset", "item", "correct", "correct_norm", "p_right", "nll")
N_VALIDATION = 16  # windows that training is watched on
REMOVED = "removed.json"  # which layers went in rounds
logger = logging.getLogger(__name__)
# What chooses channels and heads, and the layers of a round, is scored on this much text.
CALIBRATION = {"n_samples": 10, "seq_len": 128}
# What decides which model a training leaves: what other code of these trained is not used again.
HEALED_BY = (
    models.load_model,
    data.calibration_windows,
    similarity.measure_similarity,
    importance.taylor,
    selection.best_block,
    selection.deepest,
    selection.least_important,
    surgery.drop_layers,
    width.prune_width,
    data.healing_windows,
    data.evaluation_windows,
    healing.heal,
)


class Trained(NamedTuple):
    """A model as a point says it.

    Attributes:
        model: Cut and trained.
        history: Its losses while training, as :class:`healing.HealedModel` has them, with the
            tokens of all stages; None where it was not trained.
        removed: Layers that went in rounds, as ``(number in the unpruned model, round from 1)``.
    """

    model: nn.Module
    history: pd.DataFrame | None = None
    removed: tuple[tuple[int, int], ...] = ()


class Prepared(NamedTuple):
    """What a study works with, once all of its points and settings are checked.

    Attributes:
        network: The loaded model, which stays as it is.
        tokenizer: Its tokenizer.
        distances: Angular distances of all blocks; None where no point asks for the closest.
        shared: Outputs of first layers that models have in common.
        windows: Token ids ``(windows, seq_len)`` of each evaluation text, by its name.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    distances: np.ndarray | None
    shared: passes.SharedLayers
    windows: dict[str, torch.Tensor]


class Narrow(NamedTuple):
    """A model whose layers are all narrower.

    Attributes:
        size: The width of a :class:`recipes.Cut`.
        model: With weights of its own, which nobody may change.
    """

    size: tuple[int, ...]
    model: nn.Module


def loaded(
    model: str, revision: str | None, dtype: str, quantize: str | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and its tokenizer, of which one is kept in memory; nobody may change it.

    Where a directory holds other weights than before, these are loaded. Arguments and errors as for
    :func:`models.load_model`.
    """
    return _loaded(models.identity(model, revision), model, revision, dtype, quantize)


@functools.lru_cache(maxsize=1)
def _loaded(
    _identity: str, model: str, revision: str | None, dtype: str, quantize: str | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    return models.load_model(model, revision=revision, dtype=dtype, quantize=quantize)


class Study:
    """Models at points, measured one after the other from one copy of the loaded weights.

    A point is a dict of plain values, as :class:`recipes.Point` reads it. The rule ``similarity``
    removes the closest block (Sec. 3.2 of arXiv:2403.17887), ``deepest`` the last layers but the
    last one (its Sec. 4.4), ``reverse order`` the last ones (arXiv:2411.15558), ``none`` nothing.
    In rounds, ``n_dropped`` layers go ``per_round`` at a time: those with the lowest scores, or the
    last ones (``reverse order``).

    Models that are not trained share the outputs of the layers in front of the cut. A model that is
    trained alike for two points, or for two studies, is trained once. One that is trained in rounds
    is kept until it is measured: each round makes another model, and together they fill a disk.

    Args:
        points: All points that will be asked, checked before the first is computed.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        seq_len: Tokens in a window of any text.
        texts: Evaluation texts by name with their number of windows; of embedded texts a window is
            the beginning of a document (:func:`data.document_windows`), of a hub's text windows are
            packed. ``"xsum:128"`` has windows of 128 tokens.
        tasks: Benchmarks for :func:`evaluation.evaluate_tasks` by name with their number of shots;
            none is fine.
        limit: Questions of each task; None takes all.
        healing_settings: Keywords for :func:`healing.heal` that all points share. ``steps`` are the
            most that a recipe has in all, with ``batch_size`` windows each. None where no point is
            trained.
        checkpoints: Folder of the trained models, of :func:`checkpoints_of`.
        seed: Seed of the calibration text.
        n_calibration: Windows that the closest block is chosen on; None where no point asks for it.
        calibration_source: A text of :func:`data.calibration_windows`.
        healing_source: A text of :func:`data.healing_windows`, or a source of
            :func:`instructions.instruction_windows`: of a file, its content counts, not its place.

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
        texts: dict[str, int],
        tasks: dict[str, int],
        limit: int | None,
        checkpoints: str | Path,
        seed: int,
        healing_settings: dict | None = None,
        n_calibration: int | None = None,
        calibration_source: str = "xsum",
        healing_source: str | None = None,
    ):
        self.points = points
        self.model = model
        self.revision = revision
        self.dtype = dtype
        self.seq_len = seq_len
        self.texts = texts
        self.tasks = tasks
        self.limit = limit
        self.healing_settings = healing_settings or {}
        self.checkpoints = Path(checkpoints)
        self.seed = seed
        self.n_calibration = n_calibration
        self.calibration_source = calibration_source
        self.healing_source = healing_source
        # Scored anew it takes as long as a short training: kept while points in a row ask for it.
        self._narrow: Narrow | None = None

    # --- what is measured -------------------------------------------------------------------------

    def __call__(self, point: dict) -> list[dict]:
        """Rows with ``start``, ``dataset``, ``item`` and scores.

        ``start`` is the first layer that goes (L where none is given; 0 in a narrowed model). A row
        is a window of a text (``nll``: nats per token), a question of a task (scores as there), or
        a loss while training (dataset ``healing train`` or ``healing eval``, item: tokens).
        """
        asked = self._asked(point)
        found = self.model_of(asked)
        current = found.model
        rows = [] if found.history is None else training_rows(found.history)
        if asked.precision:
            current = stored(current, self.tokenizer, asked.precision)
        with self._sharing(asked, current):
            rows += self._text_rows(current) + self._task_rows(current, asked)
        if asked.cut.per_round:
            self._forget_rounds(asked)
        start = self._start(asked.cut)
        return [_completed({"start": start, **row}) for row in rows]

    def removed_at(self, point: dict) -> list[dict]:
        """Rows with ``layer`` and ``round``: the layers that went in rounds at a point.

        Layers are 0-based as in the unpruned model, rounds count from 1.
        """
        asked = self._asked(point)
        known = self._rounds_folder(asked) / REMOVED
        if known.is_file():
            removed = json.loads(known.read_text())
        else:
            removed = self.model_of(asked).removed
        return [{"layer": layer, "round": turn} for layer, turn in removed]

    def model_of(self, point: Point) -> Trained:
        """The model of a point, cut and trained; it may share weights with the loaded one."""
        if point.cut.per_round:
            return self._in_rounds(point)
        pruned = self._cut(point.cut)
        if not point.recipe.stages:
            return Trained(pruned)
        return self._in_stages(pruned, point)

    def _text_rows(self, model: nn.Module) -> list[dict]:
        rows = []
        for name, windows in self.windows.items():
            losses = evaluation.token_losses(model, windows).mean(1).tolist()
            rows += [
                {"dataset": name, "item": item, "nll": loss} for item, loss in enumerate(losses)
            ]
        return rows

    def _task_rows(self, model: nn.Module, point: Point) -> list[dict]:
        # What a call prepares, such as a copy of the tokenizer, is prepared once for its tasks.
        by_shots: dict[tuple, list[str]] = {}
        for task, num_fewshot in self.tasks.items():
            shots: dict[str, Any] = {"num_fewshot": num_fewshot, **point.shots}
            by_shots.setdefault(tuple(shots.items()), []).append(task)
        rows = []
        for items, tasks in by_shots.items():
            found = evaluation.evaluate_tasks(
                model, self.tokenizer, tasks, limit=self.limit, **dict(items)
            )
            named = found.questions.rename(columns={"task": "dataset", "question_id": "item"})
            rows += named.to_dict("records")
        return rows

    def _sharing(self, point: Point, model: nn.Module) -> contextlib.AbstractContextManager:
        """Layers in front of the cut are run once for all models with the loaded weights."""
        if point.is_only_cut:
            return self.shared.used_by(model, self._start(point.cut))
        return contextlib.nullcontext()

    # --- what is loaded, and checked --------------------------------------------------------------

    @functools.cached_property
    def _prepared(self) -> Prepared:
        network, tokenizer = loaded(self.model, self.revision, self.dtype)
        points = [Point.parse(point) for point in self.points]
        for point in points:
            self._check(point, network)
        for task, num_fewshot in self.tasks.items():
            for shots in {tuple({"num_fewshot": num_fewshot, **p.shots}.items()) for p in points}:
                check_task(task, limit=self.limit, **dict(shots))
        for seed in {point.seed for point in points if point.recipe.stages}:
            self._training_windows(tokenizer, seed)
        windows = {
            name: self._evaluation_windows(name, n_windows, tokenizer)
            for name, n_windows in self.texts.items()
        }
        distances = self._distances(network, tokenizer)
        starts = [
            self._start(point.cut, network, distances) for point in points if point.is_only_cut
        ]
        n_layers = len(models.decoder_layers(network))
        shared = passes.SharedLayers([start for start in starts if start < n_layers])
        return Prepared(network, tokenizer, distances, shared, windows)

    @property
    def network(self) -> nn.Module:
        """The loaded model, which stays as it is."""
        return self._prepared.network

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._prepared.tokenizer

    @property
    def shared(self) -> passes.SharedLayers:
        """Outputs of first layers that models have in common."""
        return self._prepared.shared

    @property
    def windows(self) -> dict[str, torch.Tensor]:
        """Token ids ``(windows, seq_len)`` of each evaluation text, by its name."""
        return self._prepared.windows

    def _distances(
        self, network: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> np.ndarray | None:
        """Angular distances of all blocks; None where no point asks for the closest."""
        if self.n_calibration is None:
            return None
        windows = data.calibration_windows(
            tokenizer,
            self.n_calibration,
            self.seq_len,
            source=self.calibration_source,
            seed=self.seed,
        )
        return similarity.measure_similarity(network, windows).angular_distance

    def _asked(self, point: dict) -> Point:
        """A point as it is asked for; it need not be among those that the study began with."""
        asked = Point.parse(point)
        self._check(asked, self.network)
        return asked

    def _check(self, point: Point, network: nn.Module) -> None:
        check_cut(point.cut, network)
        if point.cut.rule == "similarity" and self.n_calibration is None:
            raise ValueError(
                "n_calibration must be a number of windows where a point's rule is 'similarity', "
                "got None"
            )
        if point.precision and point.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {point.precision!r}"
            )
        left = len(models.decoder_layers(network)) - n_removed(point.cut)
        most = self.healing_settings.get("steps", 0)
        total = 0
        for stage in point.recipe.stages:
            settings = self._settings(stage, point.seed)
            check_training(network, settings, left)
            total += settings["steps"]
        if total > most:
            text = point.recipe.text()
            raise ValueError(f"recipe {text!r} has {total} steps, but there is text for {most}")
        if point.cut.per_round:
            check_rounds(point, total)
            rounds = point.cut.n_dropped // point.cut.per_round
            if rounds > 1:
                check_training(network, self._settings_of_rounds(point, rounds, network), left)

    # --- windows ----------------------------------------------------------------------------------

    def _evaluation_windows(
        self, name: str, n_windows: int, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        source, _, length = name.partition(":")
        is_embedded = (source, "evaluation") in data.EMBEDDED_SPLITS
        windows = data.document_windows if is_embedded else data.evaluation_windows
        return windows(tokenizer, n_windows, int(length or self.seq_len), source=source)

    def _training_windows(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> torch.Tensor:
        count = self.healing_settings["steps"] * self.healing_settings["batch_size"]
        source = self.healing_source
        return training_windows(tokenizer, count, self.seq_len, source=source, seed=seed)

    def _validation_windows(self) -> torch.Tensor:
        return data.evaluation_windows(
            self.tokenizer, N_VALIDATION, self.seq_len, split="validation"
        )

    # --- the cut ----------------------------------------------------------------------------------

    def _cut(self, cut: Cut) -> nn.Module:
        """The model without what goes; it shares weights with the loaded one, which stays."""
        network = self.network
        if self._narrow and self._narrow.size != cut.width:
            self._narrow = None
        if cut.width:
            if self._narrow is None:
                windows = data.calibration_windows(
                    self.tokenizer, **CALIBRATION, source=self.calibration_source, seed=self.seed
                )
                model = narrowed(wrappers.copied(network), cut.width, windows)
                self._narrow = Narrow(cut.width, model)
            return self._narrow.model
        layers = self._layers(cut, network, self._prepared.distances)
        return without_layers(network, layers) if layers else network

    def _layers(
        self, cut: Cut, network: nn.Module, distances: np.ndarray | None
    ) -> tuple[int, ...]:
        """0-based numbers of the layers that go at once."""
        if cut.rule == "similarity" and distances is not None:
            return selection.best_block(distances, cut.n_dropped).layers
        if cut.rule in RULES:
            n_layers = len(models.decoder_layers(network))
            return selection.deepest(n_layers, cut.n_dropped, keep_last=kept_last(cut.rule))
        return cut.layers

    def _start(
        self, cut: Cut, network: nn.Module | None = None, distances: np.ndarray | None = None
    ) -> int:
        """The first layer that is not the loaded model's: L where none goes, or none is known."""
        if network is None:
            network, distances = self.network, self._prepared.distances
        if cut.width:
            return 0
        layers = self._layers(cut, network, distances)
        return layers[0] if layers else len(models.decoder_layers(network))

    # --- the training -----------------------------------------------------------------------------

    def _settings(self, stage: Stage, seed: int) -> dict:
        """Keywords of :func:`healing.heal` for a stage."""
        return {**self.healing_settings, **stage.settings, "seed": seed}

    def _made(self, model: nn.Module) -> dict:
        """What a trained model is known by, but for the cut and the recipe."""
        return {
            "model": models.identity(self.model, self.revision),
            "data": data.identity(),
            "dtype": runtime.dtype_name(model.dtype),
            "seq_len": self.seq_len,
            "text": text_identity(self.healing_source),
            "trained_with": {"device": model.device.type, **runtime.versions()},
        }

    def _folder(self, kind: str, made: dict) -> Path:
        return self.checkpoints / f"{kind}-{records.digest(records.canonical(made))[:16]}"

    def _in_stages(self, pruned: nn.Module, point: Point) -> Trained:
        """The model after all stages, each on fresh text."""
        windows = self._training_windows(self.tokenizer, point.seed)
        validation = self._validation_windows()
        layers = self._layers(point.cut, self.network, self._prepared.distances)
        made = self._made(pruned) | {"layers": layer_text(layers)}
        if point.cut.width:
            made["width"] = layer_text(point.cut.width)
            made["calibration"] = [self.calibration_source, self.seed, CALIBRATION]
        stages: list[dict] = []
        histories = []
        steps_before = 0
        current = pruned
        for stage in point.recipe.stages:
            settings = self._settings(stage, point.seed)
            stages.append({**settings, "skipped": steps_before})
            first = steps_before * settings["batch_size"]
            count = settings["steps"] * settings["batch_size"]
            current, history = healed_once(
                current,
                self.tokenizer,
                windows[first : first + count],
                validation,
                settings,
                self._folder("set", {**made, "stages": stages}),
            )
            histories.append(history.assign(tokens=history["tokens"] + first * self.seq_len))
            steps_before += settings["steps"]
        return Trained(current, pd.concat(histories))

    def _in_rounds(self, point: Point) -> Trained:
        """The model whose layers are chosen again after each round of training.

        The steps of the recipe are shared out evenly over the rounds, so that all ways to
        ``n_dropped`` layers see the same tokens. Each round has a learning-rate schedule of its
        own, its share of the warm-up steps, rounded down, and fresh text. Validation text is looked
        at in the last round alone. With all layers in one round this is removal at once.
        """
        rounds = point.cut.n_dropped // point.cut.per_round
        if rounds == 1:
            chosen = self._chosen(self.network, point.cut)
            found = self._in_stages(without_layers(self.network, chosen), _at_once(point, chosen))
            return found._replace(removed=tuple((layer, 1) for layer in chosen))
        settings = self._settings_of_rounds(point, rounds, self.network)
        windows = self._training_windows(self.tokenizer, point.seed)
        size = settings["steps"] * settings["batch_size"]
        folder = self._rounds_folder(point)
        current = self.network
        left = [*range(len(models.decoder_layers(current)))]
        removed: list[tuple[int, int]] = []
        histories = []
        with records.locked(folder):
            for turn in range(rounds):
                chosen = self._chosen(current, point.cut)
                removed += [(left[layer], turn + 1) for layer in chosen]
                left = [layer for place, layer in enumerate(left) if place not in chosen]
                current, history = healed_once(
                    without_layers(current, chosen),
                    self.tokenizer,
                    windows[turn * size : (turn + 1) * size],
                    self._validation_windows() if turn == rounds - 1 else None,
                    settings,
                    folder / "trained" / f"round-{turn + 1}",
                )
                tokens = history["tokens"] + turn * size * self.seq_len
                histories.append(history.assign(tokens=tokens))
            with runtime.atomic_path(folder / REMOVED) as temporary:
                temporary.write_text(json.dumps(removed))
        return Trained(current, pd.concat(histories), tuple(removed))

    def _settings_of_rounds(self, point: Point, rounds: int, network: nn.Module) -> dict:
        """Settings of each round: of steps and of their warm-up it has its share."""
        settings = self._settings(point.recipe.stages[0], point.seed)
        steps, warmup_steps = settings["steps"] // rounds, settings.get("warmup_steps")
        if warmup_steps is None:
            whole = healing.check_settings(network, settings)
            warmup_steps = whole["warmup_steps"] if steps > 1 else 0
        return settings | {"steps": steps, "warmup_steps": warmup_steps // rounds}

    def _rounds_folder(self, point: Point) -> Path:
        """Of the trainings of a point in rounds, and of what was removed in them."""
        made = self._made(self.network) | {
            "calibration": [self.calibration_source, self.seed, CALIBRATION],
            "cut": [point.cut.rule, point.cut.n_dropped, point.cut.per_round],
            "settings": self._settings(point.recipe.stages[0], point.seed),
        }
        return self._folder("rounds", made)

    def _forget_rounds(self, point: Point) -> None:
        """Delete the models of a point's rounds: all at once, for half of them is no run."""
        folder = self._rounds_folder(point)
        trained, ended = folder / "trained", folder / "ended"
        if not folder.is_dir():
            return  # all layers went in one round
        with records.locked(folder):
            shutil.rmtree(ended, ignore_errors=True)
            if trained.is_dir():
                trained.rename(ended)
                shutil.rmtree(ended, ignore_errors=True)

    def _chosen(self, model: nn.Module, cut: Cut) -> tuple[int, ...]:
        """The layers of one round, 0-based in the model as it is now; scores are in float32."""
        if cut.rule == "reverse order":
            n_layers = len(models.decoder_layers(model))
            return selection.deepest(n_layers, cut.per_round, keep_last=0)
        windows = data.calibration_windows(
            self.tokenizer, **CALIBRATION, source=self.calibration_source, seed=self.seed
        )
        exact = wrappers.copied(model).float()
        if cut.rule == "taylor":
            scores = importance.taylor(exact, windows)
        else:
            scores = similarity.measure_similarity(exact, windows).block_influence
        return selection.least_important(scores, cut.per_round)


def _at_once(point: Point, layers: tuple[int, ...]) -> Point:
    """The point of a model that lacks these layers from the beginning, trained alike."""
    return Point(Cut(layers=layers), point.recipe, point.seed)


def _completed(row: dict) -> dict:
    """The row with all columns, in order."""
    return {name: row.get(name, np.nan) for name in COLUMNS}


# --- cuts -----------------------------------------------------------------------------------------


def without_layers(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A copy of the model without these layers (0-based) that shares its weights."""
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    return surgery.drop_layers(wrappers.copied(model, weights), layers)


def narrowed(
    model: nn.Module, size: Sequence[int], windows: torch.Tensor | None = None
) -> nn.Module:
    """The model with fewer feed-forward channels and key-value heads in every layer, in place.

    Args:
        model: A causal language model.
        size: Channels and key-value heads that stay.
        windows: Token ids ``(N, T)``: what has the largest Taylor scores on them stays. Without
            any, what has the largest weights.
    """
    channels, heads = size
    return width.prune_width(
        model,
        intermediate_size=channels,
        n_kv_heads=heads,
        criterion="magnitude" if windows is None else "taylor",
        input_ids=windows,
    )


def n_removed(cut: Cut) -> int:
    """Number of layers that go."""
    return cut.n_dropped if cut.rule else len(cut.layers)


def kept_last(rule: str) -> int:
    """Number of last layers that a rule never takes."""
    return 0 if rule == "reverse order" else 1


def check_cut(cut: Cut, network: nn.Module) -> None:
    """Refuse a cut that the model does not allow, with a ValueError."""
    n_layers = len(models.decoder_layers(network))
    if cut.per_round:
        if cut.rule not in ROUND_RULES:
            raise ValueError(f"rule must be one of {', '.join(ROUND_RULES)}, got {cut.rule!r}")
        selection.deepest(n_layers, cut.n_dropped, keep_last=0)
        if not 1 <= cut.per_round <= cut.n_dropped or cut.n_dropped % cut.per_round:
            raise ValueError(
                f"per_round must divide n_dropped, got {cut.per_round} of {cut.n_dropped}"
            )
    elif cut.rule:
        if cut.rule not in RULES or (cut.rule == "none") != (cut.n_dropped == 0):
            raise ValueError(
                f"rule must be one of {', '.join(RULES)}, 'none' at n_dropped 0 only, "
                f"got {cut.rule!r} at {cut.n_dropped}"
            )
        selection.deepest(n_layers, cut.n_dropped, keep_last=kept_last(cut.rule))
    elif cut.width:
        for name, size in zip(("intermediate_size", "n_kv_heads"), cut.width, strict=True):
            width.checked_size(network, name, size)
    else:
        ascending = sorted({*cut.layers} & {*range(n_layers)})
        if list(cut.layers) != ascending or len(cut.layers) == n_layers:
            raise ValueError(
                f"layers must be ascending numbers from 0 to {n_layers - 1}, not all of them, "
                f"got {layer_text(cut.layers)!r}"
            )


# --- training -------------------------------------------------------------------------------------


def training_windows(
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int,
    seq_len: int,
    *,
    source: str | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Windows to train on, of chats or of texts, by what the source is.

    Arguments, result and errors are those of :func:`instructions.instruction_windows` where the
    source is one of its own, and else of :func:`data.healing_windows`.
    """
    if source is not None and instructions.is_source(source):
        return instructions.instruction_windows(
            tokenizer, n_samples, seq_len, source=source, seed=seed
        )
    return data.healing_windows(tokenizer, n_samples, seq_len, source=source, seed=seed)


def check_training(network: nn.Module, settings: dict, n_layers: int) -> None:
    """Refuse settings of training that a model with ``n_layers`` left does not allow."""
    if "method" not in settings:
        raise ValueError(f"a training must name its method, got {settings!r}")
    settings = healing.check_settings(network, settings)
    if settings["method"] == "last_layers" and settings["last_k"] > n_layers:
        raise ValueError(
            f"last_k must be at most {n_layers}, the layers that are left, got {settings['last_k']}"
        )


def check_rounds(point: Point, steps: int) -> None:
    """Refuse rounds that cannot share out the steps of a recipe of one stage evenly."""
    if len(point.recipe.stages) != 1:
        raise ValueError(
            f"a point in rounds must have a recipe of one stage, got {point.recipe.text()!r}"
        )
    if steps * point.cut.per_round % point.cut.n_dropped:
        raise ValueError(
            f"the rounds must share {steps} steps evenly, got per_round {point.cut.per_round} "
            f"of {point.cut.n_dropped}"
        )


def healed_once(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_ids: torch.Tensor,
    eval_ids: torch.Tensor | None,
    settings: dict,
    folder: Path,
) -> tuple[nn.Module, pd.DataFrame]:
    """A trained model and its history, trained only where the folder does not hold them.

    Adapters stay there as they are. Of other methods the end alone is kept, and of it the weights
    that training has changed or added: what a step needs is six times as large as they are. Two
    processes that ask for one model train it once.

    Args:
        model: As cut.
        tokenizer: Its tokenizer.
        train_ids: Windows to train on, ``(N, T)``.
        eval_ids: Windows whose loss is measured on the way, or None.
        settings: Keywords of :func:`healing.heal`.
        folder: Of this training alone.
    """
    from pruning_utils.engine import trainer  # importing it takes seconds

    kept = folder / "kept"
    weights, losses = kept / "model.safetensors", kept / "history.csv"
    training = folder / "training"
    with records.locked(folder):
        if kept.is_dir() and not trainer.is_whole(kept):
            logger.warning("the trained weights in %s are damaged; training them again", kept)
            shutil.rmtree(kept)
        if kept.is_dir():
            healed = wrappers.copied(model)
            if unties_head(settings):
                models.untie_head(healed)
            # What is not there is as it was.
            healed.load_state_dict(safetensors_torch.load_file(weights), strict=False)
            return healed, pd.read_csv(losses)
        found = healing.heal(
            model,
            tokenizer,
            train_ids,
            eval_ids=eval_ids,
            merge=True,
            output_dir=training,
            **settings,
        )
        if settings["method"] not in healing.ADAPTERS:
            kept.mkdir()
            found.history.to_csv(losses, index=False)
            safetensors_torch.save_file(changed_weights(found.model, model), weights)
            trainer.seal(kept)
            shutil.rmtree(training)
        return found.model, found.history


def changed_weights(healed: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights, by name, in which a trained model differs from the one that it was trained from."""
    before = dict(model.named_parameters())
    return {
        name: weight.detach().contiguous()
        for name, weight in healed.named_parameters()
        if name not in before or not torch.equal(weight, before[name])
    }


def training_rows(history: pd.DataFrame) -> list[dict]:
    """Losses while training as rows of a table: all on validation text, each fourth of a step."""
    return [
        {"dataset": f"healing {row.split}", "item": int(row.tokens), "nll": row.loss}
        for row in history.itertuples()
        if row.split == "eval" or row.step % 4 == 0
    ]


def stored(model: nn.Module, tokenizer: PreTrainedTokenizerBase, precision: str) -> nn.Module:
    """A copy of the model whose weights are as one of ``PRECISIONS`` holds them.

    It computes in the model's dtype.
    """
    if precision == PRECISIONS[0]:
        rounded = wrappers.copied(model)
        for weight in rounded.parameters():  # not buffers: rotary frequencies have their own
            weight.data = weight.data.to(torch.bfloat16).to(weight.dtype)
        return rounded
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(model, tokenizer, folder)
        return models.load_model(folder, quantize=precision, dtype=model.dtype)[0]


def check_task(task: str, *, limit: int | None, **shots: int) -> None:
    """Refuse a task that does not exist, or has no choices of which one is right."""
    for found in evaluation.load_tasks([task], limit=limit, **shots)[task]["tasks"].values():
        if found.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise ValueError(
                "tasks must have choices of which one is right, or one answer, but "
                f"{task} is of the kind {found.OUTPUT_TYPE}"
            )


def text_identity(source: str | None) -> str | None:
    """What a text to train on is known by: its name, or of a file its name and content."""
    if source is None or not instructions.is_source(source):
        return source
    return instructions.identity(source)


# --- tables ---------------------------------------------------------------------------------------


def checkpoints_of(profile: str, source: str | None) -> Path:
    """Folder of the models that are trained on a source of text at a profile."""
    by_source = (instructions.instruction_windows,) if instructions.is_source(source) else ()
    return results.checkpoint_path(profile, (*HEALED_BY, *by_source))


def study_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    table: str = "",
    recompute: bool = False,
    **settings: Any,
) -> tuple[pd.DataFrame, Path]:
    """What a :class:`Study` finds at these points, and the file that holds it.

    Args:
        points: As for the study.
        profile: Name of the profile, which decides the folders of results and of trained models.
        notebook: Name of the notebook that owns the table.
        model: Name for :func:`models.load_model`, with ``revision``; it names the table.
        table: What follows the model in that name, where a notebook has several tables.
        recompute: Compute it anew, although it is there.
        settings: All others of the study.
    """
    study, kept = _study(points, profile, notebook, model, revision, table, settings)
    kept["recompute"] = can_recompute(model, recompute)
    return results.sweep(points, study, **kept), kept["path"]


def removed_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    table: str,
    recompute: bool = False,
    **settings: Any,
) -> tuple[pd.DataFrame, Path]:
    """What :meth:`Study.removed_at` finds at points in rounds, and the file that holds it.

    Arguments as for :func:`study_table`, of which this table says what its models lack.
    """
    study, kept = _study(points, profile, notebook, model, revision, table, settings)
    kept["recompute"] = can_recompute(model, recompute)
    return results.sweep(points, study.removed_at, **kept), kept["path"]


def _study(
    points: Sequence[dict],
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    table: str,
    settings: dict,
) -> tuple[Study, dict]:
    """A study, and where what it finds is kept: ``path`` and ``parameters``."""
    source = settings.get("healing_source")
    study = Study(
        points,
        model=model,
        revision=revision,
        checkpoints=checkpoints_of(profile, source),
        **settings,
    )
    said = {"healing_source": text_identity(source)} if "healing_source" in settings else {}
    identities = {"model": models.identity(model, revision), "data": data.identity()}
    return study, {
        "path": table_path(profile, notebook, model, table),
        "parameters": {**identities, **settings, **said},
    }


def trained_model(
    point: dict, *, profile: str, model: str, revision: str | None, **settings: Any
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of a point and its tokenizer, trained, or as a table of this profile kept it.

    Other arguments, and errors, as for :class:`Study`; nothing is measured.
    """
    nothing: dict[str, Any] = {"texts": {}, "tasks": {}, "limit": None}
    study = Study(
        [point],
        model=model,
        revision=revision,
        checkpoints=checkpoints_of(profile, settings.get("healing_source")),
        **{**settings, **nothing},
    )
    return study.model_of(Point.parse(point)).model, study.tokenizer


def point_table(
    compute: Callable[..., dict | list[dict]],
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    table: str,
    recompute: bool = False,
    reads_text: bool = False,
    own_process: bool = False,
    recorded: Mapping[str, object] | None = None,
    **settings: Any,
) -> tuple[pd.DataFrame, Path]:
    """What a function finds at points, and the file that holds it; others as for
    :func:`study_table`.

    Args:
        compute: Called with a point and, by name, ``model``, ``revision`` and the settings.
        points: Dicts of plain values.
        reads_text: Whether it reads embedded texts, whose version is then recorded.
        own_process: Compute each point in a process of its own, so that its peak of memory is its
            own.
        recorded: What else is recorded with the table, and is asked for when it is read.
        settings: Of the function, recorded too.
    """
    identities = {"model": models.identity(model, revision)}
    if reads_text:
        identities["data"] = data.identity()
    path = table_path(profile, notebook, model, table)
    if own_process and later.torch_is_imported() and torch.cuda.is_available():
        # The model that is kept, and what torch keeps of trainings, would take their memory.
        _loaded.cache_clear()
        memory.give_back()
    with contextlib.ExitStack() as undo:
        found = results.sweep(
            points,
            functools.partial(compute, model=model, revision=revision, **settings),
            path=path,
            parameters={**identities, **settings, **(recorded or {})},
            executor=undo.enter_context(FreshProcesses()) if own_process else None,
            recompute=can_recompute(model, recompute),
        )
    return found, path


def can_recompute(model: str, recompute: bool) -> bool:
    """Whether a table is computed anew: if so asked, and its embedded model is installed.

    The table of a model that is not installed is read as it is, and a warning says so. Half of a
    notebook would be computed before the model is missed.

    Args:
        model: As for :func:`study_table`.
        recompute: Whether it is asked for.
    """
    if not recompute or embedded.is_installed(model):
        return recompute
    logger.warning("%s is not installed: its tables are read, not computed anew", model)
    return False


def table_path(profile: str, notebook: str, model: str, table: str = "") -> Path:
    """The file of a model's table of a notebook."""
    name = "-".join(filter(None, (results.slug(model), table)))
    return results.table_path(profile, notebook, name)


def models_at_hand(
    model: str, *, profile: str, notebook: str, table: str = ""
) -> tuple[list[str], list[str]]:
    """The models that a notebook looks at: the one it is given, or all embedded ones at hand.

    Args:
        model: A name for :func:`models.load_model`; ``embedded`` stands for all embedded models.
        profile: Name of the profile.
        notebook: Name of the notebook that owns the tables.
        table: The table that says whether a model has been computed.

    Returns:
        Names of the models of which a table is kept, or can be computed here, and of those that
        are missing: neither a table nor the package that holds the model is there.
    """
    if model != embedded.EMBEDDED:
        return [model], []
    may_compute = not os.environ.get(results.NO_COMPUTE)
    here: list[str] = []
    missing: list[str] = []
    for name in embedded.MODELS:
        is_kept = table_path(profile, notebook, name, table).exists()
        can_be_made = may_compute and embedded.is_installed(name)
        (here if is_kept or can_be_made else missing).append(name)
    return here, missing


def joined(tables: Mapping[str, tuple[pd.DataFrame, Path]]) -> tuple[pd.DataFrame, list[Path]]:
    """Tables of several models as one, with the column ``model`` in front, and their files."""
    rows = [found.assign(model=name) for name, (found, _) in tables.items()]
    table = pd.concat(rows, ignore_index=True).set_index("model").reset_index()
    return table, [path for _, path in tables.values()]


class FreshProcesses(ProcessPoolExecutor):
    """One process for each point of a sweep, one after the other.

    Ctrl-C is for the process that waits: as a context manager it ends what still runs where the
    block ends by an exception.
    """

    def __init__(self) -> None:
        super().__init__(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            max_tasks_per_child=1,
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),
        )

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> bool | None:
        """Wait for what runs, or end it."""
        if kind is not None:
            for process in list((self._processes or {}).values()):
                process.terminate()
        return super().__exit__(kind, *rest)
