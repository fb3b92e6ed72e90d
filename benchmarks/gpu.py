"""Clients on a GPU: the bare loop, one after the other, several at a time.

Measures rounds of FedAvg over random images against a bare PyTorch loop in the same
run, checks that clients use the device, that memory fits the plan, and that a round
gives what it gives on the CPU, to the tolerances below. Workers that share the GPU are
measured where Ray is installed. At most six minutes, no downloads; exit code 1 if a
check fails. ``--device cpu --small`` runs all of it in small anywhere.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from _gpu_task import BATCH, LEARNING_RATE, app, images, initial_model
from _timing import medians
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flower_ext import AdditiveStrategy
from flower_ext.server.optimizers import SGD
from flower_ext.simulation import LocalGrid, PackedGrid
from flower_ext.simulation.gpus import CUDA_MIB, plan
from flower_ext.simulation.machines import Machine
from flower_ext.strategies import FLASC, FedFish, MaxFL

BEGUN = time.monotonic()
SECONDS = 300.0  # after which no further number of workers is tried

STRATEGIES = {
    "FedAvg": AdditiveStrategy,
    "FedFish": FedFish,
    "FLASC": lambda **options: FLASC(server_optimizer=SGD(1.0), **options),
    "MaxFL": MaxFL,
}
# Largest differences, as parts of the change that a round makes. A GPU adds in another
# order; and of two coordinates of nearly the same size FLASC's mask may hold the other.
TOLERANCES = {"FedAvg": 1e-3, "FedFish": 5e-3, "FLASC": 2e-2, "MaxFL": 1e-3}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    clients: int
    examples: int
    repeats: int
    workers: tuple[int, ...]
    models: tuple[str, ...]


FULL = Size(16, 1_024, 5, (1, 2, 4, 8), ("mlp", "cnn"))
SMALL = Size(3, 64, 1, (2,), ("mlp",))


def settings(size: Size, model: str) -> dict[str, str | int | float]:
    """Return the run config of the clients."""
    return {
        "model": model,
        "examples": size.examples,
        "batch-size": BATCH,
        "learning-rate": LEARNING_RATE,
    }


def bare_round(size: Size, name: str, device: torch.device) -> dict[str, Tensor]:
    """Train all clients without Flower and average their models."""
    start = initial_model(name).state_dict()
    model = initial_model(name).to(device)
    total = {key: torch.zeros_like(value) for key, value in start.items()}
    for client in range(size.clients):
        model.load_state_dict(start)
        data = {k: v.to(device) for k, v in images(client, size.examples).items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for rows in torch.randperm(size.examples).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data["x"][rows]), data["y"][rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for key, value in model.state_dict().items():
            total[key] += value.cpu()
    return {key: value / size.clients for key, value in total.items()}


def our_round(grid: Grid, model: str, strategy: str = "FedAvg") -> dict[str, Tensor]:
    """Run one round of a strategy; return the new model."""
    made = STRATEGIES[strategy](fraction_evaluate=0.0)
    start = ArrayRecord(initial_model(model).state_dict())
    result = made.start(grid, start, num_rounds=1)
    if result.train_metrics_clientapp[1].get("num-errors", 0):
        raise RuntimeError(f"{strategy}: clients failed, see the log above")
    return dict(result.arrays.to_torch_state_dict())


def seen(grid: Grid, size: Size, model: str) -> list[ConfigRecord]:
    """Let every client train once; return where each did."""
    content = RecordDict(
        {
            "arrays": ArrayRecord(initial_model(model).state_dict()),
            "config": ConfigRecord({"server-round": 1}),
        }
    )
    nodes = list(grid.get_node_ids())[: size.clients]
    messages = [Message(content, node, MessageType.TRAIN) for node in nodes]
    return [reply.content["seen"] for reply in grid.send_and_receive(messages)]


def check_devices(found: list[ConfigRecord], device: torch.device) -> list[str]:
    """Print which client saw which device; return what is wrong."""
    for client, record in enumerate(found):
        print(
            f"    client {client}: {record['devices']}, process {record['pid']}, "
            f"CUDA_VISIBLE_DEVICES={record['visible']!r}, {record['mib']:.0f} MiB"
        )
    expected = "cuda:0" if device.type == "cuda" else "cpu"
    return [
        f"client {client} computed on {record['devices']!r}, not on {expected}"
        for client, record in enumerate(found)
        if record["devices"] != expected
    ]


def sequential(size: Size, device: torch.device) -> tuple[dict[str, float], list[str]]:
    """Time clients one after the other; return the bare loops' seconds and problems."""
    bare_seconds, problems = {}, []
    for model in size.models:
        grid = LocalGrid(app, size.clients, settings(size, model))
        found = seen(grid, size, model)
        print(f"{model}, one client after the other:")
        problems += check_devices(found, device)
        bare, ours = medians(
            lambda model=model: bare_round(size, model, device),
            lambda grid=grid, model=model: our_round(grid, model),
            repeats=size.repeats,
        )
        print(
            f"  a round of {size.clients} clients: bare loop {bare:.3f} s, "
            f"ours {ours:.3f} s, ratio {ours / bare:.2f}"
        )
        bare_seconds[model] = bare
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory / 2**20
            most = max(float(record["mib"]) for record in found)
            cpus = float(os.cpu_count() or 1)
            print(f"  {most:.0f} MiB of {total:.0f} MiB, {CUDA_MIB:.0f} MiB for CUDA:")
            print("  " + plan([Machine("here", cpus, [1.0])], most, total).why)
    return bare_seconds, problems


def workers(size: Size, device: torch.device, bare: dict[str, float]) -> list[str]:
    """Time clients in Ray workers that share the device; return what is wrong."""
    problems: list[str] = []
    for model in size.models:
        for number in size.workers:
            if time.monotonic() - BEGUN > SECONDS:
                print(f"{model}, {number} workers: left out, time is over")
                continue
            need = {"num_cpus": 1.0}
            if device.type == "cuda":
                need["num_gpus"] = 1 / number
            with PackedGrid(
                num_clients=size.clients,
                client_app="_gpu_task:app",
                run_config=settings(size, model),
                num_workers=number,
                resources=need,
            ) as grid:
                print(f"{model}, {number} workers with a share of 1/{number}:")
                found = seen(grid, size, model)
                problems += check_devices(found, device)
                processes = {record["pid"] for record in found}
                if len(processes) != min(number, size.clients):
                    problems.append(f"{len(processes)} workers ran, not {number}")
                seconds = []
                for _ in range(size.repeats):
                    begun = time.perf_counter()
                    our_round(grid, model)
                    seconds.append(time.perf_counter() - begun)
                ours = statistics.median(seconds)
                print(
                    f"  a round of {size.clients} clients: {ours:.3f} s, ratio to the "
                    f"bare loop {ours / bare[model]:.2f}"
                )
                if device.type == "cuda":
                    free, total = torch.cuda.mem_get_info()
                    used = (total - free) / 2**20
                    print(f"  all processes take {used:.0f} MiB of the GPU")
    return problems


def rounds_of_all(size: Size) -> dict[str, Tensor]:
    """Return the model after a round of each strategy, by strategy and name."""
    # TF32 has a mantissa of 10 bits, which would hide every other difference.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = size.models[-1]
    grid = LocalGrid(app, size.clients, settings(size, model))
    return {
        f"{strategy}/{name}": value.cpu()
        for strategy in STRATEGIES
        for name, value in our_round(grid, model, strategy).items()
    }


def equality(size: Size, small: bool) -> list[str]:
    """Compare a round of each strategy with that on the CPU; return what differs."""
    # A process of its own: CUDA cannot be hidden from one that has used it.
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "reference.safetensors")
        command = [sys.executable, __file__, "--device", "cpu", "--reference", file]
        subprocess.run(command + ["--small"] * small, check=True)
        expected = load_file(file)
    found, problems = rounds_of_all(size), []
    start = initial_model(size.models[-1]).state_dict()
    for strategy, tolerance in TOLERANCES.items():
        pairs = [
            (found[key], expected[key], start[key.partition("/")[2]])
            for key in expected
            if key.startswith(f"{strategy}/")
        ]
        apart = sum(float((a - b).double().square().sum()) for a, b, _ in pairs)
        change = sum(float((b - c).double().square().sum()) for _, b, c in pairs)
        relative = (apart / change) ** 0.5
        print(
            f"{strategy}, a round here against the CPU: {relative:.1e} of the change "
            f"(tolerance {tolerance:g})"
        )
        if not relative <= tolerance:
            problems.append(f"{strategy} differs from the CPU by {relative:.1e}")
    return problems


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a few clients and steps")
    parser.add_argument("--reference", help="only write a round of each strategy here")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # which torch has not looked at yet
    elif not torch.cuda.is_available():
        print("error: CUDA sees no GPU here: --device cpu", file=sys.stderr)
        return 2
    logging.getLogger("flwr").setLevel(logging.ERROR)
    size = SMALL if args.small else FULL
    if args.reference:
        save_file(rounds_of_all(size), args.reference)
        return 0
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(0) if args.device == "cuda" else "the CPU"
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {name}")
    bare, problems = sequential(size, device)
    problems += equality(size, args.small)
    if find_spec("ray"):
        problems += workers(size, device, bare)
    else:
        print("Ray is not installed: no workers")
    print(f"{time.monotonic() - BEGUN:.0f} s in all")
    for problem in problems:
        print(f"FAILED: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
