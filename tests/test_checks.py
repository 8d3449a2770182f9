"""What counts as a whole number, and what the message says of anything else."""

import math
import re

import numpy as np
import pytest
import torch

from pruning_utils.engine.checks import (
    number,
    plain_value,
    refuse_nan,
    true_or_false,
    whole_number,
)


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


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0.5, float),
        (0, int),
        (np.float32(0.5), float),
        (np.float64(0.25), float),
        (np.int8(0), int),
    ],
)
def test_numbers_come_back_as_pythons_own(value, kind):
    found = number("share", value, "in [0, 1)", lambda share: 0 <= share < 1)
    assert found == value and type(found) is kind


@pytest.mark.parametrize(
    "value", [1, -0.5, math.nan, np.float32("nan"), True, np.True_, "0.5", None]
)
def test_other_numbers_are_refused_with_what_is_allowed(value):
    with pytest.raises(
        ValueError, match=rf"^share must be in \[0, 1\), got {re.escape(repr(value))}$"
    ):
        number("share", value, "in [0, 1)", lambda share: 0 <= share < 1)


def test_only_true_and_false_are_truth_values():
    assert true_or_false("merge", np.False_) is False and true_or_false("merge", True) is True
    for value in ("no", "", 0, 1, None, np.int64(1)):
        with pytest.raises(
            ValueError, match=f"^merge must be True or False, got {re.escape(repr(value))}$"
        ):
            true_or_false("merge", value)


@pytest.mark.parametrize("value", [None, "all", 3, 0.5, True, ["a", "b"], {"a": [1]}])
def test_plain_values_pass(value):
    assert plain_value("targets", value) is value


@pytest.mark.parametrize("value", [{1, 2}, (1, 2), {1: 2}, np.ones(2), math.nan, b"all"])
def test_what_json_does_not_give_back_is_refused(value):
    with pytest.raises(ValueError, match="^targets must be a plain value .*, got "):
        plain_value("targets", value)


def test_nan_among_losses_is_counted_and_placed():
    losses = torch.tensor([[1.0, 2.0], [math.inf, 3.0], [math.nan, math.nan]])
    assert refuse_nan(losses[:2]) is not None
    with pytest.raises(ValueError, match="but 2 of 6 are NaN, first in window 2"):
        refuse_nan(losses)
