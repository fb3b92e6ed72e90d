"""What a run leaves behind: its home, and processes."""

import contextlib
import re
from pathlib import Path

import psutil


def home_of(log: str) -> str:
    found = re.search(r"home (\S+)", log)
    assert found
    return found[1]


def left_of(home: str) -> list[str]:
    """List what a run left: processes with its home in environment or command."""
    left = [home] if Path(home).exists() else []
    for process in filter(lives, psutil.process_iter()):
        with contextlib.suppress(psutil.Error):
            if home in [process.environ().get("FLWR_HOME"), *process.cmdline()]:
                left.append(" ".join(process.cmdline()))
    return left


def lives(process: psutil.Process) -> bool:
    """Whether a process runs: one that init has not yet taken note of is gone."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:  # it has ended meanwhile
        return ""
