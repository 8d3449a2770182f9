"""Models inside something else: what is around them is named, and what to pass in its stead."""

from __future__ import annotations

import copy
import logging
import math
import re
from typing import TypeVar

from pruning_utils.engine.later import nn, torch

logger = logging.getLogger(__name__)
Model = TypeVar("Model")

# Parts of the names of attention and other token mixers.
NOT_FEED_FORWARD = ("attn", "attention", "mixer", "temporal", "conv", "ssm", "mamba")
# Of classes: what is called a mixer too where each layer has a single part.
FEED_FORWARD = re.compile("MLP|MoE")
# Of classes that choose experts for a token, whatever is inside them.
ROUTER = re.compile(r"Router|TopKGating|MoE\w*Gate$")


def refuse_wrapped(model: Model, *, with_head: bool = False) -> Model:
    """Refuse what is no causal language model itself, or hides one.

    A PEFT model passes: where adapters are in the way, the function that they hinder says so.

    Args:
        model: What a function was given as its model.
        with_head: Whether it is to predict tokens, for which a backbone alone does not suffice.

    Returns:
        The model.

    Raises:
        ValueError: If it is compiled, spread over devices by torch, or no model of transformers, or
            has no head where one is needed; what to pass is said.
    """
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model is inside torch.compile: pass the model that was compiled (model._orig_mod), "
            "and compile what comes back"
        )
    is_spread = type(model).__module__.startswith(("torch.nn.parallel", "torch.distributed"))
    if is_spread and isinstance(getattr(model, "module", None), nn.Module):
        raise ValueError(f"model is inside {kind}: pass the model in it (model.module)")
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise ValueError(
            f"model must be a causal language model of transformers, as load_model returns it, got "
            f"{'the class ' + model.__name__ if isinstance(model, type) else kind}"
        )
    if with_head and getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"model must have a head that predicts tokens, but {kind} has none: load it with "
            "load_model, or by AutoModelForCausalLM"
        )
    return model


def lists_of_layers(found: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Of lists of modules, by name, those that may be the decoder layers.

    A list inside another one's module is none (the experts of a mixture, say). Where several are
    left, and the parts of one alone are numbered as layers are, it is that one: a tower may have as
    many blocks as a decoder that was cut.
    """
    inside = tuple(f"{name}." for name in found)
    outer = {name: layers for name, layers in found.items() if not name.startswith(inside)}
    numbered = {name: layers for name, layers in outer.items() if _are_numbered(layers)}
    return numbered if len(outer) > 1 and len(numbered) == 1 else outer


def _are_numbered(layers: nn.ModuleList) -> bool:
    """Whether a part of these modules bears a number, as it needs for its place in the cache."""
    return any("layer_idx" in vars(part) for part in layers.modules())


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the input embedding, adapters of PEFT around it or not."""
    return len(model.get_input_embeddings().weight)


def refuse_adapters(model: nn.Module) -> None:
    """ValueError if PEFT wraps the model or sits in it."""
    if any(type(part).__module__.startswith("peft.") for part in model.modules()):
        raise ValueError(
            f"{type(model).__name__} carries adapters: merge them first (merge_and_unload)"
        )


def refuse_other_than_weights(model: nn.Module, *, gradients: bool = False) -> None:
    """Refuse a model whose weights are not what is computed with.

    Args:
        model: A causal language model.
        gradients: Whether gradients of the weights are asked for as well.

    Raises:
        ValueError: If it is no model or inside something else, the weights are in 8 or 4 bits, or
            adapters or trained tokens are added to them; or if gradients are asked for and the
            weights were made in torch's inference mode.
    """
    refuse_wrapped(model)
    refuse_own_tokens(model)
    refuse_adapters(model)
    if gradients and any(weight.is_inference() for weight in model.parameters()):
        raise ValueError(
            f"the weights of {type(model).__name__} were made inside torch.inference_mode(), where "
            "nothing has a gradient: make or load the model outside of it"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "scores of weights need the weights themselves, but this model's are quantised: load "
            "it with quantize=None (bfloat16 or float32)"
        )


def refuse_own_tokens(model: nn.Module) -> None:
    """Refuse a model of PEFT that puts trained tokens, or keys and values, before each text.

    Raises:
        ValueError: If it does so; its kind is named.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"model must have its own layers and texts alone, but {config.peft_type.value} puts "
            "trained ones before each text: pass the model without it (model.get_base_model())"
        )


def refuse_compiled_parts(model: nn.Module) -> None:
    """Refuse a model some of whose parts are inside ``torch.compile``: their weights bear its name.

    Args:
        model: A causal language model.

    Raises:
        ValueError: If there is such a part, or one whose ``forward`` is compiled; it is named.
    """
    for path, part in model.named_modules():
        # A hook of accelerate bears the marks of the forward that it calls.
        forward = vars(part).get("_old_forward", vars(part).get("forward"))
        is_own = getattr(forward, "__self__", None) is part
        if hasattr(forward, "_torchdynamo_orig_callable") and not is_own:
            raise ValueError(
                f"the forward of {path or 'model'} is inside torch.compile, and would run this "
                "model in every copy: delete it (del module.forward), and compile with "
                "module.compile(), which stays itself"
            )
        if hasattr(part, "_orig_mod"):
            raise ValueError(
                f"{path} is inside torch.compile: put the module that was compiled in its place "
                "(module._orig_mod), or compile with module.compile(), which stays itself"
            )


def copied(model: Model, memo: dict | None = None) -> Model:
    """A copy of a model that runs itself.

    Generation with a static cache leaves a compiled call in a model. In a copy it would run the
    model that was copied, so it is left out.

    Args:
        model: A causal language model.
        memo: What is not to be copied, by ``id``, as for ``copy.deepcopy``.

    Raises:
        ValueError: If parts of it are inside ``torch.compile``; one is named.
    """
    refuse_compiled_parts(model)
    duplicate = copy.deepcopy(model, memo)
    for name in ("_compiled_call", "_last_compile_config"):
        vars(duplicate).pop(name, None)
    return duplicate


# --- adapters around modules ----------------------------------------------------------------------


def is_read_past(model: nn.Module, name: str) -> bool:
    """Whether the owner of a module multiplies with its weights itself, and never calls it.

    State-space mixers do so, with their fused kernels or always. What stands around such a module,
    or stores its weights in another form, is passed over or fails.

    Args:
        model: A model.
        name: Full name of one of its modules.
    """
    owner, _, last = name.rpartition(".")
    is_of_mixer = hasattr(model.get_submodule(owner), "ssm_state_size")
    return is_of_mixer and last in ("out_proj", "dt_proj", "x_proj")


def n_values(weight: torch.Tensor) -> int:
    """Number of values of a weight, of which one that is stored in four bits holds two a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def warn_of_unquantised(layers: nn.ModuleList, quantize: str) -> None:
    """Say how much of decoder layers stays in 16 or 32 bits, where it is a tenth or more.

    Args:
        layers: Decoder layers, quantised.
        quantize: In which form.
    """
    stored = plain = 0
    for module in layers.modules():
        is_stored = "bitsandbytes" in type(module).__module__
        for weight in module.parameters(recurse=False):
            # 4-bit weights hold two parameters a byte, whatever holds the bytes.
            n_stored = 2 * weight.nbytes if quantize == "nf4" else weight.nbytes
            stored += n_stored if is_stored and weight.ndim > 1 else 0
            plain += 0 if is_stored else weight.numel()
    if plain >= 0.1 * (stored + plain):
        logger.warning(
            "%.0f %% of the parameters of the decoder layers are not stored as %s: only linear "
            "modules are, not experts that share one weight",
            100 * plain / (stored + plain),
            quantize,
        )


def refuse_shared(model: nn.Module, names: list[str]) -> None:
    """ValueError if modules share a weight: the adapters of all would be added into the one."""
    weights = {id(model.get_submodule(name).weight) for name in names}
    if len(weights) < len(names):
        raise ValueError(
            f"merge must be False for adapters of {type(model).__name__}, whose layers share "
            "weights, got True"
        )


def leave_as_it_is(*_: object, **__: object) -> None:
    """Does nothing, whatever it is given: stands for a step that is left out."""


def merged_into_copy(trained: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a model with trained adapters added into its 16- or 32-bit weights.

    In 4 bits the adapters would be rounded away.
    """
    merged = copied(model)
    for name, module in trained.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
            weight.data += module.get_delta_weight("default").to(weight.device)
    return merged


def is_feed_forward(layers: nn.Module, name: str) -> bool:
    """Whether a module is outside the attention and other token mixers.

    Args:
        layers: Decoder layers.
        name: Of the module inside them.
    """
    parts = name.split(".")
    for place, part in enumerate(parts, start=1):
        if any(kind in part for kind in NOT_FEED_FORWARD):
            owner = layers.get_submodule(".".join(parts[:place]))
            return part == "mixer" and bool(FEED_FORWARD.search(type(owner).__name__))
    return True


def is_of_router(layer: nn.Module, name: str) -> bool:
    """Whether a module chooses experts, or is part of what does.

    Args:
        layer: A decoder layer.
        name: Of the module inside it.
    """
    parts = name.split(".")
    owners = (layer.get_submodule(".".join(parts[:n])) for n in range(1, len(parts) + 1))
    return any(ROUTER.search(type(owner).__name__) for owner in owners)
