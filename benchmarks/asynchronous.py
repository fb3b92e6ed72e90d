"""Virtual seconds to a test loss: rounds that wait for all, and updates that do not.

A hundred clients have 40 digits each, mostly of a few kinds, and train a linear model
for an epoch, which takes them a second; one in ten is slower. In rounds 20 clients are
asked and waited for. Asynchronously 20 are at work, and the model moves after so many
contributions. Both have the same learning rates of the server, and run until the loss
on 1,000 other digits is below a target.
"""

import argparse
import logging
import statistics
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, MetricRecord
from torch import nn

from flower_ext import AdditiveStrategy, LocalGrid, Task, client_app
from flower_ext.core.sampling import UniformSampler
from flower_ext.data import load, partitioner
from flower_ext.server.callbacks import Callback
from flower_ext.server.finished import FinishedRound
from flower_ext.server.optimizers import SGD
from flower_ext.simulation import Asynchronous, Stragglers, VirtualClock

CLIENTS = 100
AT_WORK = 20
TARGET = 0.6  # test loss
MOST_ROUNDS = 200
CONFIG = {"lr": 0.05, "batch-size": 10}

Columns = dict[str, torch.Tensor]


def columns(rows) -> Columns:
    rows = rows.with_format("numpy")
    x = torch.tensor(rows["image"][:], dtype=torch.float32).flatten(1) / 255
    return {"x": x, "y": torch.tensor(rows["label"][:])}


def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@dataclass
class Watch(Callback):
    """Counts virtual seconds and trainings, and ends the run at the target."""

    clock: VirtualClock
    seconds: float = 0.0
    trainings: int = 0
    updates: int = 0
    needs_clients: bool = field(default=True)

    def round(self, this: FinishedRound) -> str | None:
        """Count a round; return why the run is to end with it, or None."""
        asked = [reply.client for reply in this.clients if reply.phase == "train"]
        self.updates, self.trainings = this.number, self.trainings + len(asked)
        if "virtual-seconds" in this.train:
            self.seconds = this.train["virtual-seconds"]
        else:  # the server waits for the slowest
            self.seconds += max(self.clock.of(client, 1) for client in asked)
        done = this.central["loss"] < TARGET
        return "the target is reached" if done else None


def run(
    buffer: int | None, factor: float, seed: int, rate: float
) -> tuple[float, float, float]:
    """Return virtual seconds, updates and trainings to the target; NaN if never."""
    digits = load("mnist-small")
    parts = partitioner(
        digits["train"], "dirichlet", num_partitions=CLIENTS, alpha=0.3, seed=seed
    )
    data = [columns(parts.load_partition(i)) for i in range(CLIENTS)]
    test = columns(digits["test"])
    model = nn.Linear(784, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def measure(number: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            return MetricRecord({"loss": float(loss(model, test).mean())})

    task = Task(
        lambda config: nn.Linear(784, 10),
        lambda context: (data[int(context.node_config["partition-id"])],) * 2,
        loss,
    )
    clock = VirtualClock(Stragglers(factor=factor, seed=seed))
    how, cohort = None, {"fraction_train": AT_WORK / CLIENTS}
    if buffer is not None:
        how, cohort = Asynchronous(buffer, AT_WORK, clock=clock), {}
    watch = Watch(clock)
    AdditiveStrategy(
        fraction_evaluate=0.0,
        sampler=UniformSampler(seed),
        server_optimizer=SGD(rate),
        **cohort,
    ).start(
        LocalGrid(client_app(task), CLIENTS, CONFIG),
        ArrayRecord(model.state_dict()),
        num_rounds=MOST_ROUNDS,
        evaluate_fn=measure,
        callbacks=[watch],
        asynchronous=how,
    )
    if watch.updates == MOST_ROUNDS:
        return float("nan"), float("nan"), float("nan")
    return watch.seconds, watch.updates, watch.trainings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    options = parser.parse_args()
    seeds, rates = range(options.seeds), options.rates
    logging.getLogger("flwr").setLevel(logging.ERROR)
    print(f"to a test loss of {TARGET}, means over {len(seeds)} seeds")
    ways = {"rounds of 20": None, "buffer of 20": 20, "buffer of 5": 5}
    for factor in (1.0, 10.0):
        print(f"\none in ten takes {factor:g} s, the others 1 s")
        for name, buffer in ways.items():
            for rate in rates:
                found = [run(buffer, factor, seed, rate) for seed in seeds]
                means = map(statistics.mean, zip(*found, strict=True))
                seconds, updates, trainings = means
                print(
                    f"  {name}, rate {rate:g}: {seconds:.0f} s, {updates:.0f} updates, "
                    f"{trainings:.0f} trainings",
                    flush=True,
                )


if __name__ == "__main__":
    main()
