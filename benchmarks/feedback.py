"""DiceSGD against DP-SGD: the noise that each needs, and what the noise leaves.

The noise multipliers are for a silo of 6,000 examples, 1,000 steps of 64 on average and
delta 1e-5, where C_2 is a share of C_1. Then a silo with 1,437 of scikit-learn's digits
trains a linear model, 500 steps of 64 and C_1 = 0.5, without noise and at epsilon 8.
Printed are loss on these digits and accuracy on the other 360, mean and standard
deviation over three seeds.
"""

import math
import statistics

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flower_ext import DPSGD, Plain, Task, client_app
from flower_ext.client import DiceSGD
from flower_ext.client.task import Batch
from flower_ext.client.trainer import Trainer
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import SiloPrivacy
from flower_ext.privacy.silo_budget import noise_for_steps
from flower_ext.simulation import LocalGrid

TRAINED_ON, STEPS, BATCH, SEEDS, CLIP = 1437, 500, 64, 3, 0.5
CONFIG = {"server-round": 1, "lr": 0.2, "batch-size": BATCH}


def needed() -> None:
    """Print the noise multiplier of each C_2 / C_1 and epsilon."""
    rate, steps, batch = 64 / 6000, 1000, 64
    print("C_2 / C_1     epsilon 1   epsilon 8")
    for name, share in (("0 (DP-SGD)", 0.0), ("1/64", 1 / 64), ("0.1", 0.1), ("1", 1)):
        found = [
            noise_for_steps(e, 1e-5, steps, rate, 1, shift=2 * batch * share)
            for e in (1.0, 8.0)
        ]
        print(f"{name:12}{found[0]:11.4g}{found[1]:12.4g}", flush=True)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def outcome(trainer: Trainer, seed: int) -> tuple[float, float]:
    """Return loss in training and accuracy on what was not trained on."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    train = {"x": x[:TRAINED_ON], "y": y[:TRAINED_ON]}

    def model_of(_: object) -> nn.Module:
        return nn.Linear(64, 10)

    def data_of(_: Context) -> tuple[Batch, Batch]:
        return train, train

    app = client_app(Task(model_of, data_of, loss), trainer=trainer)
    grid = LocalGrid(app, 1)
    zeros = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
    config = ConfigRecord({**CONFIG, "local-steps": STEPS})
    content = RecordDict({"arrays": to_record(zeros), "config": config})
    [reply] = grid.send_and_receive(
        [Message(content, next(iter(grid.get_node_ids())), "train")]
    )
    arrays = from_record(reply.content["arrays"])
    model = nn.Linear(64, 10)
    model.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()})
    with torch.no_grad():
        right = model(x[TRAINED_ON:]).argmax(1) == y[TRAINED_ON:]
        return float(loss(model, train).mean()), float(right.float().mean())


def trainers(seed: int) -> dict[str, Trainer]:
    """Return the trainers of all rows, by name."""

    def promise(**noise: float | int) -> SiloPrivacy:
        options = {"clipping_norm": CLIP, "delta": 1e-4, "seed": seed, **noise}
        return SiloPrivacy(**options)  # type: ignore[arg-type]

    quiet, noisy = promise(noise_multiplier=0.0), promise(epsilon=8.0, num_rounds=1)
    return {
        "SGD": Plain(),
        "clipped": DPSGD(quiet),
        "DiceSGD, C_2 = C_1": DiceSGD(quiet, feedback_norm=CLIP),
        "DP-SGD, epsilon 8": DPSGD(noisy),
        "DiceSGD, C_2 = C_1 / 64, epsilon 8": DiceSGD(noisy, feedback_norm=CLIP / 64),
        "DiceSGD, C_2 = C_1, epsilon 8": DiceSGD(noisy, feedback_norm=CLIP),
    }


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    needed()
    print("\n                                     loss            accuracy")
    for name in trainers(0):
        found = [outcome(trainers(seed)[name], seed) for seed in range(SEEDS)]
        columns = []
        for values in zip(*found, strict=True):
            spread = statistics.stdev(values) if all(map(math.isfinite, values)) else 0
            columns.append(f"{statistics.mean(values):.3f} +- {spread:.3f}")
        print(f"{name:36} {columns[0]:16}{columns[1]}", flush=True)


if __name__ == "__main__":
    main()
