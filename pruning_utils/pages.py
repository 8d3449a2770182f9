"""What the pages of the collection share: how a notebook begins, and how it shows the code of an
idea."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from pruning_utils import definitions, runtime

# What the sentences of the notebooks speak of.
WRITTEN_FOR = {
    "profile": "cpu",
    "model": "embedded",
}
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
