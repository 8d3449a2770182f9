"""What the pages of the collection share: how a notebook begins, how it shows the code of an idea,
and the numbers that it ends with."""

from __future__ import annotations

import ast
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from pruning_utils import runtime
from pruning_utils.engine import definitions, records

# What the sentences of the notebooks speak of.
WRITTEN_FOR = {
    "profile": "cpu",
    "model": "embedded",
}
SUMMARY_MIME = "application/vnd.pruning-utils.summary+json"
INJECTED = "# Parameters"  # how the cell begins that papermill puts behind the parameters


def begin(seed: int = 0) -> None:
    """Begin a notebook: :func:`runtime.setup`, and a look at what the notebook was given.

    Where the model or the profile is another one than the notebook's sentences were written for,
    its first output says so, whoever runs it.

    Args:
        seed: As for :func:`runtime.setup`.

    Raises:
        ValueError: If papermill injected a parameter that the notebook does not have: it would be
            passed over.
    """
    runtime.setup(seed)
    try:
        shell = get_ipython()  # IPython puts it among the builtins of a kernel
    except NameError:
        return
    note = looked_at(shell.user_ns.get("In", []), shell.user_ns)
    if note:
        shell.display_pub.publish(note._repr_mimebundle_())


def looked_at(cells: Sequence[str], values: dict) -> Note | None:
    """What :func:`begin` says, from the cells that were run and the values of all names; errors as
    there."""
    given = [_assigned(cell) for cell in cells if cell.lstrip().startswith(INJECTED)]
    known = next((names for names in map(_assigned, cells) if {*WRITTEN_FOR} <= {*names}), [])
    unknown = [name for names in given for name in names if name not in known]
    if unknown and known:
        raise ValueError(
            f"this notebook has no parameter {', '.join(unknown)}; it has: {', '.join(known)}"
        )
    other = [
        f"{name} `{values[name]}`"
        for name, usual in WRITTEN_FOR.items()
        if values.get(name, usual) != usual
    ]
    if not other:
        return None
    usual = " and ".join(f"{name} `{value}`" for name, value in WRITTEN_FOR.items())
    return Note(
        f"**The sentences on this page were written for {usual}.** This run has "
        f"{' and '.join(other)}: its "
        "tables and figures are its own, the sentences beside them are not."
    )


def _assigned(cell: str) -> list[str]:
    """Names that a cell assigns at its top; [] for one that is no plain Python."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:
        return []
    targets = [
        target for node in statements if isinstance(node, ast.Assign) for target in node.targets
    ]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def source(name: str) -> Note:
    """The source of a function, class or method of this package, as coloured text in any viewer of
    notebooks.

    Args:
        name: ``module.function``, ``module.Class`` or ``module.Class.method``.

    Raises:
        ValueError: If the package has no such definition.
    """
    module, *inner = name.split(".")
    package = definitions.INSTALLED
    text = package.sources[module][1] if module in package.sources else ""
    node = ast.parse(text)
    for part in inner:
        node = next(
            (child for child in node.body if getattr(child, "name", None) == part),
            ast.Module([], []),
        )
    if not inner or not hasattr(node, "lineno"):
        raise ValueError(
            "name must be module.function, module.Class or module.Class.method of this package, "
            f"got {name!r}"
        )
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    shown = textwrap.dedent("\n".join(text.split("\n")[first - 1 : node.end_lineno]))
    return Note(f"```python\n{shown}\n```", shown)


@dataclass(frozen=True)
class Note:
    """Markdown that a cell shows when it is its last value.

    Attributes:
        markdown: What a viewer of notebooks shows.
        text: What a terminal shows; the Markdown where it is empty.
    """

    markdown: str
    text: str = ""

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        return {"text/markdown": self.markdown, "text/plain": self.text or self.markdown}


@dataclass(frozen=True)
class Summary:
    """The numbers that tests assert, shown as a small table; notebooks end with it. Made by
    :func:`summary`.

    Attributes:
        rows: Per number a dict of ``name``, ``value`` (a number, or a text), ``tolerance``
            (absolute) and ``reason``.
    """

    rows: list[dict]

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        table = pd.DataFrame(self.rows).astype(str)
        with pd.option_context("display.max_colwidth", None):
            return {
                "text/plain": table.to_string(index=False),
                "text/html": table.to_html(index=False),
                SUMMARY_MIME: {"rows": self.rows},
            }


def summary(rows: Mapping[str, tuple[object, float, str]]) -> Summary:
    """The numbers of a notebook that tests assert, for its last code cell, tagged ``summary``.

    Args:
        rows: From a number's name to ``(value, tolerance, reason)``: a finite number, kept to six
            digits, with the absolute difference that another machine may show and why; or a text or
            tuple, matched exactly, tolerance 0.

    Returns:
        An object that a notebook shows as a table, and from which the driver reads the numbers
        back.

    Raises:
        ValueError: Naming the first entry that is no such thing.
    """
    if not isinstance(rows, Mapping) or not rows:
        raise ValueError(
            f"a summary needs a dict from names to (value, tolerance, reason), got {rows!r}"
        )
    return Summary([_summary_row(name, entry) for name, entry in rows.items()])


def _summary_row(name: str, entry: tuple[object, float, str]) -> dict:
    if (
        not isinstance(name, str)
        or not name.strip()
        or not isinstance(entry, (tuple, list))
        or len(entry) != 3
    ):
        raise ValueError(
            f"a summary entry is a name with (value, tolerance, reason), got {name!r}: {entry!r}"
        )
    value, tolerance, reason = records.plain(list(entry), f"summary entry {name!r}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise ValueError(f"{name}: the value must be finite, got {value}")
    if (
        not isinstance(tolerance, (int, float))
        or not 0 <= tolerance < math.inf
        or (tolerance and not number)
    ):
        raise ValueError(
            f"{name}: the tolerance must be a finite number >= 0, and 0 where {value!r} is no "
            f"number, got {tolerance!r}"
        )
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError(f"{name}: the reason must say why that tolerance, got {reason!r}")
    if isinstance(value, list):
        value = " ".join(map(str, value))
    shown = float(f"{value:.6g}") if isinstance(value, float) else value if number else str(value)
    return {"name": name, "value": shown, "tolerance": tolerance, "reason": reason}
