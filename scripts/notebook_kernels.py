"""One notebook run through papermill, in a kernel of its own that another thread can stop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import nbformat
import notebook_files
import papermill
from jobs import Failed, Job
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError

ENGINE = "stoppable"
# Beside the copy of a notebook that failed.
LOG = "kernel.txt"
# Seconds that a kernel has to clear up what it holds, before it is killed.
PATIENCE = 10
# Seconds, for a machine that is busy.
START_TIMEOUT = 300
# A kernel's ports were free when they were chosen, and may be taken when it comes to bind them.
TAKEN = "Address already in use"
# How often a kernel is started that finds its ports taken.
STARTS = 3
# Seconds between two saves of a copy while its notebook runs.
SAVED_EVERY = 5
# Objects of libraries stay, and each training begins with a full collection of garbage. What is
# there after a cell, or once libraries were imported within one, is left alone from then on. What
# they make while they are imported stays too, and is looked through less often.
FEW_TO_COLLECT = """
def few_to_collect(gc=__import__("gc"), modules=__import__("sys").modules):
    collect, n_known = gc.collect, 0
    gc.set_threshold(20_000, 20, 20)
    def collect_and_freeze(generation=2):
        nonlocal n_known
        found = collect(generation)
        if len(modules) > n_known + 100:
            gc.freeze()
            n_known = len(modules)
        return found
    def after_cell(result):
        collect()
        gc.freeze()
    gc.collect = collect_and_freeze
    get_ipython().events.register("post_run_cell", after_cell)
few_to_collect()
del few_to_collect
"""


class Kernels:
    """The kernels that run now, all with the same environment.

    Attributes:
        environment: Environment variables of each kernel.
        stderr: Where what notebooks write to stderr is shown; None: nowhere, as bars of two would
            mix.
        stopped: Whether all were asked to stop.
        clients: What papermill drives each with.
    """

    def __init__(self, variables: Mapping[str, str], *, stderr: TextIO | None):
        # Another Python's kernel may have the same name there. Results are recorded with the
        # versions of the packages of this one.
        os.environ.pop("JUPYTER_PATH", None)
        self.environment = {**os.environ, "PRUNING_UTILS_TEXT_BARS": "1", **variables}
        self.stderr = stderr
        self.stopped = False
        self.clients: set[PapermillNotebookClient] = set()

    def stop(self, threads: Collection[concurrent.futures.Future]) -> None:
        """Interrupt all kernels, kill those that do not end in time, and wait for their threads.

        A second Ctrl-C kills at once.
        """
        self.stopped = True
        for client in list(self.clients):
            # What an interrupted cell says of it is no news.
            client.stderr_file = None
            # It ends once its cell has cleared up.
            client.shutdown_kernel = "immediate"
            send_signal(client, signal.SIGINT)
        patient_until = time.monotonic() + PATIENCE
        running = set(threads)
        while running:
            try:
                running = concurrent.futures.wait(running, timeout=0.2).not_done
            except KeyboardInterrupt:
                patient_until = 0
            if time.monotonic() <= patient_until:
                continue
            # Again and again, for one that was about to start is not there the first time.
            for client in list(self.clients):
                send_signal(client, signal.SIGKILL)


def send_signal(client: PapermillNotebookClient, number: int) -> None:
    """Send a signal to a kernel, if it runs, and to all processes that it has started."""
    group = getattr(getattr(client.km, "provisioner", None), "pgid", None)
    if group and group != os.getpgrp():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


@contextlib.contextmanager
def seldom_saved(nb_man: NotebookExecutionManager) -> Iterator[None]:
    """Let papermill save a copy every few seconds, and not twice a cell with all its figures."""
    save, next_time = nb_man.save, 0.0

    def save_seldom(**given: Any) -> None:
        nonlocal next_time
        if time.monotonic() >= next_time:
            save(**given)
            next_time = time.monotonic() + SAVED_EVERY

    nb_man.save = save_seldom
    try:
        yield
    finally:
        nb_man.save = save


class StoppableEngine(Engine):
    """Gives a kernel an environment and a folder; papermill's own engine gives it the driver's."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: NotebookExecutionManager,
        kernel_name: str,
        *,
        kernels: Kernels,
        folder: Path,
        log: TextIO,
        first: str,
        **unused: object,
    ) -> None:
        """Run all cells; what the kernel says of itself, when interrupted say, goes to a log.

        ``first`` is what the kernel executes before all cells. At the end papermill saves the copy
        once more, failed or not.
        """
        with seldom_saved(nb_man):
            for start in range(1, STARTS + 1):
                client = PapermillNotebookClient(
                    nb_man,
                    kernel_name=kernel_name,
                    startup_timeout=START_TIMEOUT,
                    iopub_timeout=START_TIMEOUT,
                    timeout=None,
                    stderr_file=kernels.stderr,
                    extra_arguments=["--log-level=ERROR", f"--IPKernelApp.exec_lines={first}"],
                    resources={"metadata": {"path": str(folder)}},
                )
                kernels.clients.add(client)
                try:
                    client.execute(env=kernels.environment, stderr=log)
                    return
                except RuntimeError:
                    said = Path(log.name).read_text(encoding="utf-8", errors="replace")
                    if kernels.stopped or start == STARTS or TAKEN not in said:
                        raise
                    # What a later start says is its own.
                    log.seek(0)
                    log.truncate()
                finally:
                    kernels.clients.discard(client)


papermill_engines.register(ENGINE, StoppableEngine)


def execute(job: Job, project: Path, output: Path, kernels: Kernels) -> NotebookNode:
    """Run a notebook in a kernel of its own and give the executed copy, scrubbed.

    Raises:
        Failed: With the cell and the last lines of the error; the copy so far is left in a
            temporary folder. Nothing is left when the kernels were stopped.
    """
    partial = Path(tempfile.mkdtemp(prefix="pruning_utils_")) / job.path.name
    try:
        with open(partial.with_name(LOG), "w", encoding="utf-8") as log:
            notebook = papermill.execute_notebook(
                notebook_files.read_notebook(job.path),
                partial,
                job.changes,
                engine_name=ENGINE,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                kernels=kernels,
                folder=job.path.parent,
                log=log,
                first=FEW_TO_COLLECT if job.values["profile"] == "smoke" else "",
            )
    except (PapermillExecutionError, RuntimeError, TimeoutError) as error:
        if kernels.stopped:
            shutil.rmtree(partial.parent)
            raise Failed(f"{job.name} was stopped") from error
        raise Failed(
            f"{job.name} failed in {failed_cell(job, error, partial)}\n  so far: {partial}"
        ) from error
    try:
        notebook_files.scrub(notebook)
    except ValueError as error:
        raise Failed(f"{job.name}: {error}\n  so far: {partial}") from error
    asked = paths_in(job.changes)
    traces = notebook_files.machine_traces(notebook, [project, output], asked=asked)
    if traces:
        shown = "\n    ".join(traces)
        raise Failed(
            f"{job.name}: outputs name folders or addresses of this machine\n    {shown}\n"
            f"  so far: {partial}"
        )
    shutil.rmtree(partial.parent)
    return notebook


def paths_in(value: object) -> list[str]:
    """Texts in a value, and inside what it holds, that are absolute paths."""
    if isinstance(value, str):
        return [value] if os.path.isabs(value) else []
    if isinstance(value, dict):
        value = [*value.values()]
    if not isinstance(value, (list, tuple)):
        return []
    return [path for one in value for path in paths_in(one)]


def failed_cell(job: Job, error: Exception, partial: Path) -> str:
    """The number, in the notebook's file, of the cell that failed, and the end of what it said."""
    if isinstance(error, PapermillExecutionError):
        index = error.cell_index
        said = error.traceback or [f"{error.ename}: {error.evalue}"]
    else:
        index = last_started_cell(partial)
        said = [str(error)]
    cells = notebook_files.read_notebook(job.path).cells
    tagged = [notebook_files.has_tag(cell, "parameters") for cell in cells]
    # Papermill puts a cell of the given values behind the parameters.
    injected = bool(job.changes) and index > tagged.index(True)
    return f"cell {index + 1 - injected} of {len(cells)}\n{notebook_files.last_lines(said)}"


def last_started_cell(partial: Path) -> int:
    """The place in an executed copy of the last cell that has begun; 0 where none has."""
    if not partial.exists():
        return 0
    started = [0]
    for place, cell in enumerate(nbformat.read(partial, as_version=4).cells):
        if cell.metadata.get("papermill", {}).get("start_time"):
            started.append(place)
    return started[-1]
