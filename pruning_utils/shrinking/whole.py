"""A smaller model of one's own: planned, cut, healed, saved, loaded again, measured and judged.

What is finished is kept in a folder beside the one that is asked for. A run that is stopped goes on
from there, and the folder that is asked for appears when all is done.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import pandas as pd

from pruning_utils import (
    __version__,
    data,
    efficiency,
    embedded,
    evaluation,
    healing,
    models,
    release,
    runtime,
    surgery,
)
from pruning_utils.engine import benchmarks, memory, records
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.checks import number, whole_number
from pruning_utils.engine.later import nn, torch
from pruning_utils.shrinking import judgements, plans, reports
from pruning_utils.shrinking.orders import (
    METHODS,
    MOST_STEPS,
    NO_HEALING,
    RULES,
    Order,
    work_folder,
)
from pruning_utils.shrinking.plans import Candidate
from pruning_utils.studies.study import (
    FreshProcesses,
    text_identity,
    training_windows,
    without_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
N_CHOSEN_ON = 8  # windows of calibration text that the layers are chosen on
N_VALIDATION = 4  # windows that healing is watched on
N_PROBED = 3  # steps of the longer one of two trainings that are timed
LAST_K = 3  # layers that the recipe of Lu et al. trains with the head, or as many as are left
BATCH_SIZE = 4
N_COMPARED = 4  # windows that the saved model must give the same losses on
RECORD = "shrink.json"  # in the folder of the model: order, plan, and all that was measured
TABLES = ("plan", "history", "measured", "times")
LOCK = ".lock"  # in the folder of what is finished


def check_order(order: Order) -> None:
    """ValueError for what can be seen to be wrong before a model is loaded."""
    plans.check_goal(order.goal)
    judgements.check_limits(order.limits)
    for name, value, known in (("rule", order.rule, RULES), ("method", order.method, METHODS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    number("minutes", order.minutes, "above 0", lambda minutes: 0 < minutes < 1e6)
    if order.steps is not None:
        whole_number("steps", order.steps, 1, MOST_STEPS)
    number("learning_rate", order.learning_rate, "above 0", lambda rate: 0 < rate < 1e3)
    judgements.check_measured(order.measured)
    _check_device(order)
    whole_number("seed", order.seed, 0, healing.LARGEST)


def _check_device(order: Order) -> None:
    """ValueError where healing would go to another device than the one that is asked for."""
    if order.device is None or order.method == NO_HEALING:
        return
    device = runtime.choose_device(order.device)
    if device.type == "cuda" and device.index:
        raise ValueError(
            f"device must be cuda where a model is healed, got {order.device!r}: training takes "
            "the first GPU that it sees, so let CUDA_VISIBLE_DEVICES name that one alone"
        )
    if device.type == "cpu" and order.method == "qlora" and torch.cuda.is_available():
        raise ValueError(
            "device must be cuda for qlora where there is a GPU, got 'cpu': set "
            "CUDA_VISIBLE_DEVICES to nothing for a run on the processor"
        )


def settings_of(order: Order) -> dict:
    """The order as plain values, with the weights and the text that its names stand for."""
    asked = asdict(order) | {
        "model": models.identity(order.model, order.revision),
        "healing_text": text_identity(order.healing_text),
    }
    return json.loads(json.dumps(asked))


def record_of(order: Order) -> dict:
    """The same, and who made it."""
    return settings_of(order) | {"pruning_utils": __version__}


def planned(order: Order) -> dict:
    """The plan alone; nothing is made.

    Returns:
        As :func:`plan_of`, with ``healing_bytes``: the memory that healing takes at most beside the
        libraries. It is None where nothing is healed, or where no code of this architecture runs
        without numbers.

    Raises:
        ValueError: As for :func:`shrink`.
    """
    check_order(order)
    model, tokenizer = _loaded(order)
    plan = plan_of(order, model, tokenizer)
    return plan | {"healing_bytes": _healing_bytes(order, model, plan)}


def _healing_bytes(order: Order, model: nn.Module, plan: dict) -> int | None:
    from pruning_utils.planning import stages  # importing it takes seconds

    if not plan["steps"]:
        return None
    n_dropped, seq_len = len(plan["layers"]), plan["seq_len"]
    recipe = _recipe(order, 1, plan["n_layers"] - n_dropped)
    try:
        needs = stages.heal(
            model.config,
            model.dtype,
            seq_len=seq_len,
            n_dropped=n_dropped,
            # A GPU keeps the activations of models of every size, where they fit.
            checkpointing=False if model.device.type == "cuda" else None,
            **recipe,
        )
    except Exception as error:  # the code of the architectures asks for values in many ways
        logger.info("the memory of healing %s is not known: %s", type(model).__name__, error)
        return None
    return max(need.peak for need in needs)


def shrink(order: Order, out: str | os.PathLike) -> dict:
    """Make a smaller model and say whether it is fit.

    The stages are: plan, cut, heal, save, load again in a new process and measure there, measure
    the whole model likewise, judge. The plan says on the terminal what healing will take.

    Args:
        order: What is asked for.
        out: A new or empty folder, or one that this order has made before, of which the judgement
            is given again. It gets the model with its card, ``report.html`` with its figures,
            ``judgement.csv``, and :data:`RECORD` with all that was measured. What is finished
            before lies beside it, in ``<out>.work``.

    Returns:
        ``plan`` (:func:`plan_of`), ``judgement`` (a table of :func:`judgements.judged`) and
        ``word``, the judgement over all measures.

    Raises:
        ValueError: Before any long work, for an order that is out of range or that no number of
            layers meets (the nearest is named), or a folder that holds something else or belongs to
            another order.
        RuntimeError: If another process makes the same folder, or the saved model is not the one in
            memory.
    """
    check_order(order)
    target = Path(os.path.realpath(out))
    record = _finished(order, target)
    if record is None:
        return _produced(order, out, _publish)
    _drop_leftover(work_folder(target))
    judgement = judgements.judged(
        record["results"]["unpruned"], record["results"]["smaller"], order.limits
    )
    word = judgements.overall(judgement["judgement"].tolist())
    _say(f"{target} was made before: {word} ({judgements.limits_text(order.limits)})")
    return {"plan": record["plan"], "judgement": judgement, "word": word}


def _finished(order: Order, target: Path) -> dict | None:
    """The record of a folder that holds what is asked for, else None."""
    has_model = (target / "config.json").is_file() and any(target.glob("*.safetensors"))
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        is_whole = record["order"] == record_of(order) and {"plan", "results"} <= record.keys()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return record if has_model and is_whole else None


def _drop_leftover(folder: Path) -> None:
    """Remove what a run that was killed at its very end has left beside its folder."""
    if not (folder / "order.json").is_file():
        return
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            pass
    except filelock.Timeout as error:
        raise RuntimeError(f"another process is using {folder}") from error
    shutil.rmtree(folder)


def check_folder(order: Order, out: str | os.PathLike) -> None:
    """ValueError for a folder that :func:`shrink` would not take for this order."""
    if _finished(order, Path(os.path.realpath(out))) is None:
        _refuse_another_folder(work_folder(_free_folder(out)))


def _produced(order: Order, out: str | os.PathLike, publish: Callable[..., None]) -> dict:
    """What :func:`shrink` does; ``publish`` writes what stands beside the weights."""
    check_order(order)
    target = _free_folder(out)
    # Loaded once for plan and cut, if at all, and let go before others load it to measure.
    loaded = functools.cache(functools.partial(_loaded, order))
    with _workplace(target, order) as work:
        plan = work.once("plan", lambda: plan_of(order, *loaded()))
        _say(plan_text(order, plan))
        if not (work.folder / "model").exists():
            work.drop("made", "smaller")  # a run that was stopped at its very end gave it out
        made = work.once("made", lambda: _made(order, plan, work.folder, *loaded()))
        loaded.cache_clear()
        memory.give_back()
        _say("measuring both models, each in a process of its own")
        results = {
            "smaller": work.once(
                "smaller", lambda: _measured(order, str(work.folder / "model"), None)
            ),
            "unpruned": work.once(
                "unpruned", lambda: _measured(order, order.model, order.revision)
            ),
        }
        _refuse_another(made, results["smaller"], work.folder)
        judgement = judgements.judged(results["unpruned"], results["smaller"], order.limits)
        word = judgements.overall(judgement["judgement"].tolist())
        publish(order, plan, made, results, judgement, work.folder / "model")
        if target.exists():
            target.rmdir()
        os.replace(work.folder / "model", target)
    shutil.rmtree(work.folder)
    _say(f"{target}: {word} ({judgements.limits_text(order.limits)})")
    return {"plan": plan, "judgement": judgement, "word": word}


def made_table(table: str, order: Order, root: str | os.PathLike) -> pd.DataFrame:
    """A table of the smaller model that an order asks for, which is made first if need be.

    Args:
        table: Among :data:`TABLES`.
        order: What is asked for.
        root: Where the folders of such models lie, one for each order.

    Returns:
        ``plan``: the unpruned model, the smaller one and the runner-up, in ``model``, with the
        ``rule``, the ``layers`` that go (0-based, with spaces between), the unhealed ``loss`` in
        nats per token, of the first two ``parameters`` and ``bytes``, and of the first the
        ``validation_loss`` on the text that healing is watched on. ``history``: ``tokens``,
        ``split`` and ``loss`` while healing. ``measured``: ``model``, ``measure``, ``dataset``,
        ``item`` and ``value``. ``times``: ``model``, ``run`` and ``per_token_seconds``.

    Raises:
        ValueError: For another table, and as for :func:`shrink`.
    """
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    asked = records.digest(records.canonical(settings_of(order)))
    folder = Path(root) / f"{Path(order.model).name}-{asked[:12]}"
    if not (folder / RECORD).exists():
        # What draws, as a report does, no number depends on.
        _produced(order, folder, _write_record)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if table == "plan":
        return _plan_rows(record["plan"])
    if table == "history":
        return pd.DataFrame(record["history"], columns=["tokens", "split", "loss"])
    rows = pd.concat(
        pd.DataFrame(found["rows"]).assign(model=name) for name, found in record["results"].items()
    )
    is_time = rows["measure"] == judgements.TIME
    if table == "measured":
        return rows.loc[~is_time, ["model", "measure", "dataset", "item", "value"]]
    times = rows[is_time].rename(columns={"item": "run"})
    return times.assign(per_token_seconds=times["value"] / 1000)[
        ["model", "run", "per_token_seconds"]
    ]


def _plan_rows(plan: dict) -> pd.DataFrame:
    unpruned = {"rule": "none", "layers": [], "loss": plan["unpruned_loss"]}
    models_of = {"unpruned": unpruned, "smaller": plan, "runner-up": plan["runner_up"]}
    rows = []
    for place, (name, found) in enumerate(models_of.items()):
        if found:
            layers = " ".join(map(str, found["layers"]))
            row = {"model": name, "rule": found["rule"], "layers": layers, "loss": found["loss"]}
            sizes = (plan["parameters"][place], plan["bytes"][place]) if place < 2 else ()
            rows.append(row | dict(zip(("parameters", "bytes"), sizes, strict=False)))
    rows[0]["validation_loss"] = plan["unpruned_validation_loss"]
    return pd.DataFrame(rows)


def name_of(model: str) -> str:
    """A model as others know it: a hub id, the name of a directory without its path."""
    found = embedded.find_embedded(model)
    if found:
        return found.title
    return Path(model).resolve().name if os.path.isdir(model) else model


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


# --- the folder beside ----------------------------------------------------------------------------


def _free_folder(out: str | os.PathLike) -> Path:
    """The folder that is asked for, if it is new or empty, and can be put in its place at the end.

    What is finished lies beside it until then, so both must be of one volume.
    """
    target = Path(os.path.realpath(out))  # "." has a name then, and a link stays a link
    if os.path.ismount(target):
        raise ValueError(
            f"--out must be a folder that can be replaced, but {out} is where a volume is mounted: "
            "name a new folder in it"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--out must be a new or empty folder, but {out} holds something")
    return target


@dataclass(frozen=True)
class _Work:
    """The folder of what is finished."""

    folder: Path

    def once(self, name: str, compute: Callable[[], dict]) -> dict:
        """What was computed before under this name; else it is computed, and kept as JSON."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            self.keep(name, compute())
        return json.loads(path.read_text(encoding="utf-8"))

    def keep(self, name: str, value: dict) -> None:
        """Write a value under a name, whole or not at all."""
        with runtime.atomic_path(self.folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")

    def drop(self, *names: str) -> None:
        """Forget what was computed under these names."""
        for name in names:
            (self.folder / f"{name}.json").unlink(missing_ok=True)

    def is_planned(self) -> bool:
        """Whether there is a plan. Before that nothing has taken long."""
        return (self.folder / "plan.json").exists()


@contextlib.contextmanager
def _workplace(target: Path, order: Order) -> Iterator[_Work]:
    """The folder beside, held by this process alone, of this order and no other."""
    folder = work_folder(target)
    _refuse_another_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            work = _Work(folder)
            try:
                _refuse_another_order(work, record_of(order))
                yield work
            finally:
                if not work.is_planned():
                    shutil.rmtree(folder)
    except filelock.Timeout as error:
        raise RuntimeError(f"another process is making {target}") from error


def _refuse_another_folder(folder: Path) -> None:
    """ValueError if something lies there that no run has left; it would be removed in the end."""
    if not folder.exists():
        return
    is_ours = folder.is_dir() and (folder / "order.json").exists()
    if not is_ours and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK}):
        raise ValueError(
            f"{folder} holds something else, and is where a run keeps what is finished: remove "
            "it, or choose another --out"
        )


def _refuse_another_order(work: _Work, asked: dict) -> None:
    """ValueError if what lies there was begun for something else."""
    if not work.is_planned():
        work.keep("order", asked)
    before = work.once("order", lambda: asked)
    differing = [
        f"{name}: {before.get(name)!r} there, {asked[name]!r} asked"
        for name in sorted(asked)
        if asked[name] != before.get(name)
    ]
    if differing:
        raise ValueError(
            f"{work.folder} was begun with other values ({'; '.join(differing)}): ask for the "
            "same, remove it, or choose another --out"
        )


# --- the plan -------------------------------------------------------------------------------------


def _loaded(order: Order) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    return models.load_model(
        order.model, revision=order.revision, dtype=order.dtype, device=order.device
    )


def plan_of(order: Order, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Which layers go, what is left, and how many steps the minutes of healing allow.

    Args:
        order: What is asked for.
        model: The whole model.
        tokenizer: Its tokenizer.

    Returns:
        Plain values: ``n_layers``, ``rule``, ``layers``, ``loss`` and ``unpruned_loss`` (nats per
        token, unhealed, on the text that the layers are chosen on), ``unpruned_validation_loss``
        (on the text that healing is watched on), ``runner_up`` (``rule``, ``layers``, ``loss``;
        None where there is none), ``parameters`` and ``bytes`` before and after, ``dtype`` (of the
        weights), ``ms_per_token`` before and after, ``steps`` and the ``healing_seconds`` that they
        and the watching of them will take, and ``measuring_seconds`` of both models.
    """
    seq_len = min(order.measured.seq_len, tokenizer.model_max_length)
    # Every text is read first, so that one that is too short is refused at once.
    _evaluation_windows(order, tokenizer, seq_len, order.measured.documents)
    windows = data.calibration_windows(tokenizer, N_CHOSEN_ON, seq_len, seed=order.seed)
    watched = _validation_windows(tokenizer, seq_len)
    if order.method != NO_HEALING:
        _healing_windows(order, tokenizer, seq_len, 1)  # refuses a text that is not there
        _refuse_too_little_text(order, tokenizer, seq_len, max(order.steps or 0, N_PROBED))
    _say("planning: one scan, and the loss without each set of layers")
    # A goal without a time is refused before anything is timed.
    needs_times = order.goal.max_ms_per_token is not None
    n_dropped = 0 if needs_times else plans.layers_to_go(model, order.goal)
    # A limit is judged by as many runs, and by the upper end of their interval.
    repeats = judgements.TIMED["repeats"] if needs_times else plans.REPEATS
    runs = plans.token_runs(model, repeats=repeats)
    times = runs.line()
    if needs_times:
        n_dropped = plans.layers_to_go(model, order.goal, runs.line(at_most=True))
    choice = plans.choose(model, windows, n_dropped, order.rule)
    pruned = without_layers(model, choice.chosen.layers)
    n_layers = len(models.decoder_layers(model))
    steps, seconds = _steps(order, pruned, tokenizer, watched)
    _refuse_too_little_text(order, tokenizer, seq_len, steps)
    started = time.perf_counter()
    watched_loss = evaluation.token_losses(model, watched).mean().item()
    read = (time.perf_counter() - started) / watched.numel()
    milliseconds = [times.at(n_layers), times.at(n_layers - n_dropped)]
    measuring = [
        judgements.foretell(
            tokenizer,
            order.measured,
            seq_len=seq_len,
            token_seconds=read * left / n_layers,
            step_seconds=step / 1000,
        )
        for left, step in zip((n_layers, n_layers - n_dropped), milliseconds, strict=True)
    ]
    sizes = [efficiency.stored_parameters(one) for one in (model, pruned)]
    return {
        "n_layers": n_layers,
        **_plain(choice.chosen),
        "unpruned_loss": choice.whole.loss,
        "unpruned_validation_loss": watched_loss,
        "runner_up": _plain(choice.runner_up) if choice.runner_up else None,
        "parameters": [size["total"] for size in sizes],
        "bytes": [size["bytes"] for size in sizes],
        "dtype": runtime.dtype_name(model.dtype),
        "ms_per_token": milliseconds,
        "seq_len": seq_len,
        "steps": steps,
        "healing_seconds": seconds,
        "measuring_seconds": measuring,
    }


def _refuse_too_little_text(
    order: Order, tokenizer: PreTrainedTokenizerBase, seq_len: int, steps: int
) -> None:
    """ValueError where the text to heal on has too few windows for so many steps."""
    if not steps:
        return
    try:
        _healing_windows(order, tokenizer, seq_len, steps)
    except ValueError as error:
        advice = (
            "ask for fewer --steps or --minutes"
            if steps > N_PROBED
            else "so many are timed, however few are asked for: give more text"
        )
        raise ValueError(
            f"{steps} steps of healing need {steps * BATCH_SIZE} windows of text; {advice}: {error}"
        ) from error


def _plain(candidate: Candidate) -> dict:
    return {"rule": candidate.rule, "layers": list(candidate.layers), "loss": candidate.loss}


def _steps(
    order: Order, pruned: nn.Module, tokenizer: PreTrainedTokenizerBase, watched: torch.Tensor
) -> tuple[int, float]:
    """How many steps of healing the minutes allow, and the seconds that it takes, by a probe.

    Trainings of one step and of three differ by two steps. The first training of a process also
    imports libraries, which is no part of a step: it is not timed. ``watched`` are the windows that
    healing is watched on, as long as those to train on.
    """
    if order.method == NO_HEALING:
        return 0, 0.0
    _say("probing: a few steps of healing")
    windows = _healing_windows(order, tokenizer, watched.shape[1], N_PROBED)
    taken = {}
    for steps in (1, 1, N_PROBED):  # the second time of one step replaces the first
        started = time.perf_counter()
        healing.heal(pruned, tokenizer, windows, **_recipe(order, steps, _n_layers(pruned)))
        taken[steps] = time.perf_counter() - started
    seconds = max((taken[N_PROBED] - taken[1]) / (N_PROBED - 1), 1e-3)
    started = time.perf_counter()
    evaluation.token_losses(pruned, watched)
    watch = time.perf_counter() - started
    steps = order.steps or min(steps_within(60 * order.minutes, seconds, watch), MOST_STEPS)
    if steps < 1:
        raise ValueError(
            f"minutes must be at least {plans.rounded_up((2 * watch + seconds) / 60)} for one step "
            f"of healing here, got {order.minutes:g}"
        )
    return steps, (1 + min(steps, healing.EVALUATIONS)) * watch + steps * seconds


def steps_within(budget: float, step: float, watch: float) -> int:
    """Most steps of healing that seconds suffice for.

    Args:
        budget: Seconds in all.
        step: Seconds of a step.
        watch: Seconds of a look at the validation text: before the first step, and eight times on
            the way, at most once a step.
    """
    watched_rarely = int((budget - (healing.EVALUATIONS + 1) * watch) / step)
    watched_always = int((budget - watch) / (step + watch))
    return max(watched_rarely, min(watched_always, healing.EVALUATIONS))


def _n_layers(model: nn.Module) -> int:
    return len(models.decoder_layers(model))


def _recipe(order: Order, steps: int, n_layers: int) -> dict[str, Any]:
    """Settings of healing a model with so many layers."""
    return {
        "method": order.method,
        "last_k": min(LAST_K, n_layers),
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": order.learning_rate,
        "warmup_steps": steps // 10,
        "dropout": 0.0,  # no text is seen twice
        "untie": False,  # a head of its own would be stored beside the embedding
        "merge": True,
        "seed": order.seed,
    }


def _healing_windows(
    order: Order, tokenizer: PreTrainedTokenizerBase, seq_len: int, steps: int
) -> torch.Tensor:
    count = steps * BATCH_SIZE
    return training_windows(tokenizer, count, seq_len, source=order.healing_text, seed=order.seed)


def _evaluation_windows(
    order: Order, tokenizer: PreTrainedTokenizerBase, seq_len: int, n_documents: int
) -> torch.Tensor:
    return data.document_windows(tokenizer, n_documents, seq_len, source=order.measured.text)


def _validation_windows(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> torch.Tensor:
    return data.document_windows(tokenizer, N_VALIDATION, seq_len, split="validation")


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def plan_text(order: Order, plan: dict) -> str:
    """The plan as lines for a terminal."""
    before, after = plan["parameters"]
    lines = [
        f"plan for {name_of(order.model)}: {len(plan['layers'])} of {plan['n_layers']} layers go",
        f"  layers {_numbers(plan['layers'])}, by the rule {plan['rule']!r}: unhealed loss "
        f"{plan['loss']:.3f} nats per token, {plan['unpruned_loss']:.3f} with all layers",
    ]
    other = plan["runner_up"]
    if other:
        lines.append(
            f"  runner-up: {_numbers(other['layers'])}, by {other['rule']!r}: {other['loss']:.3f}"
        )
    lines += [
        f"  parameters {before:,} -> {after:,}; weights "
        + " -> ".join(f"{size / 1e6:,.0f} MB" for size in plan["bytes"])
        # An earlier version did not keep it in its plans.
        + (f" in {plan['dtype']}, as they are saved" if "dtype" in plan else ""),
        "  a generated token "
        + " -> ".join(f"{time:.1f} ms" for time in plan["ms_per_token"])
        + " here, one text at a time",
    ]
    if plan["steps"]:
        most = " (no more are taken)" if plan["steps"] == MOST_STEPS and not order.steps else ""
        lines.append(
            f"  healing: {order.method}, {_counted(plan['steps'], 'step')}{most} of "
            f"{BATCH_SIZE * plan['seq_len']:,} tokens, about {plan['healing_seconds'] / 60:.1f} "
            "minutes here"
        )
    read = order.measured
    untimed = [task for task in read.tasks if not benchmarks.is_embedded(task)]
    without = f", and for {', '.join(untimed)}" if untimed else ""
    lines += [
        f"  fit means: {judgements.limits_text(order.limits)}",
        f"  measured on {read.documents} documents of {read.text}, and {read.questions} questions "
        f"each of {', '.join(read.tasks)}, and by continuing the documents",
        f"  measuring both models: about {sum(plan['measuring_seconds']) / 60:.1f} minutes here"
        + without,
    ]
    return "\n".join(lines)


def _numbers(layers: list[int]) -> str:
    """Layer numbers, with runs as ``11-18``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# --- what is made and measured --------------------------------------------------------------------


def _made(
    order: Order, plan: dict, folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict:
    """Cut, in place, heal and save; the losses of the model in memory, and of its training."""
    current = surgery.drop_layers(model, plan["layers"])
    history = pd.DataFrame(columns=["tokens", "split", "loss"])
    if plan["steps"]:
        healed = healing.heal(
            current,
            tokenizer,
            _healing_windows(order, tokenizer, plan["seq_len"], plan["steps"]),
            eval_ids=_validation_windows(tokenizer, plan["seq_len"]),
            output_dir=folder / "healing",
            **_recipe(order, plan["steps"], _n_layers(current)),
        )
        current, history = healed.model, healed.history
    surgery.save(current, tokenizer, folder / "model", overwrite=True)
    windows = _evaluation_windows(order, tokenizer, plan["seq_len"], N_COMPARED)
    return {
        "losses": evaluation.token_losses(current, windows).mean(1).tolist(),
        "history": history[["tokens", "split", "loss"]].to_dict("records"),
    }


def _measured(order: Order, model: str, revision: str | None) -> dict:
    with FreshProcesses() as processes:
        return processes.submit(
            judgements.measure,
            model,
            revision=revision,
            dtype=order.dtype,
            device=order.device,
            measured=order.measured,
        ).result()


def _refuse_another(made: dict, loaded: dict, folder: Path) -> None:
    """RuntimeError if what was loaded again has other losses than what was saved."""
    rows = [row["value"] for row in loaded["rows"] if row["measure"] == judgements.LOSS]
    # Of few documents that are measured, there are fewer than were compared in memory.
    n_both = min(len(rows), len(made["losses"]))
    before, saved = made["losses"][:n_both], rows[:n_both]
    if not np.allclose(before, saved, rtol=0, atol=0.02):
        raise RuntimeError(
            f"the saved model is not the one in memory: losses {saved}, and {before} before. Both "
            f"are kept in {folder}: remove it to begin anew"
        )


def _publish(
    order: Order, plan: dict, made: dict, results: dict, judgement: pd.DataFrame, folder: Path
) -> None:
    """Write card, report, table and record into the folder of the model."""
    _write_record(order, plan, made, results, judgement, folder)
    healed = (
        f"{order.method}, {_counted(plan['steps'], 'step')} of "
        f"{BATCH_SIZE * plan['seq_len']:,} tokens"
    )
    card = release.model_card(
        base=name_of(order.model),
        layers=plan["layers"],
        n_layers=plan["n_layers"],
        parameters=results["smaller"]["parameters"],
        recipe=healed if plan["steps"] else "not at all",
        # Of a file its name and digest, not where it lies.
        text=str(text_identity(order.healing_text) or "BoolQ and QuAC passages")
        if plan["steps"]
        else "nothing",
        scores=judgement.set_index("measure").round(4).astype(object).fillna(""),
        record={"order": record_of(order), "plan": plan},
    )
    page = reports.report(
        title=f"{name_of(order.model)} without {_counted(len(plan['layers']), 'layer')}",
        plan_lines=plan_text(order, plan).splitlines(),
        plan=plan,
        history=pd.DataFrame(made["history"], columns=["tokens", "split", "loss"]),
        judgement=judgement,
        samples={name: found["sample"] for name, found in results.items()},
        prompt=judgements.PROMPT,
    )
    for name, text in (
        (release.CARD, card),
        ("report.html", page),
        ("judgement.csv", judgement.to_csv(index=False)),
    ):
        with runtime.atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _write_record(
    order: Order, plan: dict, made: dict, results: dict, judgement: pd.DataFrame, folder: Path
) -> None:
    """Write all that was measured into the folder of the model."""
    record = {"order": record_of(order), "plan": plan, "history": made["history"]}
    with runtime.atomic_path(folder / RECORD) as temporary:
        temporary.write_text(json.dumps({**record, "results": results}, indent=1), encoding="utf-8")
