"""How a training runs and is saved: a Trainer of transformers on full batches, sealed checkpoints.

:mod:`~pruning_utils.healing` says what is trained; this module trains it. A run with a folder is
saved on the way. Each checkpoint is sealed: a file in it lists the digest of every other file, so
that one that was cut short or damaged is told from a whole one.

Importing this module imports transformers, which takes seconds: import it where a training begins.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pruning_utils import models, runtime
from pruning_utils.engine.bars import tqdm

# In one forward and backward pass. Larger batches are accumulated, so that memory does not grow.
MICRO_BATCH_TOKENS = 8192
# In an evaluation pass at least: with fewer, reading the weights takes longer than multiplying.
EVALUATION_TOKENS = 1024
# Parameters from which on activations are computed again instead of kept.
LARGE = 1e9
SETTINGS = "settings.json"
SEAL = "complete.json"

# From logits (B, T, V) and token ids (B, T) to the mean loss in nats per predicted token.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Run:
    """One training: its settings and windows, and the folder that it is saved in, if any.

    Attributes:
        settings: As of :func:`healing.check_settings`.
        train_ids: Windows to train on, ``(n_windows, seq_len)``.
        eval_ids: Windows whose loss is measured before training and on the way; None: none.
        folder: Where training is saved; None: nowhere.
        checkpoint: The last whole checkpoint of this very run, to go on from; None: the beginning.

    Args:
        output_dir: The folder, or None.
        settings: See above.
        model: The model to heal, whose weights are recorded as a digest.
        train_ids: See above.
        eval_ids: See above.

    Raises:
        ValueError: If the model cannot take the windows; or if the folder holds anything but a run
            with the same settings, weights and windows (what differs is named).
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        settings: dict[str, Any],
        model: nn.Module,
        train_ids: torch.Tensor,
        eval_ids: torch.Tensor | None,
    ):
        models.check_input_ids(model, train_ids, shortest=2)
        if eval_ids is not None:
            models.check_input_ids(model, eval_ids, shortest=2)
        self.settings = settings
        self.train_ids = train_ids
        self.eval_ids = eval_ids
        self.folder: Path | None = None
        self.checkpoint: Path | None = None
        if output_dir is not None:
            self.folder = Path(output_dir)
            self._recorded = settings | {
                "model": runtime.tensor_digest(dict(model.named_parameters())),
                "train_ids": runtime.tensor_digest({"ids": train_ids}),
                "eval_ids": None if eval_ids is None else runtime.tensor_digest({"ids": eval_ids}),
            }
            self.checkpoint = _last_whole_checkpoint(self.folder, self._recorded)

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write down, where there is a folder, what the run is and the model's tokenizer."""
        if self.folder is None:
            return
        with runtime.atomic_path(self.folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(self._recorded, indent=1))
        tokenizer.save_pretrained(self.folder)


def train(
    model: nn.Module,
    run: Run,
    *,
    loss: Loss,
    in_bfloat16: bool,
    evaluations: int,
    saves: int,
) -> pd.DataFrame:
    """Train, in place, the parameters of a model that require gradients.

    Args:
        model: A causal language model, a copy of the run's in which some weights are to be trained.
        run: What it is trained on, and where that is saved.
        loss: Mean loss of a batch from its logits and its token ids.
        in_bfloat16: Whether products are computed in bfloat16, whatever holds the weights.
        evaluations: Number of evaluations, evenly over the steps; one before training comes in
            addition.
        saves: Number of saves, evenly over the steps.

    Returns:
        The ``history`` of a :class:`healing.HealedModel`, that of the steps before the run's
        ``checkpoint`` included.

    Raises:
        ValueError: If a loss is not finite.
    """
    steps, batch_size = run.settings["steps"], run.settings["batch_size"]
    use_cache = model.config.use_cache
    evaluate_at = set() if run.eval_ids is None else evenly(steps, evaluations)
    save_at = set() if run.folder is None else evenly(steps, saves)
    with tqdm(total=steps, desc="healing", leave=False) as bar:
        trainer = HealingTrainer(
            model,
            _training_arguments(model, run),
            _as_batch,
            windows_in_order(run.train_ids, steps * batch_size, run.settings["seed"]),
            None if run.eval_ids is None else list(run.eval_ids.cpu().long()),
            loss=loss,
            in_bfloat16=in_bfloat16,
            callbacks=[Schedule(evaluate_at, save_at, bar)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
    # What Trainer set for the time of the training.
    model.config.use_cache = use_cache
    model.activation_checkpointing_disable()
    return _history(trainer.state.log_history, batch_size * run.train_ids.shape[1])


def _history(log: list[dict[str, float]], tokens_per_step: int) -> pd.DataFrame:
    """What Trainer logged as a table; its summary at the end is left out."""
    rows = []
    for entry in log:
        for key, split in (("loss", "train"), ("eval_loss", "eval")):
            if key in entry:
                rate = entry.get("learning_rate", math.nan)
                rows.append((entry["step"], split, entry[key], rate))
    history = pd.DataFrame(rows, columns=["step", "split", "loss", "learning_rate"])
    history.insert(1, "tokens", history["step"] * tokens_per_step)
    return history


class HealingTrainer(Trainer):
    """A Trainer whose loss is one mean over all tokens, and whose evaluations leave no trace.

    Args:
        *given: As of Trainer.
        loss: Mean loss of a batch from its logits and its token ids.
        in_bfloat16: Whether products are computed in bfloat16, whatever holds the weights.
        **named: As of Trainer.
    """

    # All micro-batches hold equally many tokens: Trainer averages over their means.
    loss_is_scaled_for_ga = False

    def __init__(self, *given: Any, loss: Loss, in_bfloat16: bool, **named: Any):
        super().__init__(*given, **named)
        self.mean_loss = loss
        self.in_bfloat16 = in_bfloat16

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The mean loss of a micro-batch, where asked with outputs as Trainer expects them."""
        ids = inputs["labels"]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = self.mean_loss(logits, ids)
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(self, *given: Any, **named: Any) -> dict[str, float]:
        """As of Trainer, but the dropout that follows does not depend on evaluations."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*given, **named)


class Schedule(TrainerCallback):
    """Says after which steps to evaluate and to save, seals what was saved, moves the bar.

    Args:
        evaluate_at: Steps, 1-based, after which the loss is measured.
        save_at: Steps, 1-based, after which a checkpoint is saved.
        bar: The progress bar, in steps.
    """

    def __init__(self, evaluate_at: set[int], save_at: set[int], bar: tqdm):
        self.evaluate_at = evaluate_at
        self.save_at = save_at
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Decide what follows a step."""
        self.bar.update(state.global_step - self.bar.n)
        control.should_evaluate = state.global_step in self.evaluate_at
        control.should_save = state.global_step in self.save_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **others: Any) -> None:
        """Refuse a loss that is not finite: no step after it would mean anything."""
        loss = logs.get("loss", logs.get("eval_loss", 0))
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {state.global_step} of {state.max_steps}; "
                "learning_rate too high?"
            )

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Seal a checkpoint once all of it is written."""
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _training_arguments(model: nn.Module, run: Run) -> TrainingArguments:
    """What Trainer is told: a cosine schedule, norm 1, full batches in order, no saves of its own.

    Trainer's own saving is off; :class:`Schedule` asks for each save.
    """
    batch_size = run.settings["batch_size"]
    micro = micro_batch_size(batch_size, run.train_ids.shape[1])
    evaluated = run.train_ids if run.eval_ids is None else run.eval_ids
    n_parameters = sum(weight.numel() for weight in model.parameters())
    arguments = TrainingArguments(
        output_dir=str(run.folder or "."),
        max_steps=run.settings["steps"],
        train_sampling_strategy="sequential",
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=max(micro, EVALUATION_TOKENS // evaluated.shape[1]),
        gradient_accumulation_steps=batch_size // micro,
        learning_rate=run.settings["learning_rate"],
        warmup_steps=run.settings["warmup_steps"],
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        weight_decay=0.0,
        activation_checkpointing=n_parameters > LARGE,
        use_cpu=model.device.type == "cpu",
        seed=run.settings["seed"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_on_start=run.eval_ids is not None and run.checkpoint is None,
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
    return arguments


def evenly(steps: int, n: int) -> set[int]:
    """At most ``n`` of the steps 1 to ``steps``, evenly spaced, the last one among them."""
    return {math.ceil(steps * part / n) for part in range(1, n + 1)}


def micro_batch_size(batch_size: int, seq_len: int) -> int:
    """Windows in one pass: the largest divisor of ``batch_size`` within MICRO_BATCH_TOKENS.

    One where a single window of ``seq_len`` tokens is longer than that.
    """
    most = max(MICRO_BATCH_TOKENS // seq_len, 1)
    return max(size for size in range(1, batch_size + 1) if batch_size % size == 0 and size <= most)


def windows_in_order(ids: torch.Tensor, n: int, seed: int) -> list[torch.Tensor]:
    """``n`` windows: all of them in a random order, then all in a new order, and so on.

    Args:
        ids: Windows, ``(n_windows, seq_len)``.
        n: Number of windows to return.
        seed: Seed of the orders.

    Returns:
        Windows of shape ``(seq_len,)``, int64, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    n_orders = n // len(ids) + 1
    orders = [torch.randperm(len(ids), generator=generator) for _ in range(n_orders)]
    rows = ids.cpu().long()
    return [rows[index] for index in torch.cat(orders)[:n].tolist()]


def _as_batch(windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"labels": torch.stack(windows)}


# --- what lies in a run's folder ------------------------------------------------------------------


def _last_whole_checkpoint(folder: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; later ones that are damaged or cut short are deleted.

    None where nothing whole is saved; a ValueError as of :class:`Run`.
    """
    if (folder / SETTINGS).is_file():
        _refuse_other_settings(folder, settings)
    elif folder.exists():
        _refuse_other_files(folder)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=_step_of)
    for last in reversed(checkpoints):
        if is_whole(last):
            return last
        shutil.rmtree(last)
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    recorded = json.loads((folder / SETTINGS).read_text())
    differing = [
        f"{key} {recorded.get(key)!r} there, {settings.get(key)!r} asked"
        for key in sorted(recorded | settings)
        if recorded.get(key) != settings.get(key)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a healing run with other settings: {'; '.join(differing)}; "
            "choose another output_dir, or delete it"
        )


def _refuse_other_files(folder: Path) -> None:
    """ValueError for a folder without settings that is not empty.

    What a run leaves that was killed while it wrote its settings counts as empty.
    """
    if any(not path.name.startswith(f".{SETTINGS}") for path in folder.iterdir()):
        raise ValueError(f"output_dir {folder} is not empty, and holds no healing run")


def seal(checkpoint: Path) -> None:
    """Write down the digests of a checkpoint's files: without that it counts as cut short."""
    with runtime.atomic_path(checkpoint / SEAL) as temporary:
        temporary.write_text(json.dumps(file_digests(checkpoint)))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed, and its files are those that were sealed."""
    sealed = checkpoint / SEAL
    return sealed.is_file() and sealed.read_text() == json.dumps(file_digests(checkpoint))


def file_digests(folder: Path) -> dict[str, str]:
    """Hexadecimal sha256 of every file in a folder but its seal, by path, sorted."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and SEAL not in path.name:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[str(path.relative_to(folder))] = digest
    return digests
