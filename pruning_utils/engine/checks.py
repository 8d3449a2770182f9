"""Checks of what functions are given, so that one kind of mistake has one wording everywhere."""

from __future__ import annotations

import functools
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pruning_utils.engine.later import Tensor, torch

# Held while the process's mask of permissions is asked for, which sets it.
ASKING = threading.Lock()


def whole_number(
    name: str, value: object, least: int, most: int | None = None, *, of: str = ""
) -> int:
    """Refuse a value that is no whole number from ``least`` to ``most``.

    NumPy's integers are whole numbers. Booleans and floats are none, whatever their value.

    Args:
        name: What the message calls the value.
        value: What a function was given.
        least: The smallest number that is allowed.
        most: The largest number that is allowed; None for no bound.
        of: What the numbers count, for the message, where the name does not say it.

    Returns:
        The value as a Python int.

    Raises:
        ValueError: If the value is no whole number or outside the range; both are named.
    """
    highest = math.inf if most is None else most
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if least <= value <= highest:
            return int(value)
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    counted = f" ({of})" if of else ""
    raise ValueError(f"{name} must be a whole number {allowed}{counted}, got {value!r}")


def number(name: str, value: object, allowed: str, holds: Callable[[float], bool]) -> int | float:
    """Refuse a value that is no number, or not one of those that are allowed.

    NumPy's numbers are numbers. Booleans are none.

    Args:
        name: What the message calls the value.
        value: What a function was given.
        allowed: Which numbers are, for the message: ``"above 0"``.
        holds: Whether a number is one of them.

    Returns:
        The value as Python's own int or float.

    Raises:
        ValueError: If the value is no such number; it and what is allowed are named.
    """
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        own = value.item() if isinstance(value, np.generic) else value
        if holds(own):
            return own
    raise ValueError(f"{name} must be {allowed}, got {value!r}")


def true_or_false(name: str, value: object) -> bool:
    """Refuse a value that is neither True nor False: a text such as ``"no"`` would count as True.

    Args:
        name: What the message calls the value.
        value: What a function was given; NumPy's booleans are taken.

    Returns:
        The value as Python's own bool.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")


def file_path(name: str, value: object) -> Path:
    """Refuse what is no path that a file can have.

    Args:
        name: What the message calls the value.
        value: What a function was given.

    Returns:
        The value as a path.

    Raises:
        ValueError: If it is neither a text nor a path, or holds a character that no path can have.
    """
    try:
        written = b"\0" if isinstance(value, bytes) else os.fsencode(value)  # type: ignore[arg-type]
    except (TypeError, UnicodeEncodeError):
        written = b"\0"
    if b"\0" in written:
        raise ValueError(f"{name} must be a path, as a text or a Path, got {value!r}")
    return Path(value)  # type: ignore[arg-type]


@functools.cache
def file_mode() -> int:
    """Permissions of a new file, as the process's mask of them leaves at the first call."""
    with ASKING:
        mask = os.umask(0o077)
        os.umask(mask)
    return 0o666 & ~mask


def real_numbers(name: str, values: object) -> np.ndarray:
    """Numbers as float64, whatever holds them: lists, arrays, or tensors of any kind.

    Args:
        name: What the message calls them.
        values: What a function was given. Masked entries of NumPy's arrays become NaN.

    Returns:
        float64 array of their shape.

    Raises:
        ValueError: If they are no real numbers, or of ragged shape.
    """
    try:
        if isinstance(values, Tensor) and not values.is_complex():
            return values.detach().to("cpu", torch.float64).numpy()
        array: np.ma.MaskedArray = np.ma.asarray(values)
        if array.dtype.kind in "biufO":
            return np.ma.filled(array.astype(np.float64), np.nan)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ValueError(f"{name} must be real numbers in a list, an array or a tensor, got {values!r}")


def refuse_nan(losses: torch.Tensor) -> torch.Tensor:
    """Refuse losses ``(n_windows, n_tokens)`` among which there are NaN; else they come back.

    Raises:
        ValueError: If one is NaN; the first window that has one is named.
    """
    missing = losses.isnan()
    if missing.any():
        raise ValueError(
            f"the losses must be numbers, but {int(missing.sum())} of {losses.numel()} are NaN, "
            f"first in window {int(missing.any(1).nonzero()[0])}"
        )
    return losses


def finite_scores(scores: np.ndarray) -> np.ndarray:
    """The scores of layers; a ValueError names the first layer whose score is not finite."""
    if not np.isfinite(scores).all():
        worst = int((~np.isfinite(scores)).argmax())
        raise ValueError(
            f"the score of layer {worst} is {scores[worst]}: its weights or gradients are not "
            "finite"
        )
    return scores


def plain_value(name: str, value: object) -> object:
    """Refuse a value that does not come back from JSON as it was written.

    Args:
        name: What the message calls the value.
        value: What a function was given.

    Returns:
        The value.

    Raises:
        ValueError: If it is no text, number, truth value or None, nor a list or mapping of those.
    """
    try:
        is_plain = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        is_plain = False
    if not is_plain:
        raise ValueError(
            f"{name} must be a plain value (text, number, True, False, None, or a list of them), "
            f"got {value!r}"
        )
    return value


def need_columns(table: Any, *columns: str) -> None:
    """Raise a ValueError for what is no DataFrame, or one without rows or one of the columns."""
    if not hasattr(table, "columns"):
        raise ValueError(f"the table must be a DataFrame, got {type(table).__name__}")
    missing = [column for column in columns if column not in table]
    if missing or table.empty:
        fault = f"missing: {', '.join(missing)}" if missing else "it is empty"
        raise ValueError(f"the table needs rows and the columns {', '.join(columns)}; {fault}")
