"""One way to refuse an argument: its name, its value, the bound, the usual cause.

Each check returns the value as a plain ``int``, ``float`` or ``str``.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NoReturn

import numpy as np

from flower_ext.core.typing import Floats


def refuse(name: str, value: object, bound: str, cause: str = "") -> NoReturn:
    """Raise ``ValueError`` for an argument that is out of its bound."""
    raise ValueError(f"{name}={value!r} must be {bound}" + (f": {cause}" * bool(cause)))


def finite(name: str, value: object, cause: str = "") -> float:
    """Require a finite number."""
    number = _number(value)
    if not math.isfinite(number):
        refuse(name, value, "a finite number", cause)
    return number


def at_least(
    name: str, value: object, low: float, cause: str = "", *, allow_inf: bool = False
) -> float:
    """Require a number ``value >= low``; infinity only where it has a meaning."""
    number = _number(value)
    if not number >= low or (math.isinf(number) and not allow_inf):
        kind = "" if allow_inf else "finite "
        refuse(name, value, f"a {kind}number >= {low:g}", cause)
    return number


def positive(
    name: str, value: object, cause: str = "", *, allow_inf: bool = False
) -> float:
    """Require a number ``value > 0``; infinity only where it has a meaning."""
    number = _number(value)
    if not number > 0 or (math.isinf(number) and not allow_inf):
        refuse(name, value, f"a {'' if allow_inf else 'finite '}number > 0", cause)
    return number


def fraction(name: str, value: object, cause: str = "") -> float:
    """Require ``0 <= value <= 1``."""
    number = _number(value)
    if not 0 <= number <= 1:
        refuse(name, value, "between 0 and 1", cause)
    return number


def probability(name: str, value: object, cause: str = "") -> float:
    """Require ``0 < value <= 1``."""
    number = _number(value)
    if not 0 < number <= 1:
        refuse(name, value, "in (0, 1]", cause)
    return number


def open_unit(name: str, value: object, cause: str = "") -> float:
    """Require ``0 < value < 1``."""
    number = _number(value)
    if not 0 < number < 1:
        refuse(name, value, "in the open interval (0, 1)", cause)
    return number


def whole(name: str, value: object, low: int, cause: str = "") -> int:
    """Require an integer ``value >= low``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        refuse(name, value, f"an integer >= {low}", cause)
    return int(value)


def one_of(name: str, value: str, choices: Sequence[str], cause: str = "") -> str:
    """Require one of a few words."""
    if value not in choices:
        refuse(name, value, f"one of {tuple(choices)}", cause)
    return value


def yes_or_no(name: str, value: object) -> bool:
    """Require True or False."""
    if not isinstance(value, bool):
        refuse(name, value, "True or False")
    return value


def different_names(name: str, values: Sequence[str]) -> list[str]:
    """Require a sequence of at least one name, no two of them equal."""
    ok = isinstance(values, Sequence) and not isinstance(values, str)
    if not ok or not values or len(set(values)) < len(values):
        refuse(name, values, "a sequence of different names")
    return list(values)


def one_each(
    name: str, value: object, names: Sequence[str], low: float = -math.inf
) -> Floats:
    """Require a finite number ``>= low`` for all names, or one for each of them."""
    try:
        values = np.array(value, np.float64)
    except (TypeError, ValueError):
        values = np.zeros((0, 0))
    if values.shape not in ((), (len(names),)) or isinstance(value, bool | str):
        refuse(name, value, f"one number or {len(names)}, for {list(names)}")
    if not np.all(np.isfinite(values)) or np.any(values < low):
        refuse(name, value, "finite" + f" and >= {low:g}" * math.isfinite(low))
    return np.array(np.broadcast_to(values, (len(names),)))


def _number(value: object) -> float:
    """Return a real number as a float, anything else as NaN."""
    # Every comparison with NaN is false, so that all checks refuse it. A bool is an
    # integer to Python, but a mistake where a number is meant.
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value)
