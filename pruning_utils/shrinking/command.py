"""The command ``pruning-utils``: a smaller model of one's own, with a judgement."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields

from safetensors import SafetensorError

from pruning_utils.shrinking import orders

# What ends the command with one line.
REFUSALS = (
    ValueError,
    RuntimeError,
    OSError,
    MemoryError,
    ModuleNotFoundError,
    SafetensorError,
)


def parser() -> argparse.ArgumentParser:
    """What the command line may say."""
    top = argparse.ArgumentParser(
        prog="pruning-utils", description="Remove layers of a language model."
    )
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "shrink",
        help="plan, cut, heal, save, load again, measure and judge a smaller model",
        description="Make a smaller model and say whether it is fit. A run that is stopped goes on "
        "when the same command is given again.",
    )
    command.add_argument("model", help="smollm2-135m, gemma-3-270m, a directory, or a hub id")
    command.add_argument("--out", metavar="DIR", help="a new folder for the model")
    goal = command.add_argument_group("goal, one or more")
    goal.add_argument(
        "--keep", metavar="SHARE", type=share, help="share of the layers that stays, such as 75%%"
    )
    goal.add_argument("--max-parameters", metavar="N", type=count, help="such as 100M")
    goal.add_argument(
        "--max-bytes",
        metavar="N",
        type=count,
        help="of the weights in the precision of --dtype, such as 400M or 1.5G",
    )
    goal.add_argument(
        "--max-ms-per-token", metavar="MS", type=float, help="on this machine, one text at a time"
    )
    how = command.add_argument_group("how")
    how.add_argument(
        "--rule",
        metavar="RULE",
        default=orders.LOWEST_LOSS,
        help=f"one of {', '.join(map(repr, orders.RULES))} (default: the first)",
    )
    how.add_argument(
        "--recipe",
        metavar="NAME",
        default="lora",
        help=f"one of {', '.join(orders.METHODS)} (default: %(default)s)",
    )
    asked = {field.name: field.default for field in fields(orders.Order)}
    length = how.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        metavar="M",
        type=float,
        help=f"of healing, at most {orders.MOST_STEPS:,} steps (default: {asked['minutes']:g})",
    )
    length.add_argument(
        "--steps", metavar="N", type=int, help="of healing, instead of as many as the minutes allow"
    )
    how.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=float,
        help=f"(default: {asked['learning_rate']:g})",
    )
    how.add_argument(
        "--healing-text", metavar="TEXT", help="a text's name, or a .jsonl file of questions"
    )
    how.add_argument("--plan", action="store_true", help="print the plan and make nothing")
    limits = orders.Limits()
    fit = command.add_argument_group("fit means")
    for option, unit, read, default, said in (
        ("--loss-limit", "NATS", float, limits.loss, "nats per token that the loss may rise by"),
        ("--accuracy-limit", "SHARE", share, limits.accuracy, "that mean accuracy may fall by"),
        ("--repetition-limit", "SHARE", share, limits.repetition, "that repetition may rise by"),
    ):
        said = f"{said} (default: {default})"
        fit.add_argument(option, metavar=unit, type=read, default=default, help=said)
    measured = orders.Measured()
    fit.add_argument(
        "--documents",
        metavar="N",
        type=int,
        default=measured.documents,
        help="read by both (default: %(default)s)",
    )
    fit.add_argument(
        "--questions",
        metavar="N",
        type=int,
        default=measured.questions,
        help="of each task (default: %(default)s)",
    )
    fit.add_argument(
        "--tasks",
        metavar="TASK",
        nargs="+",
        default=list(measured.tasks),
        help=f"asked of both (default: {' '.join(measured.tasks)})",
    )
    where = command.add_argument_group("where")
    where.add_argument("--revision", metavar="NAME", help="of a hub id")
    where.add_argument(
        "--dtype",
        metavar="NAME",
        default="auto",
        help="auto, bfloat16, float16 or float32 (default: %(default)s)",
    )
    where.add_argument(
        "--device", metavar="NAME", help="a torch device (default: the first GPU, or the CPU)"
    )
    where.add_argument("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    return top


def share(text: str) -> float:
    """``75%`` or ``0.75`` as a number."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a share, 75% or 0.75, got {text!r}") from None


def count(text: str) -> int:
    """``1.5G``, ``100M``, ``20k``, ``2GiB`` or ``12345`` as a whole number; G and B are 10**9."""
    scales = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
    scales |= {f"{letter}B": scales[letter] for letter in "kMG"} | {"KB": 10**3}
    scales |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    digits, scale = re.fullmatch(r"(.*?)\s*([A-Za-z]*)", text, re.DOTALL).groups()  # type: ignore
    try:
        return round(float(digits) * scales[scale])
    except (KeyError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"must be a number, 12345, 20k, 100M, 1.5G or 2GiB, got {text!r}"
        ) from None


def order_of(given: argparse.Namespace) -> orders.Order:
    """What a command line asks for.

    Raises:
        ValueError: For a recipe that is none, and for what would be passed over where nothing is
            trained.
    """
    if given.recipe not in orders.METHODS:
        raise ValueError(
            f"--recipe must be one of {', '.join(orders.METHODS)}, got {given.recipe!r}"
        )
    names = ("minutes", "steps", "learning_rate", "healing_text")
    of_healing = {name: vars(given)[name] for name in names if vars(given)[name] is not None}
    if given.recipe == orders.NO_HEALING:
        for name, value in of_healing.items():
            option = name.replace("_", "-")
            raise ValueError(f"--{option} needs a --recipe that trains, got {value!r} with 'none'")
    goal = orders.Goal(given.keep, given.max_parameters, given.max_bytes, given.max_ms_per_token)
    return orders.Order(
        given.model,
        goal,
        rule=given.rule,
        method=given.recipe,
        **of_healing,
        limits=orders.Limits(
            given.loss_limit, given.accuracy_limit, given.repetition_limit, given.max_ms_per_token
        ),
        measured=orders.Measured(
            documents=given.documents, questions=given.questions, tasks=tuple(given.tasks)
        ),
        revision=given.revision,
        dtype=given.dtype,
        device=given.device,
        seed=given.seed,
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run the command: 0 if all went well, whatever the judgement; 1 with one line if not."""
    given = parser().parse_args(words)
    with ended_like_ctrl_c():
        return _done(given)


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, which ends a job on a cluster, stops what runs inside as Ctrl-C does."""
    before = signal.getsignal(signal.SIGTERM)
    is_ours = threading.current_thread() is threading.main_thread() and before is signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, before)


def _done(given: argparse.Namespace) -> int:
    try:
        from pruning_utils.shrinking import whole  # importing it takes seconds

        if not given.plan and not given.out:
            raise ValueError("--out must name a new folder, or --plan be given")
        order = order_of(given)
        if given.plan:
            if given.out:
                whole.check_folder(order, given.out)
            plan = whole.planned(order)
            print(whole.plan_text(order, plan))
            if plan["healing_bytes"]:
                print(f"  healing takes {plan['healing_bytes'] / 1e9:.2f} GB of memory at most")
            return 0
        print(whole.shrink(order, given.out)["judgement"].to_string(index=False))
    except shutil.Error as error:
        # Of a folder that could not be copied it names every file; all have one reason.
        _, _, reason = error.args[0][0]
        print(f"pruning-utils: {reason}", file=sys.stderr)
        return 1
    except REFUSALS as error:
        # Those of other libraries may have several lines.
        print("pruning-utils:", *str(error).split(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = given.out and not given.plan and orders.work_folder(given.out).is_dir()
        goes_on = "goes on from here" if kept else "begins anew"
        print(f"pruning-utils: stopped; the same command {goes_on}", file=sys.stderr)
        return 130
    return 0
