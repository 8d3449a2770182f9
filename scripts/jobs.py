"""Notebooks with the values to run them with, from profiles and the command line; and the run of one of them."""

from __future__ import annotations

import ast
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
import notebook_files
import papermill
import yaml
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

COMMITTED = "cpu"  # the profile whose executed notebooks are the committed ones


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
        """Where the executed copy is kept in the checkout: it replaces the notebook, or lies beside its results."""
        if self.profile == COMMITTED and not set(self.changes) - notebook_files.UNRECORDED:
            return self.path
        return project / "results" / self.profile / "notebooks" / self.path.name


def plan(project: Path, profile: str, only: list[str], given: dict[str, str], recompute: bool) -> list[Job]:
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
    paths = {path.stem: path for path in sorted((project / "notebooks").glob("[0-9]*.ipynb"))}
    unknown = [start for start in only if not any(name.startswith(start) for name in paths)]
    if unknown or not paths:
        raise Refused(f"no notebook {' or '.join(unknown)}; there are: {', '.join(paths) or 'none'}")
    chosen = [name for name in paths if not only or name.startswith(tuple(only))]
    if given and len(chosen) != 1:
        raise Refused(f"-p sets parameters of one notebook, chosen are: {', '.join(chosen)}; name one with --only")
    sections = read_profile(project / "profiles", profile, list(paths))
    extra = {name: literal(text) for name, text in given.items()} | ({"recompute": True} if recompute else {})
    jobs, faults = [], []
    for name, path in paths.items():
        try:
            defaults = notebook_files.parameters_of(notebook_files.read_notebook(path), name)
        except ValueError as error:
            raise Refused(str(error)) from error
        values = {**sections["all"], **sections[name], **(extra if name in chosen else {})}
        faults += [fault for key in values if (fault := parameter_fault(name, key, values[key], defaults))]
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
    if not isinstance(sections, dict) or not all(isinstance(values or {}, dict) for values in sections.values()):
        raise Refused(f"profile {profile} must map sections to parameter values; sections are: {', '.join(allowed)}")
    if unknown := [str(name) for name in sections if name not in allowed]:
        raise Refused(f"profile {profile} has sections {', '.join(unknown)}; allowed are: {', '.join(allowed)}")
    return {name: sections.get(name) or {} for name in allowed}


def parameter_fault(name: str, key: str, value: object, defaults: dict[str, object]) -> str:
    """What is wrong with a value: the notebook lacks the parameter, or its default has another type; "" if nothing."""
    if key not in defaults:
        return f"{name} has no parameter {key}; it has: {', '.join(defaults)}"
    default = defaults[key]
    kinds = {float: (int, float), tuple: (list, tuple), list: (list, tuple)}.get(type(default), type(default))
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
    if fits or value is None or default is None:
        return ""
    return f"{name}: {key} must be a {type(default).__name__} like its default {default!r}, got {value!r}"


def literal(text: str) -> object:
    """A value of the command line: a Python literal such as ``3e-4`` or ``[1, 2]``, else what YAML makes of it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(text)


def execute(job: Job, project: Path, output: Path) -> NotebookNode:
    """Run a notebook in a kernel of its own and give the executed copy, scrubbed.

    Raises:
        Failed: With the cell and the last lines of the error; the copy so far is left in a temporary folder.
    """
    partial = Path(tempfile.mkdtemp(prefix="pruning_utils_")) / job.path.name
    try:
        notebook = papermill.execute_notebook(
            notebook_files.read_notebook(job.path), partial, job.changes, kernel_name="python3", language="python",
            progress_bar=False, stderr_file=sys.stderr, cwd=job.path.parent, start_timeout=300, iopub_timeout=300,
            extra_arguments=["--log-level=ERROR"])
    except (PapermillExecutionError, RuntimeError, TimeoutError) as error:
        raise Failed(f"{job.name} failed in {failed_cell(job, error, partial)}\n  so far: {partial}") from error
    try:
        notebook_files.scrub(notebook)
    except ValueError as error:
        raise Failed(f"{job.name}: {error}\n  so far: {partial}") from error
    if traces := notebook_files.machine_traces(notebook, [project, output]):
        shown = "\n    ".join(traces)
        raise Failed(f"{job.name}: outputs name folders or addresses of this machine\n    {shown}\n  so far: {partial}")
    shutil.rmtree(partial.parent)
    return notebook


def failed_cell(job: Job, error: Exception, partial: Path) -> str:
    """The number, in the notebook's file, of the cell that failed, and the end of what it said."""
    if isinstance(error, PapermillExecutionError):
        index, said = error.cell_index, error.traceback or [f"{error.ename}: {error.evalue}"]
    else:
        cells = nbformat.read(partial, as_version=4).cells if partial.exists() else []
        started = [place for place, cell in enumerate(cells) if cell.metadata.get("papermill", {}).get("start_time")]
        index, said = max(started, default=0), [str(error)]
    cells = notebook_files.read_notebook(job.path).cells
    first = next(place for place, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    injected = bool(job.changes) and index > first
    return f"cell {index + 1 - injected} of {len(cells)}\n{notebook_files.last_lines(said)}"
