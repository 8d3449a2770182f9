"""Remove decoder layers from a model, save the smaller one, write the cut as a mergekit plan.

Layers are numbered from 0, in the order in which they run. A cut is planned completely, on a copy
of the configuration and on two weightless copies of the model, before the model itself changes: an
error leaves it as it was.
"""

from __future__ import annotations

import copy
import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from safetensors import SafetensorError

from pruning_utils.engine import checks, held_configurations, passes, saved_models, wrappers
from pruning_utils.engine.later import nn, torch
from pruning_utils.models import decoder_layers, text_config

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
# RWKV halves weights by layer number as it evaluates; Inkling 2 attends over groups of layers.
COUNTED_WHEN_RUN = ("rescale_every", "n_layers_per_attn_res_block")
# Lists that may be as long as the model is deep by chance, or that are rewritten by name.
OTHER_LISTS = re.compile(
    "architectures|.*_token_ids?|.*_multipliers|time_step_limit|mtp_.*|(block|attention)_types"
)
# Kinds of layers whose caches count no tokens.
WITHOUT_LENGTH = frozenset(("linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"))
HAS_A_KIND = re.compile(r"has_\w+_layers")  # whether a kind of layer is there at all
ABSENT = "absent"  # stands for the value of an attribute that a module does not have


def _kept_layers(layers: Iterable[int], n_layers: int) -> list[int]:
    """Ascending numbers of the layers that stay when ``layers`` go, or a ValueError."""
    allowed = f"layers must be different integers in [0, {n_layers})"
    is_one = isinstance(layers, (str, bytes)) or getattr(layers, "ndim", 1) != 1
    if is_one or not isinstance(layers, Iterable):
        raise ValueError(f"{allowed}, got {layers!r}")
    # Scalars of NumPy and torch count as the numbers that they hold.
    dropped = [layer.item() if hasattr(layer, "item") else layer for layer in layers]
    for place, layer in enumerate(dropped):
        if type(layer) is not int or not 0 <= layer < n_layers:
            raise ValueError(f"{allowed}, got {layer!r}")
        if layer in dropped[:place]:
            raise ValueError(f"{allowed}, got {layer!r} twice")
    if len(dropped) == n_layers:
        raise ValueError(f"at least one layer must stay, got all {n_layers} to drop")
    return [layer for layer in range(n_layers) if layer not in dropped]


def _keep(layers: nn.ModuleList, kept: list[int]) -> None:
    """Delete, in place, all layers but those with these numbers, and number them anew.

    Modules may have been exchanged since the model was made (BigBird does so when it first sees a
    short text), so that a weightless copy does not show all that bear a number.
    """
    for layer in reversed(range(len(layers))):
        if layer not in kept:
            del layers[layer]
    for number, layer in zip(kept, layers, strict=True):
        for part in layer.modules():
            if vars(part).get("layer_idx") == number:
                part.layer_idx = kept.index(number)


def refuse_unfit(model: nn.Module, layers: nn.ModuleList, kept: list[int]) -> None:
    """Refuse a cut for reasons that no configuration repairs.

    Args:
        model: A causal language model.
        layers: Its decoder layers.
        kept: Ascending 0-based numbers of the layers that are to stay, at least one.

    Raises:
        ValueError: If the model carries adapters, parts of it are compiled, layers share weights or
            bear numbers of a longer list, the cache of what stays could not count tokens, or layers
            would lack the one whose keys and values they take.
    """
    wrappers.refuse_adapters(model)
    wrappers.refuse_compiled_parts(model)
    held_configurations.refuse_numbers_beyond(layers)
    owner: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if owner.setdefault(id(parameter), number) != number:
                raise ValueError(f"layers {owner[id(parameter)]} and {number} share {name}")
    text = text_config(model)
    types = getattr(text, "layer_types", None) or []
    left = [types[layer] for layer in kept] if types else []
    if left and WITHOUT_LENGTH.issuperset(left) and not WITHOUT_LENGTH.issuperset(types):
        raise ValueError(
            "no attention layer would stay, and without one the cache cannot count tokens"
        )
    # The last layers of Gemma 3n take keys and values from the nearest earlier one of their kind.
    n_shared = getattr(text, "num_kv_shared_layers", None) or 0
    lacking = sorted(set(left) - set(left[:-n_shared])) if n_shared else []
    if lacking:
        raise ValueError(
            f"num_kv_shared_layers = {n_shared}, and of {lacking[0]} no earlier layer would stay "
            "that makes keys and values for them"
        )
    # MiniMax's cache asks layer 0 for the length.
    if left and text.model_type == "minimax" and left[0] != "full_attention":
        raise ValueError(f"the first layer must be one of full attention, got {left[0]}")


# --- the configuration ----------------------------------------------------------------------------


def _new_fields(text: PreTrainedConfig, kept: list[int]) -> dict[str, object]:
    """What changes in a decoder's configuration.

    ValueError for an unknown field that seems to speak of layers.
    """
    n_layers = text.num_hidden_layers
    fields: dict[str, object] = {"num_hidden_layers": len(kept)}
    for name, value in vars(text).items():
        if name in COUNTED_WHEN_RUN and value:
            raise ValueError(f"{name} = {value} counts layers as the model runs")
        if name in BOUNDARIES and isinstance(value, int) and value < n_layers:
            fields[name] = (
                sum(layer < value + BOUNDARIES[name] for layer in kept) - BOUNDARIES[name]
            )
        if not isinstance(value, (list, tuple)) or not value or OTHER_LISTS.fullmatch(name):
            continue
        if name in ENTRY_PER_LAYER and len(value) == n_layers:
            fields[name] = [value[layer] for layer in kept]
        elif name in LAYER_NUMBERS:
            fields[name] = [kept.index(layer) for layer in value if layer in kept]
        elif len(value) == n_layers or (
            "layer" in name and all(type(entry) is int for entry in value)
        ):
            raise ValueError(
                f"{name} = {value} seems to speak of single layers in a way that is not known here"
            )
    return fields | _fields_of_own_form(text, fields, kept)


def _fields_of_own_form(
    text: PreTrainedConfig, fields: dict[str, object], kept: list[int]
) -> dict[str, object]:
    """Fields in which single architectures speak of layers, each in a form of its own."""
    found: dict[str, object] = {}
    # GPT-Neo expands its attention_types whenever it is loaded.
    if fields.get("attention_layers"):
        found["attention_types"] = [[fields["attention_layers"], 1]]
    # RecurrentGemma repeats a pattern.
    if isinstance(getattr(text, "block_types", None), list):
        found["block_types"] = [text.block_types[layer % len(text.block_types)] for layer in kept]
    # Every step-th layer is a mixture of experts, but those that are listed.
    step = getattr(text, "decoder_sparse_step", None) or 1
    if step > 1:
        dense = [layer for layer in kept if (layer + 1) % step or layer in text.mlp_only_layers]
        found["decoder_sparse_step"] = 1
        found["mlp_only_layers"] = [kept.index(layer) for layer in dense]
    overrides = text.to_dict().get("per_layer_config")
    if overrides:
        found["per_layer_config"] = {
            kept.index(int(layer)): values
            for layer, values in overrides.items()
            if int(layer) in kept
        }
    return found


def _planned_configuration(
    config: PreTrainedConfig, kept: list[int]
) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The configuration of the smaller model, and the same as it comes back from disk.

    ValueError if the two differ.
    """
    planned = copy.deepcopy(config)
    old, new = config.get_text_config(decoder=True), planned.get_text_config(decoder=True)
    fields = _new_fields(old, kept)
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


def configurations(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The decoder's configuration, and what modules hold of its class: itself, or copies of it."""
    text = text_config(model)
    held = (own for part in model.modules() for own in vars(part).values())
    return [text, *(own for own in held if type(own) is type(text))]


# --- weightless copies ----------------------------------------------------------------------------


def skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class as a configuration describes it, without memory for weights.

    Args:
        model: The model whose class is taken.
        config: The configuration; it is left as it was.

    Returns:
        ``type(model)(config)`` on torch's device ``meta``.
    """
    from transformers.initialization import meta_device_safe_creation_ops

    config = copy.deepcopy(config)
    # Other implementations may ask for hardware that a comparison does not need.
    config._attn_implementation = "eager"
    for part in (config, config.get_text_config(decoder=True)):
        # save_pretrained leaves the dtype behind as text, and some activations make tensors of it.
        if isinstance(part.dtype, str):
            part.dtype = getattr(torch, part.dtype, part.dtype)
    with torch.device("meta"), meta_device_safe_creation_ops():
        return type(model)(config)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint of ``model`` holds, by their names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def facts(module: nn.Module) -> dict[tuple[str, str], object]:
    """What can be compared of two models without their weights.

    Returns:
        By path and name of an attribute: of every submodule its class, as ``class``, and its plain
        attributes (tuples as lists, as JSON has it); of every saved tensor its ``shape``.
    """
    found: dict[tuple[str, str], object] = {}
    for path, part in module.named_modules():
        for name, value in {"class": type(part).__name__, **vars(part)}.items():
            # Where a model came from says nothing of its layers.
            if name != "name_or_path" and _is_plain(value):
                found[path, name] = list(value) if isinstance(value, tuple) else value
    return found | {(name, "shape"): shape for name, shape in shapes(module).items()}


def _is_plain(value: object) -> bool:
    """Whether a value is a number, a text, a dtype or None, or a list or tuple of such values."""
    plain = isinstance(value, (type(None), int, float, str, torch.dtype))
    return plain or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def _attribute_changes(
    before: PreTrainedModel, after: PreTrainedModel, name: str, kept: list[int]
) -> list[tuple[str, str, object]]:
    """What makes ``before``, sliced here, an ``after``: (module path, attribute, value).

    Both are skeletons; ``name`` is the path of the list of layers. ValueError for what differs
    beyond numbers of layers, a rule that the new configuration cannot express: a scale by depth, a
    first layer unlike the others, a shape.
    """
    n_layers = len(before.get_submodule(name))
    if len(after.get_submodule(name)) != len(kept):
        text = text_config(after)
        field = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        counts = [key for key, value in vars(text).items() if value == n_layers]
        raise ValueError(
            f"{field} does not count {name}: with {len(kept)} there, {n_layers} layers would come "
            f"back (fields with that number: {counts})"
        )
    _keep(before.get_submodule(name), kept)
    old, new = facts(before), facts(after)
    changes = []
    for path, attribute in sorted(old.keys() | new.keys()):
        value, other = old.get((path, attribute), ABSENT), new.get((path, attribute), ABSENT)
        is_same = type(value) is type(other) and value == other
        is_outside = attribute != "shape" and not path.startswith(f"{name}.")
        # What is outside the layers may serve a kind of layer that has gone altogether.
        if is_same or (is_outside and other == ABSENT):
            continue
        allowed = _renumbered(value, other, kept, n_layers)
        if is_outside and value is True and HAS_A_KIND.fullmatch(attribute):
            allowed.append(False)
        if other not in allowed:
            raise ValueError(f"{path}.{attribute} is {value}, and would be {other} after a reload")
        changes.append((path, attribute, other))
    return changes


def _renumbered(value: object, other: object, kept: list[int], n_layers: int) -> list[object]:
    """What may become of an attribute once only the layers ``kept`` are left.

    An integer may be the number of a layer. A list may hold an entry for each layer, numbers of
    layers, or kinds of layers, of which those in ``other`` are left, in any order.
    """
    if type(value) is int and 0 <= value <= n_layers:
        return [sum(layer < value for layer in kept)]
    if type(value) is not list:
        return []
    # A list that was a set has the order of its hashes.
    are_kinds = isinstance(other, list) and all(isinstance(kind, str) for kind in value)
    if are_kinds and len(set(other)) == len(other) and set(other) <= set(value):  # type: ignore
        return [other]
    return [
        [value[layer] for layer in kept] if len(value) == n_layers else [],
        [kept.index(layer) for layer in value if layer in kept],
        [kind for kind in value if isinstance(other, list) and kind in other],
    ]


# --- cutting, saving, describing ------------------------------------------------------------------


def drop_layers(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """Remove decoder layers in place.

    The model computes, generates with a cache, saves and reloads without them. The layers that stay
    are renumbered, and every field of the configuration that speaks of single layers is cut to
    match. Weights are neither copied nor converted, tied nor untied. Any error comes before the
    first change.

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
    kept = _kept_layers(layers, len(decoder))
    if len(kept) == len(decoder):
        return model
    try:
        refuse_unfit(model, decoder, kept)
        name = next(path for path, module in model.named_modules() if module is decoder)
        planned, reloaded = _planned_configuration(model.config, kept)
        before = skeleton(model, model.config)
        # Packed weights have other names and shapes than the skeleton's.
        if getattr(model, "hf_quantizer", None) is None and shapes(model) != shapes(before):
            raise ValueError("its weights are not those that its configuration describes")
        changes = _attribute_changes(before, skeleton(model, reloaded), name, kept)
        quantization = held_configurations.quantization_of(model, name, kept)
    except Exception as error:  # the code of the architectures refuses in many ways
        raise ValueError(
            f"{type(model).__name__} cannot be cut to layers {kept}: {error}"
        ) from error
    held_configurations.make_own(model)
    held_configurations.set_quantization(model, quantization)
    _keep(decoder, kept)
    for path, attribute, value in changes:
        setattr(model.get_submodule(path), attribute, value)
    old, new = vars(text_config(model)), vars(planned.get_text_config(decoder=True))
    changed = {field: value for field, value in new.items() if old.get(field) != value}
    for config in configurations(model):
        # Copies that layers hold lack the fields that differ between layers.
        vars(config).update(
            {field: value for field, value in changed.items() if field in vars(config)}
        )
    return model


def directory_to_write(path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """The directory that :func:`save` would write, with links followed, if it may.

    Args:
        path: As for :func:`save`, with ``overwrite``.
        overwrite: See above.

    Raises:
        ValueError: If it is no path, a file, holds something else, or is where a volume is mounted:
            that cannot be replaced.
    """
    replaces = checks.true_or_false("overwrite", overwrite)
    found = checks.file_path("path", path).resolve()  # a link stays a link, and "." has a name
    if os.path.ismount(found):
        raise ValueError(
            f"a model is written beside its place and renamed into it, but {path} is where a "
            "volume is mounted: name a new directory in it"
        )
    if found.exists() and not (replaces and found.is_dir()):
        saved_models.refuse_what_others_wrote(found, str(path))
    return found


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    finish: Callable[[Path], object] = wrappers.leave_as_it_is,
) -> Path:
    """Write a directory that plain ``from_pretrained`` of a model and of a tokenizer loads.

    It is written beside ``path`` and renamed into place: a reader sees the old directory, none
    for a moment, or the whole new one. Before that, it is loaded again: names and shapes of all
    weights, and 256 values of each, must be those in memory. The configuration says what is so,
    whatever it said before: a shared head, periods of layers, no code and no further-token
    layers that are not there. It names precision and rotation for transformers 4 as well.

    Args:
        model: A transformers model without adapters; quantised where transformers can save that.
            Weights that were read from fewer bits, and are held in 16 or 32, are saved as held.
        tokenizer: Its tokenizer, or None to write the model alone. The processor of a model that
            takes pictures or sound is not written: let ``finish`` save it into the directory.
        path: The directory. It may exist if it is empty or holds what this function wrote, and
            nothing else.
        overwrite: Replace a directory whatever it holds.
        finish: Called with the whole directory before it is renamed into place. Files that it adds
            belong to it, and where it raises an error nothing is replaced.

    Returns:
        ``path``, as a Path.

    Raises:
        ValueError: If ``path`` is a file or holds something else, the model or the tokenizer is
            none of transformers, the model is inside something else, has adapters, or weights that
            it cannot save, or what was written is not read back as it is in memory. Nothing
            half-written stays.
        OSError: If writing fails (a full disk, say), with ``path`` named; nothing half-written
            stays.
    """
    wrappers.refuse_wrapped(model)
    passes.refuse_missing_weights(model)
    wrappers.refuse_compiled_parts(model)
    saved_models.refuse_other_tokenizer(tokenizer)
    folder = directory_to_write(path, overwrite=overwrite)
    wrappers.refuse_adapters(model)
    # On some CPUs bitsandbytes repacks 4-bit weights when it first evaluates, rounds their scales
    # and unpacks them wrongly as soon as a state dict is asked for.
    states = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError(
            "4-bit weights that have evaluated on this CPU cannot be saved: drop the same layers "
            "from a fresh copy and save it before its first forward pass"
        )
    is_plain = _is_held_plainly(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not is_plain and not quantizer.is_serializable():
        raise ValueError(
            f"{type(quantizer).__name__} cannot save its weights: drop the same layers in 16 or 32 "
            "bits"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # What replaced files leave behind on a shared volume is no fault of what was written.
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
        ) as beside:
            new = Path(beside, "new")
            saved_models.write(model, tokenizer, new, is_plain=is_plain)
            finish(new)
            saved_models.mark(new)
            for file in filter(Path.is_file, new.iterdir()):
                file.chmod(checks.file_mode())  # safetensors lets nobody else read
            _replace_directory(folder, new, Path(beside, "old"))
    except (OSError, SafetensorError) as error:
        # safetensors gives the number of a system error in its text only.
        told = re.search(r"os error (\d+)", str(error))
        code = getattr(error, "errno", None) or (int(told[1]) if told else errno.EIO)
        raise OSError(
            code, f"could not write {folder}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return Path(path)


def _is_held_plainly(model: PreTrainedModel) -> bool:
    """Whether weights are held in 16 or 32 bits, although fewer may have been read from files."""
    config = copy.deepcopy(model.config)
    if getattr(model, "hf_quantizer", None) is None and not hasattr(config, "quantization_config"):
        return True
    vars(config).pop("quantization_config", None)
    kinds = ("class", "shape")
    plain = facts(skeleton(model, config))
    held = {place: fact for place, fact in facts(model).items() if place[1] in kinds}
    return (
        all(weight.is_floating_point() and weight.itemsize > 1 for weight in model.parameters())
        and all(type(weight.data) is torch.Tensor for weight in model.parameters())
        and held == {place: fact for place, fact in plain.items() if place[1] in kinds}
    )


def _replace_directory(path: Path, new: Path, old: Path) -> None:
    """Rename ``new`` to ``path``; what was there becomes ``old``, or stays if that fails."""
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:  # also where someone stops it
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise


def mergekit_plan(
    model_name: str, n_layers: int, layers: Iterable[int], *, dtype: str = "bfloat16"
) -> str:
    """The same cut as a mergekit configuration, for ``mergekit-yaml plan.yml out/``.

    It is the same where all layers are of one kind (Llama, Mistral, GPT-NeoX). mergekit changes the
    number of layers alone. Some configurations list the kind of each layer, in ``layer_types``
    (Gemma 3, Qwen 3) or ``no_rope_layers`` (SmolLM3). Take the ``config.json`` of :func:`save`
    there.

    Args:
        model_name: Name on a hub, or directory, of the model to cut.
        n_layers: Its number of decoder layers, at least 1.
        layers: 0-based numbers of the layers to remove, different from each other, in any order.
        dtype: Of the written weights: ``bfloat16``, ``float16`` or ``float32``.

    Returns:
        YAML text: a slice ``layer_range: [start, end]``, half open, for each run of kept layers,
        passed through.

    Raises:
        ValueError: If a layer number is no integer in [0, n_layers), comes twice, or no layer would
            stay; or for another dtype, an empty name, or ``n_layers`` below 1.
    """
    from pruning_utils.engine.precisions import DTYPES  # importing it imports torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not (isinstance(model_name, str) and model_name):
        raise ValueError(f"model_name must be a name, got {model_name!r}")
    n_layers = checks.whole_number("n_layers", n_layers, 1)
    kept = _kept_layers(layers, n_layers)
    starts = [layer for layer in kept if layer - 1 not in kept]
    ends = [layer + 1 for layer in kept if layer + 1 not in kept]
    plan = {
        "slices": [
            {"sources": [{"model": model_name, "layer_range": [start, end]}]}
            for start, end in zip(starts, ends, strict=True)
        ],
        "merge_method": "passthrough",
        "dtype": dtype,
    }
    return yaml.safe_dump(plan, sort_keys=False, default_flow_style=None)
