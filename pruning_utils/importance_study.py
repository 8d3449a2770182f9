"""Layers scored one by one and dropped as sets: what the notebooks on Shortened LLaMA
(arXiv:2402.02834) compute."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from pruning_utils import (
    data,
    depth_study,
    evaluation,
    healing,
    importance,
    models,
    results,
    runtime,
    selection,
    surgery,
)
from pruning_utils.engine import records

CRITERIA = ("magnitude", "magnitude L2", "taylor", "perplexity")
PLUS = {"keep_first": 4, "keep_last": 2}  # what the "+" rule never removes
# Of stored weights; what is computed with them has the study's dtype.
PRECISIONS = (
    "bfloat16",
    "int8",
    "nf4",
)
STAGE = ("method", "learning_rate", "steps")
# The paper's average: of plain accuracy for some tasks and of accuracy per character for the
# others.
SEVEN_TASKS = {
    "boolq": "correct",
    "piqa": "correct",
    "hellaswag": "correct_norm",
    "winogrande": "correct",
    "arc_easy": "correct",
    "arc_challenge": "correct_norm",
    "openbookqa": "correct_norm",
}


@functools.lru_cache(maxsize=1)
def _load(model: str, revision: str | None, dtype: str):
    """The points of one sweep share the loaded weights."""
    return models.load_model(model, revision=revision, dtype=dtype)


def score_layers(
    point: dict, *, model: str, revision: str | None, dtype: str, seq_len: int
) -> list[dict]:
    """Scores of all layers by every criterion on one draw of calibration text.

    Args:
        point: ``source`` (a calibration text), ``n_samples`` (windows) and ``seed`` (of the draw).
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        seq_len: Tokens in a window.

    Returns:
        Rows with ``criterion``, ``layer`` (0-based) and ``score``; a layer with a low score goes
        first. Magnitudes do not depend on the text.
    """
    network, tokenizer = _load(model, revision, dtype)
    windows = data.calibration_windows(
        tokenizer, point["n_samples"], seq_len, source=point["source"], seed=point["seed"]
    )
    scores = {
        "magnitude": importance.magnitude(network),
        "magnitude L2": importance.magnitude(network, norm=2),
        "taylor": importance.taylor(network, windows),
        "perplexity": importance.perplexity_without_layer(network, windows),
    }
    return [
        {"criterion": criterion, "layer": layer, "score": float(score)}
        for criterion in CRITERIA
        for layer, score in enumerate(scores[criterion])
    ]


def removed_sets(scores: pd.DataFrame, depths: Sequence[int]) -> pd.DataFrame:
    """The one-shot sets that scores lead to, with and without the "+" rule (first four and last two
    layers stay).

    Args:
        scores: Columns ``criterion``, ``layer`` and ``score``, one draw of text.
        depths: Numbers of layers to drop.

    Returns:
        A row for each criterion, rule and depth: ``rule`` (the criterion, with ``+`` where layers
        are protected), ``n_dropped`` and ``layers`` (ascending 0-based numbers as a text, such as
        ``"4 7 11"``).
    """
    rows = []
    for criterion, group in scores.groupby("criterion", sort=False):
        values = group.sort_values("layer")["score"].to_numpy()
        rows += [
            {
                "rule": f"{criterion}{mark}",
                "n_dropped": n_dropped,
                "layers": " ".join(map(str, selection.least_important(values, n_dropped, **kept))),
            }
            for mark, kept in (("", {}), ("+", PLUS))
            for n_dropped in depths
        ]
    return pd.DataFrame(rows)


def score_table(
    draws: Sequence[Sequence],
    *,
    profile: str,
    model: str,
    revision: str | None,
    dtype: str,
    seq_len: int,
    recompute: bool = False,
) -> tuple[pd.DataFrame, Path]:
    """What :func:`score_layers` finds on each draw (text, windows, seed), read if it is there, and
    the file with it."""
    path = results.table_path(profile, "06_block_importance", f"{results.slug(model)}-scores")
    points = [dict(zip(("source", "n_samples", "seed"), draw, strict=True)) for draw in draws]
    compute = functools.partial(
        score_layers, model=model, revision=revision, dtype=dtype, seq_len=seq_len
    )
    return results.sweep(
        points,
        compute,
        path=path,
        recompute=recompute,
        parameters={
            "model": models.identity(model, revision),
            "data": data.identity(),
            "dtype": dtype,
            "seq_len": seq_len,
        },
    ), path


def set_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    table: str,
    recompute: bool = False,
    **settings,
) -> tuple[pd.DataFrame, Path]:
    """What a :class:`SetStudy` finds at these points, read if it is there, and the file that holds
    it.

    Arguments as for :func:`depth_study.depth_table`.
    """
    study = SetStudy(
        points,
        model=model,
        revision=revision,
        **settings,
        checkpoints=results.checkpoint_path(profile, depth_study.HEALED_BY),
    )
    path = results.table_path(profile, notebook, f"{results.slug(model)}-{table}")
    return results.sweep(
        points,
        study,
        path=path,
        recompute=recompute,
        parameters={"model": models.identity(model, revision), "data": data.identity(), **settings},
    ), path


class SetStudy(depth_study.DepthStudy):
    """A :class:`depth_study.DepthStudy` whose points say which layers go and how the model is
    trained afterwards.

    A point is a dict of ``layers`` (ascending 0-based numbers as a text; empty for the whole
    model), ``recipe`` (method of :func:`healing.heal`, peak learning rate and steps, such as
    ``"lora 0.003 72"``; several stages, joined by `` + ``, follow each other on fresh text; empty
    for no training), ``seed``, and perhaps ``precision`` (in which the weights that are measured
    were stored: ``bfloat16``, ``int8`` or ``nf4``, rounded to it after training). What else the
    point holds names it for the reader. ``healing_settings`` are what all stages share, with
    ``steps`` as the most that a recipe has in all. ``texts`` may name the length of their windows,
    as in ``"xsum:128"``. Models trained alike are trained once, whatever rule their layers come
    from.
    """

    parts = ("layers",)  # what of a point says which model is trained

    def __init__(self, points: Sequence[dict], *, texts: dict[str, int], **settings):
        self.segments = texts
        super().__init__(
            [{**point, "healed": bool(point["recipe"])} for point in points],
            **settings,
            n_calibration=1,
            texts={name: count for name, count in texts.items() if ":" not in name},
        )

    def __call__(self, point: dict) -> list[dict]:
        """Rows as there; while healing, ``item`` counts the tokens of all stages."""
        network, tokenizer, _, shared = self.loaded
        current, rows = self.pruned(network, point), []
        start = (*self._block(None, point), len(models.decoder_layers(network)))[0]
        unchanged = not point["recipe"] and "precision" not in point
        if point["recipe"]:
            current, history = self._trained(current, tokenizer, point)
            rows += [
                {"dataset": f"healing {row.split}", "item": int(row.tokens), "nll": row.loss}
                for row in history.itertuples()
                if row.split == "eval" or row.step % 4 == 0
            ]
        if "precision" in point:
            current = stored(current, tokenizer, point["precision"])
        with shared.used_by(current, start) if unchanged else contextlib.nullcontext():
            for name, n_windows in self.segments.items():
                source, _, length = name.partition(":")
                windows = data.evaluation_windows(
                    tokenizer, n_windows, int(length or self.seq_len), source=source
                )
                losses = evaluation.token_losses(current, windows).mean(1).tolist()
                rows += [
                    {"dataset": name, "item": item, "nll": loss} for item, loss in enumerate(losses)
                ]
            for task, num_fewshot in self.tasks.items():
                found = evaluation.evaluate_tasks(
                    current, tokenizer, [task], limit=self.limit, num_fewshot=num_fewshot
                ).questions
                rows += found.rename(columns={"task": "dataset", "question_id": "item"}).to_dict(
                    "records"
                )
        return [
            {key: {"start": start, **row}.get(key, np.nan) for key in depth_study.DEPTH_COLUMNS}
            for row in rows
        ]

    def pruned(self, network: torch.nn.Module, point: dict) -> torch.nn.Module:
        """The model of a point before it is trained; it may share weights with the given one, which
        stays as it is."""
        weights = {id(weight): weight for weight in (*network.parameters(), *network.buffers())}
        layers = self._block(None, point)
        return surgery.drop_layers(copy.deepcopy(network, weights), layers) if layers else network

    def _trained(
        self, current: torch.nn.Module, tokenizer, point: dict
    ) -> tuple[torch.nn.Module, pd.DataFrame]:
        """The model after all stages, and its losses with the tokens of the stages added up."""
        windows, histories, before = self._healing_windows(tokenizer, point["seed"]), [], 0
        validation = data.evaluation_windows(tokenizer, 16, self.seq_len, split="validation")
        made = {
            "model": models.identity(self.model, self.revision),
            "data": data.identity(),
            "stages": [],
            "dtype": runtime.dtype_name(current.dtype),
            "seq_len": self.seq_len,
            "text": self.healing_source,
            **{part: point[part] for part in self.parts},
        }
        for settings in self._stages(point):
            made["stages"].append({**settings, "skipped": before})
            first = before * settings["batch_size"]
            count = settings["steps"] * settings["batch_size"]
            folder = self.checkpoints / f"set-{records.digest(records.canonical(made))[:16]}"
            current, history = _healed_once(
                current, tokenizer, windows[first : first + count], validation, settings, folder
            )
            histories.append(history.assign(tokens=history["tokens"] + first * self.seq_len))
            before += settings["steps"]
        return current, pd.concat(histories)

    def _stages(self, point: dict) -> list[dict]:
        stages = [
            dict(zip(STAGE, stage.split(), strict=True)) for stage in point["recipe"].split(" + ")
        ]
        return [
            self.healing_settings
            | {
                "method": stage["method"],
                "learning_rate": float(stage["learning_rate"]),
                "steps": int(stage["steps"]),
                "seed": point["seed"],
            }
            for stage in stages
        ]

    def _check(self, point: dict, network: torch.nn.Module) -> None:
        layers, n_layers = self._block(None, point), len(models.decoder_layers(network))
        if list(layers) != sorted({*layers} & {*range(n_layers)}) or len(layers) == n_layers:
            raise ValueError(
                f"layers must be ascending numbers from 0 to {n_layers - 1}, not all of them, got "
                f"{point['layers']!r}"
            )
        if point.get("precision", PRECISIONS[0]) not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {point['precision']!r}"
            )
        if point["recipe"]:
            try:
                stages = self._stages(point)
            except ValueError as error:
                raise ValueError(
                    f"recipe must be stages such as 'lora 0.003 72', joined by ' + ', got "
                    f"{point['recipe']!r}"
                ) from error
            if (total := sum(stage["steps"] for stage in stages)) > self.healing_settings["steps"]:
                raise ValueError(
                    f"recipe {point['recipe']!r} has {total} steps, but there is text for "
                    f"{self.healing_settings['steps']}"
                )
            for settings in stages:
                healing.check_settings(network, settings)

    def _block(self, distances: np.ndarray | None, point: dict) -> tuple[int, ...]:
        return tuple(int(layer) for layer in point["layers"].split())


def stored(model: torch.nn.Module, tokenizer, precision: str) -> torch.nn.Module:
    """A copy of the model with its weights as one of ``PRECISIONS`` holds them, computing in the
    model's dtype."""
    with tempfile.TemporaryDirectory() as folder:
        if precision == PRECISIONS[0]:
            rounded = copy.deepcopy(model)
            for weight in (
                rounded.parameters()
            ):  # not buffers: rotary frequencies have a precision of their own
                weight.data = weight.data.to(torch.bfloat16).to(weight.dtype)
            return rounded
        surgery.save(model, tokenizer, folder)
        return models.load_model(folder, quantize=precision, dtype=model.dtype)[0]


def _healed_once(
    model: torch.nn.Module,
    tokenizer,
    train_ids: torch.Tensor,
    eval_ids: torch.Tensor,
    settings: dict,
    folder: Path,
) -> tuple[torch.nn.Module, pd.DataFrame]:
    """A healed model and its history, trained where the folder does not hold them. Adapters stay
    there as they are; of other methods the end alone is kept, for what a training step needs is six
    times as large."""
    weights = folder / "model.safetensors"
    losses = folder / "history.csv"
    training = folder / "training"
    if weights.is_file():
        healed, tensors = copy.deepcopy(model), load_file(weights)
        if settings["method"] == "last_layers" and settings.get("untie", True):
            models.untie_head(healed)
        healed.load_state_dict(tensors, strict=False)  # tied weights are there once
        return healed, pd.read_csv(losses)
    found = healing.heal(
        model, tokenizer, train_ids, eval_ids=eval_ids, merge=True, output_dir=training, **settings
    )
    if settings["method"] not in healing.ADAPTERS:
        with runtime.atomic_path(losses) as temporary:
            found.history.to_csv(temporary, index=False)
        with runtime.atomic_path(weights) as temporary:  # last: what is there is whole
            save_file(
                {name: weight.contiguous() for name, weight in found.model.named_parameters()},
                temporary,
            )
        shutil.rmtree(training)
    return found.model, found.history
