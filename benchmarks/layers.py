"""What clipping by layer is worth beside flat clipping, at the same epsilon.

A silo with 1,437 of scikit-learn's digits trains an MLP of three or of seven layers by
400 steps of 64, epsilon 4, clipping norm 1. Printed is the accuracy on the other 360,
mean and standard deviation over three seeds, at the best of four learning rates for
each row.
"""

import statistics

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flower_ext import DPSGD, Task, client_app
from flower_ext.client import OnePassClipping
from flower_ext.client.task import Batch
from flower_ext.client.trainer import Trainer
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import SiloPrivacy
from flower_ext.simulation import LocalGrid

TRAINED_ON, STEPS, BATCH, SEEDS = 1437, 400, 64, 3
RATES = (0.25, 0.5, 1.0, 2.0)
WIDTH = 64


def network(layers: int) -> nn.Module:
    """Return an MLP."""
    hidden = [
        x for _ in range(layers - 1) for x in (nn.Linear(WIDTH, WIDTH), nn.ReLU())
    ]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def trainer_of(name: str, seed: int) -> Trainer:
    """Return the trainer of a row."""
    privacy = SiloPrivacy(
        clipping_norm=1.0, delta=1e-4, epsilon=4.0, num_rounds=1, seed=seed
    )
    if name == "flat":
        return DPSGD(privacy)
    return OnePassClipping(privacy, split=name)  # type: ignore[arg-type]


def accuracy(name: str, layers: int, rate: float, seed: int) -> float:
    """Return the accuracy of one training on what was not trained on."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    train = {"x": x[:TRAINED_ON], "y": y[:TRAINED_ON]}

    def model_of(_: object) -> nn.Module:
        return network(layers)

    def data_of(_: Context) -> tuple[Batch, Batch]:
        return train, train

    app = client_app(Task(model_of, data_of, loss), trainer=trainer_of(name, seed))
    grid = LocalGrid(app, 1)
    torch.manual_seed(seed)
    first = {k: v.numpy() for k, v in network(layers).state_dict().items()}
    config = {"server-round": 1, "lr": rate, "batch-size": BATCH, "local-steps": STEPS}
    content = RecordDict({"arrays": to_record(first), "config": ConfigRecord(config)})
    [reply] = grid.send_and_receive(
        [Message(content, next(iter(grid.get_node_ids())), "train")]
    )
    model = network(layers)
    arrays = from_record(reply.content["arrays"])
    model.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()})
    with torch.no_grad():
        right = model(x[TRAINED_ON:]).argmax(1) == y[TRAINED_ON:]
    return float(right.float().mean())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for layers in (3, 7):
        for name in ("flat", "uniform", "dimension"):
            rows = [
                [accuracy(name, layers, rate, seed) for seed in range(SEEDS)]
                for rate in RATES
            ]
            best = max(rows, key=statistics.mean)
            rate = RATES[rows.index(best)]
            mean, spread = statistics.mean(best), statistics.stdev(best)
            print(
                f"{layers} layers, {name:10} {mean:.3f} +- {spread:.3f} (lr {rate})",
                flush=True,
            )


if __name__ == "__main__":
    main()
