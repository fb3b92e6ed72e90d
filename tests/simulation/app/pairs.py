"""Clients of Ditto, whose own models are large enough to be files."""

import os
import signal
import time

import torch
from torch import nn

from flower_ext.client.app import client_app
from flower_ext.client.task import Task
from flower_ext.strategies.ditto import DittoClient


class Waves(nn.Module):
    """As many numbers as are kept in a file, each with a place on a wave."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(20_000))


def data(context):
    """Return examples with a phase each: more of them at odd clients."""
    client = context.node_config["partition-id"]
    phases = torch.arange(2 + client % 2 * 3) + client
    columns = {"phase": phases.float()[:, None]}
    return columns, columns


def loss(model, batch):
    """Return how far the model is from each example's wave."""
    wave = torch.sin(batch["phase"] + torch.arange(len(model.w)))
    return (model.w - wave).square().sum(1) / 2


def killing(message, context, call_next):
    """Let a client kill the server where it is told to."""
    config = message.content["config"]
    here = [config["server-round"], context.node_config["partition-id"]]
    if here == config.get("kill"):
        os.kill(config["server"], signal.SIGKILL)
        time.sleep(60)
    return call_next(message, context)


app = client_app(Task(lambda config: Waves(), data, loss), DittoClient, mods=[killing])
