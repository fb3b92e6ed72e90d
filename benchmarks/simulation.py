"""Seconds of a simulated round: ours, stock Flower, a bare loop, and pfl.

FedAvg over images: each client trains for one epoch on 50 images of 28x28 in batches of
10; two processes with one torch thread each. Cases and systems take turns, each run in
a process of its own; printed are the medians of the runs, and the targets. ``--only``
and ``--cases`` choose, ``--pfl PYTHON`` or the variable ``PFL`` adds pfl 0.6 from an
environment of its own (``pip install pfl torch``). Needs Linux, 16 GB of memory and
half an hour.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _timing import report

BEGUN = time.perf_counter()
HERE = Path(__file__).parent
WORKERS = 2


@dataclass(frozen=True)
class Case:
    """What is run: model, clients, cohort, rounds; the first ``warm`` are not timed."""

    model: str
    clients: int
    cohort: int
    rounds: int
    warm: int
    systems: tuple[str, ...]


# Ours by default (workers add up), with all replies sent to the server, and over
# Flower's messages, of a ClientApp as a user writes it; and of client_app's, one by one
# and stacked.
SUMS, TASK, STACKED = "packed-sums", "packed-task", "packed-stacked"
OURS = (SUMS, "packed-replies", "packed-messages", TASK, STACKED)
ALL = ("bare-1", "bare-2", *OURS, "flower", "pfl-1", "pfl-2")
CASES = {
    "mlp": Case("mlp", 1_000, 20, 45, 5, ALL),
    "cnn": Case("cnn", 1_000, 20, 15, 3, ALL),
    "few-clients": Case("mlp", 100, 20, 45, 5, (SUMS,)),
    "many-clients": Case("mlp", 100_000, 20, 45, 5, (SUMS,)),
    "tiny": Case("10000", 1_000, 1_000, 6, 2, (SUMS, "packed-replies", "flower")),
    "large": Case("10000000", 100, 100, 3, 1, (SUMS, "packed-replies", "flower")),
    "large-few": Case("10000000", 100, 10, 3, 1, (SUMS,)),
}
APPS = {TASK: "_task:app", STACKED: "_task:stacked"}
KEYS = ("seconds", "cpu", "mib", "start")
Rows = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class Target:
    """The most that one of ours may take, as a multiple of the best peer's.

    A peer is a case and a system, or a number.
    """

    case: str
    peers: tuple[tuple[str, str] | float, ...]
    limit: float
    key: str = "seconds"
    ours: str = SUMS


PFL = ("pfl-1", "pfl-2")
TARGETS = (
    Target("mlp", tuple(("mlp", system) for system in PFL), 0.5, ours=STACKED),
    Target("mlp", (("mlp", "bare-2"),), 1.0, ours=STACKED),
    Target("mlp", (("mlp", "flower"),), 1 / 12, ours=STACKED),
    Target("cnn", tuple(("cnn", system) for system in PFL), 1.0, ours=TASK),
    Target("cnn", (("cnn", "bare-2"),), 1.02, ours=TASK),
    Target("many-clients", (("few-clients", SUMS),), 1.2),
    Target("tiny", (0.1,), 1.0),
    Target("large", (("large", "flower"),), 1 / 7),
    Target("large", (("large-few", SUMS),), 1.1, "mib"),
)


# One system, in this process -------------------------------------------------------


class Clock:
    """Notes when rounds begin, and the CPU seconds of this process and its children."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.times: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        """Note that a round begins, or that the last one has ended."""
        # CPU time is read twice only: it asks every process, which takes time itself.
        self.times.append(time.perf_counter())
        if len(self.times) in (self.case.warm + 1, self.case.rounds + 1):
            self.cpu.append(_cpu_seconds())

    def report(self) -> dict[str, float]:
        """Return what was measured."""
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        timed = len(self.times) - 1 - self.case.warm
        return {
            "seconds": statistics.median(steps[self.case.warm :]),
            "cpu": (self.cpu[-1] - self.cpu[0]) / timed,
            "mib": _peak_mib(),
            "start": self.times[1] - BEGUN,
        }


def _processes() -> list[int]:
    import psutil

    me = psutil.Process()
    return [me.pid, *(child.pid for child in me.children(recursive=True))]


def _cpu_seconds() -> float:
    import psutil

    total = 0.0
    for pid in _processes():
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def _peak_mib() -> float:
    """Sum the peak resident memory of this process and its children (Linux)."""
    total = 0.0
    for pid in _processes():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(
            float(line.split()[1]) / 1024
            for line in status.splitlines()
            if line.startswith("VmHWM")
        )
    return total


def _initial(case: Case) -> "dict[str, object]":
    import torch
    from _models import make_model

    torch.manual_seed(0)
    if case.model in ("mlp", "cnn"):
        return dict(make_model(case.model).state_dict())
    return {f"w{i}": torch.zeros(int(case.model) // 4) for i in range(4)}


def _bare_client(case: Case, sent: "dict[str, object]", clients: list[int]) -> object:
    """Train clients and add up their models."""
    import torch
    from _images import fit, resident_model

    torch.set_num_threads(1)
    model = resident_model(case.model)
    total = {name: torch.zeros_like(x) for name, x in sent.items()}
    for client in clients:
        model.load_state_dict(sent)
        fit(model, client)
        for name, x in model.state_dict().items():
            total[name] += x
    return {name: x.numpy() for name, x in total.items()}


def bare(case: Case, clock: Clock, processes: int) -> None:
    """Run the loop that a person would write without a framework."""
    import torch

    torch.set_num_threads(1)
    # Not by file descriptors, of which a process may have few.
    torch.multiprocessing.set_sharing_strategy("file_system")
    state = _initial(case)
    draw = random.Random(0)
    context = multiprocessing.get_context("spawn")
    pool = context.Pool(processes) if processes > 1 else None
    for _ in range(case.rounds):
        clock.tick()
        cohort = draw.sample(range(case.clients), case.cohort)
        shares = [cohort[i::processes] for i in range(processes)]
        arrays = {name: x.numpy() for name, x in state.items()}  # type: ignore[attr-defined]
        if pool:
            jobs = [(case, arrays, share) for share in shares]
            sums = pool.starmap(_bare_share, jobs)
        else:
            sums = [_bare_client(case, state, cohort)]
        state = {
            name: torch.from_numpy(sum(s[name] for s in sums) / case.cohort)
            for name in state
        }
    clock.tick()
    found = clock.report()
    if pool:
        pool.terminate()
    print(json.dumps(found), flush=True)


def _bare_share(case: Case, arrays: "dict[str, object]", share: list[int]) -> object:
    import torch

    sent = {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}  # type: ignore[attr-defined]
    return _bare_client(case, sent, share)


def _start(case: Case, clock: Clock, base: type, grid: object) -> None:
    from flwr.app import ArrayRecord, ConfigRecord

    base(
        fraction_train=case.cohort / case.clients,
        fraction_evaluate=0.0,
        min_train_nodes=case.cohort,
    ).start(
        grid=grid,
        initial_arrays=ArrayRecord(_initial(case)),
        num_rounds=case.rounds,
        train_config=ConfigRecord({"model": case.model}),
        evaluate_fn=lambda number, arrays: clock.tick(),  # before, and after each round
    )


def packed(case: Case, clock: Clock, system: str) -> None:
    """Run ours, in processes of the grid's own."""
    from flower_ext import AdditiveStrategy
    from flower_ext.simulation import PackedGrid

    with PackedGrid(
        num_clients=case.clients,
        client_app=APPS.get(system, "_images:app"),
        num_workers=WORKERS,
        partial_sums=system != "packed-replies",
        # As in the other apps, which read the model from the message.
        run_config={"model": case.model, "batch-size": 10, "learning-rate": 0.1},
    ) as grid:
        _start(case, clock, AdditiveStrategy, grid)
        print(json.dumps(clock.report()), flush=True)


def engine(case: Case, clock: Clock, wrap: Callable[[object], object] | None) -> None:
    """Run on Flower's engine: stock, or ours over its messages."""
    from _images import app as client_app
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from flower_ext import AdditiveStrategy

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        base = AdditiveStrategy if wrap else FedAvg
        _start(case, clock, base, wrap(grid) if wrap else grid)
        print(json.dumps(clock.report()), flush=True)

    run_simulation(
        server_app,
        client_app,
        num_supernodes=WORKERS if wrap else case.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": WORKERS},
        },
    )


def run_here(system: str, case: Case) -> None:
    """Run one system and print what was measured."""
    import flwr.app  # noqa: F401  sets the level of its logger, which is raised below

    logging.getLogger("flwr").setLevel(logging.ERROR)
    sys.path.insert(0, str(HERE))
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    clock = Clock(case)
    if system.startswith("bare"):
        bare(case, clock, int(system[-1]))
    elif system in (SUMS, "packed-replies", TASK, STACKED):
        packed(case, clock, system)
    elif system == "packed-messages":
        from flower_ext.simulation import PackedGrid

        def wrap(grid: object) -> object:
            return PackedGrid(grid, num_clients=case.clients, transport="messages")  # type: ignore[arg-type]

        engine(case, clock, wrap)
    else:
        engine(case, clock, None)


# All systems, in turns ----------------------------------------------------------------


def run_apart(system: str, name: str, pfl: str | None) -> dict[str, float] | None:
    """Run one system in a process of its own."""
    case = CASES[name]
    command = [sys.executable, __file__, "--run", system, "--cases", name]
    if system.startswith("pfl"):
        if pfl is None:
            return None
        script = [str(HERE / "_pfl.py"), case.model]
        script += map(str, [case.clients, case.cohort, case.rounds, case.warm])
        command = [pfl, *script]
        if system == "pfl-2":
            command = [pfl, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node=2", *script]
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as home:
        env = {
            **os.environ,
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_TMPDIR": home,
            "RAY_ADDRESS": "local",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    # One row from each process of torchrun; two may be written into one line.
    rows = [json.loads(x) for x in re.findall(r"\{[^{}]*\}", done.stdout)]
    if not rows:
        print(f"{system} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    together = {key: sum(row[key] for row in rows) for key in ("cpu", "mib")}
    worst = {key: max(row[key] for row in rows) for key in ("seconds", "start")}
    return {**worst, **together}


def measure(cases: list[str], only: list[str], runs: int, pfl: str | None) -> Rows:
    """Return the medians of all systems in all cases."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(runs):
        for name in cases:
            for system in [s for s in CASES[name].systems if s in only]:
                if row := run_apart(system, name, pfl):
                    found.setdefault((name, system), []).append(row)
                    said = " ".join(f"{key} {value:.4g}" for key, value in row.items())
                    print(f"{name} {system}: {said}", file=sys.stderr, flush=True)
    return {
        of: {key: statistics.median(row[key] for row in rows) for key in KEYS}
        for of, rows in found.items()
    }


def print_tables(rows: Rows, runs: int) -> None:
    """Print one table for each case."""
    for name in dict.fromkeys(name for name, _ in rows):
        case = CASES[name]
        cohort = f"{case.cohort} of {case.clients} clients"
        print(f"\n{name}: {cohort}, median of {runs} runs")
        print(
            f"{'system':16}{'s/round':>10}{'CPU s':>10}{'peak MiB':>10}{'start s':>9}"
        )
        for (of, system), row in rows.items():
            if of == name:
                print(
                    f"{system:16}{row['seconds']:10.4f}{row['cpu']:10.4f}"
                    f"{row['mib']:10.0f}{row['start']:9.1f}"
                )


def print_targets(rows: Rows) -> None:
    """Compare ours with the targets whose peers were measured."""
    print()
    for target in TARGETS:
        ours = rows.get((target.case, target.ours))
        peers = {
            peer if isinstance(peer, float) else " ".join(peer): (
                peer if isinstance(peer, float) else rows[peer][target.key]
            )
            for peer in target.peers
            if isinstance(peer, float) or peer in rows
        }
        if ours and peers:
            best = min(peers, key=lambda peer: peers[peer])
            unit = "s" if target.key == "seconds" else "MiB"
            what = f"{target.case}: {target.ours} / {best}"
            report(what, ours[target.key], peers[best], target.limit, unit)


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--pfl",
        metavar="PYTHON",
        default=os.environ.get("PFL"),
        help="a Python that has pfl",
    )
    parser.add_argument("--run", choices=ALL, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_here(args.run, CASES[args.cases[0]])
        return
    rows = measure(args.cases, args.only, args.runs, args.pfl)
    print_tables(rows, args.runs)
    print_targets(rows)


if __name__ == "__main__":
    main()
