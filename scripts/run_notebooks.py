"""Run the notebooks at a profile through papermill; compare, reproduce or redraw what they made.

Executed copies hold nothing of this machine. At profile cpu they replace the committed notebooks; at another one, or
with parameters set by -p, they are kept in results/<profile>/notebooks; with --output in the notebooks/ of that folder.
Exit code 0: all went well; 1: a notebook failed, or numbers differ; 2: something is asked for that is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import comparisons
import nbformat
import notebook_files
from jobs import COMMITTED, Failed, Job, Refused, execute, plan

from pruning_utils import definitions, records, results, runtime

TEMPORARY = "smoke"  # the profile whose numbers are never results


# --- files and environment ----------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    with runtime.atomic_path(path) as target:
        target.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Let environment variables, which kernels inherit, have these values for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# --- all notebooks ------------------------------------------------------------------------------------------------


def run_all(jobs: list[Job], project: Path, output: Path, keep: dict[str, Path],
            finished: dict[str, str] | None = None) -> dict[str, list[dict]]:
    """Run notebooks in order, keep their executed copies, and give their summary rows.

    Args:
        jobs: What to run.
        project: The checkout.
        output: Root under which the notebooks write ``results/`` and ``figures/``.
        keep: Where to keep the executed copies, by notebook; others are dropped.
        finished: By notebook the digest of a run that need not be repeated; saved under ``output`` after each one.

    Raises:
        Failed: At the first notebook that fails.
    """
    summaries = {}
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.name} ...", end="", flush=True)
        started, target = time.monotonic(), keep.get(job.name)
        if finished is not None and target.exists() and finished.get(job.name) == run_digest(job):
            notebook, took = nbformat.read(target, as_version=4), "finished before"
        else:
            digest = run_digest(job)
            with environment({"PRUNING_UTILS_OUTPUT": str(output)}):
                notebook = execute(job, project, output)
            took = f"{time.monotonic() - started:.0f} s"
            if target:
                write_text(target, nbformat.writes(notebook).rstrip("\n") + "\n")
            if finished is not None:
                finished[job.name] = digest
                write_text(output / "finished.json", json.dumps(finished, indent=1, sort_keys=True) + "\n")
        print(f" {took}", flush=True)
        summaries[job.name] = notebook_files.summary_rows(notebook)
    return summaries


def run_digest(job: Job) -> str:
    """Digest of all that decides what a run shows: the notebook's source, its values and the package."""
    values = {key: value for key, value in job.values.items() if key not in notebook_files.UNRECORDED}
    return records.digest(records.canonical([
        notebook_files.source_digest(notebook_files.read_notebook(job.path)), records.plain(values),
        definitions.INSTALLED.digest()]))


def required(summaries: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The summaries, all of which must hold numbers; Failed otherwise."""
    if lacking := [name for name, rows in summaries.items() if not rows]:
        raise Failed(f"no summary numbers in {', '.join(lacking)}: a cell tagged summary must show results.summary")
    return summaries


def shown_summary(path: Path) -> list[dict]:
    """Summary rows of an executed notebook; none where it is missing or shows none."""
    return notebook_files.summary_rows(nbformat.read(path, as_version=4)) if path.exists() else []


def print_comparisons(compared: list[comparisons.Comparison], *, all_of_them: bool) -> bool:
    """Print what was compared, and return whether nothing is at fault."""
    faults = [row for row in compared if row.fault]
    if shown := compared if all_of_them else faults:
        print(comparisons.report(shown))
    print(f"{len(compared) - len(faults)} of {len(compared)} agree")
    return not faults


# --- modes --------------------------------------------------------------------------------------------------------


def regress(jobs: list[Job], project: Path, *, record: bool) -> bool:
    """Run into a temporary folder and compare the summary numbers with the recorded ones, or record them."""
    path = project / "tests" / "summaries" / f"{jobs[0].profile}.csv"
    if not path.exists() and not record:
        raise Refused(f"no summary numbers are recorded in {path}; --regress --record records those of a run")
    with tempfile.TemporaryDirectory(prefix="pruning_utils_") as folder:
        new = comparisons.summary_table(required(run_all(jobs, project, Path(folder), {})))
    old = comparisons.read_summaries(path)
    others = {path.stem for path in (project / "notebooks").glob("*.ipynb")} - {job.name for job in jobs}
    mine = ~old["notebook"].isin(others)  # with the numbers of notebooks that are gone
    agree = print_comparisons(comparisons.compare_summaries(old[mine], new), all_of_them=False)
    if record:
        write_text(path, comparisons.summaries_text([old[~mine], new]))
        print(f"recorded in {path}")
    return agree or record


def reproduce(jobs: list[Job], project: Path, *, accept: bool, tolerance: float, recompute: bool) -> bool:
    """Compute everything into reproduced/<profile>, going on where that was stopped, and compare with the committed."""
    profile = jobs[0].profile
    output = project / "reproduced" / profile
    record = output / "finished.json"
    finished = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for job in jobs if recompute else []:
        shutil.rmtree(output / "results" / profile / job.name, ignore_errors=True)
        finished.pop(job.name, None)
    drop_stale_tables(output)
    keep = {job.name: output / "notebooks" / job.path.name for job in jobs}
    new = required(run_all(jobs, project, output, keep, finished))
    committed = {job.name: shown_summary(job.kept_at(project)) for job in jobs}
    compared = comparisons.compare_summaries(*map(comparisons.summary_table, (committed, new)))
    folders = [root / "results" / profile for root in (project, output)]
    compared += comparisons.compare_tables(*folders, list(new), tolerance)
    agree = print_comparisons(compared, all_of_them=True)
    if accept:
        replace_committed(jobs, project, output)
    return agree or accept


def drop_stale_tables(output: Path) -> None:
    """Remove tables that other package code than today's made: they would be read, with a warning."""
    for table in output.glob("results/*/*/*.csv"):
        try:
            stale = not table.stem.endswith(".measured") and results.stale(table)
        except ValueError:  # no sound record
            stale = True
        if stale:
            table.unlink()


def replace_committed(jobs: list[Job], project: Path, output: Path) -> None:
    """Copy tables, their records, figures and executed notebooks of a reproduction over the committed ones."""
    for source in sorted([*output.glob("results/*/*/*.csv"), *output.glob("figures/*")]):
        with runtime.atomic_path(project / source.relative_to(output)) as target:
            shutil.copyfile(source, target)
    for source in sorted(output.glob("results/*/*/run.json")):
        folder = project / source.relative_to(output).parent
        with records.locked(folder):
            merged = {**records.read_records(folder), **records.read_records(source.parent)}
            write_text(folder / "run.json", json.dumps(dict(sorted(merged.items())), indent=1) + "\n")
    for job in jobs:
        with runtime.atomic_path(job.kept_at(project)) as target:
            shutil.copyfile(output / "notebooks" / job.path.name, target)
    print("the committed results are replaced")


def figures(jobs: list[Job], project: Path) -> bool:
    """Redraw the figures from committed results, computing nothing, and see that nothing else has changed."""
    before = file_digests(project)
    # How sums of resampled means are rounded depends on the number of threads: a fixed one makes figures repeatable.
    with environment({results.NO_COMPUTE: "1", "OMP_NUM_THREADS": "2"}):
        run_all(jobs, project, project, {})
    after = file_digests(project)
    changed = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    print(f"redrawing has changed: {', '.join(changed)}" if changed else "nothing but figures was written")
    return not changed


def file_digests(project: Path) -> dict[str, str]:
    """Digests of all files under notebooks/ and results/."""
    files = (path for folder in ("notebooks", "results") for path in (project / folder).rglob("*") if path.is_file())
    return {path.relative_to(project).as_posix(): records.digest(path.read_bytes()) for path in files
            if ".ipynb_checkpoints" not in path.parts}


def run(jobs: list[Job], project: Path, output: Path | None) -> bool:
    """Run the notebooks and keep their executed copies."""
    if output is None and jobs[0].profile == TEMPORARY:
        output = Path(tempfile.mkdtemp(prefix="pruning_utils_smoke_"))
    keep = {job.name: job.kept_at(project) if output is None else output / "notebooks" / job.path.name for job in jobs}
    run_all(jobs, project, output or project, keep)
    if output:
        print(f"executed copies: {output / 'notebooks'}")
    return True


# --- command line -------------------------------------------------------------------------------------------------


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default=COMMITTED, help="file of values in profiles/ (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="notebooks by beginning, such as 01")
    parser.add_argument("-p", dest="values", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="set a parameter of the one chosen notebook (repeatable)")
    parser.add_argument("--recompute", action="store_true", help="compute anew what is stored")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write results, figures and executed copies there")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--regress", action="store_true",
                      help="compare summary numbers with tests/summaries/<profile>.csv")
    mode.add_argument("--reproduce", action="store_true",
                      help="compute into reproduced/<profile>, resumable, and compare with the committed results")
    mode.add_argument("--figures", action="store_true", help="redraw the figures from committed results")
    parser.add_argument("--record", action="store_true", help="with --regress: record the numbers of this run")
    parser.add_argument("--accept", action="store_true", help="with --reproduce: replace the committed results")
    parser.add_argument("--tolerance", type=float, metavar="SHARE",
                        help="with --reproduce: allowed difference of a column as a share of its largest value "
                             "(default 0.001: another CPU adds bfloat16 numbers in another order)")
    parser.add_argument("--project", type=Path, default=runtime.project_root(), metavar="DIR", help="the checkout")
    options = parser.parse_args(words)
    for name, needs in (("record", "regress"), ("accept", "reproduce"), ("tolerance", "reproduce")):
        if getattr(options, name) not in (None, False) and not getattr(options, needs):
            parser.error(f"--{name} goes with --{needs}")
    if options.output and (options.regress or options.reproduce or options.figures):
        parser.error("--output goes with none of --regress, --reproduce and --figures: each has its own place")
    return options


def main(words: list[str] | None = None) -> int:
    """Run the command line and give the exit code."""
    options = parsed(words)
    project = options.project.resolve()
    try:
        # A reproduction has tables of its own, and begins anew by dropping them.
        recompute = options.recompute and not options.reproduce
        jobs = plan(project, options.profile, options.only, dict(options.values), recompute)
        if options.regress:
            agree = regress(jobs, project, record=options.record)
        elif options.reproduce:
            tolerance = 1e-3 if options.tolerance is None else options.tolerance
            agree = reproduce(jobs, project, accept=options.accept, tolerance=tolerance, recompute=options.recompute)
        elif options.figures:
            agree = figures(jobs, project)
        else:
            agree = run(jobs, project, options.output and options.output.resolve())
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
