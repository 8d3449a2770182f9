"""Which of many texts something holds for, found once and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence

import numpy as np

from pruning_utils import runtime


def found_once(
    name: str, texts: Sequence[str], find: Callable[[], np.ndarray], *, distributions: Sequence[str]
) -> np.ndarray:
    """What was found for texts, from a file of the cache or anew.

    The file is known by its name, the texts, and the content of installed distributions that the
    finding reads. One that is damaged is made anew, and a cache that cannot be written is none.

    Args:
        name: Path below the cache, without a suffix; another one for another way of finding.
        texts: The texts.
        find: Gives a bool for each of them.
        distributions: Names of installed distributions.

    Returns:
        bool array of shape ``(len(texts),)``.
    """
    known_by = hashlib.sha256("\0".join(texts).encode())
    try:
        for distribution in map(importlib.metadata.distribution, distributions):
            # RECORD holds a digest of each of its files.
            known_by.update(f"{distribution.version} {distribution.read_text('RECORD')}".encode())
    except importlib.metadata.PackageNotFoundError:
        return find()  # it says how to install what is missing
    path = runtime.cache_dir() / f"{name}-{known_by.hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        kept = np.array(json.loads(path.read_text(encoding="utf-8")))
        if kept.dtype == bool and kept.shape == (len(texts),):
            return kept
    found = find()
    with contextlib.suppress(OSError), runtime.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found.tolist()), encoding="utf-8")
    return found
