"""Checks of what functions are given, so that one kind of mistake has one wording everywhere."""

from __future__ import annotations

import math

import numpy as np


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
