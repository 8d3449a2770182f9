"""Layer pruning of large language models: measure, choose, remove, heal, evaluate.

One module a step, in the order of the work: :mod:`~pruning_utils.models` and
:mod:`~pruning_utils.data` load, :mod:`~pruning_utils.similarity` compares the states around blocks,
:mod:`~pruning_utils.importance` scores single layers, :mod:`~pruning_utils.selection` chooses,
:mod:`~pruning_utils.surgery` removes (:mod:`~pruning_utils.width` makes all layers narrower
instead), :mod:`~pruning_utils.healing` trains, :mod:`~pruning_utils.evaluation` measures
:mod:`~pruning_utils.efficiency` says what a model costs and :mod:`~pruning_utils.evidence` how sure
a number is, :mod:`~pruning_utils.experiments`, :mod:`~pruning_utils.depth_study`,
:mod:`~pruning_utils.importance_study` and :mod:`~pruning_utils.shape_study` join the steps for
notebooks, :mod:`~pruning_utils.results` keeps, and :mod:`~pruning_utils.plots` and
:mod:`~pruning_utils.depth_plots` draw. Importing the package imports none of them.
"""

import os

__version__ = "0.1.0"

# Threads of torch that wait for each other spin by default, at the cost of any other process: two
# of them, with a thread for each core, then take four times as long as one. GNU's OpenMP reads this
# when torch is imported; waiting a thousand turns before sleeping costs a single process nothing
# that can be measured.
SPIN_COUNT = os.environ.setdefault("GOMP_SPINCOUNT", "1000")
