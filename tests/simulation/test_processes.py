"""Workers that are forked: what they have of their own, and when they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext.simulation import PackedGrid, packed_grid, process_workplace
from flower_ext.simulation.process_workplace import cpus_here, gpus_here
from flower_ext.simulation.ray_session import is_chosen

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"),
]


def app_of(answer):
    """Make an app whose clients report some metrics."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        metrics = MetricRecord({"num-examples": 1, **answer(context)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@pytest.fixture
def metrics(ask):
    """Run clients of an app once, each in a worker of its own; return their metrics."""

    def run(answer, num_clients=2, **options):
        options = {"num_workers": 2, "transport": "processes", **options}
        app = app_of(answer)
        with PackedGrid(num_clients=num_clients, client_app=app, **options) as grid:
            replies = ask(grid, range(num_clients))
        return [dict(reply.content["metrics"]) for reply in replies]

    return run


def test_each_has_random_numbers_of_its_own(metrics):
    def draw(context):
        import random

        import torch

        time.sleep(0.2)  # so that the other worker has the other client
        numbers = [random.random(), float(torch.rand(1))]
        numbers.append(np.random.random())  # noqa: NPY002  the global state is meant
        return {"pid": os.getpid(), "numbers": numbers}

    one, other = metrics(draw)
    assert one["pid"] != other["pid"]
    assert not set(one["numbers"]) & set(other["numbers"])


def test_each_computes_with_as_many_threads_as_cpus(metrics, monkeypatch):
    monkeypatch.setattr(process_workplace, "cpus_here", lambda: 4.0)

    def threads(context):
        import torch

        return {"torch": torch.get_num_threads()}

    found = metrics(threads, resources={"num_cpus": 2})
    assert found[0]["torch"] == 2
    assert metrics(threads)[0]["torch"] == 1


def test_each_finds_the_environment_and_the_folder_as_they_are_now(
    metrics, monkeypatch, tmp_path
):
    def look(context):
        names = ("SAID", "UNSAID", "CUDA_VISIBLE_DEVICES")
        found = [os.environ.get(name, "none") for name in names]
        here = Path.cwd() == Path(os.environ["FOLDER"])
        return {"found": [len(text) for text in found], "here": int(here)}

    monkeypatch.setenv("UNSAID", "123")
    monkeypatch.setenv("FOLDER", str(tmp_path))
    assert metrics(look)[0] == {"num-examples": 1, "found": [4, 3, 0], "here": 0}
    monkeypatch.delenv("UNSAID")
    monkeypatch.setenv("SAID", "12345")
    monkeypatch.chdir(tmp_path)
    assert metrics(look)[0] == {"num-examples": 1, "found": [5, 4, 0], "here": 1}


def test_another_grid_has_the_same_zygote(metrics):
    def parent(context):
        return {"parent": os.getppid()}

    before = {m["parent"] for m in metrics(parent)}
    assert {m["parent"] for m in metrics(parent)} == before
    [zygote] = before
    assert psutil.Process(zygote).children() == []  # the workers ended with the grid
    # One that was killed is replaced.
    os.kill(zygote, signal.SIGKILL)
    assert {m["parent"] for m in metrics(parent)} != before


def test_a_zygote_that_dies_in_between_is_said(ask, virtual):
    options = {"client_app": virtual, "num_workers": 1, "transport": "processes"}
    with PackedGrid(num_clients=2, **options) as grid:
        ask(grid, [0])
        [worker] = grid._transport._pool._idle
        os.kill(worker.zygote._process.pid, signal.SIGKILL)
        worker.zygote._process.wait()
        # The worker lives on, and when it dies there is another zygote.
        assert ask(grid, [1])[0].content["metrics"]["visits"] == 1
        replies = ask(grid, [0, 1], kill=[0])
        assert [reply.has_error() for reply in replies] == [True, False]


SCRIPT = """
import os, sys, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flower_ext import AdditiveStrategy
from flower_ext.simulation import PackedGrid

app = ClientApp()
SECONDS = float(sys.argv[1])

class Twice:
    factor = 2

@app.train()
def train(message, context):
    array = message.content["arrays"]["w"].numpy() + Twice.factor
    content = {"arrays": ArrayRecord({"w": Array(array)})}
    content["metrics"] = MetricRecord({"num-examples": 1})
    # One write: several processes have this output.
    sys.stdout.write(f"client {os.getpid()}\\n")
    sys.stdout.flush()
    time.sleep(SECONDS)
    return Message(RecordDict(content), reply_to=message)

class Mine(AdditiveStrategy):
    pass

grid = PackedGrid(num_clients=2, client_app=app, num_workers=2)
result = Mine(fraction_evaluate=0.0).start(
    grid, ArrayRecord({"w": Array(np.zeros(3, np.float32))}), num_rounds=2
)
print("sum", result.arrays["w"].numpy().sum(), "ray" in sys.modules, flush=True)
"""


def script(tmp_path, seconds):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environ.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, str(file), str(seconds)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def gone(pids):
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.05)


def clients_of(line):
    return [int(line.split()[1])] if line.startswith("client ") else []


def test_a_script_needs_no_guard_and_no_ray(tmp_path):
    """Classes, app and strategy are the script's own; nothing is left, grid open."""
    with script(tmp_path, 0) as process:
        lines = list(process.stdout)
    assert process.returncode == 0, lines
    assert lines[-1].split() == ["sum", "12.0", "False"]
    pids = {pid for line in lines for pid in clients_of(line)}
    assert 1 <= len(pids) <= 2
    gone(pids)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_server(tmp_path, signum):
    with script(tmp_path, 60) as process:
        for line in process.stdout:
            if clients_of(line):
                break
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 2  # the zygote and a worker
        process.send_signal(signum)
        process.stdout.read()
    assert process.returncode != 0
    gone([child.pid for child in below])


def test_processes_are_chosen_where_no_ray_is(monkeypatch, virtual):
    chosen = []
    monkeypatch.setattr(
        packed_grid, "ProcessWorkplace", lambda setting: chosen.append(1) or 1 / 0
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ZeroDivisionError):
        PackedGrid(num_clients=1, client_app=virtual)
    assert chosen == [1] and not is_chosen(None)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not is_chosen(None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert is_chosen(None)


def test_where_processes_cannot_be_forked_they_are_refused(monkeypatch, virtual):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ValueError, match="transport='processes' must be 'ray' or"):
        PackedGrid(num_clients=1, client_app=virtual, transport="processes")


def test_cpus_and_gpus_are_those_that_this_process_may_use(monkeypatch):
    assert 1 <= cpus_here() <= os.cpu_count()
    for seen, names in {"": [], "1, 3": ["1", "3"], "GPU-a": ["GPU-a"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert gpus_here() == names


def test_gpus_are_of_those_that_this_process_sees(ask, virtual, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    options = {"resources": {"num_gpus": 1}, "transport": "processes"}
    monkeypatch.setattr(process_workplace, "cpus_here", lambda: 8.0)
    with PackedGrid(num_clients=8, client_app=virtual, **options) as grid:
        replies = ask(grid, range(8), sleep=list(range(8)), seconds=0.1)
    assert {reply.content["where"]["gpus"] for reply in replies} == {"5", "7"}
