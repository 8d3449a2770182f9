"""What takes seconds to import is imported when something of it is first used, and only then."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as the_torch

from pruning_utils import engine
from pruning_utils.engine import checks, later

ROOT = Path(__file__).resolve().parents[1]


def child(*lines: str) -> str:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(("import sys", *lines))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("torch", "float32"),
        ("nn", "Linear"),
        ("flop_counter", "FlopCounterMode"),
        ("safetensors_torch", "load_file"),
        ("stats", "rankdata"),
    ],
)
def test_what_stands_for_a_module_has_what_the_module_has(name, attribute):
    found = getattr(later, name)
    module = importlib.import_module(found.__name__)
    assert found is not module
    assert getattr(found, attribute) is getattr(module, attribute)
    assert set(dir(found)) == set(dir(module))
    with pytest.raises(AttributeError, match=f"{found.__name__}.*no_such"):
        _ = found.no_such


def test_what_is_replaced_is_replaced_for_all(monkeypatch):
    own = the_torch.is_storage
    monkeypatch.setattr(later.torch, "is_storage", "another")
    assert the_torch.is_storage == later.torch.is_storage == "another"
    monkeypatch.undo()
    assert the_torch.is_storage is own
    monkeypatch.setattr(the_torch, "is_storage", "one more")
    assert later.torch.is_storage == "one more"
    monkeypatch.setattr(later.torch, "of_no_torch", 1, raising=False)
    assert the_torch.of_no_torch == 1
    monkeypatch.undo()
    assert not hasattr(the_torch, "of_no_torch")


def test_a_tensor_is_one_of_torchs():
    assert isinstance(the_torch.ones(2), later.Tensor)
    assert isinstance(the_torch.nn.Parameter(the_torch.ones(2)), later.Tensor)
    assert not isinstance(np.ones(2), later.Tensor)
    assert checks.real_numbers("x", the_torch.ones(2)).tolist() == [1, 1]


def test_nothing_that_takes_seconds_is_imported_before_it_is_used():
    """Intervals and figures, a notebook's beginning, and modules that need torch at their top."""
    assert child(
        "from pruning_utils import evidence, plots",
        "print([name for name in ('scipy.stats', 'seaborn', 'torch') if name in sys.modules])",
        "from pruning_utils import healing, importance, pages, runtime",
        "from pruning_utils.engine import head_losses, precisions",
        "from pruning_utils.engine.later import nn",
        "pages.begin(5)",
        "pages.begin(3)",
        "names = {'torch', 'pruning_utils.engine.precisions', 'pruning_utils.engine.head_losses'}",
        "print(sorted(names & {*sys.modules}), 'transformers' in sys.modules)",
        "weight = nn.Linear(2, 2).weight",
        "import torch",
        "print(torch.initial_seed(), torch.are_deterministic_algorithms_enabled())",
        "torch.manual_seed(3)",
        "print(torch.equal(weight, torch.nn.Linear(2, 2).weight))",
        "pages.begin(4)",
        "print(torch.initial_seed())",
        "runtime.resolve_dtype('float32')",
        "print(sorted(names & {*sys.modules}))",
        "print(head_losses.TOKENS_AT_ONCE)",
        "head_losses.TOKENS_AT_ONCE = 7",
        "from pruning_utils.engine import head_losses as now",
        "print(now is sys.modules['pruning_utils.engine.head_losses'], now.TOKENS_AT_ONCE)",
    ).splitlines() == [
        "[]",
        "[] False",
        "3 True",
        "True",
        "4",
        "['pruning_utils.engine.precisions', 'torch']",
        "128",
        "True 7",
    ]
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = engine.no_such


def test_what_waits_is_done_once(monkeypatch):
    done = []
    monkeypatch.setattr(later, "_waiting", [])
    monkeypatch.setattr(later, "all_imported", {})
    later.when_torch_is_imported(lambda: done.append("first"))
    later.when_torch_is_imported(lambda: done.append("second"))
    assert later.nn.Linear and done == []
    monkeypatch.setattr(later, "all_imported", {"torch": the_torch})
    assert later.nn.Linear and later.nn.Linear
    assert done == ["first", "second"]
    later.when_torch_is_imported(lambda: done.append("third"))
    assert done == ["first", "second", "third"]
