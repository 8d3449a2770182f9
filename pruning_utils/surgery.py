"""Remove decoder layers from a model, save the smaller model, write the same cut as a mergekit
plan.

Layers are numbered from 0, in the order in which they run. A cut is planned completely, on a copy
of the configuration and on two weightless copies of the model, before the model itself changes: an
error leaves it as it was.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from safetensors import SafetensorError
from torch import nn

from pruning_utils import __version__, runtime
from pruning_utils.models import decoder_layers

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Configuration fields that speak of single layers, over the causal language models of transformers.
ENTRY_PER_LAYER = frozenset(
    (
        "layer_types",
        "mlp_layer_types",
        "layers_block_type",
        "layers_num_experts",
        "no_rope_layers",
        "attention_layers",
        "moe_layer_freq",
        "activation_sparsity_pattern",
        "layer_rope_theta",
        "num_attention_heads_per_layer",
        "intermediate_size",
        "num_experts",
        "moe_topk",
    )
)
LAYER_NUMBERS = frozenset(("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices"))
# 0: the first layer of another kind, 1: the last of a kind.
BOUNDARIES = {
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "max_window_layers": 0,
    "moe_layer_start_index": 0,
    "moe_layer_end_index": 1,
}
# Of RWKV, which halves weights by layer number as it evaluates, and of Inkling 2, which attends
# over groups of layers.
COUNTED_WHEN_RUN = ("rescale_every", "n_layers_per_attn_res_block")
# Lists that may be as long as the model is deep by chance, or that are rewritten by name.
OTHER_LISTS = re.compile(
    "architectures|.*_token_ids?|.*_multipliers|time_step_limit|mtp_.*|(block|attention)_types"
)
# Caches count no tokens.
WITHOUT_LENGTH = frozenset(("linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"))
MARKER = "pruning_utils.json"  # tells our directories from somebody else's


def _kept_layers(layers: Iterable[int], n_layers: int) -> list[int]:
    """Ascending numbers of the layers that stay when ``layers`` go; ValueError for anything but
    different numbers."""
    allowed = f"layers must be different integers in [0, {n_layers})"
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise ValueError(f"{allowed}, got {layers!r}")
    dropped: set[int] = set()
    for layer in layers:
        number = layer.item() if hasattr(layer, "item") else layer  # NumPy and torch scalars
        if (
            not isinstance(number, int)
            or isinstance(number, bool)
            or not 0 <= number < n_layers
            or number in dropped
        ):
            raise ValueError(f"{allowed}, got {layer!r}{' twice' if number in dropped else ''}")
        dropped.add(number)
    if len(dropped) == n_layers:
        raise ValueError(f"at least one layer must stay, got all {n_layers} to drop")
    return [layer for layer in range(n_layers) if layer not in dropped]


def _refuse_adapters(model: nn.Module) -> None:
    """ValueError if PEFT wraps the model or sits in it."""
    if any(type(part).__module__.startswith("peft.") for part in model.modules()):
        raise ValueError(
            f"{type(model).__name__} carries adapters: merge them first (merge_and_unload)"
        )


def _refuse_unfit(model: nn.Module, layers: nn.ModuleList, kept: list[int]) -> None:
    """ValueError for what no configuration repairs: adapters, shared weights, computations that
    depend on depth."""
    _refuse_adapters(model)
    owner: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if owner.setdefault(id(parameter), number) != number:
                raise ValueError(f"layers {owner[id(parameter)]} and {number} share {name}")
    text = model.config.get_text_config(decoder=True)
    if types := getattr(text, "layer_types", None):
        if not WITHOUT_LENGTH.issuperset(types) and WITHOUT_LENGTH.issuperset(
            types[layer] for layer in kept
        ):
            raise ValueError(
                "no attention layer would stay, and without one the cache cannot count tokens"
            )
        if (
            text.model_type == "minimax" and types[kept[0]] != "full_attention"
        ):  # its cache asks layer 0 for the length
            raise ValueError(f"the first layer must be one of full attention, got {types[kept[0]]}")


def _new_fields(text: PreTrainedConfig, kept: list[int]) -> dict[str, object]:
    """What changes in a decoder's configuration; ValueError for an unknown field that seems to
    speak of layers."""
    n_layers, position = text.num_hidden_layers, {layer: new for new, layer in enumerate(kept)}
    fields: dict[str, object] = {"num_hidden_layers": len(kept)}
    for name, value in vars(text).items():
        if name in COUNTED_WHEN_RUN and value:
            raise ValueError(f"{name} = {value} counts layers as the model runs")
        if isinstance(value, int) and name in BOUNDARIES and value < n_layers:
            fields[name] = (
                sum(layer < value + BOUNDARIES[name] for layer in kept) - BOUNDARIES[name]
            )
        if not isinstance(value, (list, tuple)) or not value or OTHER_LISTS.fullmatch(name):
            continue
        if name in ENTRY_PER_LAYER and len(value) == n_layers:
            fields[name] = [value[layer] for layer in kept]
        elif name in LAYER_NUMBERS:
            fields[name] = [position[layer] for layer in value if layer in position]
        elif len(value) == n_layers or (
            "layer" in name and all(type(entry) is int for entry in value)
        ):
            raise ValueError(
                f"{name} = {value} seems to speak of single layers in a way that is not known here"
            )
    if fields.get("attention_layers"):  # GPT-Neo expands its attention_types whenever it is loaded
        fields["attention_types"] = [[fields["attention_layers"], 1]]
    if isinstance(
        getattr(text, "block_types", None), list
    ):  # a pattern that RecurrentGemma repeats
        fields["block_types"] = [(text.block_types * n_layers)[layer] for layer in kept]
    if (
        step := getattr(text, "decoder_sparse_step", None) or 1
    ) > 1:  # every step-th layer is a mixture of experts
        fields |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [
                position[layer]
                for layer in kept
                if (layer + 1) % step or layer in text.mlp_only_layers
            ],
        }
    if overrides := text.to_dict().get("per_layer_config"):
        fields["per_layer_config"] = {
            position[int(layer)]: values
            for layer, values in overrides.items()
            if int(layer) in position
        }
    return fields


def _planned_configuration(
    config: PreTrainedConfig, kept: list[int]
) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The configuration of the smaller model, and the same as it comes back from disk; ValueError
    if it differs."""
    old, planned = config.get_text_config(decoder=True), copy.deepcopy(config)
    new, fields = planned.get_text_config(decoder=True), _new_fields(old, kept)
    for field, value in fields.items():
        setattr(new, field, value)
    reloaded = type(planned).from_dict(planned.to_diff_dict())
    back = reloaded.get_text_config(decoder=True)
    for field in sorted(
        ENTRY_PER_LAYER.union(fields) - {"per_layer_config"} - (old.per_layer_attributes or set())
    ):
        value, wanted = getattr(old, field, None), fields.get(field, getattr(new, field, None))
        if (
            field in ENTRY_PER_LAYER
            and isinstance(value, list)
            and len(value) == old.num_hidden_layers
        ):
            # Also where the class derives the list from other fields.
            wanted = [value[layer] for layer in kept]
        if getattr(back, field, None) != wanted:
            raise ValueError(
                f"{field} would have to be {wanted} after a reload, and would be "
                f"{getattr(back, field)}"
            )
    return planned, reloaded


def _skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """``type(model)(config)`` without memory for weights."""
    from transformers.initialization import meta_device_safe_creation_ops

    config = copy.deepcopy(config)
    config._attn_implementation = (
        "eager"  # the others may ask for hardware that a comparison does not need
    )
    with torch.device("meta"), meta_device_safe_creation_ops():
        return type(model)(config)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint of ``model`` holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _facts(module: nn.Module) -> dict[tuple[str, str], object]:
    """Class and plain attributes of every submodule (tuples as lists, as JSON has it), and the
    shapes of tensors."""

    def plain(value: object) -> bool:
        return (
            all(map(plain, value))
            if isinstance(value, (list, tuple))
            else isinstance(value, plain_types)
        )

    plain_types = (type(None), int, float, str, torch.dtype)
    return {
        (path, name): list(value) if isinstance(value, tuple) else value
        for path, part in module.named_modules()
        for name, value in {"class": type(part).__name__, **vars(part)}.items()
        if plain(value) and name != "name_or_path"
    } | {  # where a model came from says nothing of its layers
        (name, "shape"): shape for name, shape in _shapes(module).items()
    }


def _attribute_changes(
    before: PreTrainedModel, after: PreTrainedModel, name: str, kept: list[int]
) -> list[tuple]:
    """What makes ``before``, sliced here, an ``after``, skeletons both: (module path, attribute,
    value).

    ValueError for what differs beyond numbers of layers, a rule that the new configuration cannot
    express: a scale by depth, a first layer unlike the others, a shape. ``name`` is the path of the
    list of layers.
    """
    n_layers, changes = len(before.get_submodule(name)), []
    for layer in sorted(set(range(n_layers)).difference(kept), reverse=True):
        del before.get_submodule(name)[layer]
    old, new = _facts(before), _facts(after)
    for path, attribute in sorted(old.keys() | new.keys()):
        one, other = (facts.get((path, attribute), "absent") for facts in (old, new))
        if type(one) is type(other) and one == other:
            continue
        if other == "absent" and attribute != "shape" and not path.startswith(f"{name}."):
            continue  # belonged to a kind of layer that has gone altogether
        if type(one) is list:
            allowed = (
                [one[layer] for layer in kept] if len(one) == n_layers else None,
                [kept.index(layer) for layer in one if layer in kept],
                [kind for kind in one if kind in other],
            )
        else:
            allowed = (
                (sum(layer < one for layer in kept),)
                if type(one) is int and 0 <= one <= n_layers
                else ()
            )
        if other not in allowed:
            raise ValueError(f"{path}.{attribute} is {one}, and would be {other} after a reload")
        changes.append((path, attribute, other))
    return changes


def drop_layers(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """Remove decoder layers in place: the model computes, generates with a cache, saves and reloads
    without them.

    The layers that stay are renumbered, and every field of the configuration that speaks of single
    layers is cut to match. Weights are neither copied nor converted, tied nor untied. Any error
    comes before the first change.

    Args:
        model: A causal language model of transformers, at any dtype, also bitsandbytes-quantised.
        layers: 0-based numbers of the layers to remove, different from each other, in any order.
            Empty: no change.

    Returns:
        The same ``model``, with ``len(layers)`` fewer layers.

    Raises:
        ValueError: If a layer number is no integer in [0, number of layers), comes twice, or no
            layer would stay; if the model carries adapters or its layers share weights; if its
            architecture has a rule by depth that no configuration of the smaller model expresses
            (the message names it).
    """
    decoder = decoder_layers(model)
    if len(kept := _kept_layers(layers, len(decoder))) == len(decoder):
        return model
    try:
        _refuse_unfit(model, decoder, kept)
        name = next(path for path, module in model.named_modules() if module is decoder)
        planned, reloaded = _planned_configuration(model.config, kept)
        before = _skeleton(model, model.config)
        # Packed weights have other names and shapes than the skeleton's.
        if getattr(model, "hf_quantizer", None) is None and _shapes(model) != _shapes(before):
            raise ValueError("its weights are not those that its configuration describes")
        changes = _attribute_changes(before, _skeleton(model, reloaded), name, kept)
    except Exception as error:  # the code of the architectures refuses in many ways
        raise ValueError(
            f"{type(model).__name__} cannot be cut to layers {kept}: {error}"
        ) from error
    for layer in sorted(set(range(len(decoder))).difference(kept), reverse=True):
        del decoder[layer]
    for path, attribute, value in changes:
        setattr(model.get_submodule(path), attribute, value)
    old, new = (config.get_text_config(decoder=True) for config in (model.config, planned))
    changed = {field: value for field, value in vars(new).items() if vars(old).get(field) != value}
    # Modules may hold copies of the configuration, without the fields that differ between layers.
    for holder in (
        old,
        *(own for part in model.modules() for own in vars(part).values() if type(own) is type(old)),
    ):
        vars(holder).update(
            {field: value for field, value in changed.items() if field in vars(holder)}
        )
    return model


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a directory that plain ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer``
    load.

    It is written beside ``path`` and renamed into place: a reader sees the old directory or the
    whole new one.

    Args:
        model: A transformers model without adapters; quantised where transformers can save that.
        tokenizer: Its tokenizer, or None to write the model alone.
        path: The directory. It may exist if it is empty or was written by this function.
        overwrite: Replace a directory whatever it holds.

    Returns:
        ``path``, as a Path.

    Raises:
        ValueError: If ``path`` is a file or holds something else, or the model adapters or weights
            it cannot save.
        OSError: If writing fails (a full disk, say), with ``path`` named; nothing half-written
            stays.
    """
    path, quantizer = Path(path), getattr(model, "hf_quantizer", None)
    ours = path.is_dir() and (overwrite or (path / MARKER).is_file() or not any(path.iterdir()))
    if path.exists() and not ours:
        raise ValueError(
            f"path must be a new or empty directory, or one written by this function, got {path}"
        )
    _refuse_adapters(model)
    # On some CPUs bitsandbytes repacks 4-bit weights when it first evaluates, rounds their scales
    # and unpacks wrongly.
    if any(
        getattr(getattr(weight, "quant_state", 0), "packing_format_for_cpu", 0)
        for weight in model.parameters()
    ):
        raise ValueError(
            "4-bit weights that have evaluated on this CPU cannot be saved: drop the same layers "
            "from a fresh copy and save it before its first forward pass"
        )
    if quantizer is not None and not quantizer.is_serializable():
        raise ValueError(
            f"{type(quantizer).__name__} cannot save its weights: drop the same layers in 16 or 32 "
            "bits"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
            new, old = Path(beside, "new"), Path(beside, "old")
            model.save_pretrained(new)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            (new / MARKER).write_text(f'{{"pruning_utils": "{__version__}"}}\n')
            for file in filter(Path.is_file, new.iterdir()):
                file.chmod(0o644)  # safetensors lets nobody else read
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(new, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
    except (
        OSError,
        SafetensorError,
    ) as error:  # safetensors gives the number of a system error in its text only
        code = getattr(error, "errno", None) or int(
            (re.search(r"os error (\d+)", str(error)) or "05")[1]
        )
        raise OSError(
            code, f"could not write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return path


def mergekit_plan(
    model_name: str, n_layers: int, layers: Iterable[int], *, dtype: str = "bfloat16"
) -> str:
    """The same cut as a mergekit configuration, for ``mergekit-yaml plan.yml out/``.

    Args:
        model_name: Name on a hub, or directory, of the model to cut.
        n_layers: Its number of decoder layers, at least 1.
        layers: 0-based numbers of the layers to remove, as for :func:`drop_layers`.
        dtype: Of the written weights: ``bfloat16``, ``float16`` or ``float32``.

    Returns:
        YAML text: a slice ``layer_range: [start, end]``, half open, for each run of kept layers,
        passed through.

    Raises:
        ValueError: As :func:`drop_layers`; or for another dtype, an empty name, or ``n_layers``
            below 1.
    """
    if (
        not isinstance(model_name, str)
        or not model_name
        or type(n_layers) is not int
        or n_layers < 1
    ):
        raise ValueError(
            f"model_name must be a name and n_layers at least 1, got {model_name!r} and "
            f"{n_layers!r}"
        )
    kept = _kept_layers(layers, n_layers)
    runs = zip(
        [layer for layer in kept if layer - 1 not in kept],
        [layer + 1 for layer in kept if layer + 1 not in kept],
        strict=True,
    )
    plan = {
        "slices": [{"sources": [{"model": model_name, "layer_range": list(run)}]} for run in runs],
        "merge_method": "passthrough",
        "dtype": str(runtime.resolve_dtype(dtype)).removeprefix("torch."),
    }
    return yaml.safe_dump(plan, sort_keys=False, default_flow_style=None)
