"""Fashion-MNIST with Dirichlet label skew; each client keeps a fifth for testing.

Where clients conflict, some of them call the kinds of clothes by other labels.
"""

from functools import lru_cache

import numpy as np
from flwr.app import Context
from flwr_datasets.partitioner import Partitioner
from torch import Tensor

from flower_ext.data import load, partitioner
from flower_ext.data.tensors import image_columns

# What is added to the labels of a client that conflicts with the others, modulo 10.
SHIFTS = (3, 7)


@lru_cache(maxsize=1)
def shifts(
    num_clients: int, num_training_clients: int, conflict: float, seed: int
) -> dict[int, int]:
    """Return the shifts of the clients that conflict with the others.

    Their share is ``conflict`` among clients that may train, and among the others.
    """
    # Every process draws for itself, and must draw the same.
    random = np.random.default_rng([seed, num_clients])
    everybody = np.arange(num_clients)
    chosen: list[int] = []
    for part in np.split(everybody, [num_training_clients]):
        size = round(conflict * len(part))
        chosen += random.choice(part, size, replace=False).tolist()
    return {client: SHIFTS[i % len(SHIFTS)] for i, client in enumerate(chosen)}


@lru_cache(maxsize=1)
def clients(num_clients: int, alpha: float, seed: int) -> Partitioner:
    """Return the clients; made once per process."""
    images = load("fashion-mnist")["train"]
    return partitioner(
        images, "dirichlet", num_partitions=num_clients, alpha=alpha, seed=seed
    )


@lru_cache(maxsize=256)
def columns(
    client: int, num_clients: int, alpha: float, seed: int, shift: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of a client: images in [0, 1], and labels."""
    rows = clients(num_clients, alpha, seed).load_partition(client)
    images = image_columns(rows.shuffle(seed=seed))
    images["y"] = (images["y"] + shift) % 10
    test = len(rows) // 5
    return (
        {name: x[test:] for name, x in images.items()},
        {name: x[:test] for name, x in images.items()},
    )


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    config = context.run_config
    client, seed = int(context.node_config["partition-id"]), int(config["seed"])
    number = int(config["num-clients"])
    may_train = int(config["num-training-clients"])
    shifted = shifts(number, may_train, float(config["conflict"]), seed)
    alpha = float(config["alpha"])
    return columns(client, number, alpha, seed, shifted.get(client, 0))
