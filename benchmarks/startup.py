"""Seconds until the first round of a packed run is done, by phase and by process.

FedAvg over the images of ``simulation.py`` with two workers, in a script and by
``flwr run``, as processes of the grid's own and in Ray. They take turns, each run in
processes of its own; printed are the medians. CPU seconds are those of the processes
that live when the round is done.
"""

# ruff: noqa: E402  imports are timed

import time

BEGUN = time.time()

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from flower_ext import AdditiveStrategy
from flower_ext.simulation import PackedGrid

IMPORTED = time.time()
HERE = Path(__file__).parent
#: With the transport of each.
WAYS = {
    "script": "processes",
    "script, Ray": "ray",
    "flwr run": "processes",
    "flwr run, Ray": "ray",
}
PHASES = ("other processes", "imports", "grid", "model", "first round")
#: What the command line of a process has in it; the first that fits counts.
KINDS = {
    "SuperLink": "flower-super",
    "workers of Ray's": "ray::Worker",
    "zygote and workers": ".zygote",
    "workers of Flower's": "ray::ClientAppActor",
    "agents of Ray's": "ray::",
    "processes of Ray's": "ray/",
}
SERVER = "server"
# In the environment.
STARTED, WRITTEN, WAY = "STARTUP_STARTED", "STARTUP_WRITTEN", "STARTUP_WAY"
PYPROJECT = """
[project]
name = "startup"
version = "1.0.0"
description = "The first round of a packed run"
license = "Apache-2.0"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "benchmarks"
[tool.flwr.app.components]
serverapp = "startup:app"
clientapp = "_images:app"
"""

app = ServerApp()


@app.main()
def main_of_server(grid: Grid, context: Context) -> None:
    """Measure in Flower's engine."""
    write(measure(grid))


def measure(grid: Grid | None) -> dict[str, float]:
    """Run a round; return the seconds of each phase and the CPU seconds by process."""
    times = [float(os.environ[STARTED]), BEGUN, IMPORTED]
    with PackedGrid(
        grid,
        num_clients=1_000,
        client_app="_images:app",
        num_workers=2,
        transport=WAYS[os.environ[WAY]],  # type: ignore[arg-type]
    ) as clients:
        times.append(time.time())
        from _models import make_model

        arrays = ArrayRecord(make_model("mlp").state_dict())
        times.append(time.time())
        strategy = AdditiveStrategy(
            fraction_train=0.02, fraction_evaluate=0.0, min_train_nodes=20
        )
        config = ConfigRecord({"model": "mlp"})
        strategy.start(clients, arrays, num_rounds=1, train_config=config)
        times.append(time.time())
        steps = [b - a for a, b in zip(times, times[1:], strict=False)]
        return dict(zip(PHASES, steps, strict=True)) | cpu_seconds()


def cpu_seconds() -> dict[str, float]:
    """Return the CPU seconds of this run's processes, by their kind."""
    me = psutil.Process()
    links = [p for p in me.parents() if kind(p.cmdline()) == "SuperLink"]
    top = [me, *links][-1]
    found: dict[str, float] = {}
    for process in [top, *top.children(recursive=True)]:
        try:
            what, times = kind(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        found[what] = found.get(what, 0.0) + times.user + times.system
    return found


def kind(command: Sequence[str]) -> str:
    """Return what a process is, by its command line."""
    line = " ".join(command)
    return next((name for name, part in KINDS.items() if part in line), SERVER)


def write(found: dict[str, float]) -> None:
    """Hand on what was measured."""
    Path(os.environ[WRITTEN]).write_text(json.dumps(found))


def run_apart(way: str) -> dict[str, float]:
    """Measure a run in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as home:
        paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "RAY_TMPDIR": home,
            "RAY_ADDRESS": "local",
            "RAY_USAGE_STATS_ENABLED": "0",
            WRITTEN: f"{home}/found",
            WAY: way,
        }
        command = [sys.executable, __file__, "--run"]
        if way.startswith("flwr run"):
            folder = Path(home, "app")
            folder.mkdir()
            (folder / "pyproject.toml").write_text(PYPROJECT)
            for file in (__file__, HERE / "_images.py", HERE / "_models.py"):
                shutil.copy(file, folder)
            command = [sys.executable, "-m", "flower_ext.runs.launch", str(folder)]
            command += ["--num-supernodes", "1", "--num-cpus", "2"]
        env[STARTED] = str(time.time())
        done = subprocess.run(
            command, env=env, cwd=home, capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            raise RuntimeError(f"{way} failed:\n{done.stdout}{done.stderr}"[-2000:])
        found: dict[str, float] = json.loads(Path(home, "found").read_text())
        return found


def main() -> None:
    """Measure all ways in turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        write(measure(None))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in args.only}
    for _ in range(args.runs):
        for way, rows in found.items():
            rows.append(run_apart(way))
    print_tables(found)


def print_tables(found: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians of the phases, and of the CPU seconds."""
    for title, keys in (("seconds", PHASES), ("CPU seconds", (SERVER, *KINDS))):
        print(f"\n{title:24}" + "".join(f"{way:>14}" for way in found))
        for key in keys:
            print_row(
                key, [[row.get(key, 0.0) for row in rows] for rows in found.values()]
            )
        sums = [
            [sum(row.get(key, 0.0) for key in keys) for row in rows]
            for rows in found.values()
        ]
        print_row("sum", sums)


def print_row(name: str, ways: Sequence[Sequence[float]]) -> None:
    """Print the median of each way."""
    print(f"{name:24}" + "".join(f"{statistics.median(way):14.1f}" for way in ways))


if __name__ == "__main__":
    main()
