"""Time and memory of functions, measured side by side in one process."""

import gc
import statistics
import threading
import time
from collections.abc import Callable

import psutil


def medians(
    *functions: Callable[[], object], repeats: int = 7, warm: bool = True
) -> list[float]:
    """Return each function's median seconds; they take turns, after a warm-up each.

    Garbage is collected before each call and not during it.
    """
    # In turns, so that a machine that grows slower or busier is so for all of them.
    seconds: list[list[float]] = [[] for _ in functions]
    for function in functions if warm else ():
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


class Peak:
    """Peak resident memory of a block above what it was at its start, in bytes."""

    def __enter__(self) -> "Peak":
        self._process = psutil.Process()
        self._start = self.bytes = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes -= self._start
