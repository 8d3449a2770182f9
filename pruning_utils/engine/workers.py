"""Points of a sweep spread over processes of this machine, as many as the environment asks for.

A single process leaves most of a GPU idle while it trains a small model. Several share it well.
What a process has loaded for one point serves its others, and it stays for the sweeps that follow.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any

import torch

from pruning_utils import runtime

VARIABLE = "PRUNING_UTILS_WORKERS"
MOST = 64
# What computes points, by digest, as a worker has read it. It may hold models.
_read: dict[str, Callable] = {}


class Workers(Executor):
    """Processes that compute points; each reads what computes them once.

    Args:
        number: Processes, at least 2. Each gets an equal share of the threads.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool = self._started()

    def submit(  # type: ignore[override]
        self, outcome: Callable, compute_point: Callable, point: dict
    ) -> Future:
        """The future of ``outcome(compute_point, point)``.

        Processes that were lost are replaced; the points that they had fail.
        """
        content = pickle.dumps(compute_point)
        asked = (outcome, hashlib.sha256(content).hexdigest(), content, point)
        try:
            return self._pool.submit(_outcome, *asked)
        except BrokenExecutor:
            self._pool = self._started()
            return self._pool.submit(_outcome, *asked)

    def _started(self) -> ProcessPoolExecutor:
        threads = max(1, torch.get_num_threads() // self.number)
        return ProcessPoolExecutor(
            self.number,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(threads,),
        )


def asked_for() -> Executor | None:
    """The workers that PRUNING_UTILS_WORKERS asks for; None where it is not set, or is 1.

    Raises:
        ValueError: If it is no number from 1 to 64.
    """
    text = os.environ.get(VARIABLE, "1")
    if not (text.isdecimal() and 1 <= int(text) <= MOST):
        raise ValueError(f"{VARIABLE} must be a number of processes from 1 to {MOST}, got {text!r}")
    return None if int(text) == 1 else _kept(int(text))


@functools.cache
def _kept(number: int) -> Workers:
    return Workers(number)


def _begin(threads: int) -> None:
    """What a worker does first."""
    os.environ.pop(VARIABLE, None)
    torch.set_num_threads(threads)
    runtime.setup()


def _outcome(outcome: Callable, digest: str, content: bytes, point: dict) -> Any:
    """In a worker: one that computed the points of another sweep before lets go of that."""
    if digest not in _read:
        _read.clear()
        _read[digest] = pickle.loads(content)
    return outcome(_read[digest], point)
