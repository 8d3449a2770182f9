"""Notebooks, the values to run them with, and which of them must wait for which."""

from __future__ import annotations

import ast
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import notebook_files
import yaml

COMMITTED = "cpu"  # the profile whose executed notebooks are the committed ones
READS = "reads its tables, and would compute them beside it"
TRAINS = "takes models that it trains, and would write the same files beside it"
# For a notebook those that must have ended before it begins, if they run at all, and why.
AFTER = {
    "03_depth_and_next_token_loss": {"02_depth_and_question_answering": READS},
    "04_simple_against_similarity": {"02_depth_and_question_answering": READS},
    "05_robustness": {"04_simple_against_similarity": READS},
    "07_depth_against_width": {"06_block_importance": READS},
    "08_lora_against_continued_pretraining": {"06_block_importance": READS},
    "10_how_to_heal": {"09_seven_metrics": READS},
    "11_one_shot_or_iterative": {"09_seven_metrics": READS, "10_how_to_heal": TRAINS},
    "12_the_recommended_model": {"09_seven_metrics": READS, "11_one_shot_or_iterative": TRAINS},
}


class Refused(ValueError):
    """The command or a profile asks for what is not there."""


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
        """Where the executed copy is kept in the checkout: it replaces the notebook, or lies beside
        its results."""
        if self.profile == COMMITTED and not set(self.changes) - notebook_files.UNRECORDED:
            return self.path
        return project / "results" / self.profile / "notebooks" / self.path.name


def notebook_paths(project: Path) -> dict[str, Path]:
    """The notebooks of a checkout by name, in order."""
    return {path.stem: path for path in sorted((project / "notebooks").glob("[0-9]*.ipynb"))}


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
    unknown = [start for start in only if not any(name.startswith(start) for name in paths)]
    if unknown or not paths:
        raise Refused(
            f"no notebook {' or '.join(unknown)}; there are: {', '.join(paths) or 'none'}"
        )
    chosen = [name for name in paths if not only or name.startswith(tuple(only))]
    if given and len(chosen) != 1:
        raise Refused(
            f"-p sets parameters of one notebook, chosen are: {', '.join(chosen)}; name one with "
            "--only"
        )
    sections = read_profile(project / "profiles", profile, list(paths))
    extra = {name: literal(text) for name, text in given.items()} | (
        {"recompute": True} if recompute else {}
    )
    jobs, faults = [], []
    for name, path in paths.items():
        try:
            defaults = notebook_files.parameters_of(notebook_files.read_notebook(path), name)
        except ValueError as error:
            raise Refused(str(error)) from error
        values = {**sections["all"], **sections[name], **(extra if name in chosen else {})}
        faults += [
            fault for key in values if (fault := parameter_fault(name, key, values[key], defaults))
        ]
        if name in chosen:
            changes = {key: value for key, value in values.items() if value != defaults.get(key)}
            jobs.append(Job(path, profile, {**defaults, **values}, changes))
    if faults:
        raise Refused("\n".join(faults))
    return jobs


def read_profile(folder: Path, profile: str, notebooks: list[str]) -> dict[str, dict]:
    """Values by parameter name for every notebook, and under ``all`` for each of them.

    Raises:
        Refused: If there is no such profile, or it has sections of other names or of another form.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if profile not in known:
        raise Refused(f"no profile {profile}; there are: {', '.join(known) or 'none'}")
    try:
        sections = yaml.safe_load((folder / f"{profile}.yaml").read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise Refused(f"profile {profile} is no YAML: {error}") from error
    allowed = ["all", *notebooks]
    if not isinstance(sections, dict) or not all(
        isinstance(values or {}, dict) for values in sections.values()
    ):
        raise Refused(
            f"profile {profile} must map sections to parameter values; sections are: "
            f"{', '.join(allowed)}"
        )
    if unknown := [str(name) for name in sections if name not in allowed]:
        raise Refused(
            f"profile {profile} has sections {', '.join(unknown)}; allowed are: "
            f"{', '.join(allowed)}"
        )
    return {name: sections.get(name) or {} for name in allowed}


def parameter_fault(name: str, key: str, value: object, defaults: dict[str, object]) -> str:
    """What is wrong with a value: the notebook lacks the parameter, or its default has another
    type; "" if nothing."""
    if key not in defaults:
        return f"{name} has no parameter {key}; it has: {', '.join(defaults)}"
    default = defaults[key]
    kinds = {float: (int, float), tuple: (list, tuple), list: (list, tuple)}.get(
        type(default), type(default)
    )
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
    if fits or value is None or default is None:
        return ""
    kind = type(default).__name__
    return f"{name}: {key} must be a {kind} like its default {default!r}, got {value!r}"


def literal(text: str) -> object:
    """A value of the command line: a Python literal such as ``3e-4`` or ``[1, 2]``, else what YAML
    makes of it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(text)


def ready(waiting: Collection[Job], running: Collection[Job]) -> list[Job]:
    """The waiting jobs that may begin beside the running ones: those first that most wait for."""
    unfinished = {job.name for job in (*waiting, *running)}
    free = [job for job in waiting if unfinished.isdisjoint(AFTER.get(job.name, ()))]
    return sorted(free, key=lambda job: (-len(chain_behind(job.name)), job.name))


def chain_behind(name: str) -> list[str]:
    """The longest chain of notebooks that wait for this one, each for the one before it."""
    chains = [
        [follower, *chain_behind(follower)] for follower, first in AFTER.items() if name in first
    ]
    return max(chains, key=len, default=[])
