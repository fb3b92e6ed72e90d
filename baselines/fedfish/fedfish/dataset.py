"""Shakespeare's speakers or Fashion-MNIST with label skew, as clients."""

import torch
from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.data import load
from flower_ext.data.clients import client_images, speaker_windows, speakers
from flower_ext.data.tensors import image_columns


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    client = int(context.node_config["partition-id"])
    config = context.run_config
    if _is_text(config):
        window = int(config["window"])
        train, test = (
            {"text": speaker_windows(split, client, window)}
            for split in ("train", "test")
        )
        return train, test
    return client_images(
        client,
        num_clients=int(config["num-clients"]),
        alpha=float(config["alpha"]),
        seed=int(config["seed"]),
    )


def num_clients(config: UserConfig) -> int:
    """Return how many clients there are."""
    if _is_text(config):
        return speakers("train").num_partitions
    return int(config["num-clients"])


def central_data(config: UserConfig) -> dict[str, Tensor]:
    """Return the server's test data: of every speaker, or Fashion-MNIST's own."""
    if not _is_text(config):
        return image_columns(load("fashion-mnist")["test"])
    parts = [
        speaker_windows("test", client, int(config["window"]))
        for client in range(speakers("test").num_partitions)
    ]
    # As many windows of each, so that Hamlet does not outweigh everybody else.
    return {"text": torch.cat([x[: int(config["central-windows"])] for x in parts])}


def _is_text(config: UserConfig) -> bool:
    name = config["dataset"]
    if name not in ("shakespeare", "fashion-mnist"):
        raise ValueError(f"dataset={name!r} must be shakespeare or fashion-mnist")
    return name == "shakespeare"
