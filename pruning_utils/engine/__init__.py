"""How results are computed and kept, never what: no notebook imports anything from here.

:mod:`~pruning_utils.engine.records` reads and writes tables with their run records,
:mod:`~pruning_utils.engine.definitions` tells which code a number depends on,
:mod:`~pruning_utils.engine.saved_points` saves each point of a sweep as it ends,
:mod:`~pruning_utils.engine.passes` runs layers and head apart and shares first layers,
:mod:`~pruning_utils.engine.prefixes` runs once what prompts share,
:mod:`~pruning_utils.engine.benchmarks` reads the papers' questions for lm-eval's own tasks,
:mod:`~pruning_utils.engine.question_scores` turns what lm-eval asked into scores,
:mod:`~pruning_utils.engine.trainer` runs and saves trainings,
:mod:`~pruning_utils.engine.head_losses` computes their loss without a batch's logits,
:mod:`~pruning_utils.engine.model_files` judges what a model's files hold,
:mod:`~pruning_utils.engine.saved_models` writes them and reads them back,
:mod:`~pruning_utils.engine.held_configurations` keeps what a cut model says its own and true,
:mod:`~pruning_utils.engine.wrappers` refuses what is no model itself,
:mod:`~pruning_utils.engine.variances` combines variances and corrects for many tests,
:mod:`~pruning_utils.engine.verdict_rows` holds the words and columns of verdicts,
:mod:`~pruning_utils.engine.checks` refuses numbers out of range,
:mod:`~pruning_utils.engine.memory` halves batches that do not fit,
:mod:`~pruning_utils.engine.workers` spreads points over processes or a cluster,
:mod:`~pruning_utils.engine.beginnings` finds the tokens that begin a text, and writes chats,
:mod:`~pruning_utils.engine.kept_texts` remembers which of many texts something holds for,
:mod:`~pruning_utils.engine.corpora` reads documents of a hub,
:mod:`~pruning_utils.engine.overlapping` finds runs of words that texts share,
:mod:`~pruning_utils.engine.identities` tells a model's files from any others,
:mod:`~pruning_utils.engine.reader_names` translates names of tables for a reader,
:mod:`~pruning_utils.engine.later` imports torch when it is first used,
:mod:`~pruning_utils.engine.precisions` names the types of numbers that models compute with,
:mod:`~pruning_utils.engine.hub` finds out whether a hub answers, and
:mod:`~pruning_utils.engine.bars` chooses the progress bars.
"""

from importlib import import_module
from types import ModuleType

# Modules that need torch while they are imported, and are therefore imported when first used.
LATER = ("precisions", "head_losses")


def __getattr__(name: str) -> ModuleType:
    """A module of :data:`LATER`, not imported yet."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.later").Later(f"{__name__}.{name}")
