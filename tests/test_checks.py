"""What counts as a whole number, and what the message says of anything else."""

import math
import re

import numpy as np
import pytest

from pruning_utils.engine.checks import whole_number


@pytest.mark.parametrize("value", [2, 5, np.int64(2), np.int8(5), np.uint64(3), np.uint8(2)])
def test_whole_numbers_come_back_as_pythons_own(value):
    found = whole_number("n", value, 2, 5)
    assert found == value and type(found) is int


@pytest.mark.parametrize(
    "value", [1, 6, -3, True, np.True_, 2.0, np.float64(2), math.nan, "2", None, [2]]
)
def test_anything_else_is_refused_with_its_name_and_range(value):
    with pytest.raises(
        ValueError, match=f"^n must be a whole number from 2 to 5, got {re.escape(repr(value))}$"
    ):
        whole_number("n", value, 2, 5)


def test_a_range_without_an_end():
    assert whole_number("limit", 10**30, 1) == 10**30
    with pytest.raises(ValueError, match="^limit must be a whole number of at least 1, got 0$"):
        whole_number("limit", 0, 1)


def test_the_message_says_what_is_counted():
    with pytest.raises(
        ValueError, match=r"^n must be a whole number from 0 to 3 \(layers\), got 4$"
    ):
        whole_number("n", 4, 0, 3, of="layers")
