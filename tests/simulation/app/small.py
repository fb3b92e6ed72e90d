"""A small task with clients that really train, in a module that workers import."""

import torch
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext.client.app import client_app
from flower_ext.client.stacked import Stacked
from flower_ext.client.task import Task
from flower_ext.simulation import packed
from flower_ext.strategies import FedFishClient, FLASCClient


class Net(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        """Return logits."""
        return self.out(self.drop(torch.relu(self.norm(self.hidden(x)))))


def data(context):
    """Return 8 examples and more, the more the higher the client's number."""
    client = context.node_config["partition-id"]
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(8 + 4 * client, 3, generator=generator)
    columns = {"x": x, "y": (x[:, 0] > x[:, 1]).long()}
    return columns, columns


def loss(model, batch):
    """Return the cross-entropy of each example."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


task = Task(lambda config: Net(), data, loss)
app = client_app(task, FedFishClient, FLASCClient)
stacked = client_app(task, trainer=Stacked())

# The same, for packing by Flower's messages.
with_mod = ClientApp(mods=[packed])
with_mod.train()(app)
with_mod.evaluate()(app)


def initial():
    """Return the initial model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().state_dict()
