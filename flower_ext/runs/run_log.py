"""Lines of a run's log: which are noise, and what a person wants to see."""

import re
from collections.abc import Sequence

_TAIL_LINES = 15  # enough for a traceback

ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s{0,6}")
_ACTOR = re.compile(r"^\((\w+) pid=\d+[^)]*\) ?")
_RAY_HINT = re.compile(r" ?\(Ray deduplicates logs by default.*")
# Lines of Flower and Ray that say nothing about the run.
_NOISE = re.compile(
    r"^Using SuperLink: |^Starting logstream for run_id|^Successfully (?:started run"
    r"|installed) |^Starting Flower Simulation$|^Since flwr 1\.32, default simulated"
    r"|^Federation `@|^To change federation size|flwr federation simulation-config"
    r"|FutureWarning: Tip: In future versions of Ray|^\s*warnings\.warn\($"
    r"|Manually terminating ClientAppActor|^For more information, visit: <"
)
_PROGRESS = re.compile(r": round \d+/\d+ \| ")


def readable_line(line: str) -> str | None:
    """Return a log line without Flower's and Ray's decoration, None for noise.

    Warnings and errors are kept, with their level in front; what a virtual client
    printed starts with ``client:``.

    Examples
    --------
    >>> readable_line("INFO :      [ROUND 1/3]")
    '[ROUND 1/3]'
    >>> readable_line("(ClientAppActor pid=77) WARNING :   loss is nan")
    'client: WARNING: loss is nan'
    >>> readable_line("INFO :      Starting logstream for run_id `1`") is None
    True
    """
    line = _RAY_HINT.sub("", ANSI.sub("", line).rstrip())
    source = ""
    if actor := _ACTOR.match(line):
        source = "client: " if actor[1] == "ClientAppActor" else f"{actor[1]}: "
        line = line[actor.end() :]
    if level := _LEVEL.match(line):
        line = line[level.end() :]
        source += "" if level[1] in ("DEBUG", "INFO") else f"{level[1]}: "
    if _NOISE.search(line) or not line.strip():
        return None
    return source + line


def print_line(line: str) -> None:
    """Print `readable_line` of a log line, nothing for noise."""
    text = readable_line(line)
    if text is not None:
        print(text, flush=True)


def print_progress(line: str) -> None:
    """Print the one line that a Tracker logs per round, warnings and errors."""
    text = readable_line(line)
    if text is not None and (
        _PROGRESS.search(text) or re.search("WARNING|ERROR|CRITICAL|Traceback", text)
    ):
        print(text, flush=True)


def tail(lines: Sequence[str]) -> str:
    """Return the end of a log, without Flower's explanation of its exit code."""
    # What a ServerApp raised comes before the code; after it only general advice.
    end = next((i for i, line in enumerate(lines) if "Exit Code:" in line), len(lines))
    readable = [text for line in lines[:end] if (text := readable_line(line))]
    return "\n".join(readable[-_TAIL_LINES:])
