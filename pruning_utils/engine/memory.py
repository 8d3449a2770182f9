"""Batches that shrink where memory does not suffice, so that work goes on instead of ending."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.checks import whole_number
from pruning_utils.engine.later import torch

# Tokens in a batch where batch_size is None. On a CPU, more would leave its caches.
TOKENS_AT_ONCE = {"cpu": 2**12, "cuda": 2**15}
Result = TypeVar("Result")
# What allocators raise: those of PyTorch a RuntimeError, Python and NumPy a MemoryError.
ERRORS = (RuntimeError, MemoryError)
# On a CPU, and inside the libraries of a GPU, the error has no kind of its own.
TEXTS = ("allocate memory", "out of memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
logger = logging.getLogger(__name__)


def give_back() -> None:
    """Let go what nothing refers to any more, so that other processes find room on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class BatchSize:
    """How many items are taken at once: halved, with a notice, wherever they do not fit.

    Attributes:
        size: Items in a batch, at most. Batches that do not fit make it smaller.

    Args:
        size: Items to begin with, at least 1.
        noun: What the notice calls the items.
        whole: Number of items that batches have to divide evenly; None where the last batch may be
            smaller.
    """

    def __init__(self, size: int, *, noun: str = "samples", whole: int | None = None):
        self.size = size
        self.noun = noun
        self.whole = whole

    def halve(self, n: int, error: BaseException) -> None:
        """Take at most half of ``n`` items from now on.

        Args:
            n: Items of the batch that failed.
            error: What it failed with, the exception that is being handled.

        Raises:
            MemoryError: If the batch was a single item.
            BaseException: The error itself, if it is not one of lacking memory.
        """
        if not is_lack_of_memory(error):
            raise error
        if n == 1:
            raise MemoryError(
                f"not even a batch of one of the {self.noun} fits into memory ({error}): take "
                "shorter ones, a smaller model, or one with 4-bit weights"
            ) from error
        half = n // 2
        while self.whole and self.whole % half:
            half -= 1
        self.size = half
        logger.warning(
            "a batch of %d %s does not fit into memory; going on with %d", n, self.noun, half
        )

    def run(
        self, function: Callable[[slice], Result], n: int, progress: tqdm | None = None
    ) -> list[Result]:
        """Call a function on batches of ``n`` items, one after another.

        Args:
            function: Given the places of a batch's items, does all of its work or, where memory
                does not suffice, none: it is then called again on fewer of them.
            n: Number of all items.
            progress: A bar in items, moved after each batch.

        Returns:
            What the function returned for each batch.

        Raises:
            MemoryError: If a batch of one item does not fit into memory.
        """
        results: list[Result] = []
        done = 0
        while done < n:
            batch = slice(done, min(done + self.size, n))
            try:
                results.append(function(batch))
            except ERRORS as error:
                self.halve(batch.stop - batch.start, error)
                continue
            done = batch.stop
            if progress is not None:
                progress.update(batch.stop - batch.start)
        return results


def samples_at_once(batch_size: int | None, input_ids: torch.Tensor, n_streams: int) -> int:
    """The batch size that was asked for; for None as many samples as fill TOKENS_AT_ONCE.

    Args:
        batch_size: What a function was given.
        input_ids: Token ids ``(N, T)``, on the device that computes.
        n_streams: Rows that each sample becomes.

    Raises:
        ValueError: If it is no whole number of at least 1.
    """
    if batch_size is not None:
        return whole_number("batch_size", batch_size, 1)
    most = TOKENS_AT_ONCE["cuda" if input_ids.is_cuda else "cpu"]
    return max(1, most // (n_streams * input_ids.shape[1]))


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)
