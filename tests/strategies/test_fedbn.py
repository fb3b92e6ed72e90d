"""FedBN: clients with inputs of their own scale, and which layers stay at home."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.core.arrays import to_record
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FedBN, FedBNClient, FedPer, FedPerClient


def shifted():
    """Return a task whose clients see the same through other cameras."""

    def data(context):
        client = context.node_config["partition-id"]
        generator = torch.Generator().manual_seed(client)
        z = torch.randn(60, 2, generator=generator)
        x = z * 2**client + 5 * client * torch.tensor([1.0, -1.0])
        columns = {"x": x, "y": (z[:, 0] > z[:, 1]).long()}
        return [
            {name: x[part] for name, x in columns.items()}
            for part in (slice(40), slice(40, 60))
        ]

    def model(config):
        return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))

    def loss(model, batch):
        return nn.functional.cross_entropy(
            model(batch["x"]), batch["y"], reduction="none"
        )

    def metrics(model, batch):
        return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).float()}

    torch.manual_seed(0)
    start = {name: x.numpy() for name, x in model({}).state_dict().items()}
    return Task(model, data, loss, metrics), to_record(start)


def test_clients_with_shifted_inputs_fare_better_than_with_fedavg():
    task, initial = shifted()
    app = client_app(task, FedBNClient)
    config = {"lr": 0.5, "batch-size": 20, "local-epochs": 2}
    accuracy = {}
    for strategy in (FedBN(model=task.model({})), AdditiveStrategy()):
        result = strategy.start(LocalGrid(app, 4, config), initial, num_rounds=10)
        found = result.evaluate_metrics_clientapp[10]["accuracy"]
        accuracy[type(strategy).__name__] = found
    assert accuracy["FedBN"] > 0.9
    assert accuracy["AdditiveStrategy"] < 0.8


def test_it_is_fedper_of_these_layers_bit_for_bit(task, initial):
    app = client_app(task, FedBNClient, FedPerClient)
    results = [
        strategy.start(
            LocalGrid(app, 3, {"batch-size": 4, "lr": 0.1}), initial, num_rounds=3
        )
        for strategy in (FedBN(model=task.model({})), FedPer(personal="norm.*"))
    ]
    for name, array in initial.items():
        ours, theirs = (result.arrays[name].data for result in results)
        assert ours == theirs
        assert (ours == array.data) == name.startswith("norm.")
    losses = [
        [m["loss"] for m in result.evaluate_metrics_clientapp.values()]
        for result in results
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 2), "model='Linear' must be one with normalisation layers"),
        (nn.BatchNorm1d, "must be a torch module: an instance, such as Net()"),
    ],
)
def test_a_model_without_such_layers_is_refused(model, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        FedBN(model=model)


def test_a_model_of_other_names_is_refused_before_anything_runs(task, initial):
    strategy = FedBN(model=nn.ModuleDict({"other": nn.BatchNorm1d(4)}))
    grid = LocalGrid(client_app(task, FedBNClient), 2)
    with pytest.raises(ValueError, match="it matches none of"):
        strategy.start(grid, initial, num_rounds=1)
    with pytest.raises(ValueError, match="must be a filter that leaves others"):
        FedBN(model=nn.LayerNorm(2)).start(
            grid,
            to_record({"weight": np.ones(2), "bias": np.ones(2)}),
            num_rounds=1,
        )
