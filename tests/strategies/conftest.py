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


class _Vector(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))


@dataclass
class Quadratics:
    """Clients whose loss is ``(w - a_k)' H_k (w - a_k) / 2``, in float64."""

    centers: np.ndarray
    hessians: np.ndarray

    @property
    def start(self):
        """A model to start from."""
        return {"w": np.zeros(self.centers.shape[1])}

    @property
    def minimizer(self):
        """Where the mean of the losses is least."""
        pulls = np.einsum("kij,kj->ki", self.hessians, self.centers)
        return np.linalg.solve(self.hessians.sum(0), pulls.sum(0))

    def fixed_point(self, eta, steps, weights=1.0):
        """Where FedAvg stands still: gradient descent of each client is a linear map.

        ``y_k - a_k = (I - eta H_k)^steps (w - a_k)``, and the mean of the y_k is w.
        """
        one, count = np.eye(self.centers.shape[1]), len(self.centers)
        steps, weights = (np.broadcast_to(x, count) for x in (steps, weights))
        pull = np.array(
            [
                weight * (one - np.linalg.matrix_power(one - eta * h, int(n)))
                for h, n, weight in zip(self.hessians, steps, weights, strict=True)
            ]
        )
        pulls = np.einsum("kij,kj->ki", pull, self.centers)
        return np.linalg.solve(pull.sum(0), pulls.sum(0))

    def task(self, **options):
        """Make the task; each client has one example, or as many as ``copies``."""
        copies = options.pop("copies", [1] * len(self.centers))

        def data(context):
            client = context.node_config["partition-id"]
            columns = {
                "a": torch.tensor(self.centers[client]),
                "h": torch.tensor(self.hessians[client]),
            }
            many = {
                k: torch.stack([x] * copies[client]) if copies[client] else x[None][:0]
                for k, x in columns.items()
            }
            return many, many

        def loss(model, batch):
            away = model.w - batch["a"]
            return 0.5 * torch.einsum("bi,bij,bj->b", away, batch["h"], away)

        size = self.centers.shape[1]
        return Task(lambda config: _Vector(size), data, loss, **options)


@pytest.fixture(scope="session")
def quadratics():
    """Three clients in the plane that agree neither on minimum nor on curvature."""
    rng = np.random.default_rng(3)
    turns = [np.linalg.qr(rng.standard_normal((2, 2)))[0] for _ in range(3)]
    hessians = [q @ np.diag(rng.uniform(0.5, 2.0, 2)) @ q.T for q in turns]
    return Quadratics(3 * rng.standard_normal((3, 2)), np.array(hessians))
