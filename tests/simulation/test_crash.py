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


def run(folder, grid, when):
    paths = [str(APP), *filter(None, sys.path)]
    # A file, not a pipe: processes of Ray may outlive their server, and hold it.
    with Path(folder).with_suffix(".log").open("a") as log:
        return subprocess.run(
            [sys.executable, str(APP / "killed_server.py"), folder, grid, when],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            timeout=150,
        )


KILLS = {
    "local": ["train:2:7", "flush:3:1", "flush:3:4", "rename:4", "renamed:4"],
    "ray": ["train:2:7", "renamed:3", "flush:4:3"],
}


@pytest.mark.parametrize("grid", KILLS)
def test_personal_clients_go_on_bit_for_bit_after_any_kill(grid, tmp_path):
    """Models, momenta and metrics are those of a run that nobody killed."""

    def play(name, when):
        return run(str(tmp_path / name), grid, when)

    for when in KILLS[grid]:
        assert play("run", when).returncode == -signal.SIGKILL, when
    again, whole = (json.loads(play(n, "never").stdout) for n in ("run", "whole"))
    assert again == whole
    assert len(whole["losses"]) == 5 and len(whole["states"]) > 6
    log = (tmp_path / "run.log").read_text()
    assert log.count("Continuing after round") == len(KILLS[grid])
    assert "start anew" not in log
