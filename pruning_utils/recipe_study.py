"""Sets of layers and ways to train what is left: what the notebooks on Reassessing Layer Pruning
compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from pruning_utils import (
    data,
    depth_study,
    healing,
    importance_study,
    instructions,
    models,
    results,
)

# Said by the stage, the point or the study.
ELSEWHERE = (
    "method",
    "learning_rate",
    "steps",
    "seed",
    "batch_size",
)


class RecipeStudy(importance_study.SetStudy):
    """A :class:`importance_study.SetStudy` whose recipes may say settings of :func:`healing.heal`.

    They follow the steps of a stage, with values as in JSON: ``"last_layers 0.001 32 last_k=2
    untie=false"``; all but those in ``ELSEWHERE`` may stand there. The ``healing_source`` may also
    be one of :func:`instructions.instruction_windows`; of a file, its content counts and not its
    place.
    """

    def __init__(self, points: Sequence[dict], **settings):
        super().__init__(points, **settings)
        self.given_source = self.healing_source
        if instructions.is_source(self.given_source):  # what trained models are known by
            self.healing_source = instructions.identity(self.given_source)

    def _stages(self, point: dict) -> list[dict]:
        stages = []
        for stage in point["recipe"].split(" + "):
            words = stage.split()
            (settings,) = super()._stages({**point, "recipe": " ".join(words[:3])})
            stages.append(settings | further_settings(words[3:]))
        return stages

    def _check(self, point: dict, network: torch.nn.Module) -> None:
        super()._check(point, network)
        left = len(models.decoder_layers(network)) - self._n_dropped(point)
        for settings in self._stages(point) if point["recipe"] else []:
            settings = healing.check_settings(network, settings)
            if settings["method"] == "last_layers" and settings["last_k"] > left:
                raise ValueError(
                    f"last_k must be at most {left}, the layers that are left, got "
                    f"{settings['last_k']}"
                )
            if not isinstance(settings["untie"], bool) or not isinstance(
                settings["train_norm"], bool
            ):
                raise ValueError(
                    f"untie and train_norm must be true or false, got {point['recipe']!r}"
                )

    def _n_dropped(self, point: dict) -> int:
        return len(self._block(None, point))

    def _healing_windows(self, tokenizer, seed: int) -> torch.Tensor:
        if not instructions.is_source(self.given_source):
            return super()._healing_windows(tokenizer, seed)
        return instructions.instruction_windows(
            tokenizer,
            self.healing_settings["steps"] * self.healing_settings["batch_size"],
            self.seq_len,
            source=self.given_source,
            seed=seed,
        )


def further_settings(words: Sequence[str]) -> dict:
    """Settings of :func:`healing.heal` from words such as ``last_k=2``, values as in JSON.

    Raises:
        ValueError: If a word is none of that form, or names a setting twice or one of
            ``ELSEWHERE``.
    """
    found = {name: json.loads(value) for name, value in (word.split("=") for word in words)}
    if len(found) < len(words) or not found.keys().isdisjoint(ELSEWHERE):
        raise ValueError(
            f"each setting may be named once, and not {', '.join(ELSEWHERE)}, got "
            f"{' '.join(words)!r}"
        )
    return found


def checkpoints(profile: str, source: str | None) -> Path:
    """Folder of the models that are trained on a source of text at a profile."""
    made_by = (instructions.instruction_windows,) if instructions.is_source(source) else ()
    return results.checkpoint_path(profile, (*depth_study.HEALED_BY, *made_by))


def recipe_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    table: str,
    recompute: bool = False,
    kind: type = RecipeStudy,
    **settings,
) -> tuple[pd.DataFrame, Path]:
    """What a study of this kind finds at these points, read if it is there, and the file that holds
    it.

    Arguments as for :func:`depth_study.depth_table`; ``kind`` is :class:`RecipeStudy` or a class
    made from it.
    """
    if instructions.is_source(source := settings.get("healing_source")):
        named = {**settings, "healing_source": instructions.identity(source)}
    else:
        named = settings
    study = kind(
        points, model=model, revision=revision, **settings, checkpoints=checkpoints(profile, source)
    )
    path = results.table_path(profile, notebook, f"{results.slug(model)}-{table}")
    return results.sweep(
        points,
        study,
        path=path,
        recompute=recompute,
        parameters={"model": models.identity(model, revision), "data": data.identity(), **named},
    ), path
