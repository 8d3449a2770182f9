"""What the task files beside this one read: the embedded benchmarks in the form that lm-eval asks
for."""

import numpy as np
from datasets import Dataset

from pruning_utils import data

SHUFFLE_SEED = 0
N_FEWSHOT = 16


def load(benchmark: str, **_) -> dict[str, Dataset]:
    """Questions of one benchmark, with the fields of :class:`pruning_utils.data.Question`, in a
    fixed shuffled order.

    Returns:
        ``test``, all of them, and ``fewshot``, the last 16, which are not scored when they serve as
        shots.
    """
    questions = data.load_questions(benchmark)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(questions))
    shuffled = [questions[row]._asdict() for row in order]
    return {
        "test": Dataset.from_list(shuffled),
        "fewshot": Dataset.from_list(shuffled[-N_FEWSHOT:]),
    }
