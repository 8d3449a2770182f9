"""Which code of this package a number depends on: the definitions that its function reaches.

A definition is a function, a class or an assigned name at the top of a module. It reaches what it
names, wherever that lies in the package, and so on. The digest of what is reached tells whether a
stored number was computed by today's code. Docstrings, comments, layout, type hints of functions
and the file that a definition lies in do not count, so that code can be moved and formatted.

What is found by reading names alone cannot see what a program looks up by a text or replaces while
it runs. Such code is refused with a ValueError: a module of the package used as a value
(``getattr(models, name)``), an assignment to an attribute of a module or definition of the package,
``globals``, ``eval``, ``exec``, ``importlib.import_module``, ``sys.modules``, ``import *``, and
statements at the top of a module that are no definitions. A method comes with its whole class. A
local name that is also the name of a definition counts as naming it: more is digested than needed,
never less. Code outside the package (a notebook's own lambda) is not digested, only the definitions
that it names. What :mod:`~pruning_utils.engine.later` imports when it is first used counts as
imported at once.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
# The form of a stamp. A table that is stamped in a later form is never called fresh.
STAMP_VERSION = 1
UNSTAMPED = "unstamped"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
UNSEEN_CALLS = {"globals", "eval", "exec", "__import__", "importlib.import_module", "sys.modules"}
# The names that other modules import from this one count as imported from where it has them.
LATER = "engine.later"
# Characters of a definition's own digest, which only serves to name what has changed.
SHOWN_CHARACTERS = 8

# Module and name, such as ("selection", "best_block").
Definition = tuple[str, str]
# The text of a definition is a list of these: plain text, and the definitions that it names.
Part = str | Definition


@dataclass
class Module:
    """What one file of the package defines and imports.

    Attributes:
        path: The file.
        definitions: By name the statements that define it.
        modules: Modules of the package by the names that they are imported under.
        names: Definitions of other modules by the names that they are imported under.
        outside: What is imported from other packages, by the names that it is imported under.
        effects: Line numbers of top-level statements that define nothing.
    """

    path: Path
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    names: dict[str, Definition] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    effects: list[int] = field(default_factory=list)


class Package:
    """The source of a package as it was when this object was made.

    Args:
        folder: The package's folder; its name is the name that its modules import each other by.
        name: Another such name.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = folder
        self.name = name or folder.name
        self.sources = {
            self._module_name(path): (path, path.read_text(encoding="utf-8"))
            for path in sorted(folder.rglob("*.py"))
        }
        self.files = {
            path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        self._modules: dict[str, Module] = {}
        self._parts: dict[Definition, list[Part]] = {}
        # Many tables have the same roots, and the source read here does not change.
        self._stamps: dict[tuple, dict] = {}

    def _module_name(self, path: Path) -> str:
        parts = path.relative_to(self.folder).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        return ".".join(parts)

    def digest(self) -> str:
        """Digest of every file of the package, comments and all."""
        digest = hashlib.sha256()
        for path, source in self.sources.values():
            digest.update(f"{path.relative_to(self.folder).as_posix()} {source}".encode())
        for path, found in self.files.items():
            digest.update(f"{path.relative_to(self.folder).as_posix()} {found}".encode())
        return digest.hexdigest()

    def stamp(self, *computes: Callable) -> dict:
        """What a run record keeps of the code behind compute functions.

        Args:
            *computes: Functions or classes of the package, instances of such classes, a
                ``functools.partial`` of one, or functions from elsewhere that name some.

        Returns:
            ``version`` (of this form), ``root`` (the definitions that it begins with), ``digest``
            (of all that these reach), and ``definitions``: by their places the own digests of all
            definitions that are reached.

        Raises:
            ValueError: If what it reaches holds code whose dependencies cannot be read, or a root
                is unknown.
        """
        roots = [self._known(module, name) for module, name in roots_of(computes, self.name)]
        return self.stamp_of(roots)

    def stamp_of(self, roots: list[Definition], leaves: Collection[Definition] = ()) -> dict:
        """The stamp of these roots; see :meth:`stamp`.

        Args:
            roots: Definitions that it begins with.
            leaves: Definitions whose text counts as nothing, and what only they reach.
        """
        asked = tuple(roots), frozenset(leaves)
        if asked not in self._stamps:
            reached = self.reached(roots, leaves)
            self._stamps[asked] = {
                "version": STAMP_VERSION,
                "root": ", ".join(map(place, roots)),
                "digest": self._digest(reached, leaves),
                "definitions": {
                    place(one): "" if one in leaves else self.own_digest(one)
                    for one in sorted(reached)
                },
            }
        return copy.deepcopy(self._stamps[asked])

    def reached(
        self, roots: list[Definition], leaves: Collection[Definition] = ()
    ) -> list[Definition]:
        """All definitions that these roots reach, as a walk through their texts meets them.

        A leaf is met, and its own text is not read.
        """
        found: dict[Definition, None] = {}
        waiting = list(reversed(roots))
        while waiting:
            one = waiting.pop()
            if one not in found:
                found[one] = None
                waiting += [] if one in leaves else reversed(self._references(one))
        return list(found)

    def own_digest(self, one: Definition) -> str:
        """A short digest of one definition, in which others count by their names alone."""
        pieces = [part if isinstance(part, str) else f"@{part[1]}" for part in self._text(one)]
        text = "".join(pieces)
        return hashlib.sha256(text.encode()).hexdigest()[:SHOWN_CHARACTERS]

    def changes(self, recorded: Any) -> list[str]:
        """What has changed since a stamp was made; [] if nothing.

        A definition that is reached for the first time is named, and one that is not reached any
        more too.

        Args:
            recorded: What a record holds as its stamp, sound or not.

        Returns:
            Places of definitions, or as the one entry what is wrong with the stamp.
        """
        fault = stamp_fault(recorded)
        if fault:
            return [fault]
        roots = self.roots_again(recorded["root"])
        if roots is None:
            return [f"{recorded['root']} is gone"]
        today = self.stamp_of(roots)
        if today["digest"] == recorded["digest"]:
            return []
        return differing_places(recorded, today) or [recorded["root"]]

    def roots_again(self, recorded: str) -> list[Definition] | None:
        """The definitions of a recorded root, where they lie now; None if one is gone."""
        roots = []
        for where in _root_places(recorded):
            module, _, name = where.rpartition(".")
            root = self._found_again(module, name)
            if root is None:
                return None
            roots.append(root)
        return roots

    def _found_again(self, module: str, name: str) -> Definition | None:
        """A root where it was, or the one definition of that name that has moved elsewhere."""
        if module in self.sources and name in self._module(module).definitions:
            return module, name
        places = [other for other in self.sources if name in self._module(other).definitions]
        return (places[0], name) if len(places) == 1 else None

    def _known(self, module: str, name: str) -> Definition:
        if module not in self.sources or name not in self._module(module).definitions:
            raise ValueError(
                f"{self.name}.{module} has no definition {name!r} at its top, so what a number "
                "depends on cannot be recorded; pass a function or class that stands there"
            )
        return module, name

    def _digest(self, reached: list[Definition], leaves: Collection[Definition] = ()) -> str:
        number = {one: index for index, one in enumerate(reached)}
        digest = hashlib.sha256()
        for one in reached:
            for part in ["leaf"] if one in leaves else self._text(one):
                text = part if isinstance(part, str) else f"@{number[part]}"
                digest.update(text.encode())
            digest.update(b"\n")
        return digest.hexdigest()[:16]

    def _references(self, one: Definition) -> list[Definition]:
        return [part for part in self._text(one) if not isinstance(part, str)]

    def _text(self, one: Definition) -> list[Part]:
        """The text of a definition, with the definitions that it names in their places."""
        if one not in self._parts:
            module, name = one
            if self._module(module).effects:
                raise ValueError(
                    f"{module} has a statement in line {self._module(module).effects[0]} that is "
                    f"no definition, so what {name} depends on cannot be read"
                )
            reader = _Reader(self, module)
            for node in self._module(module).definitions[name]:
                reader.read(node)
            self._parts[one] = _joined(reader.parts)
        return self._parts[one]

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            path, source = self.sources[name]
            self._modules[name] = self._parsed(name, path, ast.parse(source))
        return self._modules[name]

    def _parsed(self, name: str, path: Path, tree: ast.Module) -> Module:
        module = Module(path)
        for statement in tree.body:
            defined = _defined_names(statement)
            if defined is None:
                module.effects.append(statement.lineno)
                continue
            for one in defined:
                module.definitions.setdefault(one, []).append(statement)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._note_modules(module, node)
            elif isinstance(node, ast.ImportFrom):
                self._note_names(module, name, node)
        return module

    def _note_modules(self, module: Module, node: ast.Import) -> None:
        """Note what ``import a.b`` or ``import a.b as c`` brings."""
        for alias in node.names:
            top = alias.name.split(".")[0]
            # Without "as" it is the package itself that gets a name.
            if top == self.name and alias.asname:
                module.modules[alias.asname] = alias.name.removeprefix(self.name).lstrip(".")
            elif top == self.name:
                module.modules[self.name] = ""
            elif alias.asname:
                module.outside[alias.asname] = alias.name
            else:
                module.outside[top] = top

    def _note_names(self, module: Module, name: str, node: ast.ImportFrom) -> None:
        """Note what ``from a import b`` brings to the module of this name."""
        origin = self._origin(node, name, module.path.name == "__init__.py")
        for alias in node.names:
            known_as = alias.asname or alias.name
            if origin is None:
                module.outside[known_as] = f"{node.module}.{alias.name}"
                continue
            if origin == LATER and alias.name in self._module(LATER).outside:
                module.outside[known_as] = self._module(LATER).outside[alias.name]
                continue
            if alias.name == "*":
                raise ValueError(
                    f"{name} imports * from {origin or self.name}, so what it names cannot be read"
                )
            inner = f"{origin}.{alias.name}".lstrip(".")
            if inner in self.sources:
                module.modules[known_as] = inner
            else:
                module.names[known_as] = (origin, alias.name)

    def _origin(self, node: ast.ImportFrom, name: str, is_package: bool) -> str | None:
        """The module that a from-import names; None where it names another package."""
        if node.level:
            above = name.split(".") if name else []
            above = above[: len(above) - node.level + is_package]
            return ".".join([*above, node.module] if node.module else above)
        if node.module and node.module.split(".")[0] == self.name:
            return node.module.removeprefix(self.name).lstrip(".")
        return None

    def target(self, module: str, chain: list[str]) -> tuple[Definition | None, int]:
        """The definition that a dotted name means within a module.

        Args:
            module: The module that holds the name.
            chain: The parts of the name, at least one.

        Returns:
            The definition, and how many of the name's parts were used. (None, 1) where the name is
            a module's alone, and (None, 0) where it is nothing of this package.
        """
        own = self._module(module)
        head = chain[0]
        if head in own.definitions:
            return (module, head), 1
        if head in own.names:
            where, what = own.names[head]
            found, _ = self.target(where, [what])
            # Nothing is found where the other module has the name from elsewhere.
            return found, int(found is not None)
        if head not in own.modules:
            return None, 0
        inner = own.modules[head]
        used = 1
        while used < len(chain):
            deeper = f"{inner}.{chain[used]}".lstrip(".")
            if deeper not in self.sources:
                break
            inner = deeper
            used += 1
        if used == len(chain):
            return None, 1
        found, more = self.target(inner, chain[used:])
        return (found, used + more) if found else (None, 1)


class _Reader:
    """Reads the statements of one definition into pieces of text and references."""

    def __init__(self, package: Package, module: str):
        self.package = package
        self.module = module
        self.parts: list[Part] = []

    def read(self, node: object, in_class: bool = False) -> None:
        """Add a node, or a list of nodes, to the parts.

        Args:
            node: A node of a syntax tree, a list of nodes, or a plain value.
            in_class: Whether it stands right inside a class.
        """
        if isinstance(node, list):
            self.parts.append("[")
            for one in node:
                self.read(one, in_class)
                self.parts.append(",")
            self.parts.append("]")
        elif not isinstance(node, ast.AST):
            self.parts.append(repr(node))
        elif not (isinstance(node, (ast.Name, ast.Attribute)) and self._is_reference(node)):
            self._read_fields(node, in_class)

    def _read_fields(self, node: ast.AST, in_class: bool) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and self._is_own_import(node):
            # Which names it brings is seen where they are used.
            self.parts.append("import")
            return
        self.parts.append(f"{type(node).__name__}(")
        for name, value in _meaningful_fields(node, in_class):
            self.parts.append(f"{name}=")
            self.read(value, in_class=isinstance(node, ast.ClassDef))
            self.parts.append(",")
        self.parts.append(")")
        self._read_files(node)

    def _is_own_import(self, node: ast.Import | ast.ImportFrom) -> bool:
        if isinstance(node, ast.Import):
            tops = {alias.name.split(".")[0] for alias in node.names}
            return tops == {self.package.name}
        if node.level:
            return True
        return (node.module or "").split(".")[0] == self.package.name

    def _is_reference(self, node: ast.Name | ast.Attribute) -> bool:
        """Note a dotted name of a definition or import; refuse one that hides what it means."""
        chain = _chain(node)
        if not chain:
            return False
        dotted = ".".join(chain)
        if dotted in UNSEEN_CALLS or ".".join(chain[:2]) in UNSEEN_CALLS:
            raise ValueError(
                f"{self.module} uses {dotted} in line {node.lineno}, so what it depends on cannot "
                "be read"
            )
        found, used = self.package.target(self.module, chain)
        if found is None and used:
            raise ValueError(
                f"{self.module} uses a module of the package as a value in line {node.lineno} "
                f"({dotted}), so what it depends on cannot be read; name the definition"
            )
        if found is None:
            return self._is_from_outside(chain)
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            raise ValueError(
                f"{self.module} replaces {dotted} in line {node.lineno}, so what other code means "
                "by it cannot be read"
            )
        self.parts.append(found)
        self.parts.append("".join(f".{name}" for name in chain[used:]))
        return True

    def _is_from_outside(self, chain: list[str]) -> bool:
        """Note a name of another package as that package has it, however it is imported here."""
        origin = self.package._module(self.module).outside.get(chain[0])
        if origin is None:
            return False
        self.parts.append(".".join([origin, *chain[1:]]))
        return True

    def _read_files(self, node: ast.AST) -> None:
        """Where a path beside the module is assigned, what lies there belongs to the definition."""
        if not isinstance(node, ast.Assign):
            return
        inside = list(ast.walk(node))
        if not any(isinstance(one, ast.Name) and one.id == "__file__" for one in inside):
            return
        folder = self.package.sources[self.module][0].parent
        for one in inside:
            if isinstance(one, ast.Constant) and isinstance(one.value, str):
                self._read_path(folder / one.value)

    def _read_path(self, place_of_files: Path) -> None:
        for path, digest in self.package.files.items():
            if path == place_of_files or place_of_files in path.parents:
                name = path.relative_to(place_of_files.parent).as_posix()
                self.parts.append(f"file {name} {digest}")
        for module, (path, _) in self.package.sources.items():
            if place_of_files in path.parents:
                self.parts += [(module, name) for name in self.package._module(module).definitions]


def _joined(parts: list[Part]) -> list[Part]:
    """The same parts, with neighbouring texts made one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def differing_places(old: dict, new: dict) -> list[str]:
    """Places of definitions whose digest only one of two stamps holds, in order.

    A definition is looked for by its digest, as it may have moved. One that has changed is named
    once, where it lies now.
    """
    then, now = old["definitions"], new["definitions"]
    changed = {where for where, digest in now.items() if digest not in then.values()}
    bare = {where.rpartition(".")[2] for where in changed}
    for where, digest in then.items():
        if digest not in now.values() and where.rpartition(".")[2] not in bare:
            changed.add(where)
    return sorted(changed)


def _chain(node: ast.expr) -> list[str]:
    """The parts of a dotted name; [] where the dots follow anything but a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _meaningful_fields(node: ast.AST, in_class: bool) -> Iterator[tuple[str, object]]:
    """The fields of a node that decide what it does.

    Empty ones, which only some versions of Python have, are left out.
    """
    left_out = {"ctx", "type_comment"}
    if isinstance(node, (ast.arg, ast.FunctionDef, ast.AsyncFunctionDef)):
        left_out |= {"annotation", "returns", "type_params"}
    # The type of a class's field may count, as a dataclass reads it.
    if isinstance(node, ast.AnnAssign) and not in_class:
        left_out |= {"annotation", "simple"}
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            value = value[1:]
        if name not in left_out and value is not None and value != []:
            yield name, value


def _defined_names(node: ast.stmt) -> list[str] | None:
    """Names that a top-level statement defines.

    [] for imports and docstrings, and None where it does something else.
    """
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass)):
        return []
    if isinstance(node, ast.Expr):
        return [] if isinstance(node.value, ast.Constant) else None
    if isinstance(node, ast.Assign):
        return _assigned_names(node.targets)
    if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        return _assigned_names([node.target])
    # An import for some versions alone, or one for type checkers.
    if isinstance(node, ast.If):
        return _names_of_all([*node.body, *node.orelse])
    if isinstance(node, ast.Try):
        handled = [inner for handler in node.handlers for inner in handler.body]
        return _names_of_all([*node.body, *node.orelse, *node.finalbody, *handled])
    return None


def _assigned_names(targets: Sequence[ast.expr]) -> list[str] | None:
    """Names that an assignment binds; None where it changes an attribute or an item."""
    names: list[str] = []
    for target in targets:
        if not isinstance(target, (ast.Name, ast.Tuple)):
            return None
        names += [inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name)]
    return names


def _names_of_all(statements: list[ast.stmt]) -> list[str] | None:
    """Names that statements define together; None where one of them does something else."""
    names: list[str] = []
    for statement in statements:
        defined = _defined_names(statement)
        if defined is None:
            return None
        names += defined
    return names


def place(one: Definition) -> str:
    """``module.name`` of a definition."""
    return f"{one[0]}.{one[1]}"


def roots_of(computes: Iterable[object], package: str) -> list[Definition]:
    """The definitions of a package that compute functions begin with; see :meth:`Package.stamp`."""
    found: dict[Definition, None] = {}
    waiting = list(computes)
    seen: set[int] = set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        named = _named_in(one, package)
        if isinstance(one, functools.partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, types.MethodType):
            waiting.append(one.__self__)
        elif hasattr(one, "__wrapped__"):
            # Such a function is made by functools.cache, for example.
            waiting.append(one.__wrapped__)
        elif named is not None:
            found[named] = None
        elif isinstance(one, types.FunctionType):
            waiting += _used_by(one, package)
    return list(found)


def _named_in(one: object, package: str) -> Definition | None:
    """Module and outermost name of a function, a class or an instance of a class of the package."""
    if not isinstance(one, (types.FunctionType, type)):
        one = type(one)
    module = getattr(one, "__module__", None) or ""
    if module.split(".")[0] != package:
        return None
    return module.removeprefix(package).lstrip("."), one.__qualname__.split(".")[0]


def _used_by(function: types.FunctionType, package: str) -> list[object]:
    """Objects of the package that a function from elsewhere names, and what it encloses."""
    names = _names_in(function.__code__)
    used = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    for name in names:
        value = function.__globals__.get(name)
        if _is_module_of(value, package):
            used += _members_named(value, names, package)
        elif isinstance(value, (types.FunctionType, type, functools.partial)):
            used.append(value)
        elif _named_in(value, package):
            used.append(value)
    return used


def _is_module_of(value: object, package: str) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == package


def _members_named(module: Any, names: list[str], package: str) -> list[object]:
    """What a module of the package, or a module within it, has of these names."""
    found: list[object] = []
    modules = [module]
    for one in modules:
        members = [getattr(one, name, None) for name in names]
        found += [member for member in members if _named_in(member, package)]
        modules += [
            member for member in members if _is_module_of(member, package) and member not in modules
        ]
    return found


def _names_in(code: types.CodeType) -> list[str]:
    """Names of globals and attributes in a function's code and in the functions inside it."""
    names: list[str] = []
    codes = [code]
    while codes:
        one = codes.pop(0)
        names += one.co_names
        codes += [inner for inner in one.co_consts if isinstance(inner, types.CodeType)]
    return names


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def stamp_fault(recorded: Any) -> str:
    """What is wrong with a recorded stamp, "" if it is sound.

    There is none, it is damaged, or it has a form that only a later version of the package reads.
    """
    if recorded is None:
        return UNSTAMPED
    if not isinstance(recorded, dict) or not isinstance(recorded.get("version"), int):
        return "damaged stamp"
    if recorded["version"] > STAMP_VERSION:
        return f"stamp of version {recorded['version']}, this package reads {STAMP_VERSION}"
    types_of_parts = {"root": str, "digest": str, "definitions": dict}
    if not all(isinstance(recorded.get(key), kind) for key, kind in types_of_parts.items()):
        return "damaged stamp"
    sound = all("." in where for where in _root_places(recorded["root"]))
    return "" if sound else "damaged stamp"


def _root_places(root: str) -> list[str]:
    """The places that a stamp's ``root`` names, which is "" where a table depends on nothing."""
    return root.split(", ") if root else []


def is_fresh(recorded: Any, today: dict) -> bool:
    """Whether a recorded stamp is sound and of the same code as the stamp of today."""
    return not stamp_fault(recorded) and recorded["digest"] == today["digest"]


# What runs is what was imported: the sources are read once, so that one edited during a long run
# does not pass for it.
INSTALLED = Package(PACKAGE)
