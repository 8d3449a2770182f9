"""How a training runs and is saved: a Trainer of transformers on full batches, sealed checkpoints.

:mod:`~pruning_utils.healing` says what is trained; this module trains it. A run with a folder is
saved on the way. Each checkpoint is sealed: a file in it lists the digest of every other file, so
that one that was cut short or damaged is told from a whole one.

Importing this module imports transformers, which takes seconds: import it where a training begins.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
from pruning_utils.engine import memory, passes, saved_models
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.checks import file_path, whole_number

# In one forward and backward pass. Larger batches are accumulated, so that memory does not grow.
MICRO_BATCH_TOKENS = 8192
# In a step: several times what the largest models are trained with. Its token ids take 512 MiB.
STEP_TOKENS = 2**26
# In an evaluation pass at least: with fewer, reading the weights takes longer than multiplying.
EVALUATION_TOKENS = 1024
# Parameters from which on activations are computed again from the beginning: on a processor, and
# where several devices hold one model.
LARGE = 1e9
SETTINGS = "settings.json"
SEAL = "complete.json"
logger = logging.getLogger(__name__)

# Fields of a configuration that say nothing of what a layer computes.
NAMES_AND_OUTPUTS = {
    *("architectures", "dtype", "transformers_version", "id2label", "label2id", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict"),
    *("output_hidden_states", "output_attentions", "output_router_logits"),
}

# From a model and token ids (B, T) to the mean loss in nats per predicted token.
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """What Python, NumPy and torch draw afterwards does not depend on what is drawn inside."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _digest_beside_weights(model: nn.Module) -> str:
    """Digest of what a model computes by, beside its parameters: configuration and buffers."""
    kept = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    fields = json.dumps(_computed_by(model.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256((fields + runtime.tensor_digest(buffers)).encode()).hexdigest()


def _computed_by(fields: dict) -> dict:
    """What a configuration says of what is computed, at any depth."""
    return {
        name: _computed_by(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if str(name) not in NAMES_AND_OUTPUTS and not str(name).startswith("_")
    }


class Run:
    """One training: its settings and windows, and the folder that it is saved in, if any.

    Attributes:
        settings: As of :func:`healing.check_settings`.
        tokenizer: The model's tokenizer, saved in the folder.
        train_ids: Windows to train on, ``(n_windows, seq_len)``.
        eval_ids: Windows whose loss is measured before training and on the way; None: none.
        folder: Where training is saved; None: nowhere.
        checkpoint: The last whole checkpoint of this very run, to go on from; None: the beginning.

    Args:
        output_dir: The folder, or None.
        settings: See above.
        model: The model to heal. Digests of its weights and of its configuration are recorded.
        tokenizer: See above.
        train_ids: See above.
        eval_ids: See above.

    Raises:
        ValueError: If weights are not in memory or in float64, or the model cannot take the
            windows; if a batch of them is larger than :data:`STEP_TOKENS`; if ``output_dir`` is no
            path, or there is a folder and a tokenizer that cannot be saved; or if the folder holds
            anything but a run with the same settings, model and windows (what differs is named).
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        settings: dict[str, Any],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        train_ids: torch.Tensor,
        eval_ids: torch.Tensor | None,
    ):
        passes.refuse_missing_weights(model, offloaded=False)
        if holds(model, torch.float64):
            raise ValueError("the model must be a 16- or 32-bit one, but has weights in float64")
        models.check_input_ids(model, train_ids, shortest=2, name="train_ids")
        if eval_ids is not None:
            models.check_input_ids(model, eval_ids, shortest=2, name="eval_ids")
        whole_number(
            "batch_size",
            settings["batch_size"],
            1,
            STEP_TOKENS // train_ids.shape[1],
            of=f"windows of {train_ids.shape[1]} tokens, {STEP_TOKENS} in a step",
        )
        self.settings = settings
        self.tokenizer: Any = tokenizer
        self.train_ids = train_ids
        self.eval_ids = eval_ids
        self.folder: Path | None = None
        self.checkpoint: Path | None = None
        if output_dir is not None:
            if not callable(getattr(tokenizer, "save_pretrained", None)):
                raise ValueError(
                    "tokenizer must be one that can be saved where output_dir is given, got "
                    f"{tokenizer!r}"
                )
            self.folder = file_path("output_dir", output_dir)
            there = [path for path in (self.folder, *self.folder.parents) if path.exists()]
            above = there[0] if there else None
            if above is not None and not above.is_dir():
                raise ValueError(f"output_dir must be a folder, but {above} is a file")
            self._recorded = settings | {
                "model": runtime.tensor_digest(dict(model.named_parameters())),
                "configuration": _digest_beside_weights(model),
                "train_ids": runtime.tensor_digest({"ids": train_ids}),
                "eval_ids": None if eval_ids is None else runtime.tensor_digest({"ids": eval_ids}),
            }
            self.checkpoint = _last_whole_checkpoint(self.folder, self._recorded)

    def begin(self) -> None:
        """Write down, where there is a folder, what the run is and the model's tokenizer.

        Raises:
            ValueError: If the tokenizer cannot be saved; nothing is written then.
        """
        if self.folder is None:
            return
        with tempfile.TemporaryDirectory() as saved:
            try:
                self.tokenizer.save_pretrained(Path(saved))
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"tokenizer must be one that can be saved, got {self.tokenizer!r}: {error}"
                ) from error
            with runtime.atomic_path(self.folder / SETTINGS) as temporary:
                temporary.write_text(json.dumps(self._recorded, indent=1))
            shutil.copytree(saved, self.folder, dirs_exist_ok=True)


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
        loss: Mean loss of a model on a batch of token ids.
        in_bfloat16: Whether products are computed in bfloat16, whatever holds the weights.
        evaluations: Number of evaluations, evenly over the steps; one before training comes in
            addition.
        saves: Number of saves, evenly over the steps.

    Returns:
        The ``history`` of a :class:`healing.HealedModel`, that of the steps before the run's
        ``checkpoint`` included.

    Raises:
        ValueError: If a loss, the norm of the gradients, or a trained weight is not finite.
    """
    steps, batch_size = run.settings["steps"], run.settings["batch_size"]
    evaluate_at = set() if run.eval_ids is None else evenly(steps, evaluations)
    save_at = set() if run.folder is None else evenly(steps, saves)
    with (
        tqdm(total=steps, desc="healing", leave=False) as bar,
        # Trainer sets it. In a larger configuration, around that of the text, it may not exist.
        passes.replaced(model.config, "use_cache", False),
    ):
        trainer = HealingTrainer(
            model,
            _training_arguments(model, run),
            _as_batch,
            WindowsInOrder(run.train_ids, steps * batch_size, run.settings["seed"]),
            None if run.eval_ids is None else list(run.eval_ids.cpu().long()),
            loss=loss,
            in_bfloat16=in_bfloat16,
            at_once=micro_batch_size(batch_size, run.train_ids.shape[1]),
            callbacks=[Schedule(evaluate_at, save_at, bar)],
        )
        trainer.remove_callback(PrinterCallback)
        with _names_as_they_were_saved():
            trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
    _refuse_weights_not_finite(model)
    model.activation_checkpointing_disable()
    return _history(trainer.state.log_history, batch_size * run.train_ids.shape[1])


@contextlib.contextmanager
def _names_as_they_were_saved() -> Iterator[None]:
    """Let PEFT load adapters under the names that a save gave them.

    They are those of the model. PEFT would translate them as if they came from a hub, and pass over
    what the model does not have then.
    """
    from peft.utils import transformers_weight_conversion

    with passes.replaced(
        transformers_weight_conversion,
        "convert_peft_adapter_state_dict_for_transformers",
        lambda *, adapter_state_dict, **_: adapter_state_dict,
    ):
        yield


def refuse_many_processes() -> None:
    """Refuse one of several processes that were started together.

    Trainer would give each of them windows of its own, so that a step takes many times as many.

    Raises:
        ValueError: If it is one of several.
    """
    is_one_of = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1
    team = torch.distributed
    if is_one_of or (team.is_available() and team.is_initialized() and team.get_world_size() > 1):
        raise ValueError(
            "healing.heal trains in one process, but this is one of several that were launched "
            "together: sharded.heal trains one model in all of them"
        )


def holds(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether any weight of a model is of a type."""
    return any(weight.dtype == dtype for weight in model.parameters())


def refuse_overflow(healed: nn.Module, model: nn.Module) -> None:
    """Refuse weights that are too large for the type of the model that they were trained for.

    Args:
        healed: The trained model in the dtypes of ``model``.
        model: What it was before; what is not finite there may stay so.

    Raises:
        ValueError: If a weight is not finite; the first one is named.
    """
    before = dict(model.named_parameters())
    for name, weight in healed.named_parameters():
        known = before.get(name, torch.zeros(()))
        if not all_finite(weight) and all_finite(known):
            raise ValueError(
                f"the trained {name} holds numbers beyond the range of {weight.dtype}; "
                "learning_rate or alpha too high?"
            )


def all_finite(weight: torch.Tensor) -> bool:
    """Whether a tensor holds neither infinities nor NaN; either would make its sum one.

    A sum takes a small part of the time of a look at each number, which follows only where the sum
    of finite numbers is beyond the range of their type.
    """
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())


def _refuse_weights_not_finite(model: nn.Module) -> None:
    """Refuse what the last step has made, after which no loss is measured."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not all_finite(weight):
            raise ValueError(
                f"{name} is not finite after the last step; learning_rate or alpha too high?"
            )


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

    A step's windows come as one batch, which passes through the model a few at a time. Where they
    do not fit into memory there are fewer; where one alone does not, activations are computed again
    instead of kept. The step begins again: with the gradients, and the random numbers, that it
    began with.

    Args:
        *given: As of Trainer.
        loss: Mean loss of a model on a batch of token ids.
        in_bfloat16: Whether products are computed in bfloat16, whatever holds the weights.
        at_once: Windows of a batch in one forward and backward pass; it divides the batch evenly.
        **named: As of Trainer.
    """

    # All parts of a batch hold equally many tokens: Trainer averages over their means.
    loss_is_scaled_for_ga = False

    def __init__(self, *given: Any, loss: Loss, in_bfloat16: bool, at_once: int, **named: Any):
        super().__init__(*given, **named)
        self.mean_loss = loss
        self.in_bfloat16 = in_bfloat16
        batch_size = self.args.per_device_train_batch_size
        self.at_once = at_once
        self.trained = memory.BatchSize(at_once, noun="windows", whole=batch_size)
        self.evaluated = memory.BatchSize(self.args.per_device_eval_batch_size, noun="windows")

    def training_step(self, model: nn.Module, inputs: dict, *others: Any) -> torch.Tensor:
        """Add a batch's gradients, and return its mean loss."""
        train_part = super().training_step
        while True:
            drawn = _random_states()
            parts = inputs["labels"].split(self.trained.size)
            self.current_gradient_accumulation_steps = len(parts)
            try:
                return sum(train_part(model, {"labels": part}) for part in parts)
            except memory.ERRORS as error:
                self._make_room(model, len(parts[0]), error)
            model.zero_grad()
            _set_random_states(drawn)

    def _make_room(self, model: nn.Module, n_windows: int, error: BaseException) -> None:
        """Take fewer windows at once, or keep no activations where one window was too many.

        What it raises is what :meth:`memory.BatchSize.halve` does.
        """
        keeps = model.supports_gradient_checkpointing and not model.is_activation_checkpointing
        if n_windows > 1 or not keeps or not memory.is_lack_of_memory(error):
            self.trained.halve(n_windows, error)
            return
        model.activation_checkpointing_enable()
        self.trained.size = self.at_once
        logger.warning(
            "the activations of one window do not fit into memory; computing them again on the way "
            "back"
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The mean loss of a batch; where evaluated, with outputs as Trainer expects them."""
        ids = inputs["labels"]
        if not return_outputs:
            return self._loss_of(model, ids)
        shares = self.evaluated.run(
            lambda rows: self._loss_of(model, ids[rows]) * (len(ids[rows]) / len(ids)), len(ids)
        )
        loss = sum(shares)
        return loss, {"loss": loss}

    def _loss_of(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            return self.mean_loss(model, ids)

    def _save(self, *given: Any, **named: Any) -> None:
        """As of Trainer, but under the names that the weights have in memory.

        Trainer loads weights by these. Many models save theirs by other names, of older versions.
        """
        own = functools.partial(self.model.save_pretrained, save_original_format=False)
        save = self.model.save_pretrained if hasattr(self.model, "peft_config") else own
        with (
            passes.replaced(self.model, "save_pretrained", save),
            saved_models.generation_as_it_is(self.model),
        ):
            super()._save(*given, **named)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint whose weights are not those of the model."""
        if load_result.unexpected_keys:
            raise ValueError(
                f"{self.args.output_dir} holds weights of other names, such as "
                f"{load_result.unexpected_keys[0]}: delete it to train from the beginning"
            )

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
        """Refuse a loss or gradients that are not finite: nothing after them means anything."""
        norm = logs.get("grad_norm", 0)
        if not math.isfinite(norm) and math.isfinite(logs["loss"]):
            raise ValueError(
                f"the gradients' norm is {norm} at step {state.global_step} of {state.max_steps}; "
                "learning_rate or alpha too high?"
            )
        loss = logs.get("loss", logs.get("eval_loss", 0))
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {state.global_step} of {state.max_steps}; "
                "learning_rate too high?"
            )

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Seal a checkpoint once all of it is written, and keep the last two."""
        folder = Path(args.output_dir)
        seal(folder / f"checkpoint-{state.global_step}")
        for earlier in checkpoints(folder)[2:]:
            shutil.rmtree(earlier)


def _random_states() -> list[torch.Tensor]:
    """States of the generators that dropout draws from."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def _set_random_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])


def _training_arguments(model: nn.Module, run: Run) -> TrainingArguments:
    """What Trainer is told: a cosine schedule, norm 1, full batches in order, no saves of its own.

    Trainer's own saving is off; :class:`Schedule` asks for each save.
    """
    batch_size = run.settings["batch_size"]
    micro = micro_batch_size(batch_size, run.train_ids.shape[1])
    evaluated = run.train_ids if run.eval_ids is None else run.eval_ids
    is_large = models.n_parameters(model) > LARGE
    # Elsewhere an error comes in time; a processor's system ends the process, or begins to swap.
    is_scarce = is_large and model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(run.folder or "."),
        max_steps=run.settings["steps"],
        train_sampling_strategy="sequential",
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=max(micro, EVALUATION_TOKENS // evaluated.shape[1]),
        learning_rate=run.settings["learning_rate"],
        warmup_steps=run.settings["warmup_steps"],
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        weight_decay=0.0,
        activation_checkpointing=is_scarce and model.supports_gradient_checkpointing,
        use_cpu=model.device.type == "cpu",
        seed=run.settings["seed"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_on_start=run.eval_ids is not None and run.checkpoint is None,
        save_strategy="no",
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
    return max(size for size in range(1, min(batch_size, most) + 1) if batch_size % size == 0)


class WindowsInOrder(torch.utils.data.Dataset):
    """``n`` windows: all of them in a random order, then all in a new order, and so on.

    Only one order exists at a time, however many windows are asked for.

    Args:
        ids: Windows, ``(n_windows, seq_len)``.
        n: Number of windows.
        seed: Seed of the orders.
    """

    def __init__(self, ids: torch.Tensor, n: int, seed: int):
        self.rows = ids.cpu().long()
        self.n = n
        self.seed = seed
        self._begin()

    def _begin(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.n_drawn = 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        """A window of shape ``(seq_len,)``, int64, on the CPU."""
        number, place = divmod(index, len(self.rows))
        if number < self.n_drawn - 1:
            self._begin()
        while self.n_drawn <= number:
            self.order = torch.randperm(len(self.rows), generator=self.generator)
            self.n_drawn += 1
        return self.rows[self.order[place]]


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
    for last in checkpoints(folder):
        if is_whole(last):
            return last
        shutil.rmtree(last)
    return None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved; 0 for a name that is none of a checkpoint."""
    step = re.fullmatch(r"checkpoint-([1-9][0-9]*)", checkpoint.name)
    return int(step[1]) if step else 0


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the last one first. What the user has put beside them is none."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.is_dir() and step_of(path)]
    return sorted(numbered, key=step_of, reverse=True)


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    try:
        recorded = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError(f"it must be an object, got {type(recorded).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / SETTINGS} is damaged ({error}); delete {folder}, or choose another "
            "output_dir"
        ) from error
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
    """Write down the digests of a checkpoint's files: without that it counts as cut short.

    Raises:
        RuntimeError: If it holds no file.
    """
    digests = file_digests(checkpoint)
    if not digests:
        raise RuntimeError(
            f"{checkpoint} was removed while it was saved: two runs must not share an output_dir"
        )
    with runtime.atomic_path(checkpoint / SEAL) as temporary:
        temporary.write_text(json.dumps(digests))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed, and its files are those that were sealed."""
    sealed, digests = checkpoint / SEAL, file_digests(checkpoint)
    is_sealed = sealed.is_file() and sealed.read_bytes() == json.dumps(digests).encode()
    return is_sealed and bool(digests)


def file_digests(folder: Path) -> dict[str, str]:
    """Hexadecimal sha256 of every file in a folder but its seal, by path, sorted."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and SEAL not in path.name:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[str(path.relative_to(folder))] = digest
    return digests
