"""The client: one app for all methods; the server says what is trained."""

from collections.abc import Iterable

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from federated_lora.dataset import client_data
from federated_lora.model import make_model
from flower_ext import client_app
from flower_ext.client.adapters import adapter_task
from flower_ext.client.half import LocalSettings
from flower_ext.strategies import (
    FedExLoRAClient,
    FLASCClient,
    FlexLoRAClient,
    StackedLoRAClient,
)

METHOD = "method"
HALVES = (FedExLoRAClient, FlexLoRAClient, StackedLoRAClient, FLASCClient)

app = ClientApp()


def adam(
    parameters: Iterable[torch.nn.Parameter], settings: LocalSettings
) -> torch.optim.Optimizer:
    """Return the optimizer of a client's steps, which is new in every round."""
    return torch.optim.Adam(parameters, lr=settings.learning_rate)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train what the method of the message trains."""
    # Made for each message, as the model depends on the method; its base is read once.
    name = str(message.content.config_records["config"][METHOD])
    model = make_model(name, context.run_config)
    task = adapter_task(model, client_data, optimizer=adam)
    return client_app(task, *HALVES)(message, context)
