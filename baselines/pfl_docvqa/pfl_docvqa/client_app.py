"""The client: one app for all methods; the server says what is trained."""

from collections.abc import Iterable

import torch
from flwr.app import Context, Message, UserConfig
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import Task, client_app
from flower_ext.client.adapters import adapter_task
from flower_ext.client.half import LocalSettings
from pfl_docvqa.dataset import client_data
from pfl_docvqa.model import make_model

METHOD = "method"

app = ClientApp()


def adam(
    parameters: Iterable[nn.Parameter], settings: LocalSettings
) -> torch.optim.Optimizer:
    """Return the clients' optimizer, new in each round."""
    return torch.optim.AdamW(parameters, settings.learning_rate)


def make_task(name: str, config: UserConfig) -> Task:
    """Return the task of a method."""
    return adapter_task(make_model(name, config), client_data, optimizer=adam)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train what the method of the message trains."""
    # Made for each message, as the model depends on the method; its base is read once.
    name = str(message.content.config_records["config"][METHOD])
    return client_app(make_task(name, context.run_config))(message, context)
