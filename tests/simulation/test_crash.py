"""The server process is killed, between rounds and within, and started again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord

from flower_ext import AdditiveStrategy
from flower_ext.simulation import LocalGrid

APP = Path(__file__).parent / "app"
pytestmark = pytest.mark.slow


def run(script, folder, *arguments):
    paths = [str(APP), *filter(None, sys.path)]
    # A file, not a pipe: processes of Ray may outlive their server, and hold it.
    with Path(folder).with_suffix(".log").open("a") as log:
        return subprocess.run(
            [sys.executable, str(APP / script), folder, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            timeout=150,
        )


def test_a_run_goes_on_after_its_server_was_killed(virtual, tmp_path):
    folder = str(tmp_path / "run")
    assert run("crashing_server.py", folder, 3).returncode == -signal.SIGKILL
    again = run("crashing_server.py", folder, 0)
    assert again.returncode == 0
    assert "start anew" not in (tmp_path / "run.log").read_text()
    found = json.loads(again.stdout.splitlines()[-1])
    assert found["rounds"] == [1, 2, 3, 4, 5]
    whole = AdditiveStrategy(fraction_train=0.25, fraction_evaluate=0.0).start(
        LocalGrid(virtual, 20),
        ArrayRecord({"w": Array(np.zeros(3, np.float32))}),
        num_rounds=5,
        train_config=ConfigRecord({"stateful": False}),
    )
    assert found["w"] == whole.arrays["w"].numpy().tolist()


KILLS = {
    "local": ["train:2:7", "flush:3:1", "flush:3:4", "rename:4", "renamed:4"],
    "ray": ["train:2:7", "flush:4:3"],
}


@pytest.mark.parametrize("grid", KILLS)
def test_personal_clients_go_on_bit_for_bit_after_any_kill(grid, tmp_path):
    """Models, momenta and metrics are those of a run that nobody killed."""

    def play(name, when):
        return run("killed_server.py", str(tmp_path / name), grid, when)

    for when in KILLS[grid]:
        assert play("run", when).returncode == -signal.SIGKILL, when
    again, whole = (json.loads(play(n, "never").stdout) for n in ("run", "whole"))
    assert again == whole
    assert len(whole["losses"]) == 5 and len(whole["states"]) > 6
    log = (tmp_path / "run.log").read_text()
    assert log.count("Continuing after round") == len(KILLS[grid])
    assert "start anew" not in log
