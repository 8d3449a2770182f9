"""Configurations that a model holds: its own, shared with no other model, layers renumbered.

A configuration object may serve several models, and a quantised model's configuration names layers
in its settings. Both have to be seen to before a model loses layers.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from pruning_utils.engine.later import nn

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

# Parts of paths to layers that are not those of the decoder.
OTHER_LAYERS = re.compile(r"vision|visual|audio|speech|encoder|mtp")
# Parts of a path or of a pattern of paths: a dot between them may be escaped.
DOT = re.compile(r"(\\?\.)")


def make_own(model: nn.Module) -> None:
    """Put, in place, copies of all configurations that a model's modules hold in their stead.

    Modules that held one object hold one copy of it.
    """
    from transformers import PreTrainedConfig

    copied: dict[int, Any] = {}
    for part in model.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, PreTrainedConfig):
                vars(part)[name] = copy.deepcopy(value, copied)


def refuse_numbers_beyond(layers: nn.ModuleList) -> None:
    """Refuse layers that bear numbers of a longer list: the cache has no place for them.

    Args:
        layers: The decoder layers of a model.

    Raises:
        ValueError: If a part of a layer has a ``layer_idx`` of their count or more.
    """
    for place, layer in enumerate(layers):
        for part in layer.modules():
            number = vars(part).get("layer_idx")
            if isinstance(number, int) and number >= len(layers):
                raise ValueError(
                    f"layer {place} of {len(layers)} bears the number {number}: layers "
                    "were removed without numbering the others anew (layer_idx)"
                )


def quantization_of(model: PreTrainedModel, path: str, kept: list[int]) -> dict[str, Any] | None:
    """A model's settings of quantisation, once only some of its layers are left.

    Args:
        model: A causal language model.
        path: Path of the list of its decoder layers.
        kept: Ascending 0-based numbers of the layers that stay.

    Returns:
        The settings by name, names of layers renumbered and those of removed layers left out; None
        for a model without such settings.

    Raises:
        ValueError: If a setting names layers in a form that is not understood.
    """
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else vars(settings)
    return _renumbered(copy.deepcopy(values), path.rpartition(".")[2], kept)


def set_quantization(model: PreTrainedModel, values: dict[str, Any] | None) -> None:
    """Set, in place, what :func:`quantization_of` returned."""
    quantizer = getattr(model, "hf_quantizer", None)
    for holder in (model.config, quantizer):
        settings = getattr(holder, "quantization_config", None)
        if values is not None and settings is not None:
            (settings if isinstance(settings, dict) else vars(settings)).update(values)


def _renumbered(value: Any, leaf: str, kept: list[int]) -> Any:
    """A value with the layers' numbers in it renewed; entries of removed layers are left out."""
    if isinstance(value, str):
        return _renumbered_path(value, leaf, kept)
    if isinstance(value, (list, tuple)):
        changed = [_renumbered(entry, leaf, kept) for entry in value]
        return type(value)(entry for entry in changed if entry is not None)
    if isinstance(value, dict):
        names = {name: _renumbered(name, leaf, kept) for name in value}
        return {
            names[name]: _renumbered(entry, leaf, kept)
            for name, entry in value.items()
            if name is None or names[name] is not None
        }
    return value


def _renumbered_path(path: str, leaf: str, kept: list[int]) -> str | None:
    """A path of modules, or a pattern of paths, after the cut; None if its layer is gone."""
    parts = DOT.split(path)
    for place, part in enumerate(parts):
        before = parts[place - 2] if place >= 2 else ""
        is_layer = before.removeprefix("*") == leaf and not OTHER_LAYERS.search(path)
        # Everything but a name or a plain "any number" before a number, or around one.
        is_pattern = before.endswith("*") or (is_layer and not part.isdecimal())
        if is_pattern and re.search(r"\d", part.replace(r"\d", "")):
            raise ValueError(
                f"quantization_config names layers in a form that is not known here: {path!r}"
            )
        if is_layer and part.isdecimal():
            if int(part) not in kept:
                return None
            parts[place] = str(kept.index(int(part)))
    return "".join(parts)
