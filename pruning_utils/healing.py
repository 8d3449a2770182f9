"""Train a pruned model a little so that it recovers: adapters, its last layers, or all of it."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from pruning_utils import models
from pruning_utils.engine import head_losses, passes, wrappers
from pruning_utils.engine.checks import number, plain_value, true_or_false, whole_number
from pruning_utils.engine.later import nn, torch

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedTokenizerBase

ADAPTERS = ("lora", "qlora", "dora")
METHODS = (*ADAPTERS, "last_layers", "full")
TARGETS = ("all", "mlp")
# Evenly over the steps; the evaluation loss before the first step comes in addition.
EVALUATIONS = 8
SAVES = 4
# Arguments of heal that are no settings: they are recorded as digests, or do not decide what is
# trained.
NOT_RECORDED = ("model", "tokenizer", "train_ids", "eval_ids", "output_dir", "merge")
# Part of the names of classes that derive from PyTorch's linear module and do more: they multiply
# groups of features apart.
NOT_LINEAR = re.compile("Grouped")
LARGEST = 2**32 - 1  # of a whole number among the settings


class HealedModel(NamedTuple):
    """A healed model and how its loss went.

    Attributes:
        model: The trained copy, in evaluation mode: a PEFT model for unmerged adapters, else a
            plain one.
        history: ``step`` (1-based; 0 is before training), ``tokens`` (seen so far), ``split``
            (``train`` or ``eval``), ``loss`` (nats per token, of the step's batch or all evaluation
            windows), ``learning_rate`` (NaN for eval).
    """

    model: nn.Module
    history: pd.DataFrame

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that were trained, of which ``history.attrs`` keeps count."""
        return self.history.attrs["trainable_parameters"]


def heal(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_ids: torch.Tensor,
    *,
    method: str = "qlora",
    eval_ids: torch.Tensor | None = None,
    steps: int = 40,
    batch_size: int = 4,
    learning_rate: float = 3e-4,
    warmup_steps: int | None = None,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.05,
    targets: str | list[str] = "all",
    last_k: int = 3,
    train_norm: bool = False,
    untie: bool = True,
    merge: bool = False,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> HealedModel:
    """Train a copy of a model on windows of text.

    The optimiser is AdamW, with a cosine schedule and gradients clipped at norm 1. What is trained,
    see :func:`trainable_copy`, is kept in float32. Everything else, and the input model, stays as
    it is. With ``output_dir``, training is saved up to four times. Called again with the same
    settings, it goes on from the last save that is whole.

    Layers are compiled by torch where accelerate's own environment variables ask for it:
    ``ACCELERATE_DYNAMO_BACKEND=inductor`` and ``ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true``.
    Losses differ by rounding, and by what dropout draws. ``benchmarks/healing.py`` measures whether
    it pays.

    Args:
        model: A 16- or 32-bit causal language model, pruned or not.
        tokenizer: Its tokenizer, saved in ``output_dir``.
        train_ids: Windows to train on, ``(n_windows, seq_len)``; in a new order each time that all
            have been seen.
        method: ``lora``; ``qlora`` (LoRA over a copy whose layers are stored in NF4); ``dora``;
            ``last_layers`` (the language-model head and the last ``last_k`` layers); ``full`` (all
            weights).
        eval_ids: Windows whose loss is measured before training and up to eight times on the way;
            None: none.
        steps: Optimiser steps, at least 1.
        batch_size: Windows in a step.
        learning_rate: Peak rate, above 0.
        warmup_steps: Steps in which the rate rises linearly, from 0 at the first; from 0 to
            ``steps``. None: 4, or all where there are fewer, and none of a single step.
        rank: Rank of the adapters, at least 1.
        alpha: Scale of the adapters is alpha / rank; None takes alpha = rank.
        dropout: Dropout before the adapters, in [0, 1).
        targets: Linear weights that get adapters, see :func:`adapter_targets`.
        last_k: Number of last layers that ``last_layers`` trains, from 0 to all.
        train_norm: Whether ``last_layers`` trains the final norm too.
        untie: Whether ``last_layers`` gives a tied head weights of its own; otherwise the embedding
            is trained with it.
        merge: Whether adapters are added into a copy of the 16- or 32-bit weights, for ``qlora``
            too.
        seed: Seed of the adapters, the dropout and the order of windows.
        output_dir: Where training is saved; None: nowhere.

    Raises:
        ValueError: If an argument is out of range, the model is quantised, has adapters or is on
            another GPU than the first, or this is one of several processes that were launched
            together. If ``output_dir`` holds anything but a run with these settings (the differing
            ones are named). If a loss, gradient or trained weight is not finite.
    """
    given = locals()
    merge = true_or_false("merge", merge)
    settings = check_settings(model, {name: given[name] for name in given.keys() - NOT_RECORDED})
    if merge and method in ADAPTERS:
        wrappers.refuse_shared(model, adapter_targets(model, settings["targets"]))
    from pruning_utils.engine import trainer  # importing it takes seconds

    passes.refuse_other_gpu(model)
    trainer.refuse_many_processes()
    run = trainer.Run(output_dir, settings, model, tokenizer, train_ids, eval_ids)
    # The caller may be in a mode without gradients.
    with trainer.own_random_state(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(settings["seed"])
        trained = trainable_copy(model, settings)
        run.begin()
        history = trainer.train(
            trained,
            run,
            loss=mean_loss,
            in_bfloat16=trainer.holds(model, torch.bfloat16),
            evaluations=EVALUATIONS,
            saves=SAVES,
        )
        history.attrs["trainable_parameters"] = n_trainable(trained)
        healed = finished(trained, model, method, merge)
    trainer.refuse_overflow(healed, model)
    return HealedModel(healed, history)


def n_trainable(model: nn.Module) -> int:
    """Number of parameters of a model that require gradients."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def check_settings(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of :func:`heal` for a model, complete and checked.

    Args:
        model: The model to heal.
        settings: Arguments of :func:`heal`, any of them, without those in ``NOT_RECORDED``.

    Returns:
        All settings in the order of the signature, defaults filled in.

    Raises:
        ValueError: As :func:`heal`; or if it has no such setting.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(heal).parameters.items()
        if name not in NOT_RECORDED
    }
    unknown = settings.keys() - defaults.keys()
    if unknown:
        raise ValueError(f"healing has no settings {sorted(unknown)}; it has {', '.join(defaults)}")
    settings = defaults | settings
    if settings["warmup_steps"] is None:
        steps = whole_number("steps", settings["steps"], 1, LARGEST)
        settings["warmup_steps"] = min(4, steps) if steps > 1 else 0
    targets, alpha = settings["targets"], settings["alpha"]
    # A list is what comes back from JSON.
    settings["targets"] = list(targets) if isinstance(targets, tuple) else targets
    settings["alpha"] = settings["rank"] if alpha is None else alpha
    if settings["method"] not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {settings['method']!r}")
    if getattr(model, "is_quantized", False) or hasattr(model, "peft_config"):
        raise ValueError(
            "the model must be a 16- or 32-bit one without adapters: load it with quantize=None, "
            "merge adapters first; 'qlora' quantises a copy itself"
        )
    n_layers = len(models.decoder_layers(model))
    whole_numbers = {
        "steps": (1, LARGEST),
        "batch_size": (1, LARGEST),
        "warmup_steps": (0, settings["steps"]),
        "rank": (1, LARGEST),
        "last_k": (0, n_layers if settings["method"] == "last_layers" else LARGEST),
        "seed": (0, LARGEST),
    }
    for name, (low, high) in whole_numbers.items():
        settings[name] = whole_number(name, settings[name], low, high)
    for name in ("learning_rate", "alpha"):
        settings[name] = number(name, settings[name], "above 0", lambda value: 0 < value < 1e300)
    settings["dropout"] = number(
        "dropout", settings["dropout"], "in [0, 1)", lambda share: 0 <= share < 1
    )
    for name in ("train_norm", "untie"):
        settings[name] = true_or_false(name, settings[name])
    plain_value("targets", settings["targets"])
    if settings["method"] in ADAPTERS:
        weights = [
            model.get_submodule(name).weight for name in adapter_targets(model, settings["targets"])
        ]
        largest = max(min(weight.shape) for weight in weights)
        whole_number("rank", settings["rank"], 1, largest, of="no adapted weight has a higher rank")
    return settings


def trainable_copy(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """A copy of a model in which exactly what a method trains requires gradients.

    - ``lora`` (arXiv:2106.09685): every weight ``W`` stays; beside it a product ``B A`` of low rank
      is trained, scaled by ``alpha / rank``.
    - ``qlora`` (arXiv:2305.14314): the same, beside weights that are stored in 4 bits (NF4).
    - ``dora`` (arXiv:2402.09353): the same as ``lora``, and the norm of each output of
      ``W + B A`` is trained too.
    - ``last_layers`` (arXiv:2411.15558): the language-model head and the last ``last_k`` layers are
      trained, with the final norm if asked for.
    - ``full``: every weight is trained.

    Args:
        model: A 16- or 32-bit causal language model; it is left as it was.
        settings: As of :func:`check_settings`.

    Returns:
        The copy: a PEFT model for adapters, else a plain one. What requires gradients is float32.

    Raises:
        ValueError: If ``qlora`` finds no ``nn.Linear`` to store, or ``train_norm`` no single norm.
    """
    method = settings["method"]
    # float16 is too narrow for gradients.
    narrow = any(weight.dtype == torch.float16 for weight in model.parameters())
    source = wrappers.copied(model).float() if narrow else model
    if method == "qlora":
        trained = models.quantized_copy(source)
    else:
        trained = source if narrow else wrappers.copied(source)

    if method == "full":
        parts = [trained]
    elif method == "last_layers":
        if settings["untie"]:
            models.untie_head(trained)
        layers = models.decoder_layers(trained)
        parts = [trained.get_output_embeddings(), *layers[len(layers) - settings["last_k"] :]]
        if settings["train_norm"]:
            parts.append(models.final_norm(trained))
    else:
        parts = []
    trained.requires_grad_(False)
    # Buffers stay: rotary frequencies have a precision of their own.
    for weight in nn.ModuleList(parts).parameters():
        weight.requires_grad_(True)
        weight.data = weight.data.float()
    return _with_adapters(trained, settings) if method in ADAPTERS else trained


def _with_adapters(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """A PEFT model around a model whose weights stay; the adapters are float32."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import transformers_weight_conversion

    for module in model.modules():
        # On the CPU, bitsandbytes repacks 4-bit weights at the first evaluation, after which no
        # gradient passes them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # Each save would ask the hub about that name, which never had these weights.
    model.name_or_path = ""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=adapter_targets(model, settings["targets"]),
        use_dora=settings["method"] == "dora",
    )
    # PEFT would give adapters to fused experts, instead of the modules that are named.
    as_named = passes.replaced(
        transformers_weight_conversion,
        "convert_peft_config_for_transformers",
        wrappers.leave_as_it_is,
    )
    # Warnings of old names within transformers, and that Conv1D is transposed.
    with warnings.catch_warnings(action="ignore"), as_named:
        return get_peft_model(model, config)


def adapter_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Full names of the linear modules inside the decoder layers that get adapters, at least one.

    Left out are routers of experts, and experts that an architecture holds together in one weight.
    So are those of state-space mixers whose weights the mixer reads itself, past any adapter.

    Args:
        model: A causal language model.
        targets: ``all``; ``mlp`` (those outside the attention and other token mixers); or a list of
            last parts of names, such as ``["q_proj"]``.

    Raises:
        ValueError: If ``targets`` is anything else, or names no such module.
    """
    from transformers.pytorch_utils import Conv1D

    layers = models.decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    linear = [
        f"{prefix}{number}.{name}"
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not NOT_LINEAR.search(type(module).__name__)
        and not wrappers.is_of_router(layer, name)
        and not wrappers.is_read_past(layer, name)
    ]
    known = {name.rpartition(".")[2] for name in linear}
    listed = targets if isinstance(targets, list | tuple) else []
    asked = {name if isinstance(name, str) else None for name in listed}
    if isinstance(targets, str) and targets in TARGETS:
        asked = known
    if isinstance(targets, str) and targets == "mlp":
        linear = [
            name for name in linear if wrappers.is_feed_forward(layers, name.removeprefix(prefix))
        ]
    chosen = [name for name in linear if name.rpartition(".")[2] in asked]
    if known and asked == known and not chosen:
        raise ValueError(
            f"targets must be 'all' or names of modules: {type(model).__name__} has no linear "
            f"modules outside its attention and other token mixers, got {targets!r}"
        )
    if not chosen or not asked <= known:
        raise ValueError(
            f"targets must be 'all', 'mlp' or a list of names among {sorted(known)}, the linear "
            f"modules of the decoder layers, got {targets!r}"
        )
    return chosen


def mean_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats over every token but the first of each window.

    Args:
        model: The model in training, or in an evaluation on the way.
        ids: Token ids, ``(B, T)``.
    """
    return head_losses.mean_loss(model, ids)


def finished(trained: nn.Module, model: nn.Module, method: str, merge: bool) -> nn.Module:
    """The model to return: merged where asked, in the model's own dtypes, in evaluation mode."""
    if merge and method == "qlora":
        trained = wrappers.merged_into_copy(trained, model)
    elif merge and method in ADAPTERS:
        trained = trained.merge_and_unload()
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    for name, weight in trained.named_parameters():
        if weight.is_floating_point() and ".lora_" not in name:
            own_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            weight.data = weight.data.to(dtypes.get(own_name, model.dtype))
    return trained.requires_grad_(False).eval()
