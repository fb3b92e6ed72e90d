"""One way to refuse an argument: its name, its value, the bound, the usual cause."""

import math


def refuse(name: str, value: object, bound: str, cause: str = "") -> None:
    """Raise ``ValueError`` for an argument that is out of its bound."""
    raise ValueError(f"{name}={value!r} must be {bound}" + (f": {cause}" * bool(cause)))


def at_least(name: str, value: float, low: float, cause: str = "") -> None:
    """Require a finite number ``value >= low``."""
    if not _is_number(value) or not value >= low or math.isinf(value):
        refuse(name, value, f"a finite number >= {low:g}", cause)


def positive(name: str, value: float, cause: str = "") -> None:
    """Require a finite number ``value > 0``."""
    if not _is_number(value) or not value > 0 or math.isinf(value):
        refuse(name, value, "a finite number > 0", cause)


def fraction(name: str, value: float, cause: str = "") -> None:
    """Require ``0 <= value <= 1``."""
    if not _is_number(value) or not 0 <= value <= 1:
        refuse(name, value, "between 0 and 1", cause)


def whole(name: str, value: int, low: int, cause: str = "") -> None:
    """Require an integer ``value >= low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        refuse(name, value, f"an integer >= {low}", cause)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
