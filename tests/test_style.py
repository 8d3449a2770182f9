"""The code's style: layout and rules by ruff, types by mypy, and statements that read at once."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "pruning_utils").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Files that ruff does not read, and that are kept as narrow as the code.
NARROW = (
    ".github/workflows/notebooks.yml",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "environment.yml",
    "pyproject.toml",
    "requirements-embedded.txt",
    "requirements-torch.txt",
)
WIDTH = 100


def said_by(*command: str) -> str:
    """What a tool says of the repository; "" where it finds nothing to say."""
    finished = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    return "" if finished.returncode == 0 else finished.stdout + finished.stderr


def nested_comprehensions(tree: ast.AST) -> list[int]:
    """Lines of comprehensions that stand inside another."""
    lines = set()
    for outer in ast.walk(tree):
        if not isinstance(outer, COMPREHENSIONS):
            continue
        for inner in ast.walk(outer):
            if isinstance(inner, COMPREHENSIONS) and inner is not outer:
                lines.add(inner.lineno)
    return sorted(lines)


def walruses(node: ast.AST) -> int:
    """Number of ``:=`` in a node, without those of the statements inside it."""
    found = int(isinstance(node, ast.NamedExpr))
    for inner in ast.iter_child_nodes(node):
        # The handlers of try and the cases of match hold statements, and are none themselves.
        if not isinstance(inner, (ast.stmt, ast.excepthandler, ast.match_case)):
            found += walruses(inner)
    return found


def crowded_statements(tree: ast.AST) -> list[int]:
    """Lines of statements with two ``:=`` or more."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return sorted(node.lineno for node in statements if walruses(node) > 1)


def names_of_others(tree: ast.Module) -> list[str]:
    """Names with an underscore that a module takes from other modules of the package."""
    modules = set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pruning_utils"):
            modules |= {alias.asname or alias.name for alias in node.names}
            found += [alias.name for alias in node.names if re.match(r"_[^_]", alias.name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and re.match(r"_[^_]", node.attr):
                found.append(f"{node.value.id}.{node.attr}")
    return sorted(found)


def test_faults_are_found():
    nested = "\n".join(
        [
            "a = [x for x in b]",
            "c = {k: [x for x in v] for k, v in d}",
            "e = sum(f(x for x in y) for y in z)",
            "g = [x for y in z for x in y]",
            "h = [x for x in [y for y in z]]",
        ]
    )
    assert nested_comprehensions(ast.parse(nested)) == [2, 3, 5]
    crowded = "\n".join(
        [
            "if (a := b) and (c := d):",
            "    e = (f := g)",
            "if h := i:",
            "    j = (k := l)",
            "m = [n := o, p := q]",
        ]
    )
    assert crowded_statements(ast.parse(crowded)) == [1, 5]
    borrowed = "\n".join(
        [
            "from pruning_utils import data, models as known",
            "from pruning_utils.engine.hub import _asked, asked",
            "known._resolve(data.pack(asked))",
            "self._own(data._windows)",
        ]
    )
    assert names_of_others(ast.parse(borrowed)) == ["_asked", "data._windows", "known._resolve"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_statements_read_at_once(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert nested_comprehensions(tree) == [], "lines with a comprehension inside another"
    assert crowded_statements(tree) == [], "lines with two := in one statement"
    assert names_of_others(tree) == [], "names with an underscore, of another module"


def test_layout_is_that_of_ruff():
    assert said_by("ruff", "format", "--check", ".") == ""


def test_ruff_has_no_objection():
    assert said_by("ruff", "check", ".") == ""


@pytest.mark.parametrize("name", NARROW)
def test_other_files_are_as_narrow_as_the_code(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > WIDTH] == []


@pytest.mark.slow
def test_types_hold():
    assert said_by("mypy") == ""
