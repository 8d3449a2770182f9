"""What is written of a model: weights as in memory, a configuration that tells the truth of them.

:func:`surgery.save` chooses the folder. This module fills it and reads it back before anybody else
can. Files that transformers writes are completed in two ways. What they say of the weights is made
true: shared head, layer kinds, weights that are not there, code that is not there. And what
transformers 5 calls by a new name is written under its old name too, since serving programs still
read with transformers 4: without it they take defaults, and say nothing.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pruning_utils import __version__, runtime
from pruning_utils.embedded import quiet_loading
from pruning_utils.engine import passes
from pruning_utils.engine.later import nn, torch
from pruning_utils.engine.memory import is_lack_of_memory

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# In a saved directory: which of its files we wrote.
MARKER = "pruning_utils.json"
# Values of a weight that are compared after it was read back, evenly spaced.
SAMPLES = 256
# Counts of layers that predict further tokens: transformers runs none, so none are in memory.
FURTHER_TOKENS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_layers",
    "mtp_num_hidden_layers",
    "num_mtp_modules",
)
# Fields that name code which a saved folder does not hold.
NAMES_OF_CODE = ("auto_map", "custom_pipelines")
# Settings that a tokenizer writes only if it was made with them, not if they were set later.
SIDES = ("padding_side", "truncation_side")
# Tokenizers of these names add tokens to each text in transformers 4, unless they say otherwise.
ADD_BY_DEFAULT = ("Llama", "CodeLlama", "Gemma", "Cohere")
# The factors of longrope, and what Phi-3 says at most beside them.
LONGROPE_FACTORS = {"short_factor", "long_factor"}
LONGROPE_OF_PHI3 = LONGROPE_FACTORS | {"rope_type", "type", "original_max_position_embeddings"}
# Names of transformers 4, and what they are called now.
FORMER_NAMES = {"torch_dtype": "dtype", "num_experts": "num_local_experts"}
# A period in layers, the list that it stands for, and what the last layer of each period is.
PERIODS = {
    "sliding_window_pattern": ("layer_types", "full_attention"),
    "_sliding_window_pattern": ("layer_types", "full_attention"),
    "full_attention_interval": ("layer_types", "full_attention"),
    "global_attn_every_n_layers": ("layer_types", "full_attention"),
    "no_rope_layer_interval": ("no_rope_layers", 0),
}


def mark(folder: Path, *further: str) -> None:
    """Write down which files of a directory are ours: all that are there, or further ones too.

    Args:
        folder: That is saved, or has been saved.
        further: Names of files that were added to a directory which is marked already. One that an
            older version saved, without a list, stays as it is.
    """
    if further:
        listed = _marked(folder)
        if listed is None:
            return
        names = {*listed, *further}
    else:
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    content = {"pruning_utils": __version__, "files": sorted(names)}
    with runtime.atomic_path(folder / MARKER) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _marked(folder: Path) -> set[str] | None:
    """Names of the files in a directory that are ours; None where its mark names none.

    Raises:
        ValueError: If the mark cannot be read.
    """
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        listed = found.get("files")
        return None if listed is None else {MARKER, *map(str, [*listed])}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"its {MARKER} is damaged") from error


def refuse_other_tokenizer(tokenizer: object) -> None:
    """ValueError for what is neither a tokenizer of transformers nor None."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ValueError(
            "tokenizer must be one of transformers, as load_model returns it, or None, got "
            f"{tokenizer!r}"
        )


def refuse_what_others_wrote(folder: Path, name: str) -> None:
    """Refuse to replace a directory that holds anything but what we wrote there.

    Args:
        folder: That exists.
        name: What the message calls it.

    Raises:
        ValueError: If it is a file, not one of ours, or holds further files, one of which is named.
    """
    allowed = "path must be a new or empty directory, or one written by surgery.save"
    if not folder.is_dir():
        raise ValueError(f"{allowed}, got {name}, which is a file")
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    if names and MARKER not in names:
        raise ValueError(f"{allowed}, got {name}")
    if names:
        try:
            ours = _marked(folder)
        except ValueError as error:
            raise ValueError(f"{allowed}, got {name}: {error}") from error
        others = sorted(names - (names if ours is None else ours))
        if others:
            raise ValueError(
                f"{name} holds what surgery.save did not write, {others[0]} for one: give "
                "overwrite=True to lose it, or another path"
            )


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    is_plain: bool,
) -> None:
    """Write a model and its tokenizer, if there is one, and see that it is read back as it is.

    Args:
        model: A model of transformers without adapters; it is left as it was.
        tokenizer: Its tokenizer, or None.
        folder: A new folder, which is made.
        is_plain: Whether weights are held in 16 or 32 bits, whatever the files held that they came
            from. They are then written without a word of that.

    Raises:
        ValueError: If transformers cannot write these weights, or what it wrote is not the model.
        OSError: If writing fails.
    """
    try:
        with _as_it_is_held(model, is_plain), quiet_loading():
            model.save_pretrained(folder)
        _complete(folder / "config.json", _complete_configuration)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            _complete(
                folder / "tokenizer_config.json",
                lambda content: _complete_tokenizer(content, tokenizer),
            )
        refuse_unlike(model, folder, device="cpu" if is_plain else model.device)
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # the code of architectures and quantisers fails in many ways
        if is_lack_of_memory(error):
            raise
        told = str(error) or type(error).__name__
        raise ValueError(f"{type(model).__name__} cannot be saved: {told}") from error


@contextlib.contextmanager
def _as_it_is_held(model: PreTrainedModel, is_plain: bool) -> Iterator[None]:
    """Let transformers save what is in memory, with a configuration that says what that is.

    Left alone, transformers undoes what it did to weights as it loaded them. Of quantised weights
    not all can be undone, and those that are held in 16 bits now would be rounded again.
    """
    with contextlib.ExitStack() as undo:
        config = true_configuration(model)
        undo.enter_context(passes.replaced(model, "config", config))
        if _were_unpacked(model):
            undo.enter_context(passes.replaced(model, "_weight_conversions", None))
        undo.enter_context(generation_as_it_is(model))
        if is_plain:
            vars(config).pop("quantization_config", None)
            undo.enter_context(passes.replaced(model, "hf_quantizer", None))
        yield


@contextlib.contextmanager
def generation_as_it_is(model: nn.Module) -> Iterator[None]:
    """Let transformers save the settings of generation, whatever it thinks of them.

    Those of Llama 2, which sample without saying so, it saves only as long as nobody has changed
    any of them, such as the token for padding.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    with passes.replaced(own, "_original_object_hash", hash(own)):
        yield


def _were_unpacked(model: PreTrainedModel) -> bool:
    """Whether the code of a quantisation took part when transformers loaded the weights."""
    conversions = getattr(model, "_weight_conversions", None) or []
    steps = [step for each in conversions for step in getattr(each, "operations", None) or []]
    return any(type(step).__module__.startswith("transformers.integrations.") for step in steps)


# --- a configuration that tells the truth ---------------------------------------------------------


def true_configuration(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of a model's configuration that says of its weights what is so.

    Whether the head is the embedding is seen from the weights themselves: checkpoints exist whose
    configuration says otherwise.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for part in (config, text):
        # Of offloaded weights it cannot be seen.
        if head is not None and not head.weight.is_meta:
            part.tie_word_embeddings = _is_one(head.weight, embedding.weight)
        for field in FURTHER_TOKENS:
            if getattr(part, field, None):
                setattr(part, field, 0)
        for field in NAMES_OF_CODE:
            vars(part).pop(field, None)
    return config


def _is_one(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two weights are one, or two names of the same memory."""
    return one is other or (
        one.numel() > 0
        and (one.data_ptr(), one.device, one.dtype) == (other.data_ptr(), other.device, other.dtype)
        and (one.shape, one.stride()) == (other.shape, other.stride())
    )


def _complete(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change, in place, what a JSON file says, if there is one."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _complete_configuration(content: dict[str, Any]) -> None:
    """Drop what is not so of the layers that are left, and add the names of transformers 4."""
    for value in list(content.values()):
        if isinstance(value, dict) and "model_type" in value:
            _complete_configuration(value)
    for field, (of_layers, last) in PERIODS.items():
        period, kinds = content.get(field), content.get(of_layers)
        if period and kinds and not _repeats(kinds, period, last):
            del content[field]
    step, places = content.get("interleave_moe_layer_step"), content.get("moe_layers")
    if step and places != list(range(step - 1, content["num_hidden_layers"], step)):
        del content["interleave_moe_layer_step"]
    content.update(_of_transformers_4(content))


def _repeats(kinds: list[object], period: object, last: object) -> bool:
    """Whether of these kinds of layers every ``period``-th is ``last``, and no other one."""
    if type(period) is not int:
        return False
    return all((kind == last) == (place % period == 0) for place, kind in enumerate(kinds, start=1))


def _of_transformers_4(content: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 looks for, and would take a default for in silence."""
    found = {name: content[new] for name, new in FORMER_NAMES.items() if content.get(new)}
    rope = content.get("rope_parameters") or {}
    model_type = content.get("model_type", "")
    if "full_attention" in rope:
        return found | _rotation_by_kind(model_type, rope)
    if "rope_theta" not in rope:
        return found
    scaling = dict(rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            found[name] = scaling.pop(name)
    is_plain = scaling.get("rope_type", "default") == "default" and set(scaling) <= {"rope_type"}
    found["rope_scaling"] = None if is_plain else scaling
    if model_type.startswith("phi3") and LONGROPE_FACTORS <= scaling.keys() <= LONGROPE_OF_PHI3:
        # It looks for its type and factors alone. The rest is derived again by transformers 5.
        factors = {name: scaling[name] for name in sorted(LONGROPE_FACTORS)}
        found["rope_scaling"] = {"type": "longrope", **factors}
    if model_type.startswith("gpt_neox"):
        found["rotary_emb_base"] = found["rope_theta"]
        found["rotary_pct"] = found.get("partial_rotary_factor", 1.0)
    return found


def _rotation_by_kind(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    """The same where kinds of layers rotate in their own ways: few architectures did before."""
    full, local = rope["full_attention"] or {}, rope.get("sliding_attention") or {}
    is_modernbert = model_type.startswith("modernbert")
    found = {
        "global_rope_theta" if is_modernbert else "rope_theta": full.get("rope_theta"),
        "local_rope_theta" if is_modernbert else "rope_local_base_freq": local.get("rope_theta"),
    }
    if model_type.startswith(("gemma3", "olmo3")) and full.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    return {name: value for name, value in found.items() if value is not None}


def _complete_tokenizer(content: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the names that transformers 4 knows, and what it would take for granted."""
    content.pop("auto_map", None)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    further = content.get("extra_special_tokens")
    if isinstance(further, list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    _say_ends(content, tokenizer)
    content.update({side: getattr(tokenizer, side, "right") for side in SIDES})


def _say_ends(content: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which tokens a tokenizer adds, where transformers 4 would add some by default."""
    if str(content.get("tokenizer_class", "")).startswith(ADD_BY_DEFAULT):
        # To tokenize a text changes what a tokenizer says of truncation and padding.
        ids = copy.deepcopy(tokenizer)("a")["input_ids"]
        content.setdefault("add_bos_token", bool(ids) and ids[0] == tokenizer.bos_token_id)
        content.setdefault("add_eos_token", bool(ids) and ids[-1] == tokenizer.eos_token_id)


# --- read back ------------------------------------------------------------------------------------


def refuse_unlike(model: PreTrainedModel, folder: Path, *, device: str | torch.device) -> None:
    """Load what was written, as anybody would, and compare it with the model in memory.

    Args:
        model: The model that was written.
        folder: Where it was written.
        device: Where it is loaded. On the CPU files are mapped, so that hardly any memory is taken.

    Raises:
        ValueError: If names, shapes or, at :data:`SAMPLES` places each, values differ.
    """
    with quiet_loading():
        back, report = type(model).from_pretrained(
            folder,
            dtype="auto",
            device_map={"": device},
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    lost = sorted(report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]})
    if lost:
        raise ValueError(f"{len(lost)} weights would not be loaded again, {lost[0]} for one")
    held, loaded = model.state_dict(), back.state_dict()
    names = sorted(held.keys() ^ loaded.keys())
    if names:
        raise ValueError(f"{len(names)} weights would be lost or added, {names[0]} for one")
    for name, tensor in held.items():
        if not _is_same(tensor, loaded[name]):
            raise ValueError(f"{name} would have other values when it is loaded again")


def _is_same(held: torch.Tensor, loaded: torch.Tensor) -> bool:
    """Whether two weights have one shape, and equal values where they are sampled."""
    if held.shape != loaded.shape:
        return False
    # Offloaded weights are in the files that they were read from.
    if not held.numel() or held.is_meta or loaded.is_meta:
        return True
    places = torch.linspace(0, held.numel() - 1, SAMPLES, dtype=torch.float64).long()
    values = held.detach().flatten()[places.to(held.device)]
    others = loaded.detach().flatten()[places.to(loaded.device)]
    # Not all types of few bits can be compared as they are.
    return torch.allclose(values.cpu().double(), others.cpu().double(), 0, 0, equal_nan=True)
