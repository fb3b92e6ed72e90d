"""Checks of arguments: what passes, what does not, and with which words."""

import math

import numpy as np
import pytest

from flower_ext.core.errors import (
    at_least,
    finite,
    fraction,
    one_of,
    open_unit,
    positive,
    probability,
    refuse,
    whole,
)

NO_NUMBERS = ["1", None, True, [1.0], 1j, math.nan, np.bool_(True), np.ones(1)]


def refused(check, *arguments, **options):
    with pytest.raises(ValueError, match="must be") as caught:
        check(*arguments, **options)
    return str(caught.value)


def same(found, value):
    """Whether a check returned the value as a plain Python number."""
    return found == value and type(found) in (int, float)


def test_the_words_are_name_value_bound_and_cause():
    assert refused(refuse, "rate", "x", "a number", "a typo?") == (
        "rate='x' must be a number: a typo?"
    )


def test_without_a_cause_the_words_end_with_the_bound():
    assert refused(refuse, "rate", -1, "> 0") == "rate=-1 must be > 0"


@pytest.mark.parametrize("value", [2, 2.0, 1e300, np.float32(2.5), np.int64(2)])
def test_at_least_accepts_from_its_bound_on(value):
    assert same(at_least("x", value, 2), value)


@pytest.mark.parametrize("value", [1.999, -math.inf, math.inf, *NO_NUMBERS])
def test_at_least_refuses(value):
    assert refused(at_least, "x", value, 2, "why") == (
        f"x={value!r} must be a finite number >= 2: why"
    )


@pytest.mark.parametrize("value", [5e-324, 1, 1e300, np.float64(0.1)])
def test_positive_accepts_what_is_above_0(value):
    assert same(positive("x", value), value)


@pytest.mark.parametrize("value", [0, -0.0, -1, math.inf, *NO_NUMBERS])
def test_positive_refuses(value):
    assert refused(positive, "x", value) == f"x={value!r} must be a finite number > 0"


def test_positive_accepts_infinity_where_it_has_a_meaning():
    assert positive("x", math.inf, allow_inf=True) == math.inf
    for value in (0, -math.inf, math.nan):
        assert refused(positive, "x", value, allow_inf=True) == (
            f"x={value!r} must be a number > 0"
        )


@pytest.mark.parametrize(
    ("check", "inside", "outside", "bound"),
    [
        (fraction, [0, 0.5, 1], [-1e-9, 1.0000001], "between 0 and 1"),
        (probability, [5e-324, 0.5, 1], [0, 1.0000001], "in (0, 1]"),
        (open_unit, [5e-324, 0.5], [0, 1], "in the open interval (0, 1)"),
    ],
)
def test_parts_of_one_accept_their_interval_only(check, inside, outside, bound):
    for value in inside:
        assert same(check("x", value), value)
    for value in [*outside, math.inf, *NO_NUMBERS]:
        assert refused(check, "x", value, "why") == f"x={value!r} must be {bound}: why"


@pytest.mark.parametrize("value", [3, 10**30, np.int8(3), np.uint64(2**63)])
def test_whole_accepts_integers_from_its_bound_on(value):
    assert same(whole("x", value, 3), int(value))


@pytest.mark.parametrize("value", [-2, 0.0, np.float64(3), *NO_NUMBERS])
def test_whole_refuses(value):
    assert refused(whole, "x", value, -1) == f"x={value!r} must be an integer >= -1"


def test_one_of_accepts_the_words_only():
    assert one_of("x", "a", ["a", "b"]) == "a"
    assert refused(one_of, "x", "c", ["a", "b"], "why") == (
        "x='c' must be one of ('a', 'b'): why"
    )


@pytest.mark.parametrize("value", [-1e300, 0, np.float32(2.5), np.int64(-2)])
def test_finite_accepts_every_number_of_finite_size(value):
    assert same(finite("x", value), value)


@pytest.mark.parametrize("value", [-math.inf, math.inf, *NO_NUMBERS])
def test_finite_refuses(value):
    assert refused(finite, "x", value, "why") == (
        f"x={value!r} must be a finite number: why"
    )
