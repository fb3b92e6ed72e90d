"""One silo and what it trains: a ClientApp under DP-SGD, spoken to by messages."""

import math

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from flower_ext.client.app import client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.task import Task
from flower_ext.core.arrays import to_record
from flower_ext.privacy import SiloPrivacy
from flower_ext.simulation import LocalGrid

EXAMPLES = 12
NOTHING = {"noise_multiplier": 0.0, "clipping_norm": math.inf, "delta": 1e-3}
NOISY = {"noise_multiplier": 1.0, "clipping_norm": 0.5, "delta": 1e-3}


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.frozen(torch.tanh(self.norm(self.hidden(x)))))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 2)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.conv(x.unsqueeze(1)))).flatten(1))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        tokens = (x.abs() * 3).long().clamp(max=5)  # (batch, 3)
        return self.out(torch.tanh(self.mix(self.embed(tokens))).mean(1))


class Scaled(nn.Module):
    """A parameter without dimensions, in a module that has a layer as well."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.out(x) * self.scale


def columns(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator)
    return {
        "x": x,
        "y": (x[:, 0] > x[:, 1]).long(),
        "weight": torch.ones(size),
        "user": torch.arange(size) % 5,
    }


def cross_entropy(model, batch):
    losses = nn.functional.cross_entropy(
        model(batch["x"]), batch["y"], reduction="none"
    )
    return batch["weight"] * losses


def make_task(net=Dense, data=None, loss=cross_entropy, **options):
    data = columns(EXAMPLES) if data is None else data
    return Task(lambda config: net(), lambda context: (data, data), loss, **options)


def first_arrays(net=Dense):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = net().state_dict()
    return {name: tensor.numpy().copy() for name, tensor in state.items()}


class Silo:
    """One ClientApp and its clients, which keep their state."""

    def __init__(self, task, privacy, *halves, clients=3, **options):
        if isinstance(privacy, dict):
            privacy = SiloPrivacy(**privacy)
        trainer = options.pop("trainer", None) or DPSGD(privacy, **options)
        app = client_app(task, *halves, trainer=trainer)
        self.grid = LocalGrid(app, clients)
        self.nodes = list(self.grid.get_node_ids())

    def send(
        self,
        arrays,
        kind="train",
        client=0,
        server_round=1,
        run=None,
        beside=None,
        **config,
    ):
        config = {k.replace("_", "-"): v for k, v in config.items()}
        record = ConfigRecord({"server-round": server_round, **config})
        content = RecordDict({"arrays": to_record(arrays), "config": record})
        if run is not None:
            content["run"] = run
        if beside is not None:
            content["beside"] = to_record(beside)
        message = Message(content, self.nodes[client], kind)
        [reply] = self.grid.send_and_receive([message])
        return reply

    def train(self, arrays, **config):
        reply = self.send(arrays, **config)
        if reply.has_error():
            raise RuntimeError(reply.error.reason.splitlines()[0])
        new = {name: a.numpy() for name, a in reply.content["arrays"].items()}
        return new, dict(reply.content["metrics"])

    def state(self, client=0):
        return self.grid.states.read(client)


def vector(arrays):
    return np.concatenate([np.ravel(a) for a in arrays.values()]).astype(float)


def close(found, expected, atol):
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.first(self.embed(tokens)).mean(1))


class Filtered(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.conv(self.embed(tokens).transpose(1, 2)).mean(2))


class Twice(Text):
    def forward(self, tokens):
        return self.head(self.first(self.first(self.embed(tokens))).mean(1))


def cancelling(net, large, rest):
    """Weights under which the terms of two tokens cancel, but for a rest."""
    state = {k: torch.tensor(a) for k, a in first_arrays(net).items()}
    embed = state["embed.weight"]
    embed[0], embed[1] = torch.zeros(4), torch.zeros(4)
    embed[0, 0], embed[1, 0] = large, -large
    embed[:2, 1] = rest
    for name in state.keys() - {"embed.weight", "head.weight"}:
        state[name].zero_()
    return {name: tensor.numpy() for name, tensor in state.items()}


def amplifying(net, large, rest):
    """Weights under which gradients of the classes cancel on their way back."""
    state = {k: torch.tensor(a) for k, a in first_arrays(net).items()}
    state["head.weight"][:] = large
    state["head.bias"][:] = torch.tensor([0.0, 0.3, -0.2])
    state["embed.weight"] *= rest / large
    return {name: tensor.numpy() for name, tensor in state.items()}
