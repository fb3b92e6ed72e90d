"""Both transports of the packed grid inside Flower's own simulation engine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flower_ext.runs.launch import run_app

APP = Path(__file__).parent / "flower_app"
pytestmark = pytest.mark.slow


def run_until_killed(saved, config):
    """Run the app until a client has killed the server; do not wait for Flower.

    Its SuperLink would take a minute to find out.
    """
    code = "import sys; from flower_ext.runs.launch import run_app; "
    code += f"run_app(sys.argv[1], run_config={config}, num_supernodes=2)"
    command = [sys.executable, "-c", code, str(APP)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, env=environment) as process:
        end = time.monotonic() + 300
        while not (saved / "killed").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
    assert process.returncode != 0


def test_both_transports_under_flwr_run_give_what_plain_clients_give(
    plain_clients, tmp_path
):
    """With states, over messages, of a run whose server was killed within a round."""
    file, saved = tmp_path / "results.json", tmp_path / "saved"
    config = {"results": str(file), "checkpoint": str(saved)}
    run_until_killed(saved, {**config, "transports": "messages"})
    assert [path.name for path in (saved / "messages").glob("round-*")] == [
        "round-00001"
    ]
    run_app(APP, run_config=config, num_supernodes=2, timeout=300)
    assert (saved / "messages" / "round-00003").is_dir()
    results = json.loads(file.read_text("utf-8"))
    assert set(results) == {"ray", "messages"}
    workers, expected = {}, plain_clients(3)
    for transport, found in results.items():
        assert {key: found[key] for key in expected} == expected
        workers[transport] = {pid for pids in found["pids"] for pid in pids}
    # Ray's are the grid's own, the others are Flower's.
    assert not workers["ray"] & workers["messages"]
