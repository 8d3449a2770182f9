"""Models inside something else: what is around them is named, and what to pass in its stead."""

from __future__ import annotations

from torch import nn


def refuse_wrapped(model: object) -> None:
    """Refuse what is no causal language model itself, or hides one.

    A PEFT model passes: where adapters are in the way, the function that they hinder says so.

    Args:
        model: What a function was given as its model.

    Raises:
        ValueError: If it is compiled, spread over devices by torch, or no model of transformers;
            what to pass is said.
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
    needed = ("config", "get_input_embeddings")
    if not isinstance(model, nn.Module) or not all(hasattr(model, name) for name in needed):
        raise ValueError(
            f"model must be a causal language model of transformers, as load_model returns it, got "
            f"{'the class ' + model.__name__ if isinstance(model, type) else kind}"
        )


def refuse_no_weights(model: nn.Module) -> None:
    """Refuse a model some of whose weights are nowhere: their products would be made up.

    Weights that accelerate has moved to the CPU or to disk pass: it brings them back as they are
    needed.

    Args:
        model: A causal language model.

    Raises:
        ValueError: If a weight is on torch's device ``meta`` and nothing would load it.
    """
    for path, part in model.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.is_meta and not _is_brought_back(part):
                raise ValueError(
                    f"{path}.{name} has no values (it is on torch's device meta): load the weights "
                    "first"
                )


def _is_brought_back(part: nn.Module) -> bool:
    """Whether accelerate loads a module's weights before it runs."""
    hook = getattr(part, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]
    return any(getattr(one, "offload", False) for one in hooks)
