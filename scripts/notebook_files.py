"""Notebook files: their parameters, executed copies that two machines agree on, and the summary
numbers inside."""

from __future__ import annotations

import ast
import json
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from pruning_utils.engine import records
from pruning_utils.pages import SUMMARY_MIME

INJECTED = "injected-parameters"
UNRECORDED = {"recompute"}  # parameters that decide how a number is come by, not which
KEPT_METADATA = {"tags", "jupyter", "slideshow", "editable"}
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
    notebook.cells = [
        cell for cell in notebook.cells if INJECTED not in cell.metadata.get("tags", [])
    ]
    return notebook


def parameters_of(notebook: NotebookNode, name: str) -> dict[str, object]:
    """Names and default values that the cell tagged ``parameters`` assigns.

    Raises:
        ValueError: If there is not exactly one such cell, or it holds anything but assignments of
            plain literals.
    """
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{name} must have one cell tagged parameters, it has {len(tagged)}")
    values = {}
    for node in ast.parse(tagged[0].source).body:
        try:
            (target,) = node.targets if isinstance(node, ast.Assign) else [node.target]
            values[target.id] = ast.literal_eval(
                node.value if not isinstance(node, ast.AugAssign) else node
            )
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{name}: the parameters cell must assign plain literals, one name a line; this is "
                f"none: {ast.unparse(node)}"
            ) from error
    return values


def source_digest(notebook: NotebookNode) -> str:
    """sha256 of what is written in a notebook; its outputs do not count."""
    return records.digest(
        records.canonical([[cell.cell_type, cell.source] for cell in notebook.cells])
    )


def scrub(notebook: NotebookNode) -> None:
    """Remove from an executed notebook, in place, what differs from run to run or from machine to
    machine.

    Raises:
        ValueError: If a code cell was not executed.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    cells, count = [], 0
    for number, cell in enumerate(notebook.cells, start=1):
        if INJECTED in cell.metadata.get("tags", []) and not _name_injected(cell):
            continue
        cells.append(cell)
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key in KEPT_METADATA}
        )
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type != "code":
            continue
        if cell.source.strip() and cell.execution_count is None:
            raise ValueError(f"cell {number} was not executed")
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        cell.outputs = _scrubbed_outputs(cell.outputs, count)
    notebook.cells = cells


def _name_injected(cell: NotebookNode) -> bool:
    lines = [line for line in cell.source.splitlines() if line.split(" = ")[0] not in UNRECORDED]
    cell.source, cell.id = "\n".join(lines), INJECTED
    return any(" = " in line for line in lines)


def _scrubbed_outputs(outputs: list[NotebookNode], count: int) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET_MIME in output.get("data", {}):
            continue
        if output.output_type == "execute_result":
            output.execution_count = count
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text  # one print may arrive in several messages
        else:
            kept.append(output)
    return kept


def machine_traces(notebook: NotebookNode, roots: list[Path]) -> list[str]:
    """Places in the outputs that name a folder of this machine or an address in its memory.

    Args:
        notebook: An executed notebook.
        roots: Folders to look for; this Python's, the home and the temporary folder are looked for
            anyway.
    """
    folders = {
        str(form)
        for root in [*roots, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir())]
        for form in (root.absolute(), root.resolve())
        if len(form.parts) > 1
    }
    named = re.compile(
        "|".join(
            rf"(?<![\w.]){re.escape(folder)}(?![\w-])" for folder in sorted(folders, reverse=True)
        )
    )
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            shown = {
                kind: data
                for kind, data in output.get("data", {}).items()
                if not kind.startswith("image/")
            }
            text = output.get("text", "") + json.dumps(shown)
            found += [
                f"cell {number}: {text[max(0, match.start() - 40) : match.end() + 40]!r}"
                for pattern in (named, ADDRESS)
                for match in pattern.finditer(text)
            ]
    return found


def summary_rows(notebook: NotebookNode) -> list[dict]:
    """The numbers that an executed notebook shows by ``pages.summary`` in its cells tagged
    ``summary``."""
    return [
        row
        for cell in notebook.cells
        if "summary" in cell.metadata.get("tags", [])
        for output in cell.get("outputs", [])
        if SUMMARY_MIME in output.get("data", {})
        for row in output.data[SUMMARY_MIME]["rows"]
    ]


def last_lines(traceback: list[str], limit: int = 12) -> str:
    """The end of a traceback, without colours, indented."""
    lines = ANSI.sub("", "\n".join(traceback)).rstrip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-limit:])
