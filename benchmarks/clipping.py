"""A step of DP-SGD against a plain one: time of a core, and memory.

Opacus' hooks, mode="ghost" and OnePassClipping, for an MLP and a small transformer,
with and without the drawing of noise. Limit: 1.6 times the plain step without the
noise, and less memory than mode="ghost". Memory is the peak of a process of its own
above what it had before its first step.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from _timing import Peak
from flwr.app import ConfigRecord, Context, RecordDict
from torch import Tensor, nn

from flower_ext.client.half import ClientHalf, Local, LocalSettings
from flower_ext.client.noisy_steps import NoisePlan, NoisySteps
from flower_ext.client.one_pass import OnePassSteps
from flower_ext.client.task import Batch, Task
from flower_ext.client.trainer import Steps

WAYS = ("plain", "hooks", "ghost", "one pass")
LIMIT = 1.6
STEPS = 9
CLASSES = 10
VOCABULARY = 1000


class Block(nn.Module):
    """Attention of four heads and two layers, each after a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of the input."""
        heads = self.read(self.before(x)).unflatten(-1, (3, 4, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.write(seen.transpose(1, 2).flatten(2))
        down: Tensor = self.down(nn.functional.gelu(self.up(self.between(x))))
        return x + down


class Transformer(nn.Module):
    """Says of a text of 64 tokens which class it is of."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(2)))
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)``."""
        found: Tensor = self.out(self.blocks(self.embed(x)).mean(1))
        return found


def mlp() -> nn.Module:
    """Return a network for images of 28x28."""
    return nn.Sequential(
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def problem(name: str) -> tuple[nn.Module, Batch]:
    """Return a model, and its batch of random inputs."""
    torch.manual_seed(0)
    size = {"MLP": 256, "transformer": 64}[name]
    y = torch.randint(0, CLASSES, (size,))
    if name == "MLP":
        return mlp(), {"x": torch.randn(size, 784), "y": y}
    return Transformer(), {"x": torch.randint(0, VOCABULARY, (size, 64)), "y": y}


def steps(name: str, way: str, noise: float) -> tuple[Steps, Batch]:
    """Return what takes steps, and the batch that each takes."""

    def unused(_: object) -> nn.Module:
        raise AssertionError

    def no_data(_: Context) -> tuple[Batch, Batch]:
        raise AssertionError

    model, batch = problem(name)
    local = Local(
        task=Task(unused, no_data, loss),
        model=model,
        train=batch,
        test=batch,
        settings=LocalSettings(learning_rate=0.01, batch_size=len(batch["y"])),
        config=ConfigRecord(),
        context=Context(1, 1, {"partition-id": 0}, RecordDict(), {}),
        device=torch.device("cpu"),
    )
    if way == "plain":
        return Steps(local, ClientHalf()), batch
    plan = NoisePlan(1000, 1.0, len(batch["y"]), 1.0, noise)
    taken: NoisySteps
    if way == "one pass":
        taken = OnePassSteps(local, ClientHalf(), plan, "uniform")
    else:
        taken = NoisySteps(local, ClientHalf(), plan, way)  # type: ignore[arg-type]
    taken.seeded([1, 2, 3])
    return taken, batch


def seconds(functions: list[Callable[[], object]]) -> list[float]:
    """Return the median seconds of a core that each takes, in turns."""
    taken: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(STEPS):
        for times, function in zip(taken, functions, strict=True):
            gc.collect()
            begun = time.process_time()
            function()
            times.append(time.process_time() - begun)
    return [statistics.median(times) for times in taken]


def of_each(name: str, noise: float) -> list[float]:
    """Return the seconds of a step each way."""
    functions = []
    for way in WAYS:
        taken, batch = steps(name, way, noise)

        def take(taken: Steps = taken, batch: Batch = batch) -> object:
            return taken.take(batch)

        functions.append(take)
    return seconds(functions)


def memory(name: str, way: str) -> float:
    """Return the peak of three steps in this process, above its start, in MiB."""
    taken, batch = steps(name, way, 1.0)
    with Peak() as peak:
        for _ in range(5):
            taken.take(batch)
    return peak.bytes / 2**20


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", nargs=2, help="of a model and a way, in here")
    parser.add_argument("--models", nargs="*", default=["MLP", "transformer"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(memory(*options.memory))
        return
    for name in options.models:
        quiet, noisy = of_each(name, 0.0), of_each(name, 1.0)
        print(f"{name:12}   ms  ratio   with noise  ratio   MiB")
        for i, way in enumerate(WAYS):
            done = subprocess.run(
                [sys.executable, __file__, "--memory", name, way],
                capture_output=True,
                text=True,
                check=True,
            )
            verdict = ""
            if way == "one pass":
                verdict = "ok" if quiet[i] <= LIMIT * quiet[0] else "MISSED"
            print(
                f"{way:10}{1e3 * quiet[i]:7.1f}{quiet[i] / quiet[0]:7.2f}"
                f"{1e3 * noisy[i]:13.1f}{noisy[i] / noisy[0]:7.2f}"
                f"{float(done.stdout):6.0f} {verdict}"
            )


if __name__ == "__main__":
    main()
