"""Layer pruning of large language models: measure, choose, remove, heal, evaluate.

The package has three floors, and two houses of their own beside them:

* The core has one module a step of the work; ``dir(pruning_utils)`` lists it, and each is imported
  when it is first used.
* :mod:`~pruning_utils.studies` composes the steps into what the notebooks compute.
* :mod:`~pruning_utils.engine` computes, keeps and checks results; no notebook imports it.
* :mod:`~pruning_utils.planning` says what each step takes, from a configuration alone.
* :mod:`~pruning_utils.shrinking` makes a smaller model of one's own: the command ``pruning-utils``.

The map below names, for each notebook, its question, its modules of the studies and its steps of
the core. All of them load with ``models`` and ``data``. Notebooks 02 to 13 share ``studies.study``,
which cuts, trains and measures a model, and ``studies.recipes``, which says how.

00  What breaks when eight of thirty layers go, and what does healing bring back?
    whole_path, depth: similarity, selection, surgery, healing, evaluation
01  Which layers change the hidden states least?
    scan, depth: similarity, selection
02  How many layers can go before the answers fall?
    depth, places: similarity, selection, surgery, evaluation
03  Does healing turn the jump of the loss into a slope?
    depth, places, beginnings: similarity, selection, surgery, healing, evaluation
04  Is it enough to remove the deepest layers?
    depth, rates: similarity, selection, surgery, healing, evaluation
05  How much do the seed, the rank, the rate and the shots matter?
    depth, shots: similarity, selection, surgery, healing, evaluation
06  Which layers matter, and does it matter how one asks?
    scores, sets, depth, pairs, rates: importance, selection, surgery, healing, evaluation
07  Are fewer layers faster than narrower ones?
    scores, sets, shapes, depth, speeds, costs, rates: importance, selection, surgery, width,
    healing, evaluation, efficiency
08  Adapters or all weights: what brings a pruned model back?
    scores, sets, depth, costs, quantised, rates: importance, selection, surgery, healing,
    evaluation, efficiency
09  Does it matter how the layers are chosen?
    scores, sets, depth, pairs, rates: similarity, importance, selection, surgery, healing,
    evaluation, efficiency
10  Which way of healing is best, each at its own rate?
    scores, sets, depth, costs, rates: similarity, importance, selection, surgery, healing,
    evaluation, efficiency
11  Do rounds, more samples or another text help?
    scores, sets, depth, pairs, rates, swaps: similarity, importance, selection, surgery, healing,
    evaluation, efficiency
12  What does the recommended model give, all in all?
    scores, sets, depth, costs, rates: similarity, importance, selection, surgery, healing,
    evaluation, efficiency, release
13  Is a smaller model of your own still fit for use?
    depth: similarity, importance, selection, surgery, healing, evaluation, efficiency
"""

import os

# By this name, which engine.definitions lets pass: it reads the module behind a dotted name from
# the files, and never from what the function below returns.
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

# The core, in the order of the work.
MODULES = (
    "runtime",
    "models",
    "data",
    "similarity",
    "importance",
    "selection",
    "surgery",
    "healing",
    "evaluation",
    "efficiency",
    "evidence",
    "results",
    "plots",
    "depth_plots",
    "importance_plots",
    "cost_plots",
    "healing_plots",
    "round_plots",
    "verdict_plots",
    "width",
    "release",
    "offload",
    "sharded",
    "embedded",
    "instructions",
    "pages",
)

# Threads of torch that wait for each other spin by default, at the cost of any other process: two
# of them, with a thread for each core, then take four times as long as one. GNU's OpenMP reads this
# when torch is imported; waiting a thousand turns before sleeping costs a single process nothing
# that can be measured.
SPIN_COUNT = os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> ModuleType:
    """A module of the core, imported when it is first used."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """What a person is offered after a dot: the core and the version."""
    return sorted([*MODULES, "__version__"])
