"""Flower's log lines: on the console once, whatever other packages do to logging."""

import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
{first}
from flower_ext._flower import log
{then}
log(logging.INFO, "said")
logging.getLogger("other").warning("not Flower's")
"""
BASIC = "logging.basicConfig(stream=sys.{})"
ABSL = "from absl import logging as absl; absl.use_absl_handler()"
FILE = "logging.getLogger().addHandler(logging.FileHandler({!r}))"


def said(first="", then=""):
    """Return the lines that a process writes to its consoles."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first, then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


OTHERS = [ABSL, BASIC.format("stderr"), BASIC.format("stdout")]
# Opacus calls basicConfig when it is imported, which is late and takes seconds.
CASES = [(order, other) for order in ("first", "then") for other in OTHERS]
CASES.append(("then", "import opacus"))


@pytest.mark.parametrize(("order", "other"), CASES)
def test_a_line_is_there_once(order, other):
    lines = said(**{order: other})
    assert sum("said" in line for line in lines) == 1
    assert sum("not Flower's" in line for line in lines) == 1


def test_a_file_of_the_root_logger_gets_the_line(tmp_path):
    path = tmp_path / "log"
    said(ABSL, FILE.format(str(path)))
    assert path.read_text().splitlines() == ["said", "not Flower's"]


def test_without_flowers_own_console_the_root_loggers_is_used():
    quiet = "logging.getLogger('flwr').handlers.clear()"
    lines = said(ABSL, quiet)
    assert sum("said" in line for line in lines) == 1
