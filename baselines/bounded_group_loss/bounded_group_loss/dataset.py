"""Adult by occupation and COMPAS by charge; sex or race as groups."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.core.errors import refuse
from flower_ext.data import feature_names, load

Columns = dict[str, Tensor]
OTHER = "Other"


@dataclass(frozen=True)
class Source:
    """How people of a data set are divided.

    Attributes
    ----------
    client : str
        Column whose values are the clients.
    fewest : int
        Values with fewer people in the training data form one client together.
    labels : tuple of str
        Names of the two labels.
    groups : dict of str to tuple of str
        Values of the columns ``sex`` and ``race``; all others count as ``Other``.
    """

    client: str
    fewest: int
    labels: tuple[str, str]
    groups: dict[str, tuple[str, ...]]


_SEX = ("Female", "Male")
SOURCES = {
    "adult": Source(
        client="occupation",
        fewest=1,
        labels=("<=50K", ">50K"),
        groups={
            "sex": _SEX,
            "race": (
                "White",
                "Black",
                "Asian-Pac-Islander",
                "Amer-Indian-Eskimo",
                OTHER,
            ),
        },
    ),
    "compas": Source(
        client="c_charge_desc",
        fewest=30,
        labels=("no", "charged"),
        groups={
            "sex": _SEX,
            "race": ("African-American", "Caucasian", "Hispanic", OTHER),
        },
    ),
}


@lru_cache(maxsize=2)
def num_features(dataset: str) -> int:
    """Return the width of the feature vector."""
    return len(feature_names(load(dataset)["train"]))


def group_names(config: UserConfig) -> tuple[str, ...]:
    """Return the names of the groups, in the order of their indices."""
    return SOURCES[str(config["dataset"])].groups[str(config["group"])]


@lru_cache(maxsize=2)
def clients(dataset: str) -> tuple[str, ...]:
    """Return the clients' names in order; the last may stand for all that are rare."""
    source = SOURCES[dataset]
    people = Counter(load(dataset)["train"][source.client][:])
    kept = sorted(name for name, count in people.items() if count >= source.fewest)
    return (*kept, OTHER) if len(kept) < len(people) else tuple(kept)


@lru_cache(maxsize=4)
def people(dataset: str, split: str, group: str) -> Columns:
    """Return features, label, group and client of all people of a split."""
    source = SOURCES[dataset]
    rows = load(dataset)[split].with_format("numpy")[:]

    def indices(values: list[str], names: tuple[str, ...]) -> Tensor:
        # A value without a name of its own counts as OTHER, where there is one.
        index = {name: i for i, name in enumerate(names)}
        return torch.tensor([index.get(v, index.get(OTHER, -1)) for v in values])

    return {
        "x": torch.from_numpy(np.asarray(rows["features"], np.float32)),
        "y": torch.from_numpy(np.asarray(rows["label"], np.int64)),
        "group": indices(rows[group], source.groups[group]),
        "client": indices(rows[source.client], clients(dataset)),
    }


@lru_cache(maxsize=128)
def columns(dataset: str, split: str, group: str, client: int) -> Columns:
    """Return a client's people: ``x``, ``y`` and ``group``."""
    everybody = people(dataset, split, group)
    own = everybody["client"] == client
    return {key: everybody[key][own] for key in ("x", "y", "group")}


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test data of the client that the context is of."""
    config = context.run_config
    number = int(context.node_config["partition-id"])
    last = len(clients(str(config["dataset"]))) - 1
    if not 0 <= number <= last:
        refuse("partition-id", number, f"from 0 to {last}, a client's number")
    train, test = (
        columns(str(config["dataset"]), split, str(config["group"]), number)
        for split in ("train", "test")
    )
    return train, test
