"""Finding and stopping the processes of a run, and the signals in between."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
GIVE_UP_SECONDS = 30.0  # for processes that survive SIGKILL (dead file systems)


def _ours(home: Path, sessions: set[int]) -> set[psutil.Process]:
    """Find all processes of a run, detached ones too.

    Each inherits ``FLWR_HOME``. A few of Ray's processes overwrite their environment
    with their title; those are found as descendants, or by the session that they were
    started in. ``sessions`` keeps the sessions that were seen, also when the processes
    that led here have ended.
    """
    everyone = list(psutil.process_iter())
    found = set()
    for process in everyone:
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(home):
                found |= {process, *process.children(recursive=True)}
    for process in everyone:
        with contextlib.suppress(psutil.Error, OSError):
            if process in found:
                sessions.add(os.getsid(process.pid))
    sessions.discard(os.getsid(0))  # our own, in which the user's shell may be
    for process in everyone:
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) in sessions:
                found.add(process)
    return {p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE}


def stop_all(home: Path) -> None:
    """Terminate, then kill, until nothing of the run is left."""
    begin = time.monotonic()
    sessions: set[int] = set()
    told: set[psutil.Process] = set()
    # A process that ends may start another one: look again until there is none.
    while processes := _ours(home, sessions):
        seconds = time.monotonic() - begin
        for process in processes:
            with contextlib.suppress(psutil.Error):
                if seconds > GRACE_SECONDS:
                    process.kill()
                elif process not in told:
                    process.terminate()
        told |= processes
        psutil.wait_procs(processes, timeout=min(0.5, GRACE_SECONDS))
        if seconds > GIVE_UP_SECONDS:
            left = sorted(process.pid for process in processes)
            print(f"WARNING: cannot stop processes {left}", file=sys.stderr)
            return


@contextlib.contextmanager
def signals(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers, *numbers: int
) -> Iterator[None]:
    """Set signal handlers for a while; only the main thread can."""
    in_main = threading.current_thread() is threading.main_thread()
    previous = {n: signal.signal(n, handler) for n in numbers if in_main}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def kills(number: int) -> bool:
    """Whether a signal has its default action: not under nohup or a handler."""
    return signal.getsignal(number) is signal.SIG_DFL


def exit_on_signal(number: int, _: FrameType | None) -> None:
    """End the process with the exit status that a shell gives for a signal."""
    raise SystemExit(128 + number)
