"""Shakespeare's speakers as clients, and windows of all of them for the server."""

import torch
from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.data.clients import speaker_windows, speakers


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test windows of the speaker that the context is of."""
    client = int(context.node_config["partition-id"])
    window = int(context.run_config["window"])
    train, test = (
        {"text": speaker_windows(split, client, window)} for split in ("train", "test")
    )
    return train, test


def central_data(config: UserConfig) -> dict[str, Tensor]:
    """Return test windows of every speaker, as many of each at the most."""
    most, window = int(config["central-windows"]), int(config["window"])
    number = speakers("test").num_partitions
    parts = [speaker_windows("test", client, window)[:most] for client in range(number)]
    return {"text": torch.cat(parts)}
