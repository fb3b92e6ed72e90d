"""Shakespeare's speakers, or Fashion-MNIST with skewed labels or inputs, as clients."""

from random import Random

from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.core.errors import positive, whole
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
    train, test = client_images(
        client,
        num_clients=int(config["num-clients"]),
        alpha=float(config["alpha"]),
        seed=int(config["seed"]),
    )
    return shifted(train, client, config), shifted(test, client, config)


def shifted(
    images: dict[str, Tensor], client: int, config: UserConfig
) -> dict[str, Tensor]:
    """Return a client's images as its camera takes them: turned, darker or lighter.

    Turned by quarters, as many kinds of clients as ``rotations``; and every pixel to
    the power of a number of the client's, between 1 / ``gamma`` and ``gamma``.
    """
    turns = client % whole("rotations", config["rotations"], 1)
    draw = Random(f"{config['seed']} {client}")
    power = positive("gamma", float(config["gamma"])) ** draw.uniform(-1, 1)
    return {**images, "x": images["x"].rot90(turns, (2, 3)) ** power}


def is_text(config: UserConfig) -> bool:
    """Whether the clients are speakers."""
    name = config["dataset"]
    if name not in ("shakespeare", "fashion-mnist"):
        raise ValueError(f"dataset={name!r} must be shakespeare or fashion-mnist")
    return name == "shakespeare"
