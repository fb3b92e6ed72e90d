"""The server process is killed, between rounds and within, and started again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parent / "app"
pytestmark = pytest.mark.slow


def play(folder, grid, moments, address):
    """Run in a folder, killed at each moment and started again; return what is there.

    First comes the exit status of each server.
    """
    paths = [str(APP), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, str(APP / "killed_server.py"), str(folder), grid, *moments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "RAY_ADDRESS": address,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=150,
    )
    log, _, found = done.stdout.rpartition("\n{")
    assert done.returncode == 0 and found, done.stdout
    return log, json.loads("{" + found)


# With workers they are clients of Ditto, and round 12 is the first that is not saved.
ROUNDS = {"local": 5, "ray": 20, "processes": 20}
KILLS = {
    "local": ["train:2:7", "flush:3:1", "flush:3:4", "rename:4", "renamed:4"],
    "ray": ["train:12:9"],
    "processes": ["train:12:9"],
}


@pytest.mark.parametrize("grid", KILLS)
def test_personal_clients_go_on_bit_for_bit_after_any_kill(grid, tmp_path, cluster):
    """Models, momenta and metrics are those of a run that nobody killed."""
    address = cluster().address if grid == "ray" else ""
    log, found = play(tmp_path / "run", grid, [*KILLS[grid], "never"], address)
    again, whole = found["again"], found["whole"]
    assert found["ends"] == [*[-signal.SIGKILL] * len(KILLS[grid]), 0]
    assert again == whole
    assert whole["rounds"] == ROUNDS[grid] and len(whole["states"]) > 6
    assert log.count("Continuing after round") == len(KILLS[grid])
    assert "start anew" not in log
