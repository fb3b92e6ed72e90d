"""Strict JSON, which any reader takes, of values that may be NaN or infinite.

JSON has no such numbers. In files of metrics the texts ``"nan"``, ``"inf"`` and
``"-inf"`` stand in their place, and :func:`numbers` turns them back. Where text may
stand beside numbers, ``tagged`` writes ``{"$number": "nan"}`` instead, which
:func:`read` understands. The bare words ``NaN`` and ``Infinity``, which Python's
``json`` writes by default, are read as well.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

_TAG = "$number"
_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def write(
    value: object,
    *,
    tagged: bool = False,
    indent: int | None = None,
    default: Callable[[object], object] | None = None,
) -> str:
    """Return a value as strict JSON.

    Parameters
    ----------
    value : object
        What ``json.dumps`` takes, numbers that are not finite included.
    tagged : bool (default: False)
        Whether numbers that are not finite are written so that they can be told from
        text.
    indent, default
        As in ``json.dumps``.

    Examples
    --------
    >>> write({"loss": float("nan"), "norms": [1.0, float("-inf")]})
    '{"loss": "nan", "norms": [1.0, "-inf"]}'
    """
    return json.dumps(
        _named(value, tagged), allow_nan=False, indent=indent, default=default
    )


def _named(value: object, tagged: bool) -> object:
    if isinstance(value, Mapping):
        return {key: _named(inner, tagged) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named(inner, tagged) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: str(float(value))} if tagged else str(float(value))
    return value


def read(text: str) -> Any:
    """Return what was written; only tagged names become numbers again.

    Examples
    --------
    >>> read(write({"mode": "inf", "norm": float("inf")}, tagged=True))
    {'mode': 'inf', 'norm': inf}
    """
    return json.loads(text, object_hook=_untagged)


def _untagged(found: dict[str, object]) -> object:
    return _NAMES[str(found[_TAG])] if set(found) == {_TAG} else found


def numbers(value: object) -> Any:
    """Return nested values in which the names of numbers are numbers again.

    Examples
    --------
    >>> numbers({"loss": "nan", "norms": [1.0, "-inf"]})
    {'loss': nan, 'norms': [1.0, -inf]}
    """
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    return _NAMES.get(value, value) if isinstance(value, str) else value
