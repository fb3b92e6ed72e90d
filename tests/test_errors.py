"""Checks of arguments: what passes, what does not, and with which words."""

import math

import pytest

from flower_ext.errors import at_least, fraction, positive, refuse, whole

NO_NUMBERS = ["1", None, True, [1.0], 1j, math.nan]


def refused(check, *arguments):
    with pytest.raises(ValueError, match="must be") as caught:
        check(*arguments)
    return str(caught.value)


def test_the_words_are_name_value_bound_and_cause():
    assert refused(refuse, "rate", "x", "a number", "a typo?") == (
        "rate='x' must be a number: a typo?"
    )


def test_without_a_cause_the_words_end_with_the_bound():
    assert refused(refuse, "rate", -1, "> 0") == "rate=-1 must be > 0"


@pytest.mark.parametrize("value", [2, 2.0, 1e300])
def test_at_least_accepts_from_its_bound_on(value):
    at_least("x", value, 2)


@pytest.mark.parametrize("value", [1.999, -math.inf, math.inf, *NO_NUMBERS])
def test_at_least_refuses(value):
    assert refused(at_least, "x", value, 2, "why") == (
        f"x={value!r} must be a finite number >= 2: why"
    )


@pytest.mark.parametrize("value", [5e-324, 1, 1e300])
def test_positive_accepts_what_is_above_0(value):
    positive("x", value)


@pytest.mark.parametrize("value", [0, -0.0, -1, math.inf, *NO_NUMBERS])
def test_positive_refuses(value):
    assert refused(positive, "x", value) == f"x={value!r} must be a finite number > 0"


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_fraction_accepts_both_ends(value):
    fraction("x", value)


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, math.inf, *NO_NUMBERS])
def test_fraction_refuses(value):
    assert refused(fraction, "x", value) == f"x={value!r} must be between 0 and 1"


@pytest.mark.parametrize("value", [3, 10**30])
def test_whole_accepts_integers_from_its_bound_on(value):
    whole("x", value, 3)


@pytest.mark.parametrize("value", [2, 3.0, *NO_NUMBERS])
def test_whole_refuses(value):
    assert refused(whole, "x", value, 3) == f"x={value!r} must be an integer >= 3"
