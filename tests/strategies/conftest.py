"""Tasks small enough to solve by hand, and whole runs of them in process."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext.client.task import Task
from flower_ext.core.arrays import from_record, to_record
from flower_ext.simulation.local import LocalGrid


def _columns(data):
    """Make columns of numbers into tensors: integers int64, others float32."""
    arrays = {name: np.asarray(column) for name, column in data.items()}
    return {
        name: torch.tensor(x, dtype=torch.int64 if x.dtype.kind == "i" else None)
        if x.dtype.kind in "ib"
        else torch.tensor(x, dtype=torch.float32)
        for name, x in arrays.items()
    }


def _pick(clients):
    """Return ``Task.data`` for clients given as (train, test), or as train only."""
    pairs = [c if isinstance(c, tuple) else (c, c) for c in clients]
    tensors = [(_columns(train), _columns(test)) for train, test in pairs]
    return lambda context: tensors[context.node_config["partition-id"]]


class _Point(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(float(start)))


@pytest.fixture(scope="session")
def point_task():
    """Make a task of one number: an example c costs ``scale * (w - c) ** 2``."""

    def make(clients, scale=0.5, start=0.0, metrics=None):
        return Task(
            lambda config: _Point(start),
            _pick(clients),
            lambda model, batch: scale * (model.w - batch["c"]) ** 2,
            metrics,
        )

    return make


def _half_squares(model, batch):
    return 0.5 * (batch["y"] - model(batch["x"])[:, 0]) ** 2


def _draw_labels(model, batch, generator):
    mean = model(batch["x"])[:, 0].detach()
    return {**batch, "y": mean + torch.randn(len(mean), generator=generator)}


@pytest.fixture(scope="session")
def linear_task():
    """Make linear regression with unit Gaussian noise: ``0.5 * (y - x @ w) ** 2``."""

    def make(clients, features, bias=False):
        return Task(
            lambda config: nn.Linear(features, 1, bias),
            _pick(clients),
            _half_squares,
            sample_labels=_draw_labels,
        )

    return make


@dataclass
class Played:
    """A run: Flower's result, and the model of every round, the first one too."""

    result: object
    models: list

    def train(self, server_round=1):
        return self.result.train_metrics_clientapp[server_round]

    def evaluate(self, server_round=1):
        return self.result.evaluate_metrics_clientapp[server_round]


@pytest.fixture(scope="session")
def play():
    """Run a strategy with virtual clients in process."""

    def run(strategy, app, clients, initial, rounds=1, config=None, **start):
        models = []

        def look(server_round, record):
            models.append({k: x.copy() for k, x in from_record(record).items()})

        grid = app if isinstance(app, LocalGrid) else LocalGrid(app, clients, config)
        sent = to_record({name: np.asarray(x) for name, x in initial.items()})
        result = strategy.start(
            grid, sent, num_rounds=rounds, evaluate_fn=look, **start
        )
        return Played(result, models)

    return run


@dataclass
class Call:
    """One message that a client answered."""

    kind: str
    client: int
    server_round: int
    reply: RecordDict
    state: RecordDict


@pytest.fixture(scope="session")
def spied():
    """Wrap a ClientApp; return the wrapped one and the list of its calls."""

    def wrap(app, forget=False):
        calls = []

        def answer(message, context):
            kind = message.metadata.message_type
            server_round = message.content["config"]["server-round"]
            answered = app(message, context)
            calls.append(
                Call(
                    kind,
                    context.node_config["partition-id"],
                    server_round,
                    answered.content,
                    RecordDict({k: r.copy() for k, r in context.state.items()}),
                )
            )
            if forget:
                context.state.clear()
            return answered

        wrapped = ClientApp()
        wrapped.train()(answer)
        wrapped.evaluate()(answer)
        return wrapped, calls

    return wrap
