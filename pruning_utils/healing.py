"""Train a pruned model a little so that it recovers: adapters, its last layers, or all of it, over one Trainer."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from pruning_utils import models, runtime

METHODS = ("lora", "qlora", "dora", "last_layers", "full")
MICRO_BATCH_TOKENS = 8192  # larger batches are accumulated, so that memory does not grow with the batch
EVALUATIONS = 8  # of the evaluation loss, evenly over the steps, besides the one before the first
SAVES = 4
NOT_FEED_FORWARD = ("attn", "attention", "mixer", "conv", "ssm", "mamba")


@dataclass(frozen=True)
class HealedModel:
    """A healed model and how its loss went.

    Attributes:
        model: The trained copy: a PEFT model for unmerged adapters, else a plain one, in evaluation mode.
        history: Columns ``step`` (1-based; 0 is before training), ``tokens`` (seen so far), ``split`` (``train`` or
            ``eval``), ``loss`` (nats per token; of the step's batch, or of all evaluation windows) and
            ``learning_rate`` (of the step; empty for ``eval``).
        trainable_parameters: Number of parameters that were trained.
    """

    model: nn.Module
    history: pd.DataFrame
    trainable_parameters: int


def heal(model: nn.Module, tokenizer, train_ids: torch.Tensor, *, method: str = "qlora",
         eval_ids: torch.Tensor | None = None, steps: int = 40, batch_size: int = 4, learning_rate: float = 3e-4,
         warmup_steps: int = 4, rank: int = 8, alpha: float | None = None, dropout: float = 0.05,
         targets: str | list[str] = "all", last_k: int = 3, train_norm: bool = False, untie: bool = True,
         merge: bool = False, seed: int = 0, output_dir: str | Path | None = None) -> HealedModel:
    """Train a copy of a model on windows of text, with AdamW, a cosine schedule and gradient clipping at norm 1.

    What is trained is kept in float32 whatever the model's dtype; everything else stays as it is. The input model is
    never changed. With ``output_dir``, training is saved four times on its way; called again with the same settings
    after an interruption it goes on from the last save that is whole, and after its end it only loads the result.

    Args:
        model: A 16- or 32-bit causal language model, pruned or not.
        tokenizer: Its tokenizer, saved beside checkpoints.
        train_ids: Windows to train on, ``(n_windows, seq_len)``; passed over again when the steps need more.
        method: ``lora``; ``qlora`` (LoRA over a copy whose layers are stored in NF4); ``dora``; ``last_layers`` (the
            language-model head and the last ``last_k`` layers); ``full`` (all weights).
        eval_ids: Windows whose loss is measured before training and eight times on the way; None: none.
        steps: Optimiser steps, at least 1.
        batch_size: Windows in a step.
        learning_rate: Peak rate, above 0.
        warmup_steps: Steps of linear warm-up, from 0 to ``steps``.
        rank: Rank of the adapters, at least 1.
        alpha: Scale of the adapters is alpha / rank; None takes alpha = rank.
        dropout: Dropout before the adapters, in [0, 1).
        targets: Linear weights that get adapters: ``all`` inside the decoder layers, ``mlp`` (those outside the
            attention), or a list of module names.
        last_k: Number of last layers that ``last_layers`` trains, from 0 to all.
        train_norm: Whether ``last_layers`` trains the final norm too.
        untie: Whether ``last_layers`` gives a tied head weights of its own; otherwise the embedding is trained with it.
        merge: Whether adapters are added into a copy of the 16- or 32-bit weights (for ``qlora`` too, so that nothing
            is rounded to 4 bits).
        seed: Seed of the adapters, the dropout and the order of windows.
        output_dir: Where training is saved; None: nowhere.

    Returns:
        The :class:`HealedModel`.

    Raises:
        ValueError: If an argument is out of range, the model is quantised or wrapped by PEFT, or ``output_dir`` holds a
            run with other settings (the differing ones are named).
    """
    settings = {key: value for key, value in locals().items()
                if key not in ("model", "tokenizer", "train_ids", "eval_ids", "output_dir", "merge")}
    _check(model, settings, train_ids, eval_ids)
    folder = None if output_dir is None else Path(output_dir)
    checkpoint = None
    if folder is not None:
        settings |= {"model": _model_digest(model), "train_ids": _tensor_digest(train_ids),
                     "eval_ids": None if eval_ids is None else _tensor_digest(eval_ids)}
        checkpoint = _last_whole_checkpoint(folder, settings)
    torch.manual_seed(seed)
    trained = _trainable_copy(model, settings)
    trainer = _trainer(trained, tokenizer, train_ids, eval_ids, settings, folder, checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    count = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    history = _history(trainer.state.log_history, batch_size * train_ids.shape[1])
    return HealedModel(_finished(trained, model, method, merge), history, count)


def _check(model: nn.Module, settings: dict, train_ids: torch.Tensor, eval_ids: torch.Tensor | None) -> None:
    n_layers = len(models.decoder_layers(model))
    if settings["method"] not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {settings['method']!r}")
    if getattr(model, "is_quantized", False) or hasattr(model, "peft_config"):
        raise ValueError("heal takes a 16- or 32-bit model without adapters: load it with quantize=None, and merge "
                         "adapters first; method 'qlora' quantises a copy itself")
    ranges = {"steps": (1, math.inf), "batch_size": (1, math.inf), "warmup_steps": (0, settings["steps"]),
              "rank": (1, math.inf), "last_k": (0, n_layers)}
    for name, (low, high) in ranges.items():
        if isinstance(settings[name], bool) or not isinstance(settings[name], int) or \
                not low <= settings[name] <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, got {settings[name]!r}")
    if not 0 <= settings["dropout"] < 1:
        raise ValueError(f"dropout must be in [0, 1), got {settings['dropout']}")
    for name in ("learning_rate", "alpha"):
        if settings[name] is not None and not 0 < settings[name] < math.inf:
            raise ValueError(f"{name} must be above 0, got {settings[name]}")
    for ids in (train_ids, eval_ids):
        if ids is not None:
            models.check_input_ids(model, ids)
            if ids.shape[1] < 2:
                raise ValueError(f"windows must hold at least 2 tokens, got {ids.shape[1]}")


def _trainable_copy(model: nn.Module, settings: dict) -> nn.Module:
    """A copy in which exactly what the method trains requires gradients, in float32."""
    method = settings["method"]
    if method in ("lora", "qlora", "dora"):
        return _with_adapters(models.quantized_copy(model) if method == "qlora" else copy.deepcopy(model), settings)
    trained = copy.deepcopy(model)
    parts = [trained]
    if method == "last_layers":
        trained.requires_grad_(False)
        if settings["untie"]:
            models.untie_head(trained)
        layers = models.decoder_layers(trained)
        parts = [trained.get_output_embeddings(), *layers[len(layers) - settings["last_k"]:]]
        if settings["train_norm"]:
            parts.append(models.final_norm(trained))
    for part in parts:
        part.requires_grad_(True)
        part.float()
    return trained


def _with_adapters(trained: nn.Module, settings: dict) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    for module in trained.modules():
        # On the CPU, bitsandbytes repacks 4-bit weights at the first evaluation, after which no gradient passes them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return get_peft_model(trained, LoraConfig(
        task_type="CAUSAL_LM", r=settings["rank"], lora_alpha=settings["alpha"] or settings["rank"],
        lora_dropout=settings["dropout"], target_modules=adapter_targets(trained, settings["targets"]),
        use_dora=settings["method"] == "dora", bias="none"))


def adapter_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Names of the linear modules inside the decoder layers that get adapters.

    Args:
        model: A causal language model.
        targets: ``all``, ``mlp`` (those outside the attention and other token mixers), or names such as ``q_proj``.

    Returns:
        Sorted last parts of module names where they occur inside the decoder layers only, else whole names.

    Raises:
        ValueError: If a name fits no linear module of the decoder layers; the message lists those that there are.
    """
    from transformers.pytorch_utils import Conv1D

    layers = models.decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    inside = [name for name in linear if name.startswith(prefix)]
    leaves = {name.rpartition(".")[2] for name in inside}
    if targets == "mlp":
        inside = [name for name in inside if not any(part in name[len(prefix):] for part in NOT_FEED_FORWARD)]
    elif targets != "all":
        wrong = [targets] if isinstance(targets, str) else [name for name in targets if name not in leaves]
        if wrong or not targets:
            raise ValueError(f"targets must be 'all', 'mlp' or names among {', '.join(sorted(leaves))}, got "
                             f"{wrong[0] if wrong else targets!r}")
        inside = [name for name in inside if name.rpartition(".")[2] in targets]
    if not inside:
        raise ValueError(f"the decoder layers of {type(model).__name__} hold no linear module for targets {targets!r}")
    chosen = {name.rpartition(".")[2] for name in inside}
    spread = {name for name in linear if name.rpartition(".")[2] in chosen}
    return sorted(chosen) if spread == set(inside) else sorted(inside)


def _trainer(trained: nn.Module, tokenizer, train_ids: torch.Tensor, eval_ids: torch.Tensor | None, settings: dict,
             folder: Path | None, checkpoint: Path | None):
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    steps, batch_size = settings["steps"], settings["batch_size"]
    accumulation = next(parts for parts in range(1, batch_size + 1) if batch_size % parts == 0 and (
        batch_size // parts * train_ids.shape[1] <= MICRO_BATCH_TOKENS or parts == batch_size))
    on_cpu, large = trained.device.type == "cpu", sum(p.numel() for p in trained.parameters()) > 1e9
    arguments = TrainingArguments(
        output_dir=str(folder) if folder else "unused", max_steps=steps,
        per_device_train_batch_size=batch_size // accumulation, per_device_eval_batch_size=batch_size // accumulation,
        gradient_accumulation_steps=accumulation, gradient_checkpointing=large, learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup_steps"], lr_scheduler_type="cosine", max_grad_norm=1.0, weight_decay=0.0,
        bf16=trained.dtype == torch.bfloat16, fp16=trained.dtype == torch.float16 and not on_cpu, use_cpu=on_cpu,
        seed=settings["seed"], data_seed=settings["seed"], full_determinism=False, logging_steps=1,
        logging_strategy="steps", eval_strategy="no", save_strategy="no", save_total_limit=2, report_to="none",
        disable_tqdm=True, prediction_loss_only=True, remove_unused_columns=False, dataloader_pin_memory=False,
        eval_on_start=eval_ids is not None and checkpoint is None, label_names=["labels"])
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs would be used by splitting batches, which changes them
    trainer = Trainer(model=trained, args=arguments, train_dataset=_Windows(train_ids), processing_class=tokenizer,
                      eval_dataset=None if eval_ids is None else _Windows(eval_ids),
                      callbacks=[_callback(steps, eval_ids is not None, folder is not None)])
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Windows(torch.utils.data.Dataset):
    """Packed windows as the Trainer reads them; every token but the first is predicted."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids.cpu()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def _callback(steps: int, evaluates: bool, saves: bool):
    """Evaluate and save at even distances and at the end, seal what was saved, and show progress."""
    from transformers import TrainerCallback

    class Schedule(TrainerCallback):
        evaluations = {math.ceil(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
        checkpoints = {math.ceil(steps * part / SAVES) for part in range(1, SAVES + 1)}

        def on_train_begin(self, args, state, control, **others):
            self.bar = tqdm(total=steps, initial=state.global_step, desc="healing", leave=False)

        def on_step_end(self, args, state, control, **others):
            self.bar.update()
            control.should_evaluate = evaluates and state.global_step in self.evaluations
            control.should_save = saves and state.global_step in self.checkpoints

        def on_save(self, args, state, control, **others):
            _seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        def on_train_end(self, args, state, control, **others):
            self.bar.close()

    return Schedule()


def _finished(trained: nn.Module, model: nn.Module, method: str, merge: bool) -> nn.Module:
    """The model to return: adapters merged where asked, the model's own dtype elsewhere, in evaluation mode."""
    if method in ("last_layers", "full"):
        trained = trained.to(model.dtype)
    elif not merge:
        for module in trained.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = type(module)(1, 1).support_avx512bf16_for_cpu
    elif method == "qlora":
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        weights = {name: weight.to(model.device) for name, weight in get_peft_model_state_dict(trained).items()}
        trained = get_peft_model(copy.deepcopy(model), trained.peft_config["default"])
        set_peft_model_state_dict(trained, weights)
        trained = trained.merge_and_unload()
    else:
        trained = trained.merge_and_unload()
    trained.requires_grad_(False)
    return trained.eval()


def _history(log: list[dict], tokens_a_step: int) -> pd.DataFrame:
    rows = [{"step": entry["step"], "tokens": entry["step"] * tokens_a_step,
             "split": "train" if "loss" in entry else "eval", "loss": entry.get("loss", entry.get("eval_loss")),
             "learning_rate": entry.get("learning_rate")} for entry in log if "loss" in entry or "eval_loss" in entry]
    return pd.DataFrame(rows, columns=["step", "tokens", "split", "loss", "learning_rate"]).astype(
        {"loss": float, "learning_rate": float})


def _tensor_digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(values.shape)}".encode() + values.view(torch.uint8).numpy().tobytes()).hexdigest()


def _model_digest(model: nn.Module) -> str:
    """Digest of up to 1,024 values of each weight, spread over it: other weights differ, and it takes no time."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()
        digest.update(f"{name} {tuple(weight.shape)} {_tensor_digest(values[::-(-len(values) // 1024)])}".encode())
    return digest.hexdigest()


def _seal(checkpoint: Path) -> None:
    """Record the size and digest of every file; a checkpoint without this record was cut short."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                files[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
    with runtime.atomic_path(checkpoint / "complete.json") as temporary:
        temporary.write_text(json.dumps(files))


def _is_whole(checkpoint: Path) -> bool:
    try:
        recorded = json.loads((checkpoint / "complete.json").read_text())
        for name, digest in recorded.items():
            with (checkpoint / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
        return True
    except (OSError, ValueError):
        return False


def _last_whole_checkpoint(folder: Path, settings: dict) -> Path | None:
    """The checkpoint to go on from; later ones that are damaged are deleted.

    Raises:
        ValueError: If the folder was begun with other settings.
    """
    record = folder / "settings.json"
    if record.is_file():
        recorded = json.loads(record.read_text())
        asked = json.loads(json.dumps(settings))
        differing = [f"{key} {recorded.get(key)!r} there, {asked.get(key)!r} asked"
                     for key in sorted(recorded.keys() | asked.keys()) if recorded.get(key) != asked.get(key)]
        if differing:
            raise ValueError(f"{folder} holds a healing run with other settings: {'; '.join(differing)}; "
                             "choose another output_dir, or delete it")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir {folder} is not empty, and holds no healing run")
    with runtime.atomic_path(record) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while found and not _is_whole(found[-1]):
        shutil.rmtree(found.pop())
    return found[-1] if found else None
