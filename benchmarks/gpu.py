"""Clients on a GPU: the bare loop, one after the other, stacked, several workers.

Measures rounds of FedAvg of 10, 100 and 1,000 clients, over random images and texts,
against a bare PyTorch loop in the same run; checks that clients use the device, that
memory fits the plan, and that a round gives what it gives on the CPU, to the tolerances
below. Workers that share the GPU are processes, which needs Linux, and no Ray. Nothing
is begun after five minutes; no downloads; exit code 1 if a check fails.
``--device cpu --small`` runs all of it in small.

Beside torch it needs the wheels of flwr, cloudpickle and safetensors, and for the
adapter of a transformer those of transformers and peft.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from _gpu_task import (
    BATCH,
    LEARNING_RATE,
    LORA,
    app,
    columns,
    initial_model,
    losses,
    save_base,
    stacked,
)
from _timing import medians
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from safetensors.torch import load_file, save_file
from torch import Tensor

from flower_ext import AdditiveStrategy
from flower_ext.server.optimizers import SGD
from flower_ext.simulation import LocalGrid, PackedGrid
from flower_ext.simulation.gpus import CUDA_MIB, plan
from flower_ext.simulation.machines import Machine
from flower_ext.strategies import FLASC, FedFish, MaxFL

BEGUN = time.monotonic()
SECONDS = 300.0  # after which nothing further is begun

STRATEGIES = {
    "FedAvg": AdditiveStrategy,
    "FedFish": FedFish,
    "FLASC": lambda **options: FLASC(server_optimizer=SGD(1.0), **options),
    "MaxFL": MaxFL,
}
# Largest differences, as parts of the change that a round makes. A GPU, and a stack,
# add in another order, and training magnifies rounding; of two coordinates of nearly
# the same size FLASC's mask may hold the other. Seen on an H100: 1.3e-3, and 1.2e-2.
# A wrong batch or a forgotten client is near 1.
TOLERANCES = {"FedAvg": 5e-3, "FedFish": 5e-3, "FLASC": 5e-2, "MaxFL": 5e-3}
APPS = {"one by one": app, "stacked": stacked}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    clients: tuple[int, ...]
    examples: int
    repeats: int
    workers: tuple[int, ...]
    models: tuple[str, ...]
    base: str = ""

    @property
    def some(self) -> int:
        """The clients of what is looked at closely."""
        return min(self.clients[-1], 16)


FULL = Size((10, 100, 1_000), 128, 3, (2, 8), ("mlp", "cnn", LORA))
SMALL = Size((2, 3), 64, 1, (2,), ("mlp",))


def settings(size: Size, model: str) -> dict[str, str | int | float]:
    """Return the run config of the clients."""
    return {
        "model": model,
        "base": size.base,
        "examples": size.examples,
        "batch-size": BATCH,
        "learning-rate": LEARNING_RATE,
    }


def time_left() -> float:
    """Return the seconds in which something further may be begun."""
    return SECONDS - (time.monotonic() - BEGUN)


def bare_round(
    size: Size, name: str, clients: int, device: torch.device
) -> dict[str, Tensor]:
    """Train clients without Flower and average their models."""
    start = initial_model(name, size.base).state_dict()
    model = initial_model(name, size.base).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    total = {key: torch.zeros_like(value) for key, value in start.items()}
    for client in range(clients):
        model.load_state_dict(start)
        found = columns(name, client, size.examples)
        data = {k: v.to(device) for k, v in found.items()}
        optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
        for rows in torch.randperm(size.examples).split(BATCH):
            optimizer.zero_grad()
            batch = {k: v[rows] for k, v in data.items()}
            losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for key, value in model.state_dict().items():
            total[key] += value.cpu()
    return {key: value / clients for key, value in total.items()}


def our_round(
    grid: Grid, size: Size, model: str, strategy: str = "FedAvg"
) -> dict[str, Tensor]:
    """Run one round of a strategy; return the new model."""
    made = STRATEGIES[strategy](fraction_evaluate=0.0)
    start = ArrayRecord(initial_model(model, size.base).state_dict())
    result = made.start(grid, start, num_rounds=1)
    if result.train_metrics_clientapp[1].get("num-errors", 0):
        raise RuntimeError(f"{strategy}: clients failed, see the log above")
    return dict(result.arrays.to_torch_state_dict())


def seen(grid: Grid, size: Size, model: str) -> list[ConfigRecord]:
    """Let some clients train once, one by one; return where each did."""
    content = RecordDict(
        {
            "arrays": ArrayRecord(initial_model(model, size.base).state_dict()),
            "config": ConfigRecord({"server-round": 1}),
        }
    )
    nodes = list(grid.get_node_ids())[: size.some]
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


def look(size: Size, device: torch.device) -> list[str]:
    """Print where clients run and what memory they take; return what is wrong."""
    problems = []
    for model in size.models:
        grid = LocalGrid(app, size.some, settings(size, model))
        found = seen(grid, size, model)
        print(f"{model}, one client after the other:")
        problems += check_devices(found, device)
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory / 2**20
            most = max(float(record["mib"]) for record in found)
            cpus = float(os.cpu_count() or 1)
            print(f"  {most:.0f} MiB of {total:.0f} MiB, {CUDA_MIB:.0f} MiB for CUDA:")
            print("  " + plan([Machine("here", cpus, [1.0])], most, total).why)
    return problems


def one_process(size: Size, device: torch.device) -> dict[tuple[str, int], float]:
    """Time rounds in this process; return the bare loop's seconds."""
    bare: dict[tuple[str, int], float] = {}
    each: dict[str, float] = {}  # seconds of a client in all three ways
    for clients in size.clients:
        for model in size.models:
            needed = each.get(model, 0.0) * clients
            repeats = size.repeats if needed * (size.repeats + 1) < 20 else 1
            warm = needed < 20
            if needed * (repeats + warm) > time_left():
                print(f"{model}, {clients} clients: left out, time is over")
                continue
            functions = [lambda m=model, c=clients: bare_round(size, m, c, device)]
            for each_app in APPS.values():
                grid = LocalGrid(each_app, clients, settings(size, model))
                functions.append(lambda g=grid, m=model: our_round(g, size, m))
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            loop, alone, together = medians(*functions, repeats=repeats, warm=warm)
            bare[model, clients] = loop
            each[model] = (loop + alone + together) / clients
            print(
                f"{model}, a round of {clients} clients: bare loop {loop:.3f} s, one "
                f"by one {alone:.3f} s, stacked {together:.3f} s, ratios "
                f"{alone / loop:.2f}, {together / loop:.2f}"
            )
            if device.type == "cuda":
                peak = torch.cuda.max_memory_reserved() / 2**20
                print(f"  {peak:.0f} MiB at most")
    return bare


def workers(
    size: Size, device: torch.device, bare: dict[tuple[str, int], float]
) -> list[str]:
    """Time clients in workers that share the device; return what is wrong."""
    problems: list[str] = []
    clients = size.clients[min(1, len(size.clients) - 1)]
    for model in size.models:
        for number in size.workers:
            for how in APPS:
                if time_left() < 0 or (model, clients) not in bare:
                    print(f"{model}, {number} workers, {how}: left out, time is over")
                    continue
                problems += _workers(size, device, bare, model, number, how, clients)
    return problems


def _workers(
    size: Size,
    device: torch.device,
    bare: dict[tuple[str, int], float],
    model: str,
    number: int,
    how: str,
    clients: int,
) -> list[str]:
    problems: list[str] = []
    need = {"num_cpus": 1.0}
    if device.type == "cuda":
        need["num_gpus"] = 1 / number
    with PackedGrid(
        num_clients=clients,
        client_app="_gpu_task:" + ("stacked" if how == "stacked" else "app"),
        run_config=settings(size, model),
        num_workers=number,
        resources=need,
        transport="processes",
    ) as grid:
        print(f"{model}, {number} workers with a share of 1/{number}, {how}:")
        if how != "stacked":
            found = seen(grid, size, model)
            problems += check_devices(found, device)
            processes = {record["pid"] for record in found}
            if len(processes) != min(number, size.some):
                problems.append(f"{len(processes)} workers ran, not {number}")
        our_round(grid, size, model)
        seconds = []
        for _ in range(size.repeats):
            begun = time.perf_counter()
            our_round(grid, size, model)
            seconds.append(time.perf_counter() - begun)
        ours = statistics.median(seconds)
        print(
            f"  a round of {clients} clients: {ours:.3f} s, ratio to the bare loop "
            f"{ours / bare[model, clients]:.2f}"
        )
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            used = (total - free) / 2**20
            print(f"  all processes take {used:.0f} MiB of the GPU")
    return problems


def rounds_of_all(size: Size, clients_app: ClientApp) -> dict[str, Tensor]:
    """Return the model after a round of each strategy, by strategy and name."""
    # TF32 has a mantissa of 10 bits, which would hide every other difference.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = size.models[-1 if size.models[-1] != LORA else -2]
    grid = LocalGrid(clients_app, size.some, settings(size, model))
    return {
        f"{strategy}/{name}": value.cpu()
        for strategy in STRATEGIES
        for name, value in our_round(grid, size, model, strategy).items()
    }


def equality(size: Size, small: bool) -> list[str]:
    """Compare a round of each strategy with that on the CPU; return what differs."""
    # A process of its own: CUDA cannot be hidden from one that has used it.
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "reference.safetensors")
        command = [sys.executable, __file__, "--device", "cpu", "--reference", file]
        subprocess.run(command + ["--small"] * small, check=True)
        expected = load_file(file)
    problems = []
    model = size.models[-1 if size.models[-1] != LORA else -2]
    start = initial_model(model, size.base).state_dict()
    for how, clients_app in APPS.items():
        found = rounds_of_all(size, clients_app)
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
                f"{strategy}, a round here {how} against the CPU: {relative:.1e} of "
                f"the change (tolerance {tolerance:g})"
            )
            if not relative <= tolerance:
                problems.append(
                    f"{strategy} {how} differs from the CPU by {relative:.1e}"
                )
    return problems


def _with_base(size: Size, folder: Path) -> Size:
    """Make the base of the adapter, or do without where packages are missing."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if LORA not in size.models:
        return size
    if missing:
        print(f"{' and '.join(missing)} not installed: no adapter")
        models = tuple(model for model in size.models if model != LORA)
        return replace(size, models=models)
    save_base(folder)
    return replace(size, base=str(folder))


def _all(size: Size, device: torch.device, small: bool) -> list[str]:
    problems = look(size, device)
    few = replace(size, clients=size.clients[:2])
    many = replace(size, clients=size.clients[2:])
    bare = one_process(few, device)
    problems += equality(size, small)
    problems += workers(size, device, bare)
    one_process(many, device)
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
    # Of the warnings, that clients are not stacked is one that explains the figures.
    logging.getLogger("flwr").addFilter(
        lambda said: said.levelno >= logging.ERROR or "one after the other" in said.msg
    )
    size = SMALL if args.small else FULL
    if args.reference:
        save_file(rounds_of_all(size, app), args.reference)
        return 0
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(0) if args.device == "cuda" else "the CPU"
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {name}")
    with tempfile.TemporaryDirectory() as folder:
        problems = _all(_with_base(size, Path(folder)), device, args.small)
    print(f"{time.monotonic() - BEGUN:.0f} s in all")
    for problem in problems:
        print(f"FAILED: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
