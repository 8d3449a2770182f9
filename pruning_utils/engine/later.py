"""What takes seconds to import, imported when something of it is first used.

Figures are drawn from stored tables with nothing computed, so nothing there needs torch. Yet what
draws them imports the functions that would compute. So all modules have torch from here, and the
statistics of scipy, which few of them need:

    from pruning_utils.engine.later import nn, torch

For a reader, for type checkers and for :mod:`~pruning_utils.engine.definitions` this is ``import
torch`` and ``from torch import nn``. A module that needs torch while it is imported itself, as one
that derives a class from torch's, imports it in the usual way, and is named in ``engine.LATER``.
"""

from __future__ import annotations

from collections.abc import Callable

# By these names, which engine.definitions lets pass: no number depends on what is imported when.
from importlib import import_module
from sys import modules as all_imported
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = [
    "Later",
    "Tensor",
    "flop_counter",
    "nn",
    "safetensors_torch",
    "stats",
    "torch",
    "torch_is_imported",
    "when_torch_is_imported",
]

# What waits for torch.
_waiting: list[Callable[[], None]] = []
# What was imported. Asking for it anew takes microseconds, a million times in a notebook.
_known: dict[str, ModuleType] = {}


class Later(ModuleType):
    """Stands for a module, which is imported when an attribute is first asked for or replaced.

    Nothing is kept here: what is replaced is replaced in the module itself, for all who use it.

    Args:
        name: Full name of the module, such as ``torch.nn``.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(_imported(self.__name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(_imported(self.__name__), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(_imported(self.__name__), name)

    def __dir__(self) -> list[str]:
        return dir(_imported(self.__name__))

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        # What replaces an attribute for a while looks here for what was there.
        return _imported(self.__name__).__dict__


def torch_is_imported() -> bool:
    """Whether torch is there already; nothing that needs it was done otherwise."""
    return "torch" in all_imported


def when_torch_is_imported(act: Callable[[], None]) -> None:
    """Do something now if torch is imported, else as soon as this package first uses torch."""
    if torch_is_imported():
        act()
    else:
        _waiting.append(act)


def _imported(name: str) -> ModuleType:
    module = _known.get(name)
    if module is None:
        module = _known[name] = import_module(name)
    if _waiting and "torch" in all_imported:
        # What is done uses torch from here itself.
        waited, _waiting[:] = _waiting[:], []
        for act in waited:
            act()
    return module


if TYPE_CHECKING:
    import safetensors.torch as safetensors_torch
    import torch
    from scipy import stats
    from torch import Tensor, nn
    from torch.utils import flop_counter
else:

    class _OfTensors(type):
        """Before torch is imported, nothing can be a tensor."""

        def __instancecheck__(cls, value: object) -> bool:
            return "torch" in all_imported and isinstance(value, _imported("torch").Tensor)

    class Tensor(metaclass=_OfTensors):
        """Stands for ``torch.Tensor`` where all that is asked is whether something is one."""

    torch = Later("torch")
    nn = Later("torch.nn")
    flop_counter = Later("torch.utils.flop_counter")
    safetensors_torch = Later("safetensors.torch")
    stats = Later("scipy.stats")
