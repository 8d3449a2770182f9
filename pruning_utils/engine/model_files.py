"""What a model's files hold: whether it is a model, all of it, and nothing that is code."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

from pruning_utils.engine.checks import whole_number
from pruning_utils.engine.later import torch
from pruning_utils.engine.memory import is_lack_of_memory

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

# Fields of a configuration that may name a kernel on a hub, which is code.
KERNELS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
ADAPTER = "adapter_config.json"
WEIGHTS = "model.safetensors"
# Architectures whose layers llama.cpp tells apart by their numbers alone.
KINDS_BY_NUMBER = ("gemma2", "gemma3_text", "smollm3", "llama4_text")
LAYERS_OF_27B = (46, 62)  # of Gemma 2 and 3, whose scale of attention llama.cpp knows by these
# Fields of a configuration that count parts which are built one by one, and more than any model has
# of them: building them would not end.
COUNTS = re.compile(r"(n|num)_(hidden_)?layers?|\w+_layers|depth|(n|num)_(\w+_)?experts")
TOO_MANY = 10_000
# Kinds of models whose tokens see those that follow them.
SEE_AHEAD = ("cpmant", "paligemma", "xlnet")
# Masks that were saved with the weights of GPT-2 and its kin, and are made anew today.
MASKS = re.compile(r".*\.(attn|attention)\.(masked_)?bias")
# What only a layer that predicts further tokens has, and the number of the layer.
OF_FURTHER_TOKENS = re.compile(r"(.*\.layers\.\d+\.)eh_proj\b.*")


def refuse_adapter(source: str, options: dict[str, Any]) -> None:
    """Refuse the files of a PEFT adapter: transformers would load another model behind it.

    Args:
        source: A directory or a hub id.
        options: Further arguments for reading from the hub.

    Raises:
        ValueError: If there is an adapter's configuration.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(source, revision=options.get("revision")) is not None:
        raise ValueError(
            f"it is a PEFT adapter ({ADAPTER}), not a model: load its base model, merge the "
            "adapter (peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()), save the "
            "result and load that"
        )


def refuse_kernels_of_hub(settings: dict[str, Any]) -> None:
    """Refuse a configuration that asks for a kernel on a hub, which is code that would be run.

    Args:
        settings: The configuration as it stands in the file, or a part of it.

    Raises:
        ValueError: If a field names such a kernel; the field and its value are named.
    """
    for field, value in settings.items():
        named = value.values() if isinstance(value, dict) else [value]
        if KERNELS.fullmatch(field) and any("/" in str(name) for name in named):
            raise ValueError(
                f"its configuration asks for {field} = {value!r}: that is code on a hub, and code "
                "that comes with a model is never run here"
            )
        if isinstance(value, dict):
            refuse_kernels_of_hub(value)


def configuration(source: str, options: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model, once it is seen to ask for nothing that is refused.

    Args:
        source: A directory or a hub id.
        options: Further arguments for reading it.

    Raises:
        ValueError: If a field names a kernel on a hub, or counts more than could be built, or the
            number of layers is no such number.
    """
    from transformers import AutoConfig, PreTrainedConfig

    settings = PreTrainedConfig.get_config_dict(source, **options)[0]
    refuse_kernels_of_hub(settings)
    refuse_countless(settings)
    refuse_seeing_ahead(settings)
    refuse_unknown_quantisation(settings)
    config = AutoConfig.from_pretrained(source, **options)
    n_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if n_layers is not None:
        whole_number("num_hidden_layers", n_layers, 1, TOO_MANY)
    return config


def auto_class(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """The class of transformers that loads a model with this configuration.

    Of a model that also takes pictures the text decoder is what is measured, cut and healed.

    Raises:
        ValueError: If it is no decoder-only language model; what it is instead is said.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    takes_pictures = type(config) in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_causal = type(config) in known.MODEL_FOR_CAUSAL_LM_MAPPING
    kinds = {
        "an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "an encoder-only": type(config) in known.MODEL_FOR_MASKED_LM_MAPPING,
        "not a causal language": not is_causal and not takes_pictures,
    }
    for kind, is_so in kinds.items():
        if is_so:
            raise ValueError(
                f"{config.model_type} is {kind} model; layer pruning needs a decoder-only language "
                "model"
            )
    # As a causal language model alone, some would leave the weights for pictures out.
    return AutoModelForImageTextToText if takes_pictures else AutoModelForCausalLM


def refuse_countless(settings: dict[str, Any]) -> None:
    """Refuse a configuration that asks for more layers or experts than could ever be built.

    Args:
        settings: The configuration as it stands in the file, or a part of it.

    Raises:
        ValueError: If a field counts more than :data:`TOO_MANY`; it is named.
    """
    for field, value in settings.items():
        if COUNTS.fullmatch(field) and isinstance(value, (int, float)) and value > TOO_MANY:
            raise ValueError(
                f"its configuration says {field} = {value}, and at most {TOO_MANY} are allowed"
            )
        if isinstance(value, dict):
            refuse_countless(value)


def refuse_seeing_ahead(settings: dict[str, Any]) -> None:
    """Refuse a configuration of a model whose tokens see those that follow them.

    Losses of such a model are of no prediction.

    Raises:
        ValueError: If it is of such a kind, or says so; the setting is named.
    """
    if settings.get("model_type") in SEE_AHEAD:
        raise ValueError(
            f"tokens of {settings['model_type']} see those that follow them, but layer pruning "
            "needs a model that predicts each token from those before it"
        )
    for name, value in settings.items():
        if isinstance(value, dict) and name in ("text_config", "llm_config", "language_config"):
            refuse_seeing_ahead(value)
        sees = name == "use_bidirectional_attention" and value in (True, "all")
        if sees or name == "is_causal" and value is False:
            raise ValueError(
                f"tokens see those that follow them, as {name} is {value!r}, but layer pruning "
                "needs a model that predicts each token from those before it"
            )


def refuse_unknown_quantisation(settings: dict[str, Any]) -> None:
    """Refuse weights in a form that transformers does not know, and would take for plain ones.

    Args:
        settings: The configuration as it stands in the file.

    Raises:
        ValueError: If the form is unknown; what there is is said.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    for part in (settings, settings.get("text_config")):
        form = part.get("quantization_config") if isinstance(part, dict) else None
        if not isinstance(form, dict):
            continue
        # Older files of bitsandbytes say it in another way.
        is_named = form.get("quant_method") or form.get("load_in_8bit") or form.get("load_in_4bit")
        if not is_named or not AutoHfQuantizer.supports_quant_method(form):
            known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
            raise ValueError(
                f"its quantization_config says quant_method = {form.get('quant_method')!r}, which "
                f"must be one of {known}; load the model's 16-bit files"
            )


def refuse_other_files(source: str, config: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Refuse weights elsewhere, or of another kind than safetensors, whoever names them.

    Args:
        source: A directory or a hub id.
        config: Its configuration, which may name the file of the weights, or an index of files.
        options: Further arguments for reading from the hub.

    Raises:
        ValueError: If the index is damaged, or it or the configuration names such a file; it is
            named.
    """
    from huggingface_hub import is_offline_mode
    from transformers.utils import cached_file

    absent: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    revision = options.get("revision")
    asked_for = getattr(config, "transformers_weights", None)
    if asked_for is None and os.path.isfile(os.path.join(source, WEIGHTS)):
        return
    name = f"{WEIGHTS}.index.json" if asked_for is None else str(asked_for)
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"its configuration says transformers_weights = {asked_for!r}: weights must be "
            ".safetensors files"
        )
    if name.endswith(".safetensors"):
        return
    index = cached_file(source, name, revision=revision, **absent)
    if index is None:
        is_asked = asked_for is None and not os.path.isdir(source) and not is_offline_mode()
        if is_asked and cached_file(source, WEIGHTS, revision=revision, **absent) is None:
            # transformers would ask a service to convert them, in the name of who loads them.
            raise ValueError(
                "its files on the hub hold no safetensors, and no others are read: if its page "
                "offers a conversion, give its revision, such as refs/pr/1"
            )
        return
    with open(index, encoding="utf-8") as file:
        content = json.load(file)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise ValueError(f"its index {name} has no weight_map")
    for shard in map(str, shards.values()):
        path = PureWindowsPath(shard)
        if ".." in path.parts or path.anchor or path.suffix != ".safetensors":
            raise ValueError(
                f"its index names {shard!r}: weights must be .safetensors files below its directory"
            )


def refuse_other_weights(report: dict[str, Any], config: PreTrainedConfig) -> None:
    """Refuse a model whose files hold other weights than its configuration describes.

    Weights that transformers never makes part of a model pass: layers that predict further tokens,
    and masks.

    Args:
        report: What transformers says about the loading.
        config: What describes them.

    Raises:
        ValueError: If weights are missing, left out, or of another shape; one is named.
    """
    n_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    shapes = {name: tuple(map(tuple, both)) for name, *both in report["mismatched_keys"]}
    wrong = sorted(report["missing_keys"] | shapes.keys())
    if wrong:
        told = f" (num_hidden_layers = {n_layers})"
        if wrong[0] in shapes:
            held, described = shapes[wrong[0]]
            told = f": its files hold {held}, its configuration describes {described}"
        raise ValueError(
            f"{len(wrong)} weights are missing or of another shape, {wrong[0]} for one{told}"
        )
    others = report["unexpected_keys"]
    further = tuple({found[1] for found in map(OF_FURTHER_TOKENS.fullmatch, others) if found})
    left_out = sorted(
        name for name in others if not name.startswith(further) and not MASKS.fullmatch(name)
    )
    if left_out:
        raise ValueError(
            f"its files hold {len(left_out)} weights that its configuration does not describe, "
            f"{left_out[0]} for one: is the number of layers right (num_hidden_layers = "
            f"{n_layers}), is it another kind of model?"
        )


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, longest: int) -> None:
    """Give a tokenizer a token for padding that its model knows, and the model's context length.

    Args:
        tokenizer: Of the model; it is changed in place.
        model: The model.
        longest: Tokens of the model's context.
    """
    # Padding that was added to a tokenizer alone has no row in the embedding.
    if (tokenizer.pad_token_id or 0) >= model.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)


def refuse_no_vocabulary(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a tokenizer that has special tokens alone, so that any text becomes none.

    transformers makes one up where a folder holds no tokenizer.

    Args:
        tokenizer: As it was loaded.

    Returns:
        The same.

    Raises:
        ValueError: If it knows no other token.
    """
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError(
            "its tokenizer has no vocabulary: no tokenizer.json, or what the architecture reads in "
            "its place, lies beside the weights; save the tokenizer into the same directory"
        )
    return tokenizer


def refuse_picture_needed(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse a model that takes pictures and cannot do without, seen on a text of two tokens.

    Args:
        model: As it was loaded.
        device: Where it takes token ids.

    Raises:
        ValueError: If it gives no logits for each token of a text alone.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    takes_pictures = type(model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    # Their first pass may repack quantised weights, and it takes time: only where it is needed.
    if not takes_pictures or getattr(model, "is_quantized", False):
        return
    text = torch.tensor([[0, 1]], device=device)
    try:
        with torch.no_grad():
            n_positions = model(input_ids=text, use_cache=False).logits.shape[1]
    except Exception as error:  # each architecture misses its picture in its own way
        if is_lack_of_memory(error):
            raise
        n_positions = 0
    if n_positions != text.shape[1]:
        raise ValueError(
            f"{model.config.model_type} gives no prediction for each token of text alone; layer "
            "pruning needs a decoder-only language model"
        )


def refuse_what_gguf_cannot_tell(folder: str | os.PathLike) -> None:
    """Refuse a model that llama.cpp would read from its GGUF file as another one.

    For these architectures it concludes the kind of each layer and the scale of attention from the
    number of layers. Of all Gemmas it takes the embedding for the head.

    Args:
        folder: Of a saved model.

    Raises:
        ValueError: If it is such a model; what the file would lack is named.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    if config.model_type not in KINDS_BY_NUMBER:
        return
    usual = type(config)(num_hidden_layers=config.num_hidden_layers)
    for field in ("layer_types", "no_rope_layers"):
        if getattr(config, field, None) != getattr(usual, field, None):
            raise ValueError(
                f"GGUF cannot tell the {field} of this {config.model_type}: llama.cpp takes layers "
                "by their number, as in a model that was not cut"
            )
    if not config.model_type.startswith("gemma"):
        return
    if not config.tie_word_embeddings:
        raise ValueError(
            f"GGUF cannot hold the head of this {config.model_type}, which is not its embedding"
        )
    scale = config.query_pre_attn_scalar
    if scale != config.head_dim and config.num_hidden_layers not in LAYERS_OF_27B:
        raise ValueError(
            f"GGUF cannot tell query_pre_attn_scalar = {scale} of this {config.model_type}: "
            f"llama.cpp takes it from the number of layers, and head_dim, {config.head_dim}, here"
        )


@contextlib.contextmanager
def named_errors(source: str, revision: str | None) -> Iterator[None]:
    """Turn what libraries raise about a model into one ValueError that names it and says why.

    What is the machine's fault stays what it is: a full disk, memory that does not suffice.

    Args:
        source: The directory or hub id that is loaded inside.
        revision: Branch, tag or commit of a hub id.
    """
    try:
        yield
    except Exception as error:  # each quantisation and architecture fails in its own way
        if getattr(error, "errno", None) or is_lack_of_memory(error):
            raise
        raise ValueError(
            f"{source!r} cannot be loaded: {_fault(error, source, revision)}"
        ) from error


def _fault(error: Exception, source: str, revision: str | None) -> str:
    """What is wrong, in words for who asked for the model."""
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error
    while cause and not isinstance(cause, GatedRepoError):
        cause = cause.__cause__ or cause.__context__
    if cause:
        return (
            "it is gated: accept its licence on its hub page, then set HF_TOKEN to a token that "
            "may read it"
        )
    if "trust_remote_code" in str(error):
        return "it needs code of its own, and code that comes with a model is never run here"
    if isinstance(error, OSError) and not os.path.isdir(source):
        return (
            f"there is no such directory in {os.getcwd()}, and on the hub (revision "
            f"{revision or 'main'}): {error}"
        )
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    if isinstance(error, ImportError):
        return f"it needs what is not installed ({type(error).__name__}: {error})"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
