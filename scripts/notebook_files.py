"""Notebook files: parameters, executed copies that two machines agree on, and summary numbers."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from pruning_utils.engine import records
from pruning_utils.pages import SUMMARY_MIME

INJECTED = "injected-parameters"
# Parameters that decide how a number is come by, not which.
UNRECORDED = {"recompute"}
KEPT_METADATA = {"tags", "slideshow", "editable"}
# Longer code is folded: JupyterLab and the site show a bar in its place, which a click opens.
MOST_LINES_OPEN = 25
FOLDED_IN_JUPYTER, FOLDED_ON_THE_SITE = {"source_hidden": True}, "hide-input"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


def read_notebook(path: Path) -> NotebookNode:
    """A notebook without the cell of parameters that an earlier run may have put in."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not has_tag(cell, INJECTED)]
    return notebook


def has_tag(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell carries a tag."""
    return tag in cell.metadata.get("tags", [])


def parameters_of(notebook: NotebookNode, name: str) -> dict[str, object]:
    """Names and default values that the cell tagged ``parameters`` assigns.

    Raises:
        ValueError: If there is not exactly one such cell, or it holds anything but assignments of
            plain literals.
    """
    tagged = [cell for cell in notebook.cells if has_tag(cell, "parameters")]
    if len(tagged) != 1:
        raise ValueError(f"{name} must have one cell tagged parameters, it has {len(tagged)}")
    values = {}
    for statement in ast.parse(tagged[0].source).body:
        try:
            target, value = _assignment(statement)
            values[target] = ast.literal_eval(value)
        except ValueError as error:
            raise ValueError(
                f"{name}: the parameters cell must assign plain literals, one name a line; this is "
                f"none: {ast.unparse(statement)}"
            ) from error
    return values


def _assignment(statement: ast.stmt) -> tuple[str, ast.expr]:
    """The one name that a statement assigns to, and the value.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        raise ValueError("no assignment")
    if len(targets) != 1 or not isinstance(targets[0], ast.Name) or statement.value is None:
        raise ValueError("no assignment to one name")
    return targets[0].id, statement.value


def source_digest(notebook: NotebookNode) -> str:
    """sha256 of what is written in a notebook; its outputs do not count."""
    written = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return records.digest(records.canonical(written))


def scrub(notebook: NotebookNode) -> None:
    """Remove from an executed notebook, in place, what differs between runs or machines.

    Raises:
        ValueError: If a code cell was not executed.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    cells = []
    count = 0
    for number, cell in enumerate(notebook.cells, start=1):
        if has_tag(cell, INJECTED) and not _name_injected(cell):
            continue
        cells.append(cell)
        _scrub_metadata(cell)
        if cell.cell_type != "code":
            continue
        if cell.source.strip() and cell.execution_count is None:
            raise ValueError(f"cell {number} was not executed")
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        cell.outputs = _scrubbed_outputs(cell.outputs, count)
    notebook.cells = cells
    fold_long_code(notebook)


def fold_long_code(notebook: NotebookNode) -> None:
    """Fold, in place, code of more than ``MOST_LINES_OPEN`` lines, and open all other code.

    Parameters stay open: a reader is to see and to change them.
    """
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != FOLDED_ON_THE_SITE]
        cell.metadata.pop("jupyter", None)
        if len(cell.source.splitlines()) > MOST_LINES_OPEN and "parameters" not in tags:
            cell.metadata["jupyter"] = dict(FOLDED_IN_JUPYTER)
            tags.append(FOLDED_ON_THE_SITE)
        cell.metadata["tags"] = tags
        if not tags:
            del cell.metadata["tags"]


def _name_injected(cell: NotebookNode) -> bool:
    """Give the cell of given parameters its name, and tell whether any is left to be recorded."""
    lines = [line for line in cell.source.splitlines() if line.split(" = ")[0] not in UNRECORDED]
    cell.source = "\n".join(lines)
    cell.id = INJECTED
    return any(" = " in line for line in lines)


def _scrub_metadata(cell: NotebookNode) -> None:
    kept = {key: value for key, value in cell.metadata.items() if key in KEPT_METADATA}
    if kept.get("tags") == []:
        del kept["tags"]
    cell.metadata = nbformat.from_dict(kept)


def _scrubbed_outputs(outputs: list[NotebookNode], count: int) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET_MIME in output.get("data", {}):
            continue
        if output.output_type == "execute_result":
            output.execution_count = count
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            # One print may arrive in several messages.
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def machine_traces(
    notebook: NotebookNode, roots: list[Path], *, asked: Iterable[str] = ()
) -> list[str]:
    """Places in the outputs that name a folder of this machine or an address in its memory.

    Args:
        notebook: An executed notebook.
        roots: Folders to look for; this Python's, the home and the temporary folder are looked for
            anyway.
        asked: What it was run on by name, such as the folder of a model: that may be named.
    """
    own = [Path(sys.prefix), Path(tempfile.gettempdir())]
    with contextlib.suppress(RuntimeError):  # a user may have no home
        own.append(Path.home())
    named = _any_of([*roots, *own])
    said = sorted(asked, key=len, reverse=True)
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            text = _shown_text(output)
            for name in said:
                text = text.replace(name, "")
            matches = [*named.finditer(text), *ADDRESS.finditer(text)]
            for match in matches:
                around = text[max(0, match.start() - 40) : match.end() + 40]
                found.append(f"cell {number}: {around!r}")
    return found


def _any_of(folders: list[Path]) -> re.Pattern:
    """Finds each of these folders as a whole name; a root of all files is left out."""
    names = set()
    for folder in folders:
        for form in (folder.absolute(), folder.resolve()):
            if len(form.parts) > 1:
                names.add(str(form))
    # The longer of two names that begin alike comes first.
    patterns = [rf"(?<![\w.]){re.escape(name)}(?![\w-])" for name in sorted(names, reverse=True)]
    return re.compile("|".join(patterns))


def _shown_text(output: NotebookNode) -> str:
    """What an output shows, images left out."""
    data = output.get("data", {})
    texts = {kind: shown for kind, shown in data.items() if not kind.startswith("image/")}
    return output.get("text", "") + json.dumps(texts, ensure_ascii=False)


def summary_rows(notebook: NotebookNode) -> list[dict]:
    """The numbers that ``pages.summary`` shows in the cells tagged ``summary``."""
    rows: list[dict] = []
    for cell in notebook.cells:
        if not has_tag(cell, "summary"):
            continue
        for output in cell.get("outputs", []):
            shown = output.get("data", {}).get(SUMMARY_MIME)
            rows += shown["rows"] if shown else []
    return rows


def last_lines(traceback: list[str], limit: int = 12) -> str:
    """The end of a traceback, without colours, indented."""
    lines = ANSI.sub("", "\n".join(traceback)).rstrip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-limit:])
