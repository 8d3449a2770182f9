"""What the driver does with notebooks: run them, compare what they give, redraw their figures."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import comparisons
import nbformat
import notebook_files
from filelock import FileLock, Timeout
from jobs import COMMITTED, Failed, Job, Refused, notebook_paths
from running import THREADS, Finished, Run, values_digest, write_text

from pruning_utils import results, runtime
from pruning_utils.engine import records

# The profile whose numbers are never results.
TEMPORARY = "smoke"


# --- a folder of its own, gone on with --------------------------------------------------------


def folder_of_reproduction(project: Path, jobs: list[Job]) -> Path:
    """Where a reproduction computes."""
    return project / "reproduced" / jobs[0].profile


def folder_of_regression(project: Path, jobs: list[Job]) -> Path:
    """Where a comparison of summary numbers computes: a choice of notebooks in another folder.

    The end of a short one removes its folder; a long one may wait to be gone on with.
    """
    name = jobs[0].profile
    if {job.name for job in jobs} != set(notebook_paths(project)):
        name = "-".join([name, *(job.name.partition("_")[0] for job in jobs)])
    return project / "regressed" / name


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, by a lock file beside it that goes at the end.

    Raises:
        Refused: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Refused(
            f"another process computes in {folder}; wait for it to end, or stop it"
        ) from error
    try:
        yield
    finally:
        # On Windows an open file stays, and filelock removes it when it lets go.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
        # The folder above stays where anything else is in it.
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def compute_apart(
    jobs: list[Job], project: Path, output: Path, *, recompute: bool, at_once: int, estimated: bool
) -> dict[str, list[dict]]:
    """Compute into a folder that is held and give the summary rows; committed results are not read.

    What an earlier start has finished there is kept, unless other code, notebooks, values or
    versions of packages made it.

    Raises:
        Failed: If a notebook fails or shows no summary numbers.
    """
    finished = Finished(output)
    if finished.versions != runtime.versions():
        begin_anew(output, finished)
    if recompute and {job.name for job in jobs} >= finished.values.keys():
        # Models that were trained there would be taken for those of a new run. Where others have
        # been begun, they are left for these.
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    for job in jobs:
        results_of = output / "results" / str(job.values["profile"]) / job.name
        is_other = finished.has_other_values(job)
        if is_other and results_of.is_dir():
            print(f"{job.name} was begun there with other values: its tables are computed anew")
        if recompute or is_other:
            shutil.rmtree(results_of, ignore_errors=True)
            finished.digests.pop(job.name, None)
        finished.values[job.name] = values_digest(job)
    finished.write()
    drop_stale_tables(output)
    keep = {job.name: output / "notebooks" / job.path.name for job in jobs}
    run = Run(jobs, project, output, keep, finished=finished, at_once=at_once)
    if estimated:
        announce([job for job in jobs if not run.finished_before(job)], jobs, project)
    summaries = run.all()
    lacking = [name for name, rows in summaries.items() if not rows]
    if lacking:
        raise Failed(
            f"no summary numbers in {', '.join(lacking)}: a cell tagged summary must show "
            "pages.summary"
        )
    return summaries


def begin_anew(output: Path, finished: Finished) -> None:
    """Remove what other versions of packages have computed, saying which they were."""
    now = runtime.versions()
    if list(output.iterdir()):
        versions = other_versions(finished.versions or {}, now)
        print(f"{output} was computed with {versions}: beginning anew")
    for path in output.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    finished.versions = now
    finished.digests = {}
    finished.values = {}


def other_versions(then: dict[str, str], now: dict[str, str]) -> str:
    """The versions of packages that are others now, as a text."""
    others = []
    for name, version in then.items():
        if version != now.get(name):
            others.append(f"{name} {version} (now {now.get(name, 'absent')})")
    return ", ".join(others) or "unknown versions of packages"


def drop_stale_tables(output: Path) -> None:
    """Remove tables that other code than today's made: they would be read, with a warning.

    Verdicts have no record; a notebook writes them anew whenever it runs.
    """
    for table in output.glob("results/*/*/*.csv"):
        has_record = not table.stem.endswith(".measured") and table.name != "verdicts.csv"
        if has_record and is_stale(table):
            table.unlink()


def is_stale(table: Path) -> bool:
    """Whether other code than today's made a table, or it has no sound record."""
    try:
        return bool(results.stale(table))
    except ValueError:
        return True


# --- how long it will take --------------------------------------------------------------------


def announce(to_run: list[Job], jobs: list[Job], project: Path) -> None:
    """Say how many notebooks will run, and how long that took for the committed results.

    Raises:
        Refused: If a committed run record is damaged.
    """
    if jobs[0].profile != COMMITTED:
        return
    seconds = {job.name: recorded_seconds(project, job) for job in to_run}
    said = f"{len(jobs)} notebook{'s' * (len(jobs) > 1)}"
    if len(to_run) < len(jobs):
        said += f", {len(jobs) - len(to_run)} of them finished"
    known = sum(seconds.values())
    if not known:
        print(said, flush=True)
        return
    total = in_words(known)
    if len(to_run) == len(jobs) > 1:
        said += f"; where they were last computed at {COMMITTED} they took {total} in all"
    else:
        one = "it" if len(jobs) == 1 else "the rest"
        said += f"; where {one} was last computed at {COMMITTED} it took {total}"
    print(said, flush=True)
    if len(to_run) > 1:
        numbers = {name: name.partition("_")[0] for name in seconds}
        each = [f"{numbers[name]} {in_words(took)}" for name, took in seconds.items() if took]
        print(f"  {', '.join(each)}", flush=True)


def recorded_seconds(project: Path, job: Job) -> float:
    """What computing the committed tables of a notebook took."""
    found = sound_records(project / "results" / job.profile / job.name)
    return sum(record.get("seconds", 0) for record in found.values())


def sound_records(folder: Path) -> dict:
    """All records of a folder of tables.

    Raises:
        Refused: If they are damaged.
    """
    try:
        return records.read_records(folder)
    except ValueError as error:
        raise Refused(str(error)) from error


def in_words(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``13.9 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


# --- modes ------------------------------------------------------------------------------------


def regress(
    jobs: list[Job], project: Path, *, record: bool, keep: bool, recompute: bool, at_once: int
) -> bool:
    """Compute into regressed/<profile>, and compare summary numbers with the recorded ones.

    It goes on where it was stopped. When all is compared the folder goes away, unless it is to be
    kept, so that the next time all is computed anew.

    Args:
        jobs: What to run.
        project: The checkout.
        record: Replace the recorded numbers by these.
        keep: Keep the folder.
        recompute: Begin anew.
        at_once: How many run at once.

    Returns:
        Whether the numbers agree or are recorded.
    """
    path = project / "tests" / "summaries" / f"{jobs[0].profile}.csv"
    if not path.exists() and not record:
        raise Refused(
            f"no summary numbers are recorded in {path}; --regress --record records those of a run"
        )
    output = folder_of_regression(project, jobs)
    with held(output):
        found = compute_apart(
            jobs, project, output, recompute=recompute, at_once=at_once, estimated=True
        )
        new = comparisons.summary_table(found)
        old = comparisons.read_summaries(path)
        others = set(notebook_paths(project)) - {job.name for job in jobs}
        # The numbers of notebooks that are gone are compared too.
        mine = ~old["notebook"].isin(others)
        agree = print_comparisons(comparisons.compare_summaries(old[mine], new), all_of_them=False)
        if record:
            write_text(path, comparisons.summaries_text([old[~mine], new]))
            print(f"recorded in {path}")
        if keep:
            print(f"kept: {output}")
        else:
            shutil.rmtree(output)
    return agree or record


def reproduce(
    jobs: list[Job], project: Path, *, accept: bool, tolerance: float, recompute: bool, at_once: int
) -> bool:
    """Compute into reproduced/<profile>, and compare all numbers with the committed ones.

    It goes on where it was stopped, and when all is compared the folder stays.

    Args:
        jobs: What to run.
        project: The checkout.
        accept: Replace the committed results by these.
        tolerance: Allowed difference of a column as a share of its largest value.
        recompute: Begin anew.
        at_once: How many run at once.

    Returns:
        Whether the numbers agree or are accepted.
    """
    profile = jobs[0].profile
    output = folder_of_reproduction(project, jobs)
    with held(output):
        new = compute_apart(
            jobs, project, output, recompute=recompute, at_once=at_once, estimated=True
        )
        committed = {job.name: shown_summary(job.kept_at(project)) for job in jobs}
        compared = comparisons.compare_summaries(
            comparisons.summary_table(committed), comparisons.summary_table(new)
        )
        compared += comparisons.compare_tables(
            project / "results" / profile, output / "results" / profile, list(new), tolerance
        )
        agree = print_comparisons(compared, all_of_them=True)
        if accept:
            replace_committed(jobs, project, output)
    return agree or accept


def shown_summary(path: Path) -> list[dict]:
    """Summary rows of an executed notebook; none where it is missing or shows none."""
    if not path.exists():
        return []
    return notebook_files.summary_rows(nbformat.read(path, as_version=4))


def print_comparisons(compared: list[comparisons.Comparison], *, all_of_them: bool) -> bool:
    """Print what was compared, and return whether nothing is at fault."""
    faults = [row for row in compared if row.fault]
    shown = compared if all_of_them else faults
    if shown:
        print(comparisons.report(shown))
    print(f"{len(compared) - len(faults)} of {len(compared)} agree")
    return not faults


def replace_committed(jobs: list[Job], project: Path, output: Path) -> None:
    """Copy a reproduction's tables, records, figures and notebooks over the committed ones.

    What other notebooks have left there, finished or not, stays where it is.

    Raises:
        Refused: If a record of either is damaged, before anything is replaced.
    """
    tables: list[Path] = []
    found: list[Path] = []
    for job in jobs:
        folder = output / "results" / job.profile / job.name
        tables += folder.glob("run.json")
        found += [*folder.glob("*.csv"), *(output / "figures").rglob(f"{job.name}*.*")]
    for source in tables:
        for place in (source, project / source.relative_to(output)):
            sound_records(place.parent)
    for source in sorted(found):
        with runtime.atomic_path(project / source.relative_to(output)) as target:
            shutil.copyfile(source, target)
    for source in sorted(tables):
        folder = project / source.relative_to(output).parent
        with records.locked(folder):
            merged = {**records.read_records(folder), **records.read_records(source.parent)}
            records.write_records(folder, merged)
    for job in jobs:
        with runtime.atomic_path(job.kept_at(project)) as target:
            shutil.copyfile(output / "notebooks" / job.path.name, target)
    print("the committed results are replaced")


def figures(jobs: list[Job], project: Path, *, at_once: int) -> bool:
    """Redraw the figures, computing nothing, and see that nothing else has changed.

    Raises:
        Refused: If there are no results of a notebook at its profile.
    """
    for job in jobs:
        if not (project / "results" / job.profile / job.name).is_dir():
            there = sorted(path.parent.name for path in project.glob(f"results/*/{job.name}"))
            raise Refused(
                f"figures of {job.name} are redrawn from its results, and there are none of profile"
                f" {job.profile}; there are those of {', '.join(there) or 'no profile'}"
            )
    before = file_digests(project)
    # How sums of resampled means are rounded depends on the number of threads: a fixed one makes
    # figures repeatable, however many notebooks run at once.
    variables = {results.NO_COMPUTE: "1", THREADS: "2"}
    Run(jobs, project, project, {}, at_once=at_once, variables=variables, ordered=False).all()
    after = file_digests(project)
    changed = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    if changed:
        print(f"redrawing has changed: {', '.join(changed)}")
    else:
        print("nothing but figures was written")
    return not changed


def file_digests(project: Path) -> dict[str, str]:
    """Digests of all files under notebooks/ and results/."""
    found = {}
    for path in [*project.glob("notebooks/**/*"), *project.glob("results/**/*")]:
        if path.is_file() and ".ipynb_checkpoints" not in path.parts:
            name = path.relative_to(project).as_posix()
            found[name] = records.digest(path.read_bytes())
    return found


def run(
    jobs: list[Job], project: Path, output: Path | None, *, recompute: bool, at_once: int
) -> bool:
    """Run the notebooks and keep their executed copies."""
    if output is None:
        keep = {job.name: job.kept_at(project) for job in jobs}
    else:
        keep = {job.name: output / "notebooks" / job.path.name for job in jobs}
    if recompute:
        announce(jobs, jobs, project)
    Run(jobs, project, output or project, keep, at_once=at_once).all()
    if output:
        print(f"executed copies: {output / 'notebooks'}")
    return True


def temporary_output() -> Path:
    """A new folder for results that are none."""
    return Path(tempfile.mkdtemp(prefix="pruning_utils_smoke_"))
