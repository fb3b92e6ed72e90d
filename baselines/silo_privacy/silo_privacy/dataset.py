"""Schools as silos; a part of every school's pupils is held out."""

from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor

from flower_ext.core.errors import refuse
from flower_ext.data import load

Columns = dict[str, Tensor]


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test data of the school that the context is of.

    The seed decides which pupils are held out. Nothing is standardised within a school:
    that would be a use of its data that no epsilon covers.
    """
    config = context.run_config
    silos = schools(int(config["min-pupils"]))
    number = int(context.node_config["partition-id"])
    if not 0 <= number < len(silos):
        refuse("partition-id", number, f"from 0 to {len(silos) - 1}, a school's number")
    data = silos[number]
    size = len(data["y"])
    seeds = [int(config["seed"]), number]
    order = torch.from_numpy(np.random.default_rng(seeds).permutation(size))
    held_out = max(1, round(float(config["test-share"]) * size))
    return (
        {name: column[order[held_out:]] for name, column in data.items()},
        {name: column[order[:held_out]] for name, column in data.items()},
    )


@lru_cache(maxsize=2)
def schools(min_pupils: int) -> list[Columns]:
    """Return features and scores of every school with enough pupils."""
    splits = load("schools").values()
    names = np.concatenate([np.asarray(split["school"][:]) for split in splits])
    x = torch.from_numpy(np.concatenate([split["features"][:] for split in splits]))
    y = torch.from_numpy(np.concatenate([split["label"][:] for split in splits]))
    places = (np.flatnonzero(names == name) for name in np.unique(names))
    return [{"x": x[i], "y": y[i]} for i in places if len(i) >= min_pupils]
