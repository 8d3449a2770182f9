"""Configurations of the papers' models, from which plans and rehearsals begin."""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd
from parameters import Refused
from transformers import AutoConfig, PreTrainedConfig

from pruning_utils import models
from pruning_utils.engine import hub, model_files

CONFIGURATIONS = "model_configurations.csv"


@functools.cache
def configuration(name: str, reference: Path) -> tuple[PreTrainedConfig, str]:
    """A model's configuration, and where it was read.

    Of an embedded model or a directory it is config.json; of a hub id the file in the local cache
    of the hub where it is there, else its row in reference/model_configurations.csv.

    Raises:
        Refused: If none of them is there.
    """
    if name in (models.EMBEDDED, *models.MODELS) or Path(name).is_dir():
        try:
            source = models.resolve(name, None)
        except (ValueError, ModuleNotFoundError) as error:
            raise Refused(str(error)) from error
        return model_files.configuration(source, {}), "config.json"
    with hub.asked_or_cached():
        try:
            found = model_files.configuration(name, {"local_files_only": True})
            return found, "config.json in the hub's cache"
        except (OSError, ValueError):
            pass
    return stated_configuration(name, reference), f"reference/{CONFIGURATIONS}"


def stated_configuration(name: str, reference: Path) -> PreTrainedConfig:
    """A model's configuration by its row in reference/model_configurations.csv.

    Raises:
        Refused: If it has none.
    """
    table = pd.read_csv(reference / CONFIGURATIONS).set_index("model")
    if name not in table.index:
        raise Refused(
            f"no configuration of {name}: download its config.json, or add it to "
            f"reference/{CONFIGURATIONS}; there are: {', '.join(table.index)}"
        )
    row = table.loc[name]
    words = ("model_type", "tied", "source")
    sizes = {key: int(row[key]) for key in row.index if key not in words}
    return AutoConfig.for_model(row["model_type"], **sizes, tie_word_embeddings=bool(row["tied"]))
