"""Shakespeare's speakers or Fashion-MNIST with label skew, as clients."""

from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.data.clients import client_images, speaker_windows


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    client = int(context.node_config["partition-id"])
    config = context.run_config
    if is_text(config):
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


def is_text(config: UserConfig) -> bool:
    """Whether the clients are speakers."""
    name = config["dataset"]
    if name not in ("shakespeare", "fashion-mnist"):
        raise ValueError(f"dataset={name!r} must be shakespeare or fashion-mnist")
    return name == "shakespeare"
