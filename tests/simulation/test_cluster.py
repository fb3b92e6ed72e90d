"""A Ray cluster of two machines, in a process of its own; one of them leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parent / "app"
pytestmark = pytest.mark.slow


def test_clients_run_on_both_machines_and_go_on_when_one_leaves():
    paths = [str(APP), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, str(APP / "on_cluster.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_ADDRESS": ""},
        capture_output=True,
        encoding="utf-8",
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = json.loads(done.stdout.splitlines()[-1])
    machines = [{c["machine"] for c in clients if "machine" in c} for clients in rounds]
    assert len(machines[0] | machines[1]) == 2
    # A state is found on whichever machine the client runs next.
    assert [client["visits"] for client in rounds[0]] == [1] * 8
    assert [client["visits"] for client in rounds[1]] == [2] * 8
    # In the round in which a machine leaves, a client may have lost its state with it,
    # which it says; then it starts anew, and nobody else is hurt.
    visits = [0] * 8
    for clients in rounds:
        for i, client in enumerate(clients):
            if "error" in client:
                assert "state is lost" in client["error"]
                visits[i] = 0
            else:
                visits[i] += 1
                assert client["visits"] == visits[i]
    assert len(machines[4]) == 1
    assert not any("error" in client for client in rounds[4])
