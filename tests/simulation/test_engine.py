"""Runs on Flower's own simulation engine: all transports, and how a run may end."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from left_behind import home_of, left_of, lives, name_of

import flower_ext
from flower_ext.runs.launch import RunFailed, run_app

APP = Path(__file__).parent / "flower_app"
DEADLINE = 120.0
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


def test_two_runs_at_once_of_which_one_is_resumed_and_fails_and_one_is_stopped(
    plain_clients, tmp_path
):
    """That a run may also complete is tested with the baselines, in test_engine.py.

    All transports give what plain clients give: with states, over messages, of a run
    whose server was killed within a round.
    """
    command = [sys.executable, "-m", "flower_ext.runs.launch", str(APP)]
    config = f"transports='messages' stay=true results='{tmp_path / 'stopped'}'"
    command += ["--num-supernodes", "2", "--run-config", config]
    output = []
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stack.enter_context(process)
        stack.callback(process.terminate)  # whatever happens
        text = resume_and_fail(plain_clients, tmp_path)
        # The other one goes on, and is stopped within a round.
        assert process.stdout
        for line in process.stdout:
            output.append(line)
            if "[ROUND 2/" in line:
                break
        started = psutil.Process(process.pid).children(recursive=True)
        names = json.dumps([name_of(process) for process in started])
        process.terminate()
        output += process.stdout
        assert process.wait(DEADLINE) == 143, output
    assert "flower-superlin" in names
    assert "raylet" in names
    assert list(filter(lives, started)) == []
    assert left_of(home_of("".join(output))) == []
    assert f"client imports {flower_ext.__file__}" in "".join(output)
    assert f"server imports {flower_ext.__file__}" in text
    assert left_of(home_of(text)) == []


def resume_and_fail(plain_clients, folder):
    """Run until killed, then to the end, which is an error; return the last log."""
    file, saved = folder / "results.json", folder / "saved"
    config = {"results": str(file), "checkpoint": str(saved)}
    run_until_killed(saved, {**config, "transports": "messages"})
    assert [path.name for path in (saved / "messages").glob("round-*")] == [
        "round-00001"
    ]
    config["message"] = "not today"
    with pytest.raises(RunFailed) as caught:
        run_app(
            APP,
            run_config=config,
            num_supernodes=2,
            timeout=300,
            on_line=lambda line: None,
        )
    assert "finished:failed" in str(caught.value)
    assert "ValueError: not today" in str(caught.value)
    assert (saved / "messages" / "round-00003").is_dir()
    results = json.loads(file.read_text("utf-8"))
    assert set(results) == {"ray", "processes", "messages"}
    workers, expected = {}, plain_clients(3)
    for transport, found in results.items():
        assert {key: found[key] for key in expected} == expected
        workers[transport] = {pid for pids in found["pids"] for pid in pids}
    # Those that get messages are Flower's, the others the grid's own.
    assert len(set.union(*workers.values())) == sum(map(len, workers.values()))
    log = Path(str(caught.value).rsplit("full log: ")[1])
    text = log.read_text()
    log.unlink()
    return text
