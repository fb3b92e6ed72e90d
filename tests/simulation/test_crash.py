"""The server process is killed between rounds, and started again."""

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


def run(folder, kill_after):
    paths = [str(APP), *filter(None, sys.path)]
    # A file, not a pipe: processes of Ray may outlive their server, and hold it.
    with Path(folder).with_suffix(".log").open("a") as log:
        return subprocess.run(
            [sys.executable, str(APP / "crashing_server.py"), folder, str(kill_after)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            timeout=150,
        )


def test_a_run_goes_on_after_its_server_was_killed(virtual, tmp_path):
    folder = str(tmp_path / "run")
    assert run(folder, 3).returncode == -signal.SIGKILL
    again = run(folder, 0)
    assert again.returncode == 0
    assert (tmp_path / "run.log").read_text().count("Clients start anew") == 1
    found = json.loads(again.stdout.splitlines()[-1])
    assert found["rounds"] == [1, 2, 3, 4, 5]
    whole = AdditiveStrategy(fraction_train=0.25, fraction_evaluate=0.0).start(
        LocalGrid(virtual, 20),
        ArrayRecord({"w": Array(np.zeros(3, np.float32))}),
        num_rounds=5,
        train_config=ConfigRecord({"stateful": False}),
    )
    assert found["w"] == whole.arrays["w"].numpy().tolist()
