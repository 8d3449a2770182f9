"""What a number depends on: hand-made packages of a few lines, and the real one."""

import functools
import json
from pathlib import Path

import pytest

import pruning_utils
from pruning_utils import efficiency, importance, selection
from pruning_utils.engine import definitions
from pruning_utils.engine.definitions import INSTALLED, Package
from pruning_utils.studies.study import Study, loaded

ROOT = Path(__file__).resolve().parents[1]

MAIN = '''
"""Doc."""
from __future__ import annotations
from pathlib import Path
from typing import NamedTuple
import numpy as np
from pkg import tools
from pkg.tools import SCALE as scale

LIMIT = 3
UNUSED = 4


class Base:
    def __call__(self, point):
        return tools.double(point)


class Study(Base):
    """Doc."""

    def extra(self, n: int = 1) -> int:
        return np.abs(n) + LIMIT + scale


def unreached():
    return tools.triple(UNUSED)
'''
TOOLS = """
SCALE = 10


def double(x):
    return 2 * _one(x)


def _one(x):
    return x


def triple(x):
    return 3 * x
"""
ROOT_OF_MAIN = [("main", "Study")]


def package(folder: Path, **sources: str) -> Package:
    """A package ``pkg`` of these modules (``a__b`` is ``a/b.py``)."""
    for name, text in ({"main": MAIN, "tools": TOOLS} | sources).items():
        path = folder / "pkg" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(folder / "pkg")


def digest(folder: Path, root=ROOT_OF_MAIN, **sources: str) -> str:
    return package(folder, **sources).stamp_of(list(root))["digest"]


def test_what_is_reached_as_worked_by_hand(tmp_path):
    stamp = package(tmp_path).stamp_of(ROOT_OF_MAIN)
    assert stamp["root"] == "main.Study"
    assert set(stamp["definitions"]) == {
        "main.Study",
        "main.Base",
        "main.LIMIT",
        "tools.SCALE",
        "tools.double",
        "tools._one",
    }


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        ("main", '"""Doc."""', '"""Other words."""'),
        (
            "main",
            "return np.abs(n) + LIMIT + scale",
            "# why\n        return (np.abs( n )\n                + LIMIT + scale)",
        ),
        ("main", "n: int = 1) -> int", "n = 1)"),
        ("main", "UNUSED = 4", "UNUSED = 5"),
        ("tools", "return 3 * x", "return 4 * x"),
        ("main", "import numpy as np", "import numpy"),
        ("main", "from pkg import tools", "from . import tools"),
        ("main", "from pkg import tools", "import pkg.tools as tools"),
        ("main", "import SCALE as scale", "import SCALE as scale, triple"),
    ],
)
def test_words_layout_and_what_is_not_reached_do_not_count(tmp_path, module, before, after):
    sources = {"main": MAIN, "tools": TOOLS}
    changed = sources[module].replace(before, after)
    changed = changed.replace("np.abs", "numpy.abs") if after == "import numpy" else changed
    assert changed != sources[module]
    assert digest(tmp_path / "a") == digest(tmp_path / "b", **{module: changed})


def test_places_do_not_count(tmp_path):
    """The definitions of tools lie in two modules of a sub-package, in another order."""
    first, last = TOOLS.split("def _one", 1)
    body, triple = last.split("def triple", 1)
    moved = {
        "main": MAIN.replace(
            "from pkg import tools", "from pkg.deep import upper as tools"
        ).replace(
            "from pkg.tools import SCALE as scale", "from pkg.deep.lower import SCALE as scale"
        ),
        "tools": "",
        "deep____init__": "",
        "deep__lower": f"def _one{body}\n\nSCALE = 10\n",
        "deep__upper": "from .lower import _one\n\n\ndef triple"
        + triple
        + first.replace("SCALE = 10", ""),
    }
    assert digest(tmp_path / "a") == digest(tmp_path / "b", **moved)
    then = package(tmp_path / "a").stamp_of(ROOT_OF_MAIN)
    assert package(tmp_path / "b", **moved).changes(then) == []
    elsewhere = {"main": "", "studies": MAIN}
    assert package(tmp_path / "c", **elsewhere).changes(then) == [], (
        "a root that has moved is found by its name"
    )


@pytest.mark.parametrize(
    ("module", "before", "after", "named"),
    [
        ("main", "n: int = 1", "n: int = 2", ["main.Study"]),
        ("main", "LIMIT = 3", "LIMIT = 3.0", ["main.LIMIT"]),
        ("main", "tools.double(point)", "tools.triple(point)", ["main.Base", "tools.triple"]),
        ("main", "class Study(Base)", "class Study", ["main.Study"]),
        ("tools", "SCALE = 10", "SCALE = 11", ["tools.SCALE"]),
        ("tools", "    return x\n", "    return -x\n", ["tools._one"]),
        ("tools", "def double", "@functools.cache\ndef double", ["tools.double"]),
        ("main", "import numpy as np", "import cupy as np", ["main.Study"]),
    ],
)
def test_what_changed_is_named(tmp_path, module, before, after, named):
    sources = {"main": MAIN, "tools": TOOLS}
    then = package(tmp_path / "a").stamp_of(ROOT_OF_MAIN)
    changes = package(
        tmp_path / "b", **{module: sources[module].replace(before, after, 1)}
    ).changes(then)
    assert set(named) <= set(changes)
    assert set(changes) - set(named) <= {"main.Base", "tools.double", "tools._one"}, (
        "and what is reached no more"
    )


LATER = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
    import torch.utils.data as texts
    from torch import nn
else:
    torch, nn, texts = map(str, ["torch", "torch.nn", "torch.utils.data"])
"""


def test_what_is_imported_when_it_is_used_counts_as_imported_at_once(tmp_path):
    body = """
def f(x, size=nn.Linear):
    return torch.abs(x) + nn.functional.relu(x) + len(texts.Dataset)
"""
    at_once = "import torch\nimport torch.utils.data as texts\nfrom torch import nn\n"
    later = "from pkg.engine.later import nn, texts, torch\n"
    root = [("main", "f")]
    found = [
        package(tmp_path / name, main=f"{imports}{body}", engine__later=LATER).stamp_of(root)
        for name, imports in {"a": at_once, "b": later, "c": later.replace("pkg", "")}.items()
    ]
    assert found[0] == found[1] == found[2]
    assert list(found[0]["definitions"]) == ["main.f"]
    other = LATER.replace("from torch import nn", "from cupy import nn")
    assert (
        digest(tmp_path / "d", root, main=f"{later}{body}", engine__later=other)
        != (found[0]["digest"])
    )


def test_two_definitions_of_one_name_are_not_taken_for_each_other(tmp_path):
    """A sum over texts in which names stand for definitions would not see the exchange."""
    source = "from pkg import left, right\n\ndef f(x):\n    return left.step(x) - right.step(x)\n"
    steps = {"left": "def step(x):\n    return x\n", "right": "def step(x):\n    return 2 * x\n"}
    exchanged = {"left": steps["right"], "right": steps["left"]}
    assert digest(tmp_path / "a", [("main", "f")], main=source, **steps) != digest(
        tmp_path / "b", [("main", "f")], main=source, **exchanged
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "from pkg import tools\ndef f(n):\n    return getattr(tools, n)(1)\n",
            "module of the package as a value in line 3",
        ),
        (
            "from pkg import tools\ndef f(n):\n    return vars(tools)[n]\n",
            "module of the package as a value",
        ),
        (
            "from pkg import tools\ndef f():\n    tools.double = max\n",
            "replaces tools.double in line 3",
        ),
        ("from pkg.tools import *\ndef f():\n    return double(1)\n", r"imports \* from tools"),
        ("def f(n):\n    return globals()[n]\n", "uses globals in line 2"),
        ("def f(n):\n    exec(n)\n", "uses exec in line 2"),
        ("def f(n):\n    return __import__(n)\n", "uses __import__ in line 2"),
        ("def f(n):\n    return eval(n)\n", "uses eval"),
        (
            "import importlib\ndef f(n):\n    return importlib.import_module(n)\n",
            "uses importlib.import_module",
        ),
        ("import sys\ndef f(n):\n    return sys.modules[n]\n", "uses sys.modules"),
        (
            "import torch\ntorch.set_num_threads(1)\ndef f():\n    return 1\n",
            "statement in line 2 that is no definition",
        ),
        ("def g():\n    return 1\n", "no definition 'f'"),
    ],
)
def test_code_whose_dependencies_cannot_be_read_is_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        made = package(tmp_path, main=source)
        made.stamp_of([made._known("main", "f")])


def test_files_that_a_definition_names_belong_to_it(tmp_path):
    source = (
        "from pathlib import Path\n"
        'FILES = Path(__file__).with_name("tasks")\n'
        "def f():\n"
        "    return FILES\n"
    )
    root = [("main", "f")]

    def with_files(name: str, yaml: str, code: str) -> str:
        folder = tmp_path / name / "pkg" / "tasks"
        folder.mkdir(parents=True)
        (folder / "a.yaml").write_text(yaml)
        return digest(tmp_path / name, root, main=source, tasks__load=code)

    code = "from pkg import tools\ndef load():\n    return tools.double(1)\n"
    first = with_files("a", "task: a\n", code)
    assert with_files("b", "task: a\n", code) == first
    assert with_files("c", "task: b\n", code) != first
    assert with_files("d", "task: a\n", code.replace("(1)", "(2)")) != first
    assert (
        "tools.double"
        in package(tmp_path / "a", main=source, tasks__load=code).stamp_of(root)["definitions"]
    )


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        (None, "unstamped"),
        ("text", "damaged stamp"),
        ({}, "damaged stamp"),
        ({"version": 1, "root": "main.f"}, "damaged stamp"),
        ({"version": 1, "root": "f", "digest": "a", "definitions": {}}, "damaged stamp"),
        (
            {"version": 2, "root": "main.Study", "digest": "a", "definitions": {}},
            "stamp of version 2, this package reads 1",
        ),
        (
            {"version": 1, "root": "main.gone", "digest": "a", "definitions": {}},
            "main.gone is gone",
        ),
    ],
)
def test_stamps_that_cannot_be_read_are_never_fresh(tmp_path, recorded, said):
    assert package(tmp_path).changes(recorded) == [said]


def test_what_depends_on_no_definition_stays_fresh(tmp_path):
    stamp = package(tmp_path / "a").stamp()
    assert package(tmp_path / "b", tools="TOOLS = 1\n").changes(stamp) == []


def test_roots_of_compute_functions():
    roots = functools.partial(definitions.roots_of, package="pruning_utils")
    magnitude = ("importance", "magnitude")
    assert roots([importance.magnitude]) == [magnitude]
    assert roots([functools.partial(functools.partial(importance.magnitude, norm=1))]) == [
        magnitude
    ]
    assert roots([functools.partial(map, importance.magnitude)]) == [magnitude]
    study = Study.__new__(Study)
    assert (
        roots([study])
        == roots([study.__call__])
        == roots([type(study)])
        == [("studies.study", "Study")]
    )
    assert roots([loaded]) == [("studies.study", "loaded")], "cached functions too"
    assert roots([lambda: [importance.magnitude(None), selection]]) == [magnitude]
    assert roots([lambda: pruning_utils.importance.magnitude(None)]) == [magnitude]
    inner = importance.magnitude
    assert roots([lambda: lambda: inner]) == [magnitude], (
        "what a function from elsewhere encloses counts"
    )
    assert roots([print, 3, None, lambda: 1]) == []


def test_every_module_that_may_compute_can_be_read():
    """Only what draws sets something up when it is imported; no table comes from the other four."""
    unread = set()
    for module in INSTALLED.sources:
        for name in INSTALLED._module(module).definitions:
            try:
                INSTALLED.reached([(module, name)])
            except ValueError as error:
                assert "statement in line" in str(error)
                unread.add(module)
    others = {"sharded", "shrinking.reports", "shrinking.whole", "shrinking.command"}
    assert {name for name in unread if not name.endswith("plots")} == others


def test_the_code_of_the_tables_is_reached():
    """Names that a trained and evaluated model surely depends on, and some that it does not."""
    reached = set(INSTALLED.stamp(Study)["definitions"])
    assert {
        "healing.heal",
        "engine.trainer.train",
        "models.load_model",
        "embedded.MODELS",
        "data.healing_windows",
        "evaluation.evaluate_tasks",
        "engine.benchmarks.read",
        "surgery.drop_layers",
        "selection.best_block",
        "runtime.resolve_dtype",
        "engine.passes.SharedLayers",
    } <= reached
    assert not {where.partition(".")[0] for where in reached} & {
        "plots",
        "results",
        "evidence",
        "release",
    }
    limits = INSTALLED.stamp(efficiency.machine_limits)["definitions"]
    modules = {where.rpartition(".")[0] for where in limits}
    assert modules == {"efficiency", "runtime", "engine.checks", "engine.precisions"}
    assert "engine.records.write_table" not in reached, "how a table is kept does not count"


def test_stamps_are_plain_and_alike_in_every_process():
    stamp = INSTALLED.stamp(Study)
    another = Package(definitions.PACKAGE).stamp_of([("studies.study", "Study")])
    assert json.loads(json.dumps(stamp)) == stamp == another
