"""Argument checks whose messages carry argument, value, bound and usual cause."""

import math
from numbers import Integral, Real


def _fail(name: str, value: object, bound: str, cause: str) -> ValueError:
    """Build the one message format that this package uses."""
    text = f"{name}={value!r} must be {bound}"
    return ValueError(f"{text}: {cause}" if cause else text)


def positive_int(name: str, value: object, cause: str = "") -> int:
    """Return ``value`` as an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise _fail(name, value, "an integer >= 1", cause)
    return int(value)


def non_negative_int(name: str, value: object, cause: str = "") -> int:
    """Return ``value`` as an int >= 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise _fail(name, value, "an integer >= 0", cause)
    return int(value)


def _real(value: object) -> float:
    """Return ``value`` as a float, NaN when it is not a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value)


def positive(
    name: str, value: object, cause: str = "", *, allow_inf: bool = False
) -> float:
    """Return ``value`` as a float > 0; infinity only where it has a meaning."""
    number = _real(value)
    if not number > 0 or (math.isinf(number) and not allow_inf):
        bound = "> 0 (inf is allowed)" if allow_inf else "> 0 and finite"
        raise _fail(name, value, bound, cause)
    return number


def non_negative(name: str, value: object, cause: str = "") -> float:
    """Return ``value`` as a finite float >= 0."""
    number = _real(value)
    if not number >= 0 or math.isinf(number):
        raise _fail(name, value, ">= 0 and finite", cause)
    return number


def open_unit(name: str, value: object, cause: str = "") -> float:
    """Return ``value`` as a float in (0, 1)."""
    number = _real(value)
    if not 0 < number < 1:
        raise _fail(name, value, "in the open interval (0, 1)", cause)
    return number


def probability(name: str, value: object, cause: str = "") -> float:
    """Return ``value`` as a float in (0, 1]."""
    number = _real(value)
    if not 0 < number <= 1:
        raise _fail(name, value, "in (0, 1]", cause)
    return number


def one_of(name: str, value: str, choices: tuple[str, ...], cause: str = "") -> str:
    """Return ``value`` if it is one of ``choices``."""
    if value not in choices:
        raise _fail(name, value, f"one of {choices}", cause)
    return value
