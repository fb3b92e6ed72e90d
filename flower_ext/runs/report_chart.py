"""Charts of the page of results: curves in SVG, with bands around them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

Point = tuple[float, float]
COLOURS = 8
# Of 360 x 200; the rest is for text.
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 344, 8, 170


@dataclass
class Curve:
    """A line, and what is around it.

    Attributes
    ----------
    name : str
        Of the run.
    line : list of (float, float)
        Its points; y may be infinite or NaN, x may not.
    band : list of (float, float, float)
        x, and what is from the second to the third there: a spread over seeds, or over
        clients. All are finite.
    """

    name: str
    line: list[Point]
    band: list[tuple[float, float, float]] = field(default_factory=list)


def look(line: int) -> str:
    """Return the style classes of the curve with a number."""
    return f"s{line % COLOURS}" + (" dashed" if line // COLOURS % 2 else "")


def chart(curves: Sequence[Curve], title: str, unit: str, least: float = 0.0) -> str:
    """Draw curves; ``""`` if there is no point in them.

    A curve is broken where its number is not finite; a cross at the upper edge says so.

    Parameters
    ----------
    curves : sequence of Curve
        In the order of their colours.
    title, unit : str
        What is drawn, against what.
    least : float (default: 0)
        The least step of the numbers along the x axis.
    """
    every = [point for curve in curves for point in curve.line]
    if not every:
        return ""
    edges = [y for curve in curves for _, *ends in curve.band for y in ends]
    finite = [y for _, y in every if math.isfinite(y)] + edges or [0.0, 1.0]
    across, along = ticks([x for x, _ in every], least=least), ticks(finite)

    def place(x: float, y: float) -> Point:
        share_x = (x - across[0]) / (across[-1] - across[0])
        share_y = (y - along[0]) / (along[-1] - along[0])
        return (
            _LEFT + share_x * (_RIGHT - _LEFT),
            _BOTTOM - share_y * (_BOTTOM - _TOP),
        )

    drawn = []
    for tick in along:
        _, y = place(across[0], tick)
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.5g}</text>'
        )
    for tick in across:
        x, _ = place(tick, along[0])
        drawn.append(
            f'<text x="{x:.1f}" y="{_BOTTOM + 15}" text-anchor="middle">{tick:.5g}'
            "</text>"
        )
    for i, curve in enumerate(curves):  # below all lines
        upper = [place(x, high) for x, _, high in curve.band]
        lower = [place(x, low) for x, low, _ in reversed(curve.band)]
        if upper:
            corners = _corners([*upper, *lower])
            drawn.append(f'<polygon class="{look(i)}" points="{corners}"/>')
    for i, curve in enumerate(curves):
        size = 2 if len(curve.line) <= 40 else 1.2
        for is_finite, group in groupby(curve.line, lambda p: math.isfinite(p[1])):
            part = list(group)
            placed = [place(x, y if is_finite else along[-1]) for x, y in part]
            if is_finite:
                drawn.append(
                    f'<polyline class="{look(i)}" points="{_corners(placed)}"/>'
                )
            for (x, y), (at_x, at_y) in zip(part, placed, strict=True):
                said = f"<title>{escape(f'{curve.name}: {y:.5g} at {x:.5g}')}</title>"
                drawn.append(
                    f'<circle class="{look(i)}" r="{size}" cx="{at_x:.1f}" '
                    f'cy="{at_y:.1f}">{said}</circle>'
                    if is_finite
                    else f'<path class="{look(i)}" d="M{at_x - 3:.1f} {at_y - 3:.1f}'
                    f'l6 6m0 -6l-6 6">{said}</path>'
                )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 360 200" role="img" aria-label="{escape(title)}">'
        f'{"".join(drawn)}<text x="200" y="198" text-anchor="middle">{escape(unit)}'
        "</text></svg></figure>"
    )


def _corners(places: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def ticks(values: Sequence[float], least: float = 0.0) -> list[float]:
    """Return round numbers from below all values to above, ``least`` or more apart.

    Examples
    --------
    >>> ticks([1, 10])
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> ticks([2.5, 2.5])
    [2.0, 2.2, 2.4, 2.6, 2.8, 3.0]
    >>> ticks([1, 2], least=1.0)
    [1.0, 2.0]
    """
    low, high = min(values), max(values)
    # Of one value some room around it, so that the curve has a height.
    if low == high:
        low, high = low - (abs(low) or 1) / 5, high + (abs(high) or 1) / 5
    rough = (high - low) / 5
    # About five steps, of 1, 2 or 5 times a power of ten. A step that is too small by a
    # rounding error alone is taken.
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Multiples of the step, since adding it up would show as 0.30000000000000004.
    return [round(i * step, 12) for i in range(first, last + 1)]
