"""Fashion-MNIST with label skew, or Shakespeare's speakers, as clients."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.data import load, partitioner
from flower_ext.data.tensors import character_windows, image_columns

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Columns = dict[str, Tensor]


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return the data of the client that the context is of; it tests on the same.

    Accuracy is measured by the server, on test data of its own: averages over
    clients would not be private.
    """
    config = context.run_config
    client = int(context.node_config["partition-id"])
    if config["dataset"] == "shakespeare":
        data = windows("train", client, int(config["window"]))
    else:
        clients, alpha = int(config["num-clients"]), float(config["alpha"])
        data = images(client, clients, alpha, int(config["seed"]))
    return data, data


def central_data(config: UserConfig) -> Columns:
    """Return test data for the server: some of every speaker, or some images."""
    size = int(config["central-examples"])
    if config["dataset"] == "shakespeare":
        speakers = _speakers("test").num_partitions
        parts = [windows("test", i, int(config["window"])) for i in range(speakers)]
        each = -(-size // speakers)  # rounded up, so that every speaker is heard
        return {k: torch.cat([part[k][:each] for part in parts]) for k in ("x", "y")}
    return image_columns(load("fashion-mnist")["test"].take(size))


@lru_cache(maxsize=512)
def images(client: int, clients: int, alpha: float, seed: int) -> Columns:
    """Return a client's images ``(n, 1, 28, 28)`` in [0, 1] and labels ``(n,)``."""
    rows = _partitions(clients, alpha, seed).load_partition(client)
    return image_columns(rows)


@lru_cache(maxsize=1)
def _partitions(clients: int, alpha: float, seed: int) -> Partitioner:
    return partitioner(
        load("fashion-mnist")["train"],
        "dirichlet",
        num_partitions=clients,
        alpha=alpha,
        seed=seed,
    )


@lru_cache(maxsize=2)
def _speakers(split: str) -> Partitioner:
    return partitioner(load("shakespeare")[split], "natural")


@lru_cache(maxsize=1024)
def windows(split: str, client: int, window: int) -> Columns:
    """Return a speaker's characters and those after them ``(windows, window)``."""
    text = "\n".join(_speakers(split).load_partition(client)["text"])
    cut = character_windows(text, window)
    return {"x": cut[:, :-1].contiguous(), "y": cut[:, 1:].contiguous()}
