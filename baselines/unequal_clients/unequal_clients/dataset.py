"""Fashion-MNIST with label skew as clients, and what the server has of it."""

from functools import lru_cache

from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.data import load
from flower_ext.data.clients import client_images
from flower_ext.data.tensors import image_columns


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a client's training data, and the server's test data.

    All clients measure on the same images, so that what is told apart by width is the
    models of the widths, and not who has them.
    """
    config = context.run_config
    train, _ = client_images(
        int(context.node_config["partition-id"]),
        num_images=int(config["num-images"]),
        num_clients=int(config["num-clients"]),
        alpha=float(config["alpha"]),
        seed=int(config["seed"]),
    )
    return train, test_data(int(config["num-test"]))


@lru_cache(maxsize=1)
def test_data(size: int) -> dict[str, Tensor]:
    """Return the first of Fashion-MNIST's test images."""
    return image_columns(load("fashion-mnist")["test"].select(range(size)))


def public_data(config: UserConfig) -> dict[str, Tensor]:
    """Return the last of the training images, which no client has."""
    images = load("fashion-mnist")["train"]
    first = len(images) - int(config["num-public"])
    return image_columns(images.select(range(first, len(images))))
