"""The clients of the GPU benchmark: random images, a ClientApp that says where it ran.

Workers import this module.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
from _models import make_model
from flwr.app import ConfigRecord, Context, Message, UserConfig
from torch import Tensor, nn

from flower_ext import Task, client_app
from flower_ext.client.task import Batch
from flower_ext.strategies import FedFishClient, FLASCClient, MaxFLClient

BATCH = 32
LEARNING_RATE = 0.05

_devices: set[str] = set()  # of the batches of this process


@cache
def images(client: int, examples: int) -> dict[str, Tensor]:
    """Return a client's images and labels, made once in a process."""
    generator = torch.Generator().manual_seed(client)
    return {
        "x": torch.randn(examples, 1, 28, 28, generator=generator),
        "y": torch.randint(0, 10, (examples,), generator=generator),
    }


def initial_model(name: str) -> nn.Module:
    """Return the model that every client starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_model(name)


def _model(config: UserConfig) -> nn.Module:
    return initial_model(str(config["model"]))


def _data(context: Context) -> tuple[Batch, Batch]:
    client = int(context.node_config["partition-id"])
    data = images(client, int(context.run_config["examples"]))
    return data, data


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    # Where the computation takes place, not where the client was told to compute.
    devices = {batch["x"].device, *(p.device for p in model.parameters())}
    _devices.update(map(str, devices))
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def witness(
    message: Message, context: Context, call_next: Callable[..., Message]
) -> Message:
    """Add to the reply where the client ran and what GPU memory it took."""
    _devices.clear()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reply = call_next(message, context)
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    reply.content["seen"] = ConfigRecord(
        {
            "devices": " ".join(sorted(_devices)),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "pid": os.getpid(),
            "mib": peak / 2**20,
        }
    )
    return reply


task = Task(_model, _data, _loss)
app = client_app(task, FedFishClient, FLASCClient, MaxFLClient, mods=[witness])
