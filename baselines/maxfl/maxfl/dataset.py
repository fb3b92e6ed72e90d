"""Fashion-MNIST with Dirichlet label skew; each client keeps a fifth for testing."""

from functools import lru_cache

from flwr.app import Context
from flwr_datasets.partitioner import Partitioner
from torch import Tensor

from flower_ext.data import load, partitioner
from flower_ext.data.tensors import image_columns


@lru_cache(maxsize=1)
def clients(num_clients: int, alpha: float, seed: int) -> Partitioner:
    """Return the clients; made once per process."""
    images = load("fashion-mnist")["train"]
    return partitioner(
        images, "dirichlet", num_partitions=num_clients, alpha=alpha, seed=seed
    )


@lru_cache(maxsize=256)
def columns(
    client: int, num_clients: int, alpha: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of a client: images in [0, 1], and labels."""
    rows = clients(num_clients, alpha, seed).load_partition(client)
    images = image_columns(rows.shuffle(seed=seed))
    test = len(rows) // 5
    return (
        {name: x[test:] for name, x in images.items()},
        {name: x[:test] for name, x in images.items()},
    )


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    config = context.run_config
    return columns(
        int(context.node_config["partition-id"]),
        int(config["num-clients"]),
        float(config["alpha"]),
        int(config["seed"]),
    )
