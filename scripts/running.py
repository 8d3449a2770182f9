"""Notebooks that run, one after the other or some at once, and what is kept of them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import nbformat
import notebook_files
from jobs import Failed, Job, ready
from nbformat import NotebookNode
from notebook_kernels import Kernels, execute

from pruning_utils import embedded, runtime
from pruning_utils.engine import definitions, records

THREADS = "OMP_NUM_THREADS"
FINISHED = "finished.json"


class Stopped(Exception):
    """A signal has stopped the driver while notebooks ran.

    Attributes:
        names: The notebooks that ran.
        failures: What had failed before.
    """

    def __init__(self, names: list[str], failures: list[str]):
        super().__init__(", ".join(names))
        self.names = names
        self.failures = failures


def write_text(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    with runtime.atomic_path(path) as target:
        target.write_text(text, encoding="utf-8")


class Finished:
    """Which notebooks of a folder of results need not run again, by the digest of their run.

    Args:
        folder: Root of the results.

    Attributes:
        digests: By notebook.
        values: By notebook, the digest of the values that it was last begun with.
        versions: Of the packages that computed what lies in the folder; None: not known.
    """

    def __init__(self, folder: Path):
        self.path = folder / FINISHED
        self.versions: dict[str, str] | None = None
        self.digests: dict[str, str] = {}
        self.values: dict[str, str] = {}
        unsound = (FileNotFoundError, ValueError, KeyError, TypeError)
        with contextlib.suppress(*unsound):
            state = json.loads(self.path.read_text(encoding="utf-8"))
            versions = dict(state["versions"])
            self.digests = dict(state["finished"])
            self.values = dict(state.get("values", {}))
            self.versions = versions

    def has_other_values(self, job: Job) -> bool:
        """Whether a notebook was last begun with other values, of which its tables are then."""
        return self.values.get(job.name, values_digest(job)) != values_digest(job)

    def set(self, name: str, digest: str) -> None:
        """A notebook has finished."""
        self.digests[name] = digest
        self.write()

    def write(self) -> None:
        """Write the file."""
        state = {"versions": self.versions, "finished": self.digests, "values": self.values}
        write_text(self.path, json.dumps(state, indent=1, sort_keys=True) + "\n")


class Run:
    """Notebooks to run, the kernels that run now, and what has come of the others.

    Args:
        jobs: What to run.
        project: The checkout.
        output: Root under which the notebooks write ``results/`` and ``figures/``.
        keep: Where to keep the executed copies, by notebook; others are dropped.
        finished: What need not be repeated; None: all is.
        at_once: How many run at once, at least 1.
        variables: Further environment variables of the kernels.
        ordered: Whether a notebook waits for those that it builds on.
    """

    def __init__(
        self,
        jobs: list[Job],
        project: Path,
        output: Path,
        keep: dict[str, Path],
        *,
        finished: Finished | None = None,
        at_once: int = 1,
        variables: dict[str, str] | None = None,
        ordered: bool = True,
    ):
        self.jobs = jobs
        self.project = project
        self.output = output
        self.keep = keep
        self.finished = finished
        self.ordered = ordered
        self.at_once = min(at_once, len(jobs))
        own = {
            "PRUNING_UTILS_OUTPUT": str(output),
            **threads_each(self.at_once),
            **(variables or {}),
        }
        self.kernels = Kernels(own, stderr=sys.stderr if self.at_once == 1 else None)
        self.waiting = list(jobs)
        self.running: dict[Future, tuple[Job, str, float]] = {}
        self.summaries: dict[str, list[dict]] = {}
        self.failures: list[str] = []

    def all(self) -> dict[str, list[dict]]:
        """Run them and give their summary rows.

        Raises:
            Failed: If a notebook fails, after those beside it have ended; no other is begun.
            Stopped: At a signal, when no kernel is left.
        """
        if self.at_once > 1:
            number = self.kernels.environment[THREADS]
            threads = f"{number} thread" if number == "1" else f"{number} threads"
            print(f"{self.at_once} notebooks at once, {threads} each", flush=True)
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                while self.waiting or self.running:
                    for job in self._free():
                        self._begin(job, pool)
                    # One that was finished before has left its place to another.
                    if self._free():
                        continue
                    ended, _ = wait(self.running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        self._end(future)
            except BaseException as error:
                names = [job.name for job, *_ in self.running.values()]
                self.kernels.stop(self.running)
                # The line of one that runs alone is begun, and ends here.
                if self.at_once == 1:
                    print(flush=True)
                if isinstance(error, KeyboardInterrupt):
                    raise Stopped(names, self.failures) from None
                raise
        if self.failures:
            raise Failed("\n".join(self.failures))
        return {job.name: self.summaries[job.name] for job in self.jobs}

    def _free(self) -> list[Job]:
        """The notebooks to begin now."""
        free = list(self.waiting)
        if self.ordered and self.at_once > 1:
            free = ready(self.waiting, [job for job, *_ in self.running.values()])
        return free[: self.at_once - len(self.running)]

    def _begin(self, job: Job, pool: ThreadPoolExecutor) -> None:
        self.waiting.remove(job)
        if self.at_once == 1:
            print(f"{self._number()} {job.name} ...", end="", flush=True)
        before = self.finished_before(job)
        if before is not None:
            self._say(job, "finished before")
            self.summaries[job.name] = notebook_files.summary_rows(before)
            return
        # The digest is taken before the run: what is edited meanwhile is not what ran.
        started = (job, run_digest(job), time.monotonic())
        self.running[pool.submit(self._executed, job)] = started

    def _executed(self, job: Job) -> NotebookNode:
        """The executed copy. Its head shows the verdicts that were there when it began.

        Where the run has changed them, and the copy is kept, it is run again: it reads its tables.
        """
        profile = str(job.values["profile"])
        verdicts = self.output / "results" / profile / job.name / "verdicts.csv"
        before = bytes_of(verdicts)
        notebook = execute(job, self.project, self.output, self.kernels)
        # Smoke's verdicts are nobody's findings.
        if job.name not in self.keep or profile == "smoke" or bytes_of(verdicts) == before:
            return notebook
        values, changes = ({**of, "recompute": False} for of in (job.values, job.changes))
        again = replace(job, values=values, changes=changes)
        return execute(again, self.project, self.output, self.kernels)

    def _end(self, future: Future) -> None:
        job, digest, began = self.running.pop(future)
        seconds = f"{time.monotonic() - began:.0f} s"
        try:
            notebook = future.result()
        except Failed as error:
            self._say(job, f"failed after {seconds}")
            self.failures.append(str(error))
            self.waiting.clear()
            return
        if job.name in self.keep:
            write_text(self.keep[job.name], nbformat.writes(notebook).rstrip("\n") + "\n")
        if self.finished is not None:
            self.finished.set(job.name, digest)
        self._say(job, seconds)
        self.summaries[job.name] = notebook_files.summary_rows(notebook)

    def finished_before(self, job: Job) -> NotebookNode | None:
        """The executed copy of a run that need not be repeated."""
        kept = self.keep.get(job.name)
        if self.finished is None or kept is None or not kept.exists():
            return None
        if self.finished.digests.get(job.name) != run_digest(job):
            return None
        return nbformat.read(kept, as_version=4)

    def _number(self) -> str:
        return f"[{len(self.summaries) + len(self.failures) + 1}/{len(self.jobs)}]"

    def _say(self, job: Job, outcome: str) -> None:
        """End the line of a notebook; one that runs alone has it begun already."""
        begun = "" if self.at_once == 1 else f"{self._number()} {job.name} ..."
        print(f"{begun} {outcome}", flush=True)


def bytes_of(path: Path) -> bytes:
    """What a file holds; nothing where it is not there."""
    return path.read_bytes() if path.exists() else b""


def threads_each(at_once: int) -> dict[str, str]:
    """A kernel's share of the cores as an environment variable; one that is set already stays."""
    if at_once == 1 or THREADS in os.environ:
        return {}
    return {THREADS: str(max(1, cores() // at_once))}


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_digest(job: Job) -> str:
    """Digest of what decides what a run shows: the notebook's source, its values, the package."""
    source = notebook_files.source_digest(notebook_files.read_notebook(job.path))
    # A notebook may look at all embedded models at hand.
    at_hand = [name for name in embedded.MODELS if embedded.is_installed(name)]
    parts = [source, values_digest(job), definitions.INSTALLED.digest(), at_hand]
    return records.digest(records.canonical(parts))


def values_digest(job: Job) -> str:
    """Digest of the values of a run, but for those that no table depends on."""
    values = dict(job.values)
    for name in notebook_files.UNRECORDED:
        values.pop(name, None)
    return records.digest(records.canonical(records.plain(values)))
