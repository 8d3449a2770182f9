"""Load a causal language model (embedded, from a directory or from a hub) and find its parts."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pruning_utils import runtime
from pruning_utils.embedded import (
    EMBEDDED,
    MODELS,
    embedded_checkpoint,
    find_embedded,
    quiet_loading,
)
from pruning_utils.engine import held_configurations, hub, identities, model_files, wrappers
from pruning_utils.engine.later import nn, torch

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

QUANTIZATIONS = (None, "nf4", "int8")


def load_model(
    name: str | os.PathLike = EMBEDDED,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = runtime.AUTO,
    quantize: str | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for evaluation.

    Args:
        name: ``"smollm2-135m"`` or its other name ``"embedded"`` (SmolLM2-135M-Instruct from the
            pinned package), ``"gemma-3-270m"`` (of packages that ``make second-model`` installs),
            a local directory as written by ``save_pretrained``, or a hub id. Code that comes with a
            model is never run, and only safetensors are read. Where the package ``kernels`` is
            installed, which is none of ours, transformers itself may fetch kernels of its own
            choice for ``flash_attention_2`` and for MXFP4 weights.
        revision: Branch, tag or commit of a hub id.
        dtype: ``"auto"`` (bfloat16 where the device multiplies it natively, float32 elsewhere, see
            :func:`runtime.resolve_dtype`), ``"bfloat16"``, ``"float16"`` or ``"float32"``; the
            dtype of weights that are not quantised, and the compute dtype of those that are (of
            int8 ones inputs are float16 whatever it is). Training and evaluation follow it.
        quantize: None, ``"nf4"`` (4-bit NormalFloat with double quantisation) or ``"int8"``.
            Experts that an architecture holds together in one weight (Mixtral, Qwen 3 MoE) stay as
            they are, with a notice. On a processor with AVX512, bitsandbytes 0.50 misreads NF4
            rows of 16 times something that are no multiple of 64 numbers, as some models that were
            narrowed have.
        device: A torch device; None takes the first CUDA GPU, or the CPU.

    Returns:
        ``(model, tokenizer)``. The tokenizer has a padding token, where it has one or a token that
        ends a text. Its ``model_max_length`` is the context length, or what the tokenizer's own
        files say where that is less.

    Raises:
        ValueError: If an argument is not among those, or the name is no decoder-only language
            model or an adapter to one, cannot be reached, is gated, lacks weights or holds others,
            asks for code of its own or on a hub, or cannot be quantised; nothing is written.
        ModuleNotFoundError: If a package of an embedded model is not installed; the message says
            how to install it.
    """
    from transformers import AutoTokenizer

    device = runtime.choose_device(device)
    precision = runtime.resolve_dtype(dtype, device)
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of None, 'nf4', 'int8', got {quantize!r}")
    source = resolve(name, revision)
    options = {"revision": revision, "trust_remote_code": False}
    storage = {"quantization_config": _storage(quantize, precision)} if quantize else {}
    on_disk = contextlib.nullcontext() if os.path.isdir(source) else hub.asked_or_cached()
    with quiet_loading(), model_files.named_errors(source, revision), on_disk:
        model_files.refuse_adapter(source, options)
        config = model_files.configuration(source, options)
        if quantize and getattr(config, "quantization_config", None):
            raise ValueError(
                f"its weights are quantised already, so quantize must be None, got {quantize!r}"
            )
        tokenizer = model_files.refuse_no_vocabulary(
            AutoTokenizer.from_pretrained(source, **options)
        )
        model_files.refuse_other_files(source, config, options)
        model, report = model_files.auto_class(config).from_pretrained(
            source,
            use_safetensors=True,
            dtype=precision,
            device_map={"": device},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
            **storage,
        )
        model_files.refuse_other_weights(report, config)
        model_files.refuse_picture_needed(model, model.device)
        if quantize and not any(
            "bitsandbytes" in type(part).__module__ for part in decoder_layers(model).modules()
        ):
            raise ValueError(f"its decoder layers hold no weights that {quantize} could store")
    if quantize:
        wrappers.warn_of_unquantised(decoder_layers(model), quantize)
    model_files.fit_tokenizer(tokenizer, model, context_length(config))
    return model.eval(), tokenizer


def _storage(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How bitsandbytes stores weights as ``nf4`` or ``int8``, to compute in ``dtype``."""
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def resolve(name: str | os.PathLike, revision: str | None) -> str:
    """Directory or hub id behind a name; an embedded model is unpacked if it is not yet."""
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"name must be 'embedded', a directory or a hub id, got {name!r}")
    source, model = os.fspath(name), find_embedded(name)
    if model or os.path.isdir(source):
        hub.refuse_revision(source, revision)
    if model:
        return str(embedded_checkpoint(model))
    if os.path.isdir(source):
        is_adapter = os.path.isfile(os.path.join(source, model_files.ADAPTER))
        if not is_adapter and not os.path.isfile(os.path.join(source, "config.json")):
            raise ValueError(f"{source!r} is no model: the directory has no config.json")
    elif os.path.exists(source) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise ValueError(
            f"{source!r} is no model: none of {', '.join([EMBEDDED, *MODELS])}, no directory, and "
            "no hub id such as 'owner/name'"
        )
    return source


def identity(name: str | os.PathLike = EMBEDDED, revision: str | None = None) -> str:
    """Which weights and tokenizer a name stands for, as recorded beside every result.

    It takes no network, and milliseconds: only the weights of a directory that are new or changed
    are read, once.

    Returns:
        Name and sha256 of an embedded file, or a hub id with its revision, or the name of a
        directory with a digest of all that it loads as, see :mod:`pruning_utils.engine.identities`.

    Raises:
        ValueError: If the name stands for nothing, a revision is named of what is no hub id, or the
            directory names weights outside of it.
    """
    model = find_embedded(name)
    if model:
        hub.refuse_revision(str(name), revision)
        return f"{model.gguf} sha256:{model.sha256[:16]}"
    source = Path(resolve(name, revision))
    if not source.is_dir():
        return f"{name}@{revision or 'main'}"
    return f"{source.resolve().name} sha256:{identities.directory_digest(source)[:16]}"


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the decoder: a multimodal model's text part, else the model's own."""
    return wrappers.refuse_wrapped(model).config.get_text_config(decoder=True)


def context_length(config: PreTrainedConfig) -> int:
    """Longest input in tokens that a configuration states, or 1e30 where it states none."""
    config = config.get_text_config(decoder=True)
    stated = [
        getattr(config, field, None)
        for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    ]
    # XLNet states -1: it has no limit.
    return next((length for length in stated if isinstance(length, int) and length > 0), int(1e30))


def check_input_ids(
    model: nn.Module, input_ids: torch.Tensor, *, shortest: int = 1, name: str = "input_ids"
) -> torch.Tensor:
    """Refuse token ids that the model cannot take, before any work.

    Args:
        model: A causal language model.
        input_ids: Integer tensor, of any width, of shape ``(n_samples, seq_len)``, both at least 1.
        shortest: Tokens that each sequence must have: 2 where tokens are to be predicted, for which
            the model must have a head.
        name: What the messages call the ids.

    Returns:
        The same ids as int64, the one width that every architecture takes.

    Raises:
        ValueError: If the model is none of transformers, has no head where it needs one, or is
            inside something else; if the shape or dtype is wrong, an id lies outside the
            vocabulary, or a sequence is too short, or longer than the model's context.
    """
    wrappers.refuse_wrapped(model, with_head=shortest > 1)
    is_tensor = isinstance(input_ids, torch.Tensor)
    if (
        not is_tensor
        or input_ids.ndim != 2
        or not input_ids.numel()
        or input_ids.is_floating_point()
        or input_ids.is_complex()
        or input_ids.dtype == torch.bool
    ):
        raise ValueError(
            f"{name} must be an integer tensor of shape (n_samples, seq_len), got "
            f"{_described(input_ids) if is_tensor else type(input_ids).__name__}"
        )
    input_ids = input_ids.long()
    vocabulary = wrappers.vocabulary_size(model)
    for extreme in (int(input_ids.min()), int(input_ids.max())):
        if not 0 <= extreme < vocabulary:
            raise ValueError(f"{name} must lie in the vocabulary [0, {vocabulary}), got {extreme}")
    if input_ids.shape[1] < shortest:
        raise ValueError(
            f"sequences of {name} must hold at least {shortest} tokens, got {input_ids.shape[1]}"
        )
    longest = context_length(model.config)
    if input_ids.shape[1] > longest:
        raise ValueError(
            f"sequences of {name} must be at most as long as the model's context of {longest} "
            f"tokens, got {input_ids.shape[1]}"
        )
    return input_ids


def _described(tensor: torch.Tensor) -> str:
    """Dtype and shape, for a message."""
    return f"{runtime.dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}"


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, in the order in which they run, from 0.

    Works on any decoder-only architecture of transformers: the list is the one ``nn.ModuleList``
    whose length is the configuration's ``num_hidden_layers``.

    Raises:
        ValueError: If the model has no such list, or more than one; if it is none of transformers,
            or inside something else.
    """
    wrappers.refuse_wrapped(model)
    text = text_config(model)
    # What some architectures call it.
    field = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    n_layers = getattr(text, field, None)
    # Of a multimodal model only the decoder is searched: its vision tower may happen to be as deep.
    decoder = backbone(model) if hasattr(model, "get_decoder") else model
    found = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and n_layers
    }
    outer = wrappers.lists_of_layers(found)
    if len(outer) != 1:
        raise ValueError(
            f"{type(model).__name__} has no single list of decoder layers: expected one "
            f"nn.ModuleList of length {field} = {n_layers}, found "
            f"{sorted(outer) or 'none'}"
        )
    return next(iter(outer.values()))


def backbone(model: nn.Module) -> nn.Module:
    """The part of a causal language model that maps token ids to final hidden states."""
    decoder = model.get_decoder()
    # Llama 4 names itself here, ModernBERT its head.
    if decoder is model or isinstance(decoder, nn.Linear):
        return next(
            (child for child in model.children() if hasattr(child, "get_input_embeddings")), model
        )
    return decoder


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the head.

    Raises:
        ValueError: If the backbone has no single norm of its own, or the model is none of
            transformers.
    """
    children = list(backbone(wrappers.refuse_wrapped(model)).children())
    norms = [module for module in children if "norm" in type(module).__name__.lower()]
    # Where there are two, the one before the layers belongs to the embedding.
    found = [
        norm for norm in norms if children.index(norm) > children.index(decoder_layers(model))
    ] or norms
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} norms beside its decoder layers, expected one"
        )
    return found[0]


def n_parameters(module: nn.Module) -> int:
    """Number of the parameters of a model or of a part of one, tied ones once.

    Weights in four bits, of which a byte holds two, count as what they stand for.
    """
    return sum(wrappers.n_values(weight) for weight in module.parameters())


def untie_head(model: nn.Module) -> None:
    """Give the head, in place, equal weights of its own where it shares those of the embedding.

    The configuration, from now on the model's own, is set so that saving keeps both and loading
    does not tie them again.

    Raises:
        ValueError: If the model is none of transformers, or has no head.
    """
    held_configurations.make_own(wrappers.refuse_wrapped(model, with_head=True))
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(
            head.weight.detach().clone(), requires_grad=head.weight.requires_grad
        )
    model.config.tie_word_embeddings = text_config(model).tie_word_embeddings = False
    name = next(name for name, module in model.named_modules() if module is head)
    model.all_tied_weights_keys = {
        key: origin
        for key, origin in model.all_tied_weights_keys.items()
        if f"{name}.weight" not in (key, origin)
    }


def quantized_copy(model: nn.Module) -> nn.Module:
    """A copy with the linear weights inside the decoder layers in NF4, double-quantised.

    Experts that an architecture holds together in one weight stay as they are, with a notice.

    Args:
        model: A 16- or 32-bit causal language model.

    The input is left as it is. The copy of a model on the CPU is placed on the first CUDA GPU where
    there is one, weight by weight, so that a model too large for the GPU may wait on the CPU.

    Raises:
        ValueError: If the model is none of transformers, carries adapters, is quantised already, or
            its decoder layers hold no ``nn.Linear``.
    """
    import bitsandbytes as bnb
    from transformers.quantizers.auto import AutoHfQuantizer

    wrappers.refuse_adapters(wrappers.refuse_wrapped(model))
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised already; load it in bfloat16 or float32")
    inside = {id(module) for module in decoder_layers(model).modules() if type(module) is nn.Linear}
    linear = {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and not wrappers.is_read_past(model, name)
    }
    if not linear:
        raise ValueError(
            f"the decoder layers of {type(model).__name__} hold no nn.Linear that NF4 could store"
        )
    device = runtime.choose_device() if model.device.type == "cpu" else model.device
    # Sharing the weights to be quantised keeps the copy from holding them in 16 bits as well.
    duplicate = wrappers.copied(
        model, {id(source.weight): source.weight for source in linear.values()}
    )
    for name, source in linear.items():
        target = bnb.nn.Linear4bit(
            source.in_features,
            source.out_features,
            source.bias is not None,
            model.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        ).train(source.training)
        target.weight = bnb.nn.Params4bit(
            source.weight.detach(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            module=target,
        )
        if source.bias is not None:
            target.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=False)
        duplicate.set_submodule(name, target.to(device))
    wrappers.warn_of_unquantised(decoder_layers(duplicate), "nf4")
    duplicate.config.quantization_config = _storage("nf4", model.dtype)
    duplicate.hf_quantizer = AutoHfQuantizer.from_config(duplicate.config.quantization_config)
    duplicate.is_loaded_in_4bit = duplicate.is_quantized = True
    duplicate.quantization_method = duplicate.config.quantization_config.quant_method
    return duplicate.to(device) if device != model.device else duplicate
