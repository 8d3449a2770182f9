"""Points of a sweep spread over processes: of this machine, or of a cluster that Dask runs.

The environment asks for them. A single process leaves most of a GPU idle while it trains a small
model. Several share it well. What a process has loaded for one point serves its others, and it
stays for the sweeps that follow.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any

from pruning_utils import runtime
from pruning_utils.engine.later import torch

VARIABLE = "PRUNING_UTILS_WORKERS"
MOST = 64
# A cluster's scheduler must answer, and one of its workers join, within so many seconds.
PATIENCE = 60.0
# What computes points, by digest, as a worker has read it. It may hold models, which one point at a
# time may use: a worker of a cluster may have several threads.
_read: dict[str, Callable] = {}
_one_at_a_time = threading.Lock()


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
        asked = _sent(outcome, compute_point, point)
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


class Cluster(Executor):
    """Workers of a Dask cluster, on any machines that share this checkout's packages.

    A worker that is lost loses the points that it had; others compute them again. A worker
    computes one point at a time, so that one thread each, and one GPU each, is enough.

    Args:
        address: Of the scheduler, such as ``tcp://10.0.0.1:8786``.

    Raises:
        ModuleNotFoundError: If Dask is not installed.
        RuntimeError: If the scheduler does not answer, or no worker joins it.
    """

    def __init__(self, address: str) -> None:
        try:
            import distributed
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{VARIABLE} is the address of a cluster, {address}, which needs Dask: "
                "pip install distributed"
            ) from error
        try:
            client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"no scheduler answers at {address}: {error}") from error
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            client.close()
            raise RuntimeError(
                f"no worker has joined the scheduler at {address} within {PATIENCE:g} s"
            ) from error
        self._client = client
        # Dask would give the outcome of an equal call before: a table that is computed anew is not.
        self._pool = client.get_executor(pure=False)

    def submit(  # type: ignore[override]
        self, outcome: Callable, compute_point: Callable, point: dict
    ) -> Future:
        """The future of ``outcome(compute_point, point)``."""
        return self._pool.submit(_outcome, *_sent(outcome, compute_point, point))

    def is_joined(self) -> bool:
        """Whether the connection to the scheduler is there."""
        return self._client.status == "running"

    def close(self) -> None:
        """Leave the cluster, which stays."""
        self._client.close()


def _sent(outcome: Callable, compute_point: Callable, point: dict) -> tuple:
    """What :func:`_outcome` gets."""
    content = pickle.dumps(compute_point)
    return outcome, hashlib.sha256(content).hexdigest(), content, point


def asked_for() -> Executor | None:
    """The workers that PRUNING_UTILS_WORKERS asks for; None where it is not set, or is 1.

    Raises:
        ValueError: If it is neither a number from 1 to 64 nor the address of a Dask scheduler.
        ModuleNotFoundError: As for :class:`Cluster`, with ``RuntimeError``.
    """
    text = os.environ.get(VARIABLE, "1")
    if "://" in text:
        if not _joined(text).is_joined():
            _joined(text).close()
            _joined.cache_clear()
        return _joined(text)
    if not (text.isdecimal() and 1 <= int(text) <= MOST):
        raise ValueError(
            f"{VARIABLE} must be a number of processes from 1 to {MOST}, or the address "
            f"of a Dask scheduler such as tcp://127.0.0.1:8786, got {text!r}"
        )
    return None if int(text) == 1 else _kept(int(text))


@functools.cache
def _kept(number: int) -> Workers:
    return Workers(number)


@functools.cache
def _joined(address: str) -> Cluster:
    return Cluster(address)


def _begin(threads: int) -> None:
    """What a worker does first."""
    torch.set_num_threads(threads)


def _outcome(outcome: Callable, digest: str, content: bytes, point: dict) -> Any:
    """In a worker: one that computed the points of another sweep before lets go of that."""
    with _one_at_a_time:
        if digest not in _read:
            os.environ.pop(VARIABLE, None)  # a worker of a cluster may have it too
            runtime.setup()
            _read.clear()
            _read[digest] = pickle.loads(content)
        return outcome(_read[digest], point)
