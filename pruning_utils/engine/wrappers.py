"""Models inside something else: what is around them is named, and what to pass in its stead."""

from __future__ import annotations

from pruning_utils.engine.later import nn


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
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(
            f"model must be a causal language model of transformers, as load_model returns it, got "
            f"{'the class ' + model.__name__ if isinstance(model, type) else kind}"
        )


def refuse_compiled_parts(model: nn.Module) -> None:
    """Refuse a model some of whose parts are inside ``torch.compile``: their weights bear its name.

    Args:
        model: A causal language model.

    Raises:
        ValueError: If there is such a part; it is named.
    """
    for path, part in model.named_modules():
        if hasattr(part, "_orig_mod"):
            raise ValueError(
                f"{path} is inside torch.compile: put the module that was compiled in its place "
                "(module._orig_mod), or compile with module.compile(), which stays itself"
            )
