"""Fashion-MNIST with label skew: Dirichlet over the labels, as clients."""

from functools import lru_cache

from flwr.app import Context
from flwr_datasets.partitioner import Partitioner
from torch import Tensor

from flower_ext.data import load, partitioner
from flower_ext.data.tensors import image_columns


@lru_cache(maxsize=1)
def clients(num_images: int, num_clients: int, alpha: float, seed: int) -> Partitioner:
    """Return the clients, of the first images; made once per process."""
    images = load("fashion-mnist")["train"].select(range(num_images))
    return partitioner(
        images, "dirichlet", num_partitions=num_clients, alpha=alpha, seed=seed
    )


@lru_cache(maxsize=256)
def columns(
    client: int, num_images: int, num_clients: int, alpha: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a client's images: four fifths for training, a fifth for testing."""
    rows = clients(num_images, num_clients, alpha, seed).load_partition(client)
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
        int(config["num-images"]),
        int(config["num-clients"]),
        float(config["alpha"]),
        int(config["seed"]),
    )


def central_data() -> dict[str, Tensor]:
    """Return the server's test data, Fashion-MNIST's own."""
    return image_columns(load("fashion-mnist")["test"])
