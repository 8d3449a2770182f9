"""The bill before the run: GPU hours, memory, disk and dollars of each notebook at a profile.

A table of :mod:`work` says what is computed; :mod:`pruning_utils.planning` says what that takes,
from the model's configuration alone. Not counted is what a GPU waits for: loading, tokenising,
lm-eval's bookkeeping, saving.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import configurations
import pandas as pd
import torch
import work
from jobs import Job, depths_fault
from parameters import Refused
from transformers import PreTrainedConfig

from pruning_utils import embedded, healing, models, runtime
from pruning_utils.engine import benchmarks, memory, trainer
from pruning_utils.planning import machines, stages
from pruning_utils.planning.machines import Machine
from pruning_utils.studies import recipes, study

QUESTIONS = "question_tokens.csv"
BATCH = 8  # windows or questions in a pass of evaluation
SAVES_AT_ONCE = 3  # a training keeps two, and deletes an older one once the next is there
REHEARSED = 4  # layers of a model in a rehearsal, and one more in a second
SHARED_BYTES = 4 * 2**30  # of passes.SharedLayers, at most
GB = 1e9
HOUR = 3600.0


class Cost(NamedTuple):
    """What one table takes.

    Attributes:
        seconds: Of the device.
        need: Memory where it is most.
        at: What is done there.
        setting: What to change where that does not fit.
        kept: Bytes that it leaves on the disk.
        saved: Bytes on the disk that it takes on the way.
    """

    seconds: float
    need: stages.Need
    at: str
    setting: str
    kept: float = 0.0
    saved: float = 0.0


@dataclass(frozen=True)
class Line:
    """A notebook with a model.

    Attributes:
        notebook: Its name.
        model: Name of the model.
        configured: Where its configuration was read.
        seconds: Of the device.
        worst: The cost whose memory is most.
        disk: Bytes of trained models at the end, and of the saves of the training that takes most.
    """

    notebook: str
    model: str
    configured: str
    seconds: float
    worst: Cost
    disk: float


# --- one model on one machine ---------------------------------------------------------------------


class Costs:
    """Memory and time of stages of one model on one machine; what was rehearsed is kept.

    Args:
        config: The model's configuration.
        machine: Where it will run.
        questions: reference/question_tokens.csv, by task.
    """

    def __init__(self, config: PreTrainedConfig, machine: Machine, questions: pd.DataFrame):
        self.config = config
        self.machine = machine
        self.questions = questions
        self.text = config.get_text_config(decoder=True)
        self.n_layers = self.text.num_hidden_layers
        self.known: dict[tuple, Any] = {}
        # Models that were trained before, which nobody trains again.
        self.trained: set[tuple] = set()

    def dtype(self, name: str) -> torch.dtype:
        """The type behind a name."""
        if name == runtime.AUTO:
            return self.machine.auto()
        return getattr(torch, name)

    def needs(
        self, stage: str, dtype: torch.dtype, *, kept: int | None = None, **asked: Any
    ) -> tuple[stages.Need, ...]:
        """What a function of :mod:`stages` finds with so many layers, all of them by default.

        A few layers are rehearsed, twice, and the rest follows: see :func:`stages.with_layers`.
        """
        kept = self.n_layers if kept is None else kept
        if self.n_layers <= REHEARSED:
            return self.rehearsed(stage, dtype, kept, asked)
        few, more = (
            self.rehearsed(stage, dtype, count, asked) for count in (REHEARSED, REHEARSED + 1)
        )
        pairs = zip(few, more, strict=True)
        return tuple(stages.with_layers(*pair, kept - REHEARSED) for pair in pairs)

    @functools.cached_property
    def few_parameters(self) -> tuple[int, int]:
        """Parameters with one layer, and with two."""
        one, two = (
            stages.n_parameters(self.config, n_dropped=self.n_layers - count) for count in (1, 2)
        )
        return one, two

    def rehearsed(
        self, stage: str, dtype: torch.dtype, kept: int, asked: dict[str, Any]
    ) -> tuple[stages.Need, ...]:
        """A stage with so many layers; what was rehearsed before is known."""
        key = (stage, dtype, kept, str(sorted(asked.items())))
        if key not in self.known:
            gone = self.n_layers - kept
            found = getattr(stages, stage)(self.config, dtype, n_dropped=gone, **asked)
            self.known[key] = found if isinstance(found, tuple) else (found,)
        return self.known[key]

    def forward(self, n_tokens: float, seq_len: int, dtype: torch.dtype, kept: int) -> float:
        """Seconds of windows in evaluation."""
        (need,) = self.needs("losses", dtype, kept=kept, seq_len=seq_len, batch_size=BATCH)
        return self.machine.seconds(n_tokens / (BATCH * seq_len) * need.flops, dtype)

    def tokens(self, task: str, limit: int | None, shots: int) -> float:
        """Tokens of a task's questions, its shots once for each subject."""
        row = self.row(task)
        count = row["questions"] if limit is None else min(limit, row["questions"])
        return count * row["tokens"] + row["subjects"] * shots * row["shot_tokens"]

    def row(self, task: str) -> pd.Series:
        """What is known of a task."""
        name = benchmarks.FORMER.get(task, task)
        if name not in self.questions.index:
            raise Refused(f"the tokens of {task} are not in reference/{QUESTIONS}")
        return self.questions.loc[name]

    # --- training ---------------------------------------------------------------------------------

    def training(self, table: work.Table, point: work.Point) -> Iterator[tuple[Cost, tuple]]:
        """What each training of a point takes, and what the model is known by."""
        stages_of = recipes.Recipe.parse(point.recipe).stages
        rounds = point.n_dropped // point.per_round if point.per_round else 1
        seen: tuple = (point.cut, point.n_dropped, point.per_round, point.seed, table.source)
        for number, stage in enumerate(stages_of):
            settings = {**table.healing, **stage.settings}
            seen = (*seen, str(sorted(settings.items(), key=lambda item: item[0])))
            before = 0.0  # on the disk, of the rounds before: all are kept until the last one
            for turn in range(1, rounds + 1):
                gone = point.per_round * turn if point.per_round else point.n_dropped
                n_steps = settings["steps"] // rounds
                cost = self.steps(table, settings, gone, n_steps, is_watched=turn == rounds)
                kept = cost.kept
                if rounds > 1:
                    cost = cost._replace(kept=0.0, saved=cost.saved + before)
                    before += kept
                if turn > 1:  # what the round before left has weights of its own
                    loaded = self.weight_bytes(self.dtype(table.dtype), self.n_layers)
                    cost = cost._replace(need=cost.need.beside(stages.WHOLE, loaded))
                yield cost, (*seen, number, turn)

    def steps(
        self, table: work.Table, settings: dict, gone: int, n_steps: int, *, is_watched: bool = True
    ) -> Cost:
        """What so many steps take, with the validation on the way where they are watched."""
        dtype = self.dtype(table.dtype)
        kept = self.n_layers - gone
        # What no shape depends on does not tell one rehearsal from another.
        free = ("steps", "learning_rate", "warmup_steps")
        asked = {name: value for name, value in settings.items() if name not in free}
        asked |= {"seq_len": table.seq_len, "checkpointing": self.is_large(settings, kept)}
        passing, stepping, ending = self.needs("heal", dtype, kept=kept, **asked)
        need = max(passing, stepping, ending, key=lambda one: one.peak)
        seconds = self.machine.seconds(n_steps * passing.flops, dtype)
        if is_watched:  # of several rounds, a study watches the last one
            looks = 1 + min(n_steps, healing.EVALUATIONS)
            n_tokens = looks * study.N_VALIDATION * table.seq_len
            seconds += self.forward(n_tokens, table.seq_len, dtype, kept)
        at = f"{settings['method']} without {gone} layers"
        change = "depths (more layers gone) or the method of healing"
        on_disk = self.on_disk(settings, stepping, dtype, kept)
        return Cost(seconds, need, at, change, *on_disk)

    def on_disk(
        self, settings: dict, stepping: stages.Need, dtype: torch.dtype, kept: int
    ) -> tuple[float, float]:
        """Bytes that a training leaves on the disk, and those of its saves at their most.

        Adapters stay with their two last saves; of other methods what was trained does. A save has
        the states of the optimiser, two numbers of four bytes for each that is trained.
        """
        states = stepping.parts.get(stages.OPTIMISER, 0)
        n_trained = states // 8
        if settings["method"] in healing.ADAPTERS:
            a_save = 4 * n_trained + states
            return 2.0 * a_save, float(SAVES_AT_ONCE * a_save)
        a_save = self.weight_bytes(dtype, kept) + (4 - dtype.itemsize) * n_trained + states
        is_tied = self.config.tie_word_embeddings
        if is_tied and recipes.unties_head(settings):
            a_save += self.text.vocab_size * self.text.hidden_size * dtype.itemsize
        return float(dtype.itemsize * n_trained), float(SAVES_AT_ONCE * a_save)

    def weight_bytes(self, dtype: torch.dtype, kept: int) -> int:
        """Bytes of the weights with so many layers."""
        one, two = self.few_parameters
        return (one + (kept - 1) * (two - one)) * dtype.itemsize

    def is_large(self, settings: dict, kept: int) -> bool:
        """Whether activations of such a training are computed again, by its stored numbers.

        A GPU does so only where they do not fit, so that it may take more memory and less time.
        """
        one, two = self.few_parameters
        a_layer = two - one
        share = 0.5 if settings["method"] == "qlora" else 1.0
        return one - a_layer + share * kept * a_layer > trainer.LARGE

    # --- measuring --------------------------------------------------------------------------------

    def measuring(self, table: work.Table, point: work.Point) -> float:
        """Seconds of a model's texts and questions; layers that models share count for each."""
        dtype, kept = self.dtype(table.dtype), self.n_layers - point.n_dropped
        seconds = 0.0
        for name, windows in table.texts.items():
            length = int(name.partition(":")[2] or table.seq_len)
            seconds += self.forward(windows * length, length, dtype, kept)
        for task, given in table.tasks.items():
            shots = given if point.shots is None else point.shots
            seconds += self.answering(self.tokens(task, table.limit, shots), task, dtype, kept)
        return seconds

    def answering(self, n_tokens: float, task: str, dtype: torch.dtype, kept: int) -> float:
        """Seconds of questions."""
        length = max(8, int(self.row(task)["tokens"]))
        answers = max(1, int(self.row(task)["answer_tokens"]))
        asked = {"n_tokens": length, "answer_tokens": answers, "batch_size": 1}
        (need,) = self.needs("questions", dtype, kept=kept, **asked)
        return self.machine.seconds(n_tokens / length * need.flops, dtype)

    def memory_of(self, table: work.Table) -> Iterator[Cost]:
        """What measuring the models of a table takes: the whole one, and of trained ones the
        largest, whose weights lie beside it."""
        dtype = self.dtype(table.dtype)
        trained = [point for point in table.points if point.recipe]
        beside = 0
        if trained:
            gone = min(point.n_dropped for point in trained)
            beside = self.weight_bytes(dtype, self.n_layers - gone)
        for need, at, setting in self.passes(table, dtype):
            yield Cost(0, need.beside(stages.COPY, beside), at, setting)
            if beside == 0 and table.texts:
                yield Cost(0, need.beside(stages.SHARED, SHARED_BYTES), at, setting)

    def passes(self, table: work.Table, dtype: torch.dtype) -> Iterator[tuple]:
        """Memory, name and setting of the largest passes of a table's texts and tasks."""
        lengths = [int(name.partition(":")[2] or table.seq_len) for name in table.texts]
        if lengths:
            (need,) = self.needs("losses", dtype, seq_len=max(lengths), batch_size=BATCH)
            yield need, f"loss on {max(lengths)} tokens", "scored_on.seq_len or text.seq_len"
        given = [point.shots for point in table.points if point.shots is not None]
        asked = {task: max([shots, *given]) for task, shots in table.tasks.items()}
        longest = {task: int(self.row(task)["longest"]) for task in asked}
        shared = {task: int(asked[task] * self.row(task)["shot_tokens"]) for task in asked}
        if asked:
            task = max(asked, key=lambda name: longest[name] + shared[name])
            most = models.context_length(self.config)
            sizes = {"n_shared": min(shared[task], most - longest[task])}
            asked_at_once = {"n_tokens": longest[task], "batch_size": BATCH}
            (need,) = self.needs("questions", dtype, **sizes, **asked_at_once)
            yield need, f"{task} with {asked[task]} shots", "scored_on.tasks, .papers or shots"

    # --- kinds of tables --------------------------------------------------------------------------

    def study(self, table: work.Table) -> Iterator[Cost]:
        """Models that are cut, trained where nobody did so before, and measured."""
        dtype = self.dtype(table.dtype)
        if table.n_calibration:
            yield self.scanning(table, dtype, table.n_calibration)
        for point in table.points:
            for cost, known in self.training(table, point) if point.recipe else ():
                is_new = known not in self.trained
                self.trained.add(known)
                yield cost if is_new else cost._replace(seconds=0.0, kept=0.0, saved=0.0)
            yield Cost(self.measuring(table, point), stages.Need({}, 0), "", "")
        yield from self.memory_of(table)

    def scanning(
        self, table: work.Table, dtype: torch.dtype, n: int, quantize: str | None = None
    ) -> Cost:
        """The distances of all blocks on n windows."""
        sizes = {"seq_len": table.seq_len, "batch_size": min(BATCH, n)}
        (need,) = self.needs("scan", dtype, **sizes, quantize=quantize)
        seconds = self.machine.seconds(need.flops * n / min(BATCH, n), dtype)
        return Cost(seconds, need, f"scan of {table.seq_len} tokens", "text.seq_len or precisions")

    def scan(self, table: work.Table) -> Iterator[Cost]:
        """A scan for each text and precision."""
        for _, precision in table.points:
            is_stored = precision in ("nf4", "int8")
            dtype = self.dtype(table.dtype if is_stored else precision)
            quantize = "nf4" if precision == "nf4" else None
            yield self.scanning(table, dtype, table.settings["n_samples"], quantize)

    def score(self, table: work.Table) -> Iterator[Cost]:
        """Taylor's scores and perplexities without each layer, for each draw of text."""
        dtype = self.dtype(table.dtype)
        yield from self.sample(table)
        most = memory.TOKENS_AT_ONCE[self.machine.kind]
        size = max(1, most // ((self.n_layers + 1) * table.seq_len))
        given: dict[str, Any] = {"seq_len": table.seq_len, "on": self.machine.kind}
        # Here the operations grow with the square of the layers.
        (need,) = self.rehearsed("perplexity_without_layer", dtype, self.n_layers, given)
        seconds = self.machine.seconds(sum(table.points) / size * need.flops, dtype)
        yield Cost(seconds, need, "perplexity without each layer", "text.dtype")

    def sample(self, table: work.Table) -> Iterator[Cost]:
        """Taylor's scores and block influence, for each draw of text."""
        dtype, most = self.dtype(table.dtype), max(table.points)
        given: dict[str, Any] = {"seq_len": table.seq_len, "on": self.machine.kind}
        (need,) = self.needs("taylor", dtype, n_samples=most, **given)
        flops = need.flops * sum(table.points) / most
        at = f"Taylor on {most} windows of {table.seq_len} tokens"
        yield Cost(self.machine.seconds(flops, dtype), need, at, "text.dtype or text.draws")
        yield self.scanning(table, dtype, sum(table.points))

    def floor(self, table: work.Table) -> Iterator[Cost]:
        """Answers without their questions."""
        dtype = self.dtype(table.dtype)
        for task in table.points:
            row = self.row(task)
            count = row["questions"] if table.limit is None else min(table.limit, row["questions"])
            n_tokens = count * row["answer_tokens"]
            seconds = self.answering(n_tokens, task, dtype, self.n_layers)
            yield Cost(seconds, stages.Need({}, 0), "", "")

    def speed(self, table: work.Table) -> Iterator[Cost]:
        """Generation with the key-value cache; narrower models count as the whole one."""
        dtype, asked = self.dtype(table.dtype), table.settings
        runs = asked["warmups"] + asked["repeats"]
        whole = self.weight_bytes(dtype, self.n_layers)
        for _, gone, batch, prompt in table.points:
            sizes = {"batch_size": batch, "prompt_tokens": prompt}
            sizes["new_tokens"] = asked["new_tokens"]
            first, last = self.needs("generation", dtype, **sizes)
            read = whole + last.parts.get(stages.CACHE, 0)
            a_token = self.machine.seconds(last.flops, dtype, n_read=read)
            prompts = self.machine.seconds(first.flops, dtype, n_read=whole)
            share = (self.n_layers - gone) / self.n_layers
            seconds = runs * share * (prompts + asked["new_tokens"] * a_token)
            need = max(first, last, key=lambda one: one.peak)
            at = f"{batch} texts of {prompt} + {asked['new_tokens']} tokens"
            yield Cost(seconds, need, at, "scored_on.batch_sizes or scored_on.prompts")

    memory = speed

    def cost(self, table: work.Table) -> Iterator[Cost]:
        """Trainings that are timed: studies.costs.measure_cost trains four times."""
        for _, gone, recipe in table.points:
            settings = {**table.healing, **recipes.Stage.parse(recipe).settings}
            settings.setdefault("learning_rate", 1.0)
            found = self.steps(table, settings, gone, 5 + table.settings["steps"])
            yield found._replace(kept=0.0, saved=0.0)  # it has no folder

    def release(self, table: work.Table) -> Iterator[Cost]:
        """Windows that are timed."""
        dtype, asked = self.dtype(table.dtype), table.settings
        sizes = {"seq_len": table.seq_len, "batch_size": asked["batch_size"]}
        for point in table.points:
            kept = self.n_layers - point.n_dropped
            n_tokens = asked["n_windows"] * table.seq_len
            seconds = self.forward(n_tokens, table.seq_len, dtype, kept)
            (need,) = self.needs("losses", dtype, **sizes)
            yield Cost(seconds, need, "release", "scored_on.timed.batch_size")

    def other(self, table: work.Table) -> Iterator[Cost]:
        """What takes no time to speak of."""
        yield Cost(0.0, stages.Need({}, 0), "", "")


# --- the bill -------------------------------------------------------------------------------------


class Bill:
    """The lines of all notebooks, in order: what one trains, later ones take.

    Args:
        reference: The folder ``reference/`` of the checkout.
        machine: Where the notebooks will run.
    """

    def __init__(self, reference: Path, machine: Machine):
        self.reference = reference
        self.machine = machine
        self.questions = pd.read_csv(reference / QUESTIONS).set_index("task")
        self.costs: dict[str, Costs] = {}

    def of_model(self, name: str) -> tuple[Costs, str]:
        """The costs of a model; models with one configuration have the same."""
        config, source = configurations.configuration(name, self.reference)
        key = config.to_json_string()
        if key not in self.costs:
            self.costs[key] = Costs(config, self.machine, self.questions)
        return self.costs[key], source

    def lines(self, job: Job) -> list[Line]:
        """A line for each model that a notebook looks at."""
        own = str(job.values["model"])
        names = [own]
        if own == models.EMBEDDED and job.name in work.EVERY_MODEL:
            names = [name for name in embedded.MODELS if embedded.is_installed(name)]
        found: list[Line] = []
        for name in names:
            costs, source = self.of_model(name)
            is_second = name != names[0]
            fault = "" if is_second else depths_fault(job, costs.n_layers)
            if fault:
                raise Refused(fault)
            tables = work.tables_of(job.name, job.values, costs.n_layers, is_second=is_second)
            found.append(self.line(job, name, [one for one in tables if not one.model]))
            for other in dict.fromkeys(one.model for one in tables if one.model):
                found.append(self.line(job, other, [one for one in tables if one.model == other]))
        return found

    def line(self, job: Job, name: str, tables: Iterable[work.Table]) -> Line:
        """What some tables take with one model."""
        costs, source = self.of_model(name)
        every = [cost for table in tables for cost in getattr(costs, table.kind)(table)]
        worst = max(every, key=lambda cost: cost.need.peak)
        seconds = math.fsum(cost.seconds for cost in every)
        disk = math.fsum(cost.kept for cost in every) + max(cost.saved for cost in every)
        return Line(job.name, name, source, seconds, worst, disk)


def text_of(lines: Sequence[Line], *, kind: str, price: float | None) -> str:
    """The bill as a table for a terminal, words from the left.

    Args:
        lines: Its lines.
        kind: Of the machine whose hours they are: ``cuda`` or ``cpu``.
        price: Dollars an hour; None: they are left out.
    """
    hours = "GPU hours" if kind == "cuda" else "hours"
    rows = []
    for line in lines:
        row = {
            "notebook": line.notebook,
            "model": line.model,
            hours: f"{line.seconds / HOUR:.1f}",
            "peak GB": f"{line.worst.need.peak / GB:.1f}",
            "disk GB": f"{line.disk / GB:.1f}",
        }
        if price is not None:
            row["dollars"] = f"{price * line.seconds / HOUR:.2f}"
        rows.append({**row, "most memory": line.worst.at})
    total = math.fsum(line.seconds for line in lines) / HOUR
    last = dict.fromkeys(rows[0], "")
    last |= {"notebook": "all", hours: f"{total:.1f}"}
    last["disk GB"] = f"{math.fsum(line.disk for line in lines) / GB:.1f}"
    if price is not None:
        last["dollars"] = f"{price * total:.2f}"
    table = pd.DataFrame([*rows, last])
    for words in ("notebook", "model", "most memory"):
        table[words] = table[words].str.ljust(table[words].str.len().max())
    return table.to_string(index=False, justify="left")


def in_gb(size: float) -> str:
    """Bytes in GB with one decimal, or below 1 GB with two digits."""
    return f"{size / GB:.1f}" if size >= GB else f"{size / GB:.2g}"


def refusals(lines: Iterable[Line], memory: float) -> list[str]:
    """What does not fit into so many bytes, each with the setting to change."""
    found = []
    for line in lines:
        peak = line.worst.need.peak
        if peak > memory:
            parts = ", ".join(
                f"{part} {in_gb(size)}" for part, size in line.worst.need.parts.items()
            )
            found.append(
                f"{line.notebook} on {line.model} needs {in_gb(peak)} GB of {memory / GB:g} "
                f"({line.worst.at}: {parts}); change {line.worst.setting}"
            )
    return found


def machine_named(name: str) -> Machine:
    """The machine of a name on the command line."""
    return machines.A100 if name == "a100" else machines.here()


def show(
    chosen: Iterable[Job],
    project: Path,
    *,
    machine: str,
    memory: float | None,
    price: float | None,
) -> None:
    """Print the bill of some notebooks.

    Args:
        chosen: The notebooks with their values.
        project: The checkout.
        machine: ``a100``, or ``here`` for a probe of this one.
        memory: GB that a process may take; None: what the machine has.
        price: Dollars an hour; None: they are left out.

    Raises:
        Refused: If a notebook does not fit into that memory, all of them are named; or if its
            values cannot be.
    """
    bill = Bill(project / "reference", machine_named(machine))
    lines: list[Line] = []
    for job in chosen:
        print(f"planning {job.name}", file=sys.stderr)
        try:
            of_job = bill.lines(job)
        except Refused:
            raise
        except (ValueError, AttributeError, TypeError, IndexError, RuntimeError) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in job.changes.items())
            raise Refused(f"{job.name}: no plan for {given or 'these values'}: {error}") from error
        lines += of_job
        for line in of_job:
            print(
                f"  {line.model}: {line.seconds / HOUR:.1f} hours, "
                f"{line.worst.need.peak / GB:.1f} GB at {line.worst.at}, "
                f"{line.disk / GB:.1f} GB on the disk",
                file=sys.stderr,
                flush=True,
            )
    print(text_of(lines, kind=bill.machine.kind, price=price))
    for name, source in dict.fromkeys((line.model, line.configured) for line in lines):
        print(f"{name}: {source}")
    rates = {str(dtype)[6:]: rate / 1e12 for dtype, rate in bill.machine.flops.items()}
    stated = ", ".join(f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in rates.items())
    print(f"{bill.machine.name}: {bill.machine.share:.0%} of {stated}")
    faults = refusals(lines, bill.machine.memory if memory is None else memory * GB)
    if faults:
        raise Refused("\n".join(faults))
