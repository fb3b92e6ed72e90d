"""Fashion-MNIST with label skew: Dirichlet over the labels, as clients."""

from flwr.app import Context
from torch import Tensor

from flower_ext.data import load
from flower_ext.data.clients import client_images
from flower_ext.data.tensors import image_columns


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    config = context.run_config
    return client_images(
        int(context.node_config["partition-id"]),
        num_images=int(config["num-images"]),
        num_clients=int(config["num-clients"]),
        alpha=float(config["alpha"]),
        seed=int(config["seed"]),
    )


def central_data() -> dict[str, Tensor]:
    """Return the server's test data, Fashion-MNIST's own."""
    return image_columns(load("fashion-mnist")["test"])
