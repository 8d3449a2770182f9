"""The 13-word rule: which texts share a run of words with texts that are evaluated on."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

import numpy as np

# Two texts that share a run of this many words count as overlapping.
RUN_LENGTH = 13


def overlaps(texts: Iterable[str], others: Iterable[str]) -> np.ndarray:
    """Whether each text shares a run of 13 lower-cased words with any of the others.

    Words are the matches of ``\\w+``. Runs are compared by 64-bit hashes, so a text may be flagged
    by chance once in about 10**13 comparisons, but no shared run is missed.

    Returns:
        bool array of shape ``(len(texts),)``.
    """
    texts = list(texts)
    numbers, known = _known_runs(tuple(others))
    # All words that the others do not have share a number that none of theirs has.
    hashes, owner = _run_hashes(texts, lambda word: numbers.get(word, len(numbers)))
    shared = np.zeros(len(texts), bool)
    if len(known):
        nearest = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)]
        shared[owner[hashes == nearest]] = True
    return shared


@functools.lru_cache(maxsize=1)
def _known_runs(others: tuple[str, ...]) -> tuple[dict[str, int], np.ndarray]:
    """Numbers of words, and the ascending hashes of all runs.

    They are kept, since every split is compared with the same texts.
    """
    numbers: dict[str, int] = {}
    hashes, _ = _run_hashes(others, lambda word: numbers.setdefault(word, len(numbers)))
    return numbers, np.sort(hashes)


def _run_hashes(
    texts: Iterable[str], number_of: Callable[[str], int]
) -> tuple[np.ndarray, np.ndarray]:
    """uint64 hash of every run of RUN_LENGTH words, and the number of the run's text.

    Equal runs have equal hashes. ``number_of`` gives the number of a word.
    """
    words_by_text = [re.findall(r"\w+", text.lower()) for text in texts]
    owner = np.repeat(np.arange(len(words_by_text)), [len(words) for words in words_by_text])
    words = np.array([number_of(word) for words in words_by_text for word in words], np.uint64)
    weights = 1 | np.random.default_rng(0).integers(1, 2**64, RUN_LENGTH, dtype=np.uint64)
    n_runs = max(len(words) - RUN_LENGTH + 1, 0)
    hashes = np.zeros(n_runs, np.uint64)
    for offset, weight in enumerate(weights):
        hashes += weight * words[offset : offset + n_runs]
    first = owner[:n_runs]
    inside = first == owner[RUN_LENGTH - 1 :][:n_runs]
    return hashes[inside], first[inside]
