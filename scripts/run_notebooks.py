"""Run the notebooks at a profile through papermill; compare, reproduce or redraw what they made.

Executed copies hold nothing of this machine. At profile cpu they replace the committed notebooks;
at another one, or with parameters set by -p, they are kept in results/<profile>/notebooks; with
--output in the notebooks/ of that folder. Exit code 0: all went well; 1: a notebook failed, or
numbers differ; 2: something is asked for that is not there; 130: a signal has stopped it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import CHOSEN_KEYS

if TYPE_CHECKING:
    from jobs import Job

# As a shell has it for what Ctrl-C ended.
STOPPED = 130
# Parameters that name tasks.
TASK_KEYS = ("tasks", "papers", "pooled")
# Tables of notebooks that look at one model and have no verdicts.
TABLES_OF_ONE = ("plan", "history", "measured", "times")
OWN_MODEL = "13_your_own_model"
# Shown below the options; the rules in full stand in parameters.py.
VALUES = f"""\
values of parameters:
  -p healing.steps=64 replaces one value inside the mapping healing, and the
  notebook gets the whole mapping. A profile may hold such a name too, as
  "healing.steps: 64". A dotted name only replaces what is there, by a value of
  the same type; of one source it comes after whole values.

  -p swapped="{{sets: {{taylor: null}}, n_windows: 8}}" replaces the whole mapping.
  It must hold the keys that the notebook has there, as the notebook reads them
  by name, and no others. Any keys may be given where they are names that you
  choose:
{textwrap.indent(textwrap.fill(", ".join(CHOSEN_KEYS), 76), "  ")}.
"""

# --- command line -----------------------------------------------------------------------------


def whole_number(text: str) -> int:
    """A number of at least 1 on the command line."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0 on the command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(
        description=summary, epilog=VALUES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profile", default="cpu", help="file of values in profiles/ (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="notebooks by beginning, such as 01"
    )
    parser.add_argument(
        "-p",
        dest="values",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set parameters of the one chosen notebook, or with a dotted name a value inside one "
        "(see below); may be repeated, and -p NAME VALUE sets one too",
    )
    parser.add_argument("--recompute", action="store_true", help="compute anew what is stored")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write results, figures and executed copies there",
    )
    parser.add_argument(
        "-j",
        "--jobs",
        type=whole_number,
        default=1,
        metavar="N",
        help="run N notebooks at once, each with its share of the cores unless OMP_NUM_THREADS is "
        "set (default: %(default)s); one that builds on another waits for it, progress bars are "
        "not shown, and times that notebooks measure are those of a busy machine",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--regress",
        action="store_true",
        help="compare summary numbers with tests/summaries/<profile>.csv (minutes at smoke, hours "
        "at cpu): computes into regressed/<profile>, resumable; when all is compared that folder "
        "is removed, and the next time all is computed anew",
    )
    mode.add_argument(
        "--reproduce",
        action="store_true",
        help="compute into reproduced/<profile>, resumable, and compare with the committed results "
        "(hours at cpu)",
    )
    mode.add_argument(
        "--figures",
        action="store_true",
        help="redraw the figures from committed results (a few minutes)",
    )
    mode.add_argument(
        "--plan",
        action="store_true",
        help="print GPU hours and peak memory of each notebook, by arithmetic on the models' "
        "configurations (minutes), and refuse what does not fit; nothing is loaded or run",
    )
    mode.add_argument(
        "--rehearse",
        action="store_true",
        help="run a profile on small random models with the configurations of its own, and on "
        "local texts in place of the hub's, with steps and counts divided (minutes); numbers are "
        "compared with tests/summaries/rehearsal.csv, those of smoke with rehearsal-smoke.csv; a "
        "stopped rehearsal goes on",
    )
    parser.add_argument(
        "--price", type=positive, metavar="DOLLARS", help="with --plan: of an hour, for the bill"
    )
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="GB",
        help="with --plan: 1e9 bytes that a process may take (default: what the machine has)",
    )
    parser.add_argument(
        "--machine",
        choices=("a100", "here"),
        help="with --plan: rates and memory stated for an A100 80 GB (default), or found here",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="with --regress or --rehearse: record the numbers of this run",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="with --regress or --rehearse: keep what was computed",
    )
    parser.add_argument(
        "--accept", action="store_true", help="with --reproduce: replace the committed results"
    )
    parser.add_argument(
        "--tolerance",
        type=share,
        metavar="SHARE",
        help="with --reproduce: allowed difference of a column as a share of its largest value "
        "(default 0.001: another CPU adds bfloat16 numbers in another order)",
    )
    parser.add_argument(
        "--project", type=Path, metavar="DIR", help="the checkout (default: that of the package)"
    )
    options = parser.parse_args(words)
    try:
        options.values = assigned(options.values)
    except ValueError as error:
        parser.error(str(error))
    fault = fault_of_options(options)
    if fault:
        parser.error(fault)
    return options


def fault_of_options(options: argparse.Namespace) -> str:
    """What is wrong with options that do not go together; "" where nothing is."""
    needed = {
        "record": ("regress", "rehearse"),
        "keep": ("regress", "rehearse"),
        "accept": ("reproduce",),
        "tolerance": ("reproduce",),
        "price": ("plan",),
        "memory": ("plan",),
        "machine": ("plan",),
    }
    for name, modes in needed.items():
        given = getattr(options, name)  # a tolerance of 0 is one
        is_left_out = given is None or given is False
        if not is_left_out and not any(getattr(options, needs) for needs in modes):
            return f"--{name} goes with {' or '.join(f'--{needs}' for needs in modes)}"
    computes_nothing = options.figures or options.plan
    faults = {
        "-p goes with neither --accept nor --record: what is committed and recorded is of the "
        "profile's own values": options.values and (options.accept or options.record),
        "-p does not go with --figures: what is redrawn is of the profile's own values": (
            options.values and options.figures
        ),
        "--rehearse goes with --profile a100 or smoke, whose numbers are recorded, got "
        f"{options.profile}": options.rehearse and options.profile not in ("a100", "smoke"),
        f"--jobs goes with what runs notebooks, and --plan runs none, got {options.jobs}": (
            options.plan and options.jobs > 1
        ),
        "--recompute goes with neither --figures nor --plan, which compute nothing": (
            options.recompute and computes_nothing
        ),
        "--output goes with none of --regress, --rehearse, --reproduce, --figures and --plan: each "
        "has a place, or makes no file": (
            options.output and (computes_apart(options) or computes_nothing)
        ),
    }
    return next((fault for fault, is_there in faults.items() if is_there), "")


def share(text: str) -> float:
    """A finite number from 0 on."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a share from 0 on, such as 0.001, got {text!r}")
    return found


def assigned(groups: list[list[str]]) -> dict[str, str]:
    """Values by name, as texts, from the words behind each -p; the last of a name counts.

    Raises:
        ValueError: If words are neither NAME=VALUE, one or more, nor NAME and VALUE.
    """
    values = {}
    for words in groups:
        if len(words) == 2 and "=" not in words[0]:
            values[words[0]] = words[1]
            continue
        for word in words:
            name, sign, value = word.partition("=")
            if not name or not sign:
                raise ValueError(f"-p takes NAME=VALUE, or NAME VALUE, got {' '.join(words)}")
            values[name] = value
    return values


# --- signals ----------------------------------------------------------------------------------


def on_signals(handler: Callable | signal.Handlers) -> None:
    """Let Ctrl-C and SIGTERM do this, unless the driver was started with them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def leave(*unused: object) -> None:
    """End at once, as nothing has begun; what is being imported can lose an exception."""
    os.write(2, b"stopped before the first notebook\n")
    os._exit(STOPPED)


def after_stop(options: argparse.Namespace, kept: Path) -> str:
    """What remains after a stop, and how to go on."""
    command = "the same command without --recompute" if options.recompute else "the same command"
    if options.plan:
        return "a plan keeps nothing, the same command begins anew"
    if options.figures:
        return "figures drawn so far stay, the same command redraws all"
    if computes_apart(options):
        return f"{command} goes on where it was"
    there = f"finished tables and points are kept under {kept / 'results'}"
    if options.profile == "smoke" and not options.output:
        return f"{there}, the same command begins anew"
    old = "; tables that were not begun keep their old numbers" if options.recompute else ""
    return f"{there}, {command} goes on where it was{old}"


# --- what is asked for ------------------------------------------------------------------------


def main(words: list[str] | None = None, *, signals: bool = False) -> int:
    """Run the command line and give the exit code.

    Args:
        words: The command line; None: that of this process.
        signals: Whether to handle signals, as the program does.
    """
    if signals:
        on_signals(leave)
    options = parsed(words)
    # Where it finds this package, jsonschema builds a grammar of internationalised addresses for
    # more than a second, whatever it is imported for. The schema of notebooks has none to check.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    # These take a second more to import; a wrong option is refused before.
    import jobs
    import modes
    import running

    project = (options.project or modes.runtime.project_root()).resolve()
    kept = project
    try:
        if not options.project:
            refuse_another_checkout(project)
        if signals:
            on_signals(signal.default_int_handler)
        # A folder of its own begins anew by dropping what is there; notebooks read what is left.
        recompute = options.recompute and not computes_apart(options)
        chosen = jobs.plan(project, options.profile, options.only, options.values, recompute)
        output = output_folder(options)
        kept = output or project
        refuse_at_once(options, chosen, project, output)
        agree = carried_out(options, chosen, project, output)
    except jobs.Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except jobs.Failed as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        # A full disk, or one that may only be read; tables and points that are whole stay.
        print(f"error: {error}; {after_stop(options, kept)}", file=sys.stderr)
        return 1
    except running.Stopped as stop:
        where = " in " + ", ".join(stop.names) if stop.names else ""
        stopped = f"stopped{where}; {after_stop(options, kept)}"
        # Behind what a progress bar has left on its line.
        print("", *stop.failures, stopped, sep="\n", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"stopped; {after_stop(options, kept)}", file=sys.stderr)
        return STOPPED
    finally:
        # All is said; one more signal must not end in a traceback.
        if signals:
            on_signals(signal.SIG_IGN)
    return 0 if agree else 1


def refuse_another_checkout(project: Path) -> None:
    """Refuse to work on another checkout than that of these scripts, unless it is named.

    A worktree may use the environment of another one, or have been copied with its own.

    Raises:
        Refused: If the installed package is that of another checkout.
    """
    from jobs import Refused

    own = Path(__file__).resolve().parents[1]
    if own != project:
        raise Refused(
            f"these are the scripts of {own}, but the installed package is that of {project}: "
            f"remove {own / '.venv'} and run make setup there, or name a checkout with --project"
        )


def refuse_at_once(
    options: argparse.Namespace, chosen: list[Job], project: Path, output: Path | None
) -> None:
    """Refuse what would end in an error, or replace what must stay, before anything runs.

    Raises:
        Refused: If something would, or nothing can be written where the results are to lie.
    """
    from jobs import Refused

    refuse_to_replace(options, project, output)
    refuse_another_model(options, chosen, output)
    refuse_depths(options, chosen, project)
    refuse_names(options, chosen)
    if output is not None:
        try:
            (output / "results").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(
                f"results must lie in a folder that can be written, got {output}: {error.strerror}"
            ) from error


def refuse_to_replace(options: argparse.Namespace, project: Path, output: Path | None) -> None:
    """Refuse a run of other values whose results would lie in the place of the committed ones.

    Raises:
        Refused: If it would, or the checkout itself is the folder for them.
    """
    from jobs import Refused

    if output == project:
        raise Refused(f"--output must be another folder than the checkout, got {output}")
    makes_none = options.figures or options.plan or computes_apart(options)
    if options.values and output is None and not makes_none:
        raise Refused(
            f"-p {' '.join(options.values)} makes other results than those of the profile: give "
            "--output DIR, so that they do not replace the ones here"
        )


def refuse_another_model(
    options: argparse.Namespace, chosen: list[Job], output: Path | None
) -> None:
    """Refuse to replace what a notebook has said of another model in the same folder.

    Tables of several models lie beside each other there; verdicts, figures and the copy do not.
    A notebook without verdicts is of one model, which its tables name.

    Raises:
        Refused: If verdicts there, or tables where there are none, are of another model.
    """
    if output is None or options.figures or options.plan or computes_apart(options):
        return
    from jobs import Refused

    from pruning_utils import embedded, results

    for job in chosen:
        name = str(job.values.get("model", embedded.EMBEDDED))
        asked = {results.slug(name)}
        if name == embedded.EMBEDDED:
            asked |= {*embedded.MODELS}
        folder = output / "results" / str(job.values["profile"]) / job.name
        if "save_verdicts" in job.path.read_text(encoding="utf-8"):
            others = others_in_verdicts(folder / "verdicts.csv", asked)
        else:
            others = others_in_tables(folder / "run.json", asked)
        if others:
            raise Refused(
                f"{output} holds what {job.name} says of {', '.join(others)}, which a run on "
                f"{name} would replace: give another --output"
            )


def others_in_verdicts(path: Path, asked: set[str]) -> list[str]:
    """Models that verdicts are of, if there are any, and a run is not."""
    from pruning_utils.engine import verdict_rows

    return sorted(set(verdict_rows.read(path)["model"]) - asked) if path.is_file() else []


def others_in_tables(path: Path, asked: Collection[str]) -> list[str]:
    """Models that the tables of a record, if there is one, are of, and a run is not.

    A table is named after its model alone, or has the name of one of ``TABLES_OF_ONE`` behind.
    """
    try:
        tables = sorted(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # what is damaged is told later
        return []
    ending = re.compile(rf"-({'|'.join(TABLES_OF_ONE)})(\.csv)?$")
    of_models = {ending.sub("", table.removesuffix(".csv")) for table in tables}
    return sorted(of_models - {*asked})


def refuse_depths(options: argparse.Namespace, chosen: list[Job], project: Path) -> None:
    """Refuse values that remove more layers than the model has, before anything runs.

    A plan looks at the models itself.

    Raises:
        Refused: If any do. A model whose configuration cannot be read is the notebook's to refuse.
    """
    if not options.values or options.plan:
        return
    import configurations  # takes seconds
    from jobs import Refused, depths_fault

    for job in (one for one in chosen if "model" in one.values):
        try:
            config, _ = configurations.configuration(
                str(job.values["model"]), project / "reference"
            )
        except (OSError, ValueError):
            continue
        n_layers = config.get_text_config(decoder=True).num_hidden_layers
        fault = depths_fault(job, n_layers)
        if fault:
            raise Refused(fault)


def refuse_names(options: argparse.Namespace, chosen: list[Job]) -> None:
    """Refuse names of tasks, methods, targets and precisions that mean nothing.

    Raises:
        Refused: If a value of the command line is one.
    """
    if not options.values or options.plan:
        return
    from jobs import Refused

    for job in chosen:
        known = known_names(job.name)
        for place, key, value in values_within(job.values):
            fault = fault_of_name(known, key, value)
            if not fault and key in keys_of_floors(job):
                fault = fault_of_floors(value or [])
            if fault:
                raise Refused(f"{place} must {fault}")


def values_within(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every value of nested parameters: its place with dots, its own key, and itself."""
    for key, value in values.items():
        yield above + key, key, value
        if isinstance(value, dict):
            yield from values_within(value, f"{above}{key}.")


def fault_of_name(known: Mapping[str, Sequence[str]], key: str, value: Any) -> str:
    """What a parameter of this key must do, if it names what is not known; else ""."""
    if key in TASK_KEYS:
        return fault_of_tasks(value or [])
    given = value if isinstance(value, list) else [value]
    if key not in known or (key == "targets" and isinstance(value, list)):
        return ""
    wrong = [name for name in given if name not in known[key]]
    further = ", or a list of modules' names" if key == "targets" else ""
    return f"be among {', '.join(known[key])}{further}, got {wrong[0]!r}" if wrong else ""


def fault_of_tasks(tasks: Collection[Any]) -> str:
    """What these must do, if one of them is no task; else ""."""
    from pruning_utils.engine import benchmarks

    for task in map(str, tasks):
        name = task.removeprefix(benchmarks.OFFICIAL)
        if not benchmarks.is_embedded(task):
            if name not in benchmarks.task_manager(False).all_tasks:
                known = ", ".join(benchmarks.TASKS)
                return f"name tasks among {known} or those of lm-eval, got {task!r}"
    return ""


def keys_of_floors(job: Job) -> Collection[str]:
    """Parameters of a notebook that name tasks whose answers are set against a floor."""
    if job.name == OWN_MODEL:
        return ()
    has_pooled = any(key == "pooled" for _, key, _ in values_within(job.values))
    return ("pooled", "papers") if has_pooled else TASK_KEYS


def fault_of_floors(tasks: Collection[Any]) -> str:
    """What these must do, if the answers to one of them cannot be set against a guess; else ""."""
    from pruning_utils import evaluation

    unknown = [task for task in map(str, tasks) if task not in evaluation.GUESSES]
    if not unknown:
        return ""
    return f"name tasks with a known guess, {', '.join(evaluation.GUESSES)}, got {unknown[0]!r}"


def known_names(notebook: str) -> dict[str, Sequence[str]]:
    """By key of a parameter, the names that it may have; for other keys there are no such names."""
    from pruning_utils import healing, runtime
    from pruning_utils.engine import precisions
    from pruning_utils.shrinking import orders
    from pruning_utils.studies import scan, study

    known: dict[str, Sequence[str]] = {
        "dtype": (runtime.AUTO, *precisions.DTYPES),
        "method": healing.METHODS,
        "targets": healing.TARGETS,
        "precisions": study.PRECISIONS,
    }
    if notebook == "01_layer_similarity":
        known["precisions"] = (*precisions.DTYPES, *scan.QUANTISED)
    if notebook == OWN_MODEL:
        known |= {"method": orders.METHODS, "rule": orders.RULES}
    return known


def computes_apart(options: argparse.Namespace) -> bool:
    """Whether it is computed into a folder that nothing else reads."""
    return options.regress or options.rehearse or options.reproduce


def output_folder(options: argparse.Namespace) -> Path | None:
    """Where notebooks that are simply run write their results; None: in the checkout."""
    import modes

    makes_none = options.figures or options.plan
    given = options.output
    if not given and not makes_none and not computes_apart(options):
        # What papermill's runs obey.
        given = os.environ.get("PRUNING_UTILS_OUTPUT")
    if given:
        return Path(given).resolve()
    if options.profile != modes.TEMPORARY or makes_none or computes_apart(options):
        return None
    return modes.temporary_output()


def carried_out(
    options: argparse.Namespace, chosen: list[Job], project: Path, output: Path | None
) -> bool:
    """Do what the options ask for, and give whether the numbers agree.

    Args:
        options: The command line.
        chosen: The notebooks to run.
        project: The checkout.
        output: Where notebooks that are simply run write; None: in the checkout.
    """
    import modes

    recompute: bool = options.recompute
    at_once: int = options.jobs
    if options.plan or options.rehearse:
        # It would say that it finds no kernels of a hub.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if options.plan:
        import bill

        bill.show(
            chosen,
            project,
            machine=options.machine or "a100",
            memory=options.memory,
            price=options.price,
        )
        return True
    if options.rehearse:
        import rehearsal

        return rehearsal.rehearse(
            chosen,
            project,
            others=not options.only,
            record=options.record,
            keep=options.keep,
            recompute=recompute,
            at_once=at_once,
        )
    if options.regress:
        return modes.regress(
            chosen,
            project,
            record=options.record,
            keep=options.keep,
            recompute=recompute,
            at_once=at_once,
        )
    if options.reproduce:
        return modes.reproduce(
            chosen,
            project,
            accept=options.accept,
            tolerance=1e-3 if options.tolerance is None else options.tolerance,
            recompute=recompute,
            at_once=at_once,
        )
    if options.figures:
        return modes.figures(chosen, project, at_once=at_once)
    return modes.run(chosen, project, output, recompute=recompute, at_once=at_once)


if __name__ == "__main__":
    sys.exit(main(signals=True))
