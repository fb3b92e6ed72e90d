"""Adult: occupations as clients, sex or race as groups, income as label."""

from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context
from flwr_datasets.partitioner import Partitioner
from torch import Tensor

from flower_ext.data import load, partitioner

GROUPS = {
    "sex": ["Female", "Male"],
    "race": ["White", "Black", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other"],
}


LABELS = ["<=50K", ">50K"]


@lru_cache(maxsize=2)
def occupations(split: str) -> Partitioner:
    """Return the clients of a split; opened once per process."""
    return partitioner(load("adult")[split], "natural", column="occupation")


@lru_cache(maxsize=64)
def columns(split: str, client: int, group: str) -> dict[str, Tensor]:
    """Return features ``x``, label ``y`` and group index of a client's people."""
    people = occupations(split).load_partition(client).with_format("numpy")
    index = {name: i for i, name in enumerate(GROUPS[group])}
    return {
        "x": torch.from_numpy(np.asarray(people["features"], np.float32)),
        "y": torch.from_numpy(np.asarray(people["label"], np.int64)),
        "group": torch.tensor([index[name] for name in people[group]]),
    }


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    client = int(context.node_config["partition-id"])
    group = str(context.run_config["group"])
    return columns("train", client, group), columns("test", client, group)
