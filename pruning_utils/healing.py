"""Train a pruned model a little so that it recovers: adapters, its last layers, or all of it, over
one Trainer."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from pruning_utils import models, runtime
from pruning_utils.engine.bars import tqdm

ADAPTERS = ("lora", "qlora", "dora")
METHODS = (*ADAPTERS, "last_layers", "full")
# In a pass at least: with fewer, reading the weights takes longer than multiplying by them.
EVALUATION_TOKENS = 1024
MICRO_BATCH_TOKENS = (
    8192  # larger batches are accumulated, so that memory does not grow with the batch
)
LOGITS_AT_ONCE = 2**22  # in float32: 16 MiB
LARGE = 1e9  # parameters from which on activations are computed again instead of kept
# Evenly over the steps; the evaluation loss before the first step comes in addition.
EVALUATIONS = 8
SAVES = 4
SETTINGS, SEAL, SPLITS = "settings.json", "complete.json", {"loss": "train", "eval_loss": "eval"}
# Or as digests.
NOT_RECORDED = (
    "model",
    "tokenizer",
    "train_ids",
    "eval_ids",
    "output_dir",
    "merge",
)
NOT_FEED_FORWARD = ("attn", "attention", "mixer", "conv", "ssm", "mamba")


class HealedModel(NamedTuple):
    """A healed model and how its loss went.

    Attributes:
        model: The trained copy, in evaluation mode: a PEFT model for unmerged adapters, else a
            plain one.
        history: ``step`` (1-based; 0 is before training), ``tokens`` (seen so far), ``split``
            (``train`` or ``eval``), ``loss`` (nats per token, of the step's batch or all evaluation
            windows), ``learning_rate`` (NaN for eval).
        trainable_parameters: Number of parameters that were trained.
    """

    model: nn.Module
    history: pd.DataFrame
    trainable_parameters: int


def heal(
    model: nn.Module,
    tokenizer,
    train_ids: torch.Tensor,
    *,
    method: str = "qlora",
    eval_ids: torch.Tensor | None = None,
    steps: int = 40,
    batch_size: int = 4,
    learning_rate: float = 3e-4,
    warmup_steps: int = 4,
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
    """Train a copy of a model on windows of text, with AdamW, a cosine schedule and gradient
    clipping at norm 1.

    What is trained is kept in float32; everything else, and the input model, stays as it is. With
    ``output_dir``, training is saved four times; called again with the same settings it goes on
    from the last save that is whole.

    Args:
        model: A 16- or 32-bit causal language model, pruned or not.
        tokenizer: Its tokenizer, saved in ``output_dir``.
        train_ids: Windows to train on, ``(n_windows, seq_len)``; in a new order each time that all
            have been seen.
        method: ``lora``; ``qlora`` (LoRA over a copy whose layers are stored in NF4); ``dora``;
            ``last_layers`` (the language-model head and the last ``last_k`` layers); ``full`` (all
            weights).
        eval_ids: Windows whose loss is measured before training and eight times on the way; None:
            none.
        steps: Optimiser steps, at least 1.
        batch_size: Windows in a step.
        learning_rate: Peak rate, above 0.
        warmup_steps: Steps in which the rate rises linearly, from 0 at the first; from 0 to
            ``steps``.
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
        ValueError: If an argument is out of range, the model is quantised or has adapters,
            ``output_dir`` holds anything but a run with these settings (the differing ones are
            named), or a loss is not finite.
    """
    settings = check_settings(
        model, {key: value for key, value in locals().items() if key not in NOT_RECORDED}
    )
    for ids in [train_ids] if eval_ids is None else [train_ids, eval_ids]:
        models.check_input_ids(model, ids, shortest=2)
    folder, last = None if output_dir is None else Path(output_dir), None
    if folder is not None:
        inputs = {
            "model": dict(model.named_parameters()),
            "train_ids": {"ids": train_ids},
            "eval_ids": None if eval_ids is None else {"ids": eval_ids},
        }
        settings |= {name: given and runtime.tensor_digest(given) for name, given in inputs.items()}
        last = _last_whole_checkpoint(folder, settings)
    torch.manual_seed(seed)
    trained = _trainable_copy(model, settings)
    if folder is not None:
        with runtime.atomic_path(folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
        tokenizer.save_pretrained(folder)
    with tqdm(total=steps, desc="healing", leave=False) as bar:
        trainer = _trainer(
            trained, model.dtype, train_ids, eval_ids, settings, folder, last is not None, bar
        )
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    count = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    log = [
        (entry["step"], split, entry[key], entry.get("learning_rate", math.nan))
        for entry in trainer.state.log_history
        for key, split in SPLITS.items()
        if key in entry
    ]
    history = pd.DataFrame(log, columns=["step", "split", "loss", "learning_rate"])
    history.insert(1, "tokens", history["step"] * batch_size * train_ids.shape[1])
    return HealedModel(_finished(trained, model, method, merge), history, count)


def check_settings(model: nn.Module, settings: dict) -> dict:
    """All settings of :func:`heal` for a model, defaults filled in; a ValueError as there, also for
    unknown names."""
    defaults = {
        name: given.default
        for name, given in inspect.signature(heal).parameters.items()
        if name not in NOT_RECORDED
    }
    if unknown := settings.keys() - defaults.keys():
        raise ValueError(f"healing has no settings {sorted(unknown)}; it has {', '.join(defaults)}")
    settings = defaults | settings
    settings["targets"] = (
        list(targets) if isinstance(targets := settings["targets"], tuple) else targets
    )
    if settings["method"] not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {settings['method']!r}")
    if getattr(model, "is_quantized", False) or hasattr(model, "peft_config"):
        raise ValueError(
            "the model must be a 16- or 32-bit one without adapters: load it with quantize=None, "
            "merge adapters first; 'qlora' quantises a copy itself"
        )
    n_layers, most = len(models.decoder_layers(model)), 2**32 - 1
    for name, low, high in (
        ("steps", 1, most),
        ("batch_size", 1, most),
        ("warmup_steps", 0, settings["steps"]),
        ("rank", 1, most),
        ("last_k", 0, n_layers),
        ("seed", 0, most),
    ):
        if type(settings[name]) is not int or not low <= settings[name] <= high:
            raise ValueError(
                f"{name} must be a whole number from {low} to {high}, got {settings[name]!r}"
            )
    settings["alpha"] = settings["rank"] if settings["alpha"] is None else settings["alpha"]
    for name, least, below in (
        ("learning_rate", 5e-324, math.inf),
        ("alpha", 5e-324, math.inf),
        ("dropout", 0, 1),
    ):
        if not isinstance(settings[name], int | float) or not least <= settings[name] < below:
            raise ValueError(
                f"{name} must be {'in [0, 1)' if below == 1 else 'above 0'}, got {settings[name]!r}"
            )
    if settings["method"] in ADAPTERS:
        adapter_targets(model, settings["targets"])
    return settings


def _trainable_copy(model: nn.Module, settings: dict) -> nn.Module:
    """A copy in which exactly what the method trains requires gradients, in float32."""
    method = settings["method"]
    # Too narrow for gradients.
    source = copy.deepcopy(model).float() if model.dtype == torch.float16 else model
    trained = models.quantized_copy(source) if method == "qlora" else copy.deepcopy(source)
    parts = [trained] if method == "full" else []
    if method == "last_layers":
        if settings["untie"]:
            models.untie_head(trained)
        layers = models.decoder_layers(trained)
        parts = [trained.get_output_embeddings(), *layers[len(layers) - settings["last_k"] :]]
        parts += [models.final_norm(trained)] if settings["train_norm"] else []
    chosen = {id(weight) for part in parts for weight in part.parameters()}
    for (
        weight
    ) in trained.parameters():  # not buffers: rotary frequencies have a precision of their own
        weight.requires_grad_(id(weight) in chosen)
        if weight.requires_grad:
            weight.data = weight.data.float()
    if method not in ADAPTERS:
        return trained
    from peft import LoraConfig, get_peft_model

    for module in trained.modules():
        # On the CPU, bitsandbytes repacks 4-bit weights at the first evaluation, after which no
        # gradient passes them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    trained.name_or_path = (
        ""  # else each save asks the hub about that name, which never had these weights
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=adapter_targets(trained, settings["targets"]),
        use_dora=method == "dora",
    )
    with warnings.catch_warnings(
        action="ignore"
    ):  # of old names within transformers, and that Conv1D is transposed
        return get_peft_model(trained, config)


def adapter_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Full names of the linear modules inside the decoder layers that get adapters; at least one,
    or a ValueError.

    ``targets`` is ``all``, ``mlp`` (those outside the attention and other token mixers), or a list
    as ``["q_proj"]``.
    """
    from transformers.pytorch_utils import Conv1D

    layers = models.decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    linear = {
        name: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D)
    }
    known = set(linear.values())
    asked = (
        known
        if targets in ("all", "mlp")
        else set(targets)
        if isinstance(targets, list | tuple)
        else set()
    )
    left_out = NOT_FEED_FORWARD if targets == "mlp" else ()
    chosen = [
        name
        for name, leaf in linear.items()
        if leaf in asked and not any(part in name[len(prefix) :] for part in left_out)
    ]
    if not chosen or not asked <= known:
        raise ValueError(
            f"targets must be 'all', 'mlp' or a list of names among {sorted(known)}, the linear "
            f"modules of the decoder layers, got {targets!r}"
        )
    return chosen


def _trainer(
    trained: nn.Module,
    dtype: torch.dtype,
    train_ids,
    eval_ids,
    settings: dict,
    folder,
    resumes: bool,
    bar,
):
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    steps, batch_size = settings["steps"], settings["batch_size"]

    class HealingTrainer(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids = inputs["labels"]
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits
            loss = _mean_loss(logits, ids)
            return (loss, {"loss": loss}) if return_outputs else loss

        def evaluate(self, *given, **named):
            with torch.random.fork_rng(
                devices=[]
            ):  # so that the dropout does not depend on evaluations
                return super().evaluate(*given, **named)

    class Schedule(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            bar.update(state.global_step - bar.n)
            marks = [
                {math.ceil(steps * part / n) for part in range(1, n + 1)}
                for n in (EVALUATIONS, SAVES)
            ]
            control.should_evaluate = eval_ids is not None and state.global_step in marks[0]
            control.should_save = folder is not None and state.global_step in marks[1]

        def on_log(self, args, state, control, logs, **others):
            if not math.isfinite(loss := logs.get("loss", logs.get("eval_loss", 0))):
                raise ValueError(
                    f"the loss is {loss} at step {state.global_step} of {steps}; learning_rate too "
                    "high?"
                )

        def on_save(self, args, state, control, **others):
            checkpoint = folder / f"checkpoint-{state.global_step}"
            with runtime.atomic_path(
                checkpoint / SEAL
            ) as temporary:  # one without this file was cut short
                temporary.write_text(json.dumps(_file_digests(checkpoint)))

    micro = max(
        (
            size
            for size in range(1, batch_size + 1)
            if batch_size % size == 0 and size * train_ids.shape[1] <= MICRO_BATCH_TOKENS
        ),
        default=1,
    )
    seq_len = train_ids.shape[1] if eval_ids is None else eval_ids.shape[1]
    arguments = TrainingArguments(
        output_dir=str(folder or "."),
        max_steps=steps,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=max(micro, EVALUATION_TOKENS // seq_len),
        gradient_accumulation_steps=batch_size // micro,
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup_steps"],
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        weight_decay=0.0,
        activation_checkpointing=sum(weight.numel() for weight in trained.parameters()) > LARGE,
        use_cpu=trained.device.type == "cpu",
        seed=settings["seed"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_on_start=eval_ids is not None and not resumes,
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    # Several GPUs would be used by splitting batches, which changes them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    generator = torch.Generator().manual_seed(settings["seed"])
    n = steps * batch_size
    rows = train_ids.cpu().long()
    order = torch.cat(
        [
            torch.randperm(len(train_ids), generator=generator)
            for _ in range(n // len(train_ids) + 1)
        ]
    )[:n]
    trainer = HealingTrainer(
        trained,
        arguments,
        lambda batch: {"labels": torch.stack(batch)},
        [rows[index] for index in order.tolist()],
        None if eval_ids is None else list(eval_ids.cpu().long()),
        callbacks=[Schedule()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _mean_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats over every token but the first of each window; float32 logits exist of a
    few tokens only."""
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    size = LOGITS_AT_ONCE // logits.shape[-1] + 1
    parts = zip(logits.flatten(0, 1).split(size), targets.split(size), strict=True)
    return (
        sum(
            torch.utils.checkpoint.checkpoint(
                lambda rows, expected: nn.functional.cross_entropy(
                    rows.float(), expected, reduction="sum"
                ),
                *part,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for part in parts
        )
        / ids[:, 1:].numel()
    )


def _finished(trained: nn.Module, model: nn.Module, method: str, merge: bool) -> nn.Module:
    """The model to return: adapters merged where asked, the model's own dtypes elsewhere, in
    evaluation mode."""
    trained.config.use_cache = model.config.use_cache
    trained.activation_checkpointing_disable()
    if (
        merge and method == "qlora"
    ):  # into the 16- or 32-bit weights: in 4 bits the adapters would be rounded away
        merged = copy.deepcopy(model)
        for name, module in trained.named_modules():
            if hasattr(module, "get_delta_weight"):
                weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
                weight.data += module.get_delta_weight("default").to(weight.device)
        trained = merged
    elif merge and method in ADAPTERS:
        trained = trained.merge_and_unload()
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    for name, weight in trained.named_parameters():
        if weight.is_floating_point() and ".lora_" not in name:
            own_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            weight.data = weight.data.to(dtypes.get(own_name, model.dtype))
    return trained.requires_grad_(False).eval()


def _file_digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(
        path for path in folder.rglob("*") if path.is_file() and SEAL not in path.name
    ):
        with path.open("rb") as file:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _last_whole_checkpoint(folder: Path, settings: dict) -> Path | None:
    """The checkpoint to go on from; later ones that are damaged or were cut short are deleted."""
    if (folder / SETTINGS).is_file():
        recorded = json.loads((folder / SETTINGS).read_text())
        if differing := [
            f"{key} {recorded.get(key)!r} there, {settings.get(key)!r} asked"
            for key in sorted(recorded | settings)
            if recorded.get(key) != settings.get(key)
        ]:
            raise ValueError(
                f"{folder} holds a healing run with other settings: {'; '.join(differing)}; "
                "choose another output_dir, or delete it"
            )
    elif folder.exists() and any(
        not path.name.startswith(f".{SETTINGS}") for path in folder.iterdir()
    ):
        raise ValueError(f"output_dir {folder} is not empty, and holds no healing run")
    for last in sorted(
        folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])
    ):
        if (last / SEAL).is_file() and (last / SEAL).read_text() == json.dumps(_file_digests(last)):
            return last
        shutil.rmtree(last)
    return None
