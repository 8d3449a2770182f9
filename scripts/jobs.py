"""Notebooks, the values to run them with, and which of them must wait for which.

:mod:`parameters` says what may be given for a parameter. A dotted name such as ``healing.steps``
replaces one value that is there; a whole mapping of settings may hold only keys that the notebook
has, as it reads them by name; mappings of :data:`parameters.CHOSEN_KEYS` may hold any.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import notebook_files
import yaml
from parameters import Refused, Values, literal, setting_keys, twice_in

from pruning_utils import embedded

# The profile whose executed notebooks are the committed ones.
COMMITTED = "cpu"
READS = "reads its tables, and would compute them beside it"
TRAINS = "takes models that it trains, and would wait for them while it holds cores"
# For a notebook those that must have ended before it begins, if they run at all, and why.
AFTER = {
    "03_depth_and_next_token_loss": {"02_depth_and_question_answering": READS},
    "04_simple_against_similarity": {
        "02_depth_and_question_answering": READS,
        "03_depth_and_next_token_loss": READS,
    },
    "05_robustness": {
        "02_depth_and_question_answering": READS,
        "04_simple_against_similarity": READS,
    },
    "06_block_importance": {"02_depth_and_question_answering": READS},
    "07_depth_against_width": {
        "02_depth_and_question_answering": READS,
        "06_block_importance": READS,
    },
    "08_lora_against_continued_pretraining": {
        "02_depth_and_question_answering": READS,
        "06_block_importance": READS,
    },
    "09_seven_metrics": {"02_depth_and_question_answering": READS},
    "10_how_to_heal": {"02_depth_and_question_answering": READS, "09_seven_metrics": READS},
    "11_one_shot_or_iterative": {
        "02_depth_and_question_answering": READS,
        "09_seven_metrics": READS,
        "10_how_to_heal": TRAINS,
    },
    "12_the_recommended_model": {
        "02_depth_and_question_answering": READS,
        "09_seven_metrics": READS,
        "11_one_shot_or_iterative": TRAINS,
    },
}


# Values that count removed layers.
DEPTHS = (
    "depths",
    "quantised.depths",
    "healing.chained_depths",
    "healing.equal_steps",
    "healing.per_round",
    "healing.rated",
)
# Values that are shares of the layers, to be removed.
SHARES = (
    "shares",
    "share_removed",
    "sweep.to",
    "sweep.placed",
    "sweep.healed",
    "sweep.judged",
    "sweep.compared",
    "sweep.answered",
)
# From 06 to 12 some rules keep the first four layers and the last two, whatever their scores.
PROTECTING = ("06", "12")
PROTECTED = 6
# What a second model loses as the same shares of its layers, by rules that keep so many: the value,
# and how many of its counts.
OF_SECOND = {
    "06_block_importance": ("depths", None),
    "08_lora_against_continued_pretraining": ("quantised.depths", None),
    "09_seven_metrics": ("depths", 1),
}
# Values of a notebook whose counts must be among its `depths`, or 0 for the unpruned model.
AMONG_DEPTHS = {
    "08_lora_against_continued_pretraining": (
        "healing.chained_depths",
        "healing.equal_steps",
        "quantised.depths",
    ),
    "09_seven_metrics": ("healing.rated",),
}


class Failed(Exception):
    """A notebook failed, or its executed copy is not fit to be kept."""


@dataclass(frozen=True)
class Job:
    """One notebook to run.

    Attributes:
        path: The notebook's file.
        profile: Name of the profile.
        values: Every parameter with its value.
        changes: The parameters whose value is not the notebook's own default.
    """

    path: Path
    profile: str
    values: dict[str, object]
    changes: dict[str, object]

    @property
    def name(self) -> str:
        """The notebook's file name without ending."""
        return self.path.stem

    def kept_at(self, project: Path) -> Path:
        """Where the executed copy is kept: in place of the notebook, or beside its results."""
        if self.profile == COMMITTED and not set(self.changes) - notebook_files.UNRECORDED:
            return self.path
        return project / "results" / self.profile / "notebooks" / self.path.name


def notebook_paths(project: Path) -> dict[str, Path]:
    """The notebooks of a checkout by name, in order."""
    return {path.stem: path for path in sorted((project / "notebooks").glob("[0-9]*.ipynb"))}


def with_whole_paths(value: Any) -> Any:
    """A value with the whole path of each ``.jsonl`` file that is there by a relative one."""
    if isinstance(value, dict):
        return {key: with_whole_paths(inner) for key, inner in value.items()}
    if isinstance(value, str) and value.endswith(".jsonl") and os.path.isfile(value):
        return os.path.abspath(value)
    return value


def plan(
    project: Path, profile: str, only: list[str], given: dict[str, str], recompute: bool
) -> list[Job]:
    """The notebooks to run, in order, each with its values.

    Args:
        project: The checkout, with ``notebooks/`` and ``profiles/``.
        profile: Name of a profile.
        only: Beginnings of names of notebooks; all notebooks if empty.
        given: Values from the command line, as texts, for the one notebook that is chosen.
        recompute: Whether stored results are computed anew.

    Raises:
        Refused: Before anything runs, naming all that is unknown and what is allowed.
    """
    paths = notebook_paths(project)
    chosen = chosen_names(list(paths), only)
    if given and len(chosen) != 1:
        raise Refused(
            f"-p sets parameters of one notebook, chosen are: {', '.join(chosen)}; name one with "
            "--only"
        )
    sections = read_profile(project / "profiles", profile, list(paths))
    commanded = {name: literal(name, text) for name, text in given.items()}
    # Notebooks run in a folder of their own, where a relative path leads elsewhere.
    folder = commanded.get("model")
    names = {embedded.EMBEDDED, *embedded.MODELS}
    if isinstance(folder, str) and folder not in names and os.path.isdir(folder):
        commanded["model"] = os.path.abspath(folder)
    commanded = {name: with_whole_paths(value) for name, value in commanded.items()}
    if recompute:
        commanded["recompute"] = True
    defaults = {name: own_defaults(path) for name, path in paths.items()}
    shared = setting_keys(defaults.values())
    jobs: list[Job] = []
    faults: list[str] = []
    for name, path in paths.items():
        values = Values(name, defaults[name])
        values.give(sections["all"], known=shared)
        values.give(sections[name], known=shared)
        if name in chosen:
            values.give(commanded, known=setting_keys([defaults[name]]))
            jobs.append(Job(path, profile, values.now, values.changes()))
        faults += values.faults
        if values.now["profile"] != profile and not values.faults:
            faults.append(
                f"{name}: its results would be those of {values.now['profile']!r}; the profile "
                f"must say all: {{profile: {profile}}}"
            )
    if faults:
        raise Refused("\n".join(faults))
    return jobs


def chosen_names(names: list[str], only: list[str]) -> list[str]:
    """The notebooks whose names have one of these beginnings; all where there are none.

    Raises:
        Refused: If a beginning is no notebook's, or there is no notebook at all.
    """
    if not names:
        raise Refused("there are no notebooks in the checkout")
    unknown = []
    for start in only:
        # An empty word would choose all: a variable of the shell may not be set.
        if not start or not any(name.startswith(start) for name in names):
            unknown.append(start or "''")
    if unknown:
        raise Refused(f"no notebook {' or '.join(unknown)}; there are: {', '.join(names)}")
    return [name for name in names if not only or name.startswith(tuple(only))]


def own_defaults(path: Path) -> dict[str, object]:
    """Parameters of a notebook with their defaults.

    Raises:
        Refused: If they cannot be read.
    """
    try:
        return notebook_files.parameters_of(notebook_files.read_notebook(path), path.stem)
    except ValueError as error:
        raise Refused(str(error)) from error


def read_profile(folder: Path, profile: str, notebooks: list[str]) -> dict[str, dict]:
    """Values by parameter name for every notebook, and under ``all`` for each of them.

    Raises:
        Refused: If there is no such profile, or it has sections of other names or of another form.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if profile not in known:
        raise Refused(f"no profile {profile}; there are: {', '.join(known) or 'none'}")
    try:
        text = (folder / f"{profile}.yaml").read_text(encoding="utf-8")
        sections, twice = yaml.safe_load(text) or {}, twice_in(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"profile {profile} is no YAML: {error}") from error
    if twice:
        raise Refused(f"profile {profile} says twice: {', '.join(twice)}")
    allowed = ["all", *notebooks]
    if not _maps_to_mappings(sections):
        raise Refused(
            f"profile {profile} must map sections to parameter values; sections are: "
            f"{', '.join(allowed)}"
        )
    unknown = [str(name) for name in sections if name not in allowed]
    if unknown:
        raise Refused(
            f"profile {profile} has sections {', '.join(unknown)}; allowed are: "
            f"{', '.join(allowed)}"
        )
    return {name: sections.get(name) or {} for name in allowed}


def _maps_to_mappings(sections: object) -> bool:
    """Whether this is a mapping of mappings; an empty section may be None."""
    if not isinstance(sections, dict):
        return False
    return all(isinstance(values or {}, dict) for values in sections.values())


def depths_fault(job: Job, n_layers: int) -> str:
    """What is wrong with the numbers of layers that a notebook would remove; "" where nothing is.

    Args:
        job: A notebook with its values. Those of :data:`DEPTHS` count layers.
        n_layers: Of the model.
    """
    protects = PROTECTING[0] <= job.name[:2] <= PROTECTING[1]
    if protects and n_layers <= PROTECTED:
        return (
            f"{job.name}: the model must have at least {PROTECTED + 1} layers, for some rules keep "
            f"{PROTECTED}, and {job.values['model']} has {n_layers}"
        )
    faults = []
    for name in DEPTHS:
        counts = [count for count in counts_of(job, name) if isinstance(count, int)]
        given = f"got {counts}; -p {name}=... gives others"
        if any(count >= n_layers for count in counts):
            faults.append(
                f"{name} must be below the {n_layers} layers of {job.values['model']}, {given}"
            )
        elif name == "depths" and any(count < 1 for count in counts):
            faults.append(f"{name} must be at least 1, {given}")
        elif protects and any(count > n_layers - PROTECTED for count in counts):
            faults.append(
                f"{name} must be at most {n_layers - PROTECTED}, for {job.values['model']} has "
                f"{n_layers} layers and some rules keep {PROTECTED}, {given}"
            )
    depths = counts_of(job, "depths")
    for name in AMONG_DEPTHS.get(job.name, ()):
        counts = counts_of(job, name)
        if not set(counts) <= {0, *depths}:
            faults.append(f"{name} must be among depths, {depths}, got {counts}")
    stored = counts_of(job, "quantised.depths")
    if stored and 0 not in stored:
        faults.append("quantised.depths must hold 0 too, the model of which nothing is removed")
    faults += round_faults(job, depths)
    faults += share_faults(job, n_layers)
    faults += second_faults(job)
    return "\n".join(f"{job.name}: {fault}" for fault in faults)


def round_faults(job: Job, depths: list) -> list[str]:
    """What is wrong with the numbers of layers that go in rounds; ``depths`` are the notebook's."""
    faults = []
    known = counts_of(job, "healing.per_round")
    if known and known[:1] != depths[:1]:
        faults.append(
            f"healing.per_round must begin with the first of depths, {depths}, got {known[0]}"
        )
    longer: Any = value_at(job, "healing.longer")
    again = longer.get("per_round", []) if isinstance(longer, dict) else []
    if again and again[0] not in known:
        faults.append(
            f"healing.longer.per_round must begin as a list of healing.per_round does, got {again}"
        )
    return faults


def share_faults(job: Job, n_layers: int) -> list[str]:
    """What is wrong with the shares of layers that a notebook would remove.

    Args:
        job: A notebook with its values. Those of :data:`SHARES` are shares of layers.
        n_layers: Of the model.
    """
    from pruning_utils.studies import depth  # takes seconds

    faults = []
    for name in SHARES:
        found = value_at(job, name)
        for share in found if isinstance(found, (list, tuple)) else [found]:
            try:
                if share is not None:
                    depth.layers_in(share, n_layers)
            except ValueError as error:
                faults.append(f"{name}: {error}")
    return faults


def second_faults(job: Job) -> list[str]:
    """What is wrong for a second model, where one is installed that a notebook looks at too."""
    if job.name not in OF_SECOND or job.values["model"] != embedded.EMBEDDED:
        return []
    from pruning_utils.studies import depth  # takes seconds

    (_, first), *others = depth.SIZES.items()
    name, n_counts = OF_SECOND[job.name]
    counts = counts_of(job, name)[:n_counts]
    faults = []
    for model, size in others:
        allowed = [
            count
            for count in range(1, first.n_layers)
            if depth.layers_in(count / first.n_layers, size.n_layers) <= size.n_layers - PROTECTED
        ]
        most = max(allowed)
        if embedded.is_installed(model) and any(count > most for count in counts):
            faults.append(
                f"{name} must be at most {most}, for {model} loses the same share of its "
                f"{size.n_layers} layers and some rules keep {PROTECTED}, got {counts}; "
                f"-p {name}=... gives others"
            )
    return faults


def value_at(job: Job, name: str) -> object:
    """A value of a job by its dotted name; None where it has none."""
    parameter, _, key = name.partition(".")
    value = job.values.get(parameter)
    return value.get(key) if key and isinstance(value, dict) else value


def counts_of(job: Job, name: str) -> list:
    """The numbers of layers in one value of a job, by its dotted name; [] where it has none."""
    found = value_at(job, name)
    if not isinstance(found, (list, tuple)):
        return []
    # Where each is a list, its first entry counts layers.
    return [one[0] if isinstance(one, (list, tuple)) else one for one in found]


def ready(waiting: Collection[Job], running: Collection[Job]) -> list[Job]:
    """The waiting jobs that may begin beside the running ones: those first that most wait for."""
    unfinished = {job.name for job in (*waiting, *running)}
    free = [job for job in waiting if unfinished.isdisjoint(all_before(job.name))]
    return sorted(free, key=lambda job: (-len(chain_behind(job.name)), job.name))


def all_before(name: str) -> set[str]:
    """The notebooks that a notebook waits for, and those that these wait for."""
    first = AFTER.get(name, {})
    return set(first).union(*map(all_before, first))


def chain_behind(name: str) -> list[str]:
    """The longest chain of notebooks that wait for this one, each for the one before it."""
    chains = [
        [follower, *chain_behind(follower)] for follower, first in AFTER.items() if name in first
    ]
    return max(chains, key=len, default=[])
