"""Timing two things against each other, fairly, in one process."""

import gc
import statistics
import time
from collections.abc import Callable


def medians(*functions: Callable[[], object], repeats: int = 7) -> list[float]:
    """Return each function's median seconds; they take turns, after one warm-up each.

    Garbage is collected before each call and not during it.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for times, function in zip(seconds, functions, strict=True):
            gc.collect()
            gc.disable()
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
            gc.enable()
    return [statistics.median(times) for times in seconds]


def report(what: str, ours: float, peer: float, limit: float, unit: str = "s") -> None:
    """Print a ratio beside its limit."""
    ratio = ours / peer
    verdict = "ok" if ratio <= limit else "MISSED"
    print(
        f"{what}: {ours:.4g} {unit} against {peer:.4g} {unit}, "
        f"ratio {ratio:.2f} (limit {limit:g}) {verdict}"
    )
