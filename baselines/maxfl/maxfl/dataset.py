"""Fashion-MNIST with Dirichlet label skew; each client keeps a fifth for testing.

Where clients conflict, some of them call the kinds of clothes by other labels.
"""

from functools import lru_cache

import numpy as np
from flwr.app import Context
from torch import Tensor

from flower_ext.data.clients import client_images

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


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    config = context.run_config
    client, seed = int(context.node_config["partition-id"]), int(config["seed"])
    number = int(config["num-clients"])
    may_train = int(config["num-training-clients"])
    shifted = shifts(number, may_train, float(config["conflict"]), seed)
    train, test = client_images(
        client, num_clients=number, alpha=float(config["alpha"]), seed=seed
    )
    shift = shifted.get(client, 0)
    return (
        {**train, "y": (train["y"] + shift) % 10},
        {**test, "y": (test["y"] + shift) % 10},
    )
