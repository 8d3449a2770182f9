"""A profile's notebooks from end to end on small stand-ins, before the hardware that it is for.

What is long is divided: steps, windows, questions, the rates and seeds that are tried. What could
fail stays: the models' names and configurations, every table, every depth, method and rule. The
profile in the notebooks is ``smoke``, where verdicts and checks of numbers count for nothing.

The smoke profile itself has nothing to divide but the layers of its model. The tests rehearse most
of its notebooks, which takes less than a third of the time that the real weights take.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import configurations
import modes
import notebook_files
import small_hub
import work
from jobs import Job, Refused
from transformers import AutoTokenizer, PreTrainedConfig

from pruning_utils import data, embedded, models, results, runtime

NAME = "rehearsal"
# What stands in for the embedded model has its name at the hub.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Other models of the papers, and the notebooks that they go through.
OTHERS = (
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "mistralai/Mistral-7B-v0.1",
    "microsoft/phi-2",
    "lmsys/vicuna-7b-v1.5",
    "Qwen/Qwen1.5-7B",
    "google/gemma-2-2b",
)
WITH_OTHERS = ("00_quickstart", "01_layer_similarity")
N_WINDOWS, N_QUESTIONS, SEQ_LEN, N_STEPS = 4, 3, 16, 2
# Of a notebook that trains in rounds: a step in each, fewer kinds of rounds, one rate for each way,
# and few of the sets that differ in one layer.
OF_ROUNDS = {
    "healing.steps": 8,
    "healing.warmup_steps": 0,
    "healing.per_round": [[8, 1], [16, 8]],
    "healing.longer": {"steps": 8, "ways": {"taylor": ["LoRA"]}, "per_round": [8, 1], "seeds": [0]},
    "healing.rates": {
        rule: {"LoRA": [1e-4], "head + 3": [1e-5]} for rule in ("reverse order", "taylor")
    },
    "swapped.sets": {"reverse order": [31], "deepest but last": [30]},
}
OF_NOTEBOOK = {"11_one_shot_or_iterative": OF_ROUNDS}
# At the smoke profile the stand-in has fewer layers than the embedded model, so fewer are removed.
N_SHORT_LAYERS = 12
OF_SHORT: dict[str, dict[str, Any]] = {
    "02_depth_and_question_answering": {"sweep.to": 0.25, "shares": [0.08, 0.17]},
    "03_depth_and_next_token_loss": {"sweep.to": 0.25, "shares": [0.08]},
    "04_simple_against_similarity": {
        "sweep.to": 0.25,
        "sweep.healed": [0.08],
        "sweep.judged": [0.08],
        "sweep.answered": [0.08],
        "sweep.compared": 0.25,
    },
    "05_robustness": {"share_removed": 0.25},
    "06_block_importance": {"depths": [6]},
    "07_depth_against_width": {"depths": [5]},
    "08_lora_against_continued_pretraining": {
        "depths": [6],
        "healing.chained_depths": [6],
        "healing.equal_steps": [[6, 1]],
        "quantised.depths": [0, 6],
    },
    "09_seven_metrics": {"depths": [6], "healing.rated": [[6, "reverse order"]]},
    "10_how_to_heal": {"depths": [6]},
    "11_one_shot_or_iterative": {
        "depths": [6],
        "healing.per_round": [[6, 3]],
        "healing.longer": {
            "steps": 2,
            "ways": {"block influence": ["LoRA"]},
            "per_round": [6, 3],
            "seeds": [100],
        },
        "swapped.sets": {"reverse order": [11], "deepest but last": [10]},
    },
    "12_the_recommended_model": {"depths": [6]},
}


# --- values ---------------------------------------------------------------------------------------


def at_most(limit: int) -> Callable[[Any], Any]:
    """A number, each number of a list, or each value of a mapping, to at most this; None is it."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return list(dict.fromkeys(cut(inner) for inner in value))
        return limit if value is None else min(value, limit)

    return cut


def first_two(value: Any) -> Any:
    """The first two of each list in a value."""
    if isinstance(value, Mapping):
        return {key: first_two(inner) for key, inner in value.items()}
    return value[:2]


def few_windows(draws: list) -> list:
    """Draws of two windows, those of a hundred of three."""
    return [[source, 2 if count < 100 else 3, seed] for source, count, seed in draws]


# What becomes of a value, by the last part of its dotted name.
DIVIDED: dict[str, Callable[[Any], Any]] = {
    "profile": lambda _: modes.TEMPORARY,
    "curves_of": lambda _: modes.TEMPORARY,
    "dtype": lambda name: "float32" if name == runtime.AUTO else name,
    "n_samples": at_most(N_WINDOWS),
    "n_windows": at_most(N_WINDOWS),
    "texts": at_most(N_WINDOWS),
    "fewer": at_most(N_WINDOWS),
    "draws": few_windows,
    "seq_len": at_most(SEQ_LEN),
    "prompts": at_most(SEQ_LEN),
    "n_questions": at_most(N_QUESTIONS),
    "more_questions": at_most(N_QUESTIONS),
    "curve_questions": at_most(N_QUESTIONS),
    "steps": at_most(N_STEPS),
    "source_steps": at_most(N_STEPS),
    "first_steps": at_most(1),
    "warmup_steps": at_most(1),
    "equal_steps": lambda pairs: [[depth, N_STEPS] for depth, _ in pairs],
    "batch_size": at_most(2),
    "batch_sizes": at_most(2),
    "rounds": at_most(2),
    "step": lambda _: 4,
    "rates": first_two,
    "source_rates": first_two,
    "seeds": first_two,
    "random_sets": at_most(1),
    "blocks": at_most(2),
    "new_tokens": at_most(2),
    "warmups": at_most(1),
    "repeats": at_most(2),
    "runs": at_most(1),
    "own_process": lambda _: False,
}


def divided(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a notebook's parameters with all that is long made short."""
    found = {}
    for name, value in values.items():
        if name in DIVIDED:
            found[name] = DIVIDED[name](value)
        elif isinstance(value, dict):
            found[name] = divided(value)
        else:
            found[name] = value
    return found


def rehearsed(job: Job, model: str | None = None) -> Job:
    """A job of a profile, as it is rehearsed; with another model under a name of its own."""
    values: dict[str, Any] = dict(job.values) if is_short(job) else divided(job.values)
    values["model"] = model or at_hub(str(job.values["model"]))
    for dotted, value in (OF_SHORT if is_short(job) else OF_NOTEBOOK).get(job.name, {}).items():
        parameter, _, key = dotted.partition(".")
        values[parameter] = {**values[parameter], key: value} if key else value
    own = notebook_files.parameters_of(notebook_files.read_notebook(job.path), job.name)
    changes = {name: value for name, value in values.items() if value != own[name]}
    profile = f"{NAME}-{modes.TEMPORARY}" if is_short(job) else NAME
    if model:
        profile = f"{profile}-{results.slug(model)}"
    return replace(job, profile=profile, values=values, changes=changes)


def is_short(job: Job) -> bool:
    """Whether a job has nothing to divide; it is for the notebook's code, whatever the model."""
    return job.profile == modes.TEMPORARY


def at_hub(model: str) -> str:
    """The name under which a stand-in of a model lies in the hub's cache."""
    return SMOLLM2 if model == models.EMBEDDED else model


def configuration(name: str, reference: Path, *, short: bool = False) -> PreTrainedConfig:
    """The configuration of a real model, by its name at the hub; with fewer layers if ``short``."""
    if name == SMOLLM2:
        found = configurations.configuration(models.EMBEDDED, reference)[0]
    else:
        found = configurations.stated_configuration(name, reference)
    if not short:
        return found
    fewer = copy.deepcopy(found)  # the first is kept by those who read it
    fewer.num_hidden_layers = N_SHORT_LAYERS
    return fewer


def model_names(chosen: list[Job]) -> list[str]:
    """The models that these notebooks load, by their names at the hub."""
    named = [at_hub(str(job.values["model"])) for job in chosen]
    for job in chosen:
        scored: Any = job.values.get("scored_on", {})
        named += scored.get("peers", [])
    return [name for name in dict.fromkeys(named) if embedded.find_embedded(name) is None]


# --- what no division shows -----------------------------------------------------------------------


def short_texts(chosen: list[Job], reference: Path) -> list[str]:
    """The embedded texts of which a profile asks for more documents than are long enough.

    Tokens are counted by the embedded model's tokenizer; those of other models differ by a tenth.

    Args:
        chosen: Jobs as the profile has them, not divided.
        reference: Folder of the models' configurations.
    """
    lengths = _embedded_lengths()
    faults = []
    for job in chosen:
        for source, least, count in documents_of(job, reference):
            there = sum(n_tokens >= least for n_tokens in lengths.get(source, []))
            if source in lengths and there < count:
                faults.append(
                    f"{job.name}: {count} documents of {source} with {least} tokens, of which "
                    f"there are {there}"
                )
    return list(dict.fromkeys(faults))


@functools.cache
def _embedded_lengths() -> dict[str, list[int]]:
    """Tokens of each document of the embedded evaluation texts."""
    known = AutoTokenizer.from_pretrained(models.resolve(models.EMBEDDED, None))
    lengths = {}
    for source in {source for source, split in data.EMBEDDED_SPLITS if split == "evaluation"}:
        texts = data.documents(source, "evaluation")
        ids = known(texts, add_special_tokens=False, verbose=False)["input_ids"]
        lengths[source] = [len(some) for some in ids]
    return lengths


def documents_of(job: Job, reference: Path) -> Iterator[tuple[str, int, int]]:
    """Texts that a notebook evaluates on, tokens that a document must have, and documents."""
    config, _ = configurations.configuration(str(job.values["model"]), reference)
    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    for table in work.tables_of(job.name, job.values, n_layers):
        # There windows are packed, and may hold several documents.
        if table.name == "beginnings":
            continue
        for name, count in table.texts.items():
            source, _, length = name.partition(":")
            yield source, int(length or table.seq_len), count


# --- the rehearsal --------------------------------------------------------------------------------


def rehearse(
    chosen: list[Job],
    project: Path,
    *,
    others: bool,
    record: bool,
    keep: bool,
    recompute: bool,
    at_once: int,
) -> bool:
    """Run notebooks on small stand-ins, and compare their summary numbers with the recorded ones.

    It goes on where it was stopped. When all is compared its folders go away.

    Args:
        chosen: Jobs as their profile has them.
        project: The checkout.
        others: Whether the papers' other models go through :data:`WITH_OTHERS`.
        record: Replace the recorded numbers by these.
        keep: Keep the folders.
        recompute: Begin anew.
        at_once: How many notebooks run at once.

    Returns:
        Whether the numbers agree or are recorded.

    Raises:
        Refused: If the profile asks for more text than there is, or for a model whose configuration
            or tokenizer is not known.
        Failed: If a notebook fails.
    """
    reference = project / "reference"
    faults = short_texts(chosen, reference)
    if faults:
        raise Refused("\n".join(faults))
    short = is_short(chosen[0])
    further = OTHERS if others and not short else ()
    names = dict.fromkeys([*model_names(chosen), *further])
    of_profile = f"{NAME}-{modes.TEMPORARY}" if short else NAME
    home = project / "regressed" / f"{of_profile}-hub"
    # Another rehearsal would read these models, and remove them at its end.
    with modes.held(home):
        if recompute:
            shutil.rmtree(home)  # stand-ins of another form may lie there
        try:
            small_hub.place(
                home, {name: configuration(name, reference, short=short) for name in names}
            )
        except ValueError as error:
            with contextlib.suppress(OSError):  # stand-ins of a kept rehearsal stay
                home.rmdir()
            raise Refused(str(error)) from error
        os.environ.update(small_hub.environment(home))
        regress = functools.partial(
            modes.regress,
            project=project,
            record=record,
            keep=keep,
            recompute=recompute,
            at_once=at_once,
        )
        agree = regress([rehearsed(job) for job in chosen])
        for name in further:
            print(f"with {name}", flush=True)
            jobs_of = [rehearsed(job, model=name) for job in chosen if job.name in WITH_OTHERS]
            agree = regress(jobs_of) and agree
        if not keep:
            shutil.rmtree(home)
    return agree
