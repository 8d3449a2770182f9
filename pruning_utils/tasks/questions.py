"""What the task files beside this one read: embedded benchmarks in the form of lm-eval."""

import numpy as np
from datasets import Dataset

from pruning_utils import data

SHUFFLE_SEED = 0
N_FEWSHOT = 16


def load(benchmark: str, **_: object) -> dict[str, Dataset]:
    """Questions of one benchmark in a fixed shuffled order.

    Args:
        benchmark: One of :data:`pruning_utils.data.BENCHMARKS`.
        **_: What lm-eval adds, which changes nothing.

    Returns:
        ``test``, all of them, and ``fewshot``, the last 16, which are not scored when they serve as
        shots. The fields are those of :class:`pruning_utils.data.Question`.
    """
    questions = data.load_questions(benchmark)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(questions))
    shuffled = [questions[row]._asdict() for row in order]
    return {
        "test": Dataset.from_list(shuffled),
        "fewshot": Dataset.from_list(shuffled[-N_FEWSHOT:]),
    }
