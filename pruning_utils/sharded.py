"""Heal a model that several devices hold together, each a share of its weights (PyTorch's FSDP2).

``accelerate launch`` starts a process for each device, of one machine or several::

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 -m pruning_utils.sharded \\
        MODEL --out DIR --text c4 --batch-size 16 --steps 5000

Losses are those of :func:`healing.heal` in one process, for the same windows in the same order.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pruning_utils import data, healing, models, runtime, surgery
from pruning_utils.engine import head_losses, wrappers
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.checks import true_or_false
from pruning_utils.engine.later import nn, torch
from pruning_utils.healing import HealedModel

if TYPE_CHECKING:  # importing it takes seconds
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

# Weights in 4 bits cannot be split; each device would hold all of them.
METHODS = tuple(method for method in healing.METHODS if method != "qlora")
ENGINE = "fsdp2"
HISTORY = "history.json"
WEIGHTS = "weights"


def heal(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_ids: torch.Tensor,
    *,
    eval_ids: torch.Tensor | None = None,
    output_dir: str | Path | None = None,
    merge: bool = False,
    **settings: Any,
) -> HealedModel | None:
    """Train a copy of a model that all processes hold together.

    Every process calls it with the same arguments. Each takes an equal part of a step's windows.
    Gradients are means over all of them, so that a step is that of :func:`healing.heal`; dropout
    draws other numbers. Training is saved as there, and goes on from the last save that is whole,
    with any number of processes.

    Args:
        model: A 16- or 32-bit causal language model, pruned or not, on the CPU, whole in each
            process.
        tokenizer: Its tokenizer, saved in ``output_dir``.
        train_ids: Windows to train on, ``(n_windows, seq_len)``.
        eval_ids: Windows whose loss is measured before training and up to eight times on the way;
            None: none.
        output_dir: Where training is saved, one folder that all processes see; None: nowhere.
        merge: Whether adapters are added into a copy of the weights.
        **settings: Further arguments of :func:`healing.heal`. The method is ``lora``, where none is
            given, and never ``qlora``.

    Returns:
        In the main process what :func:`healing.heal` returns, on the CPU; None in the others.

    Raises:
        ValueError: As :func:`healing.heal`; or if the process was not started by ``accelerate
            launch``, or the processes do not divide ``batch_size``.
    """
    from pruning_utils.engine import trainer  # importing it takes seconds

    team = _team()
    merge = true_or_false("merge", merge)
    settings = _checked_settings(model, settings, team)
    if merge and settings["method"] in healing.ADAPTERS:
        wrappers.refuse_shared(model, healing.adapter_targets(model, settings["targets"]))
    # One looks at the folder first, and removes what is damaged in it.
    with team.main_process_first():
        recorded = {**settings, "engine": ENGINE}
        run = trainer.Run(output_dir, recorded, model, tokenizer, train_ids, eval_ids)
    if team.is_main_process:
        run.begin()
    team.wait_for_everyone()
    with trainer.own_random_state(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(settings["seed"])
        trained = healing.trainable_copy(model, settings)
        count = healing.n_trainable(trained)
        training = Training(trained, run, team, trainer.holds(model, torch.bfloat16))
        history = training.whole()
        weights = training.gathered()
    if not team.is_main_process:
        return None
    whole = healing.trainable_copy(model, settings)
    whole.load_state_dict(weights, strict=False)
    healed = healing.finished(whole, model, settings["method"], merge)
    trainer.refuse_overflow(healed, model)
    history.attrs["trainable_parameters"] = count
    return HealedModel(healed, history)


def _team() -> PartialState:
    """The processes that accelerate launch started."""
    from accelerate import PartialState

    team = PartialState(cpu=not torch.cuda.is_available())
    if not torch.distributed.is_initialized():
        raise ValueError(
            "sharded.heal runs in two processes or more that accelerate launch starts; in one "
            "process healing.heal does the same"
        )
    return team


def _checked_settings(
    model: nn.Module, settings: dict[str, Any], team: PartialState
) -> dict[str, Any]:
    """The settings of :func:`healing.heal`, complete, that these processes can train with."""
    if model.device.type != "cpu":
        raise ValueError(
            f"the model must be on the CPU, from which each process takes its share, got "
            f"{model.device}: load it with device='cpu'"
        )
    settings = healing.check_settings(model, {"method": "lora", **settings})
    if settings["method"] not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {settings['method']!r}: weights in 4 "
            "bits cannot be split"
        )
    if settings["batch_size"] % team.num_processes:
        raise ValueError(
            f"batch_size must be a multiple of the {team.num_processes} processes, got "
            f"{settings['batch_size']}"
        )
    return settings


class Training:
    """A training of which this process does its part.

    Args:
        trained: The copy that is trained, whole; its weights are split here, in place.
        run: What it is trained on, and where that is saved.
        team: accelerate's state of the processes.
        in_bfloat16: Whether products are computed in bfloat16, whatever holds the weights.
    """

    def __init__(self, trained: nn.Module, run: Any, team: Any, in_bfloat16: bool):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers import get_cosine_schedule_with_warmup

        from pruning_utils.engine import trainer

        self.run, self.team, self.in_bfloat16 = run, team, in_bfloat16
        self.model: Any = trained.train()
        self.has_adapters = hasattr(trained, "peft_config")
        own = trained.get_base_model() if self.has_adapters else trained
        if models.n_parameters(trained) > trainer.LARGE and own.supports_gradient_checkpointing:
            own.gradient_checkpointing_enable({"use_reentrant": False})
        mesh = init_device_mesh(team.device.type, (team.num_processes,))
        for layer in models.decoder_layers(own):
            fully_shard(layer, mesh=mesh)
        fully_shard(trained, mesh=mesh)
        self.weights = [weight for weight in trained.parameters() if weight.requires_grad]
        settings = run.settings
        self.steps, self.batch_size = settings["steps"], settings["batch_size"]
        self.part = self.batch_size // team.num_processes
        self.at_once = trainer.micro_batch_size(self.part, run.train_ids.shape[1])
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=settings["learning_rate"], weight_decay=0.0
        )
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, settings["warmup_steps"], self.steps
        )
        self.windows = trainer.WindowsInOrder(
            run.train_ids, self.steps * self.batch_size, settings["seed"]
        )
        self.rows: list[tuple] = []

    def whole(self) -> pd.DataFrame:
        """Train to the last step, and give the history of a :class:`healing.HealedModel`."""
        from pruning_utils.engine import trainer

        watched, kept = self.run.eval_ids is not None, self.run.folder is not None
        evaluate_at = trainer.evenly(self.steps, healing.EVALUATIONS) if watched else set()
        save_at = trainer.evenly(self.steps, healing.SAVES) if kept else set()
        begun = self.resumed()
        if begun == 0 and watched:
            self.rows.append((0, "eval", self.evaluated(), float("nan")))
        shown = self.team.is_main_process
        for step in tqdm(
            range(begun + 1, self.steps + 1),
            desc="healing",
            initial=begun,
            total=self.steps,
            leave=False,
            disable=not shown,
        ):
            rate = self.schedule.get_last_lr()[0]
            self.rows.append((step, "train", self.one_step(step), rate))
            if step in evaluate_at:
                self.rows.append((step, "eval", self.evaluated(), float("nan")))
            if step in save_at:
                self.save(step)
        history = pd.DataFrame(self.rows, columns=["step", "split", "loss", "learning_rate"])
        tokens = history["step"] * self.batch_size * self.run.train_ids.shape[1]
        history.insert(1, "tokens", tokens)
        return history

    def one_step(self, step: int) -> float:
        """Take a step, and return the mean loss of all its windows.

        Raises:
            ValueError: In every process, if the loss or the gradients' norm is not finite.
        """
        # Dropout draws the same whether a training was interrupted or not.
        drawn = np.random.SeedSequence([self.run.settings["seed"], step, self.team.process_index])
        torch.manual_seed(int(drawn.generate_state(1)[0]))
        first = (step - 1) * self.batch_size + self.team.process_index * self.part
        ids = torch.stack([self.windows[first + number] for number in range(self.part)])
        parts = ids.to(self.team.device).split(self.at_once)
        loss = torch.zeros((), device=self.team.device)
        for number, part in enumerate(parts, start=1):
            # Gradients that wait to be summed are whole on each device: those of adapters are few.
            is_last = number == len(parts)
            self.model.set_requires_gradient_sync(is_last or not self.has_adapters)
            mean = self.summed_loss(part) / part[:, 1:].numel() / len(parts)
            mean.backward()
            loss += mean.detach()
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        torch.distributed.all_reduce(loss)
        mean_loss = float(loss) / self.team.num_processes
        for name, value in (("loss", mean_loss), ("gradients' norm", float(norm))):
            if not torch.isfinite(torch.tensor(value)):
                raise ValueError(
                    f"the {name} is {value} at step {step} of {self.steps}; learning_rate or alpha "
                    "too high?"
                )
        return mean_loss

    def summed_loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Summed loss of windows in nats, from the model's own forward pass: it gathers weights."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            return head_losses.loss_of_logits(
                self.model(input_ids=ids, use_cache=False).logits, ids
            )

    def evaluated(self) -> float:
        """Mean loss of the windows to evaluate, of which each process takes a part.

        All processes make as many passes, as each pass gathers weights from all of them. One that
        has no window left passes the first one, which does not count.
        """
        ids = self.run.eval_ids
        own = torch.arange(self.team.process_index, len(ids), self.team.num_processes)
        most = math.ceil(len(ids) / self.team.num_processes)
        n_passes = math.ceil(most / self.at_once)
        total = torch.zeros((), device=self.team.device)
        self.model.eval()
        with torch.no_grad():
            for number in range(n_passes):
                rows = own[number * self.at_once : (number + 1) * self.at_once]
                windows = ids[rows if len(rows) else [0]].long().to(self.team.device)
                total += self.summed_loss(windows) * bool(len(rows))
        self.model.train()
        torch.distributed.all_reduce(total)
        loss = float(total) / ids[:, 1:].numel()
        if not math.isfinite(loss):
            raise ValueError(f"the loss of eval_ids is {loss}; learning_rate too high?")
        return loss

    # --- saves ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Trained weights and the optimiser's moments, each process its part."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(ignore_frozen_params=True)
        weights, moments = get_state_dict(self.model, self.optimizer, options=options)
        return {WEIGHTS: weights, "optimizer": moments}

    def save(self, step: int) -> None:
        """Save a checkpoint, seal it, and remove all but the last two."""
        import torch.distributed.checkpoint as parts

        from pruning_utils.engine import trainer

        folder = self.run.folder / f"checkpoint-{step}"
        parts.save(self.state(), checkpoint_id=str(folder))
        if self.team.is_main_process:
            with runtime.atomic_path(folder / HISTORY) as temporary:
                temporary.write_text(json.dumps(self.rows))
            trainer.seal(folder)
            for path in trainer.checkpoints(self.run.folder)[2:]:
                shutil.rmtree(path)
        self.team.wait_for_everyone()

    def resumed(self) -> int:
        """Load the run's last whole checkpoint, and return the step that it was saved after."""
        import torch.distributed.checkpoint as parts
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        from pruning_utils.engine import trainer

        folder = self.run.checkpoint
        if folder is None:
            return 0
        state = self.state()
        parts.load(state, checkpoint_id=str(folder))
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state[WEIGHTS],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        step = trainer.step_of(folder)
        (share_of_peak,) = self.schedule.lr_lambdas
        rate = self.run.settings["learning_rate"] * share_of_peak(step)
        self.schedule.last_epoch, self.schedule._last_lr = step, [rate]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.rows = [tuple(row) for row in json.loads((folder / HISTORY).read_text())]
        return step

    def gathered(self) -> dict[str, torch.Tensor]:
        """The trained weights, whole, on the CPU of the main process; nothing in the others."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return get_model_state_dict(self.model, options=options)


# --- command --------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """What the command line may say."""
    own = argparse.ArgumentParser(
        prog="accelerate launch -m pruning_utils.sharded",
        description="Heal a model that several devices hold together. A run that is stopped goes "
        "on when the same command is given again.",
    )
    own.add_argument("model", help="a directory, such as one that surgery.save wrote, or a hub id")
    own.add_argument("--out", metavar="DIR", required=True, help="a new folder for the model")
    own.add_argument("--method", default="lora", help=f"one of {', '.join(METHODS)}")
    own.add_argument("--text", help="to heal on (default: BoolQ and QuAC passages)")
    own.add_argument("--seq-len", metavar="N", type=int, default=256, help="tokens in a window")
    own.add_argument("--dtype", default=runtime.AUTO, help="of the weights")
    for name in ("steps", "batch_size", "learning_rate", "warmup_steps", "rank", "dropout", "seed"):
        default = inspect.signature(healing.heal).parameters[name].default
        option = f"--{name.replace('_', '-')}"
        kind = int if default is None else type(default)
        shown = "4, or all steps where there are fewer" if default is None else "%(default)s"
        own.add_argument(option, type=kind, default=default, help=f"(default: {shown})")
    return own


def main(words: Sequence[str] | None = None) -> int:
    """Heal and save a model: 0 if all went well, 1 with one line if not."""
    given = vars(parser().parse_args(words))
    name, out, text = given.pop("model"), given.pop("out"), given.pop("text")
    seq_len, dtype = given.pop("seq_len"), given.pop("dtype")
    try:
        folder = Path(out)
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--out must be a new or empty folder, but {out} holds something")
        out = surgery.directory_to_write(out)
        team = _team()
        # It is loaded on the processor, and trained where "auto" may be another precision.
        dtype = runtime.resolve_dtype(dtype, team.device)
        model, tokenizer = models.load_model(name, dtype=dtype, device="cpu")
        # The text may take minutes.
        _checked_settings(model, given, team)
        count = given["steps"] * given["batch_size"]
        windows = data.healing_windows(tokenizer, count, seq_len, source=text, seed=given["seed"])
        training = out.with_name(f"{out.name}.training")
        healed = heal(model, tokenizer, windows, output_dir=training, merge=True, **given)
        if healed is not None:
            surgery.save(healed.model, tokenizer, out)
            shutil.rmtree(training, ignore_errors=True)  # optimiser states, many times the model
            print(f"saved in {out}; its last loss is {healed.history['loss'].iloc[-1]:.4f} nats")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"sharded: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
