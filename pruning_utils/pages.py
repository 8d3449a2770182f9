"""What the notebooks share: how they begin, show the code of an idea, and end with numbers."""

from __future__ import annotations

import ast
import builtins
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pruning_utils import embedded, results, runtime
from pruning_utils.engine import definitions, records, verdict_rows
from pruning_utils.engine.reader_names import NAMES, in_words

# What the sentences of the notebooks speak of.
WRITTEN_FOR = {"profile": "cpu", "model": "embedded"}
# Other names of that model.
SAME_MODEL = ("smollm2-135m",)
SUMMARY_MIME = "application/vnd.pruning-utils.summary+json"
# Columns of a table whose numbers are all in the unit of what is measured.
INTERVAL_COLUMNS = (
    *("value", "difference", "low", "high", "low_90", "high_90", "margin", "detectable"),
    *("first", "second", "unpruned", "floor", "guess", "published", "runs_sd"),
)
# What a difference is of, below a table of findings.
DIFFERENCES = (
    "A difference is what a part names first, minus what it is compared with: above 0, a loss is "
    "higher."
)
RATIOS = (
    "A ratio divides the time of what a part names first by that of what it is compared with, else "
    "of the unpruned model. Below 1 it is faster."
)
LATER = (
    f"{verdict_rows.MARK} Not named beforehand: the part was added later, or its models were "
    "healed anew."
)
# First line of the cell that papermill puts behind the parameters.
INJECTED = "# Parameters"


def begin(seed: int = 0, *, any_model: bool = False) -> None:
    """Begin a notebook: :func:`runtime.setup`, and a look at what the notebook was given.

    Torch is set up as soon as this package first uses it, for a notebook may only read tables.

    Where the model or the profile is another one than the notebook's sentences were written for,
    its first output says so, whoever runs it.

    Args:
        seed: As for :func:`runtime.setup`.
        any_model: Whether the notebook's sentences are computed, and so speak of any model.

    Raises:
        ValueError: If papermill injected a parameter that the notebook does not have: it would be
            passed over.
    """
    runtime.setup(seed, at_once=False)
    pd.set_option("display.max_colwidth", None)  # a table shows its texts whole
    # IPython puts this function among the builtins of a kernel.
    find_shell = getattr(builtins, "get_ipython", None)
    if find_shell is None:
        return
    shell = find_shell()
    note = looked_at(shell.user_ns.get("In", []), shell.user_ns)
    if note and not any_model:
        shell.display_pub.publish(note._repr_mimebundle_())


def looked_at(cells: Sequence[str], values: dict) -> Note | None:
    """What :func:`begin` says; errors as there.

    Args:
        cells: Sources of the cells that were run.
        values: Values of all names of the notebook.

    Returns:
        The note; None where there is nothing to say.
    """
    parameter_cells = [names for names in map(_assigned, cells) if set(WRITTEN_FOR) <= set(names)]
    known = parameter_cells[0] if parameter_cells else []
    injected = [cell for cell in cells if cell.lstrip().startswith(INJECTED)]
    unknown = [name for cell in injected for name in _assigned(cell) if name not in known]
    if unknown and known:
        raise ValueError(
            f"this notebook has no parameter {', '.join(unknown)}; it has: {', '.join(known)}"
        )
    other = [
        f"{name} `{values[name]}`"
        for name, usual in WRITTEN_FOR.items()
        if values.get(name, usual) not in (usual, *SAME_MODEL)
    ]
    if not other:
        return None
    usual = " and ".join(f"{name} `{value}`" for name, value in WRITTEN_FOR.items())
    return Note(
        f"**The sentences on this page were written for {usual}.** This run has "
        f"{' and '.join(other)}: its tables and figures are its own, the sentences beside them "
        "are not."
    )


def findings(notebook: str, profile: str = "cpu") -> Note:
    """What a notebook says of the papers' claims, from the verdicts that its last run saved.

    Args:
        notebook: Name of the notebook.
        profile: Whose results.

    Returns:
        A sentence that counts the verdicts of each model. Then a table: a part of a claim a row,
        and for each model the verdict with its number and interval. Then the claims in words, each
        code linked to ``reference/claims.csv``, how small a budget was, and what a mark says of a
        part that was not named beforehand.
    """
    path = results.table_path(profile, notebook, "verdicts")
    if not path.exists():
        return Note(f"No verdicts of the profile {profile} are kept yet: run this notebook.")
    rows = verdict_rows.read(path)
    claims = pd.read_csv(runtime.project_root() / "reference" / "claims.csv").set_index("id")
    is_ratio = rows["measure"].str.startswith("ratio")
    told_of = [RATIOS] * bool(is_ratio.any()) + [DIFFERENCES] * bool((~is_ratio).any())
    lines = [*_verdict_lines(rows), "", *told_of, ""]
    for claim in dict.fromkeys(rows["claim"]):
        text = claims.loc[claim, "claim"]
        lines.append(f"* [{claim}](../reference/claims.csv): *{text}.*")
    told = verdict_rows.budgets_told(rows["reason"])
    if told:
        lines.append(f"* *Budget*: {told}.")
    if rows["asked"].eq(verdict_rows.AFTERWARDS).any():
        lines.append(f"* {LATER}")
    return Note("\n".join(lines))


def verdicts(judged: pd.DataFrame) -> Note:
    """The same sentence and table of verdicts that a notebook has just saved.

    Args:
        judged: From :func:`evidence.save_verdicts`.
    """
    return Note("\n".join(_verdict_lines(judged.fillna({"reason": ""}))))


def _verdict_lines(rows: pd.DataFrame) -> list[str]:
    """A sentence that counts verdicts, and the table of them, as lines of Markdown."""
    models = verdict_rows.models_of(rows, embedded.MODELS)
    titles = {model: NAMES.get(model, model) for model in models}
    words = {titles[model]: rows.loc[rows["model"] == model, "verdict"] for model in models}
    lines = [
        " ".join(verdict_rows.counted(title, of_model) for title, of_model in words.items()),
        "",
        f"| claim | part | measured as | {' | '.join(titles.values())} |",
        f"| --- | --- | --- |{' --- |' * len(models)}",
    ]
    parts = ["claim", "part", "measure", "data"]
    # A part that a model was asked twice, at two depths say, has a row for each time.
    turn = rows.groupby([*parts, "model"]).cumcount()
    for (claim, part, measure, data, _), found in rows.groupby([*parts, turn], sort=False):
        said = {row.model: _said(row) for row in found.itertuples()}
        cells = [said.get(model, "not asked") for model in models]
        lines.append(f"| {claim} | {part} | {measure}, {data} | {' | '.join(cells)} |")
    return lines


def readable(
    table: pd.DataFrame, *, points: Sequence[bool] | bool | None = None, digits: int = 3
) -> pd.DataFrame:
    """A table in a reader's words: names as in figures and sentences, accuracies in points.

    Args:
        table: Any table. It is left as it was.
        points: For each row, or for all, whether its numbers are of accuracy, as shares. These are
            given in points, the others are in nats per token, and a column ``unit`` says so. None:
            numbers stay, and no column is added.
        digits: Decimals that numbers are rounded to.

    Returns:
        A copy whose columns, index and texts have the names of
        :mod:`pruning_utils.engine.reader_names`.
    """
    shown = table.copy()
    if points is not None:
        is_share = pd.Series(np.broadcast_to(points, len(shown)), index=shown.index)
        columns = [name for name in INTERVAL_COLUMNS if name in shown]
        shown[columns] = shown[columns].mul(is_share.map({True: 100.0, False: 1.0}), axis="index")
        shown["unit"] = is_share.map({True: "points", False: "nats"})
    texts = [name for name in shown if pd.api.types.is_string_dtype(shown[name].dtype)]
    for name in texts:
        shown[name] = shown[name].map(in_words)
    shown = shown.rename(index=in_words, columns=in_words).round(digits)
    return shown.rename_axis(
        index=[in_words(name) for name in shown.index.names],
        columns=[in_words(name) for name in shown.columns.names],
    )


def _said(row: Any) -> str:
    """A verdict with its number, interval and depth; why nothing can be tested."""
    because = f": {verdict_rows.short_reason(row.reason)}" if row.reason else ""
    said = f"**{row.verdict}**{verdict_rows.mark_of(row)}{because}"
    return f"{said}<br>{verdict_rows.number(row)}, {row.depth}"


def _assigned(cell: str) -> list[str]:
    """Names that a cell assigns at its top; [] for one that is no plain Python."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:
        return []
    targets = [
        target
        for node in statements
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def source(name: str) -> Note:
    """The source of a function, class or method of this package, as coloured text in a notebook.

    Args:
        name: ``module.function``, ``module.Class`` or ``module.Class.method``.

    Raises:
        ValueError: If the package has no such definition.
    """
    sources = definitions.INSTALLED.sources
    modules = [module for module in sources if module and name.startswith(f"{module}.")]
    module = max(modules, key=len, default="")
    inner = name.removeprefix(f"{module}.").split(".") if module else []
    text = sources[module][1] if module else ""
    node: Any = None
    statements = ast.parse(text).body
    for part in inner:
        named = [child for child in statements if getattr(child, "name", None) == part]
        node = named[0] if named else None
        statements = node.body if named else []
    if node is None:
        raise ValueError(
            "name must be module.function, module.Class or module.Class.method of this package, "
            f"got {name!r}"
        )
    first = min(part.lineno for part in [node, *node.decorator_list])
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
    """The numbers that tests assert, shown as a small table at the end of a notebook.

    :func:`summary` makes it.

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


def summary(
    rows: Mapping[str, tuple[object, float, str]],
    *,
    verdicts: pd.DataFrame | None = None,
    profile: str = "cpu",
) -> Summary:
    """The numbers of a notebook that tests assert, for its last code cell, tagged ``summary``.

    Args:
        rows: From a number's name to ``(value, tolerance, reason)``: a finite number, kept to six
            digits, with the absolute difference that another machine may show and why; or a text or
            tuple, matched exactly, tolerance 0.
        verdicts: From :func:`evidence.save_verdicts`. Each adds its value, which may move by a
            quarter of its interval, and its verdict, which may not change.
        profile: At ``smoke``, where verdicts mean nothing, none is added.

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
    entries = dict(rows)
    if verdicts is not None and profile != "smoke":
        entries |= _verdict_entries(verdicts)
    return Summary([_summary_row(name, entry) for name, entry in entries.items()])


def _verdict_entries(verdicts: pd.DataFrame) -> dict[str, tuple[object, float, str]]:
    """Values and words of verdicts, as entries of a summary."""
    entries: dict[str, tuple[object, float, str]] = {}
    for row in verdicts.itertuples():
        name = ", ".join(str(getattr(row, column)) for column in verdict_rows.KEY)
        if math.isfinite(row.value):
            width = (row.high - row.low) / 4
            tolerance = width if math.isfinite(width) else abs(row.value) / 10
            entries[name] = (row.value, tolerance, "a quarter of its interval")
        entries[f"{name}: verdict"] = (row.verdict, 0, "a verdict stands or it does not")
    return entries


def _summary_row(name: str, entry: tuple[object, float, str]) -> dict:
    """A number of a summary, checked, as a row of its table."""
    is_named = isinstance(name, str) and bool(name.strip())
    if not is_named or not isinstance(entry, (tuple, list)) or len(entry) != 3:
        raise ValueError(
            f"a summary entry is a name with (value, tolerance, reason), got {name!r}: {entry!r}"
        )
    value, tolerance, reason = records.plain(list(entry), f"summary entry {name!r}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and not math.isfinite(value):
        raise ValueError(f"{name}: the value must be finite, got {value}")
    is_finite = isinstance(tolerance, (int, float)) and 0 <= tolerance < math.inf
    if not is_finite or (tolerance and not is_number):
        raise ValueError(
            f"{name}: the tolerance must be a finite number >= 0, and 0 where {value!r} is no "
            f"number, got {tolerance!r}"
        )
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError(f"{name}: the reason must say why that tolerance, got {reason!r}")
    return {"name": name, "value": _shown(value), "tolerance": tolerance, "reason": reason}


def _shown(value: Any) -> int | float | str:
    """Floats to six digits, whole numbers as they are, lists as words, all else as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
