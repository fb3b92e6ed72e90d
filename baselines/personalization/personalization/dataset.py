"""Shakespeare's speakers or Fashion-MNIST with label skew, as clients."""

from functools import lru_cache

from flwr.app import Context, UserConfig
from flwr_datasets.partitioner import Partitioner
from torch import Tensor

from flower_ext.data import load, partitioner
from flower_ext.data.tensors import character_windows, image_columns


@lru_cache(maxsize=2)
def speakers(split: str) -> Partitioner:
    """Return the speakers' speeches of a split; opened once per process."""
    return partitioner(load("shakespeare")[split], "natural")


@lru_cache(maxsize=1024)
def client_windows(split: str, client: int, window: int) -> Tensor:
    """Return a speaker's windows; kept, since a process sees a client many times."""
    speeches = speakers(split).load_partition(client)["text"]
    return character_windows("\n".join(speeches), window)


@lru_cache(maxsize=1)
def wearers(num_clients: int, alpha: float, seed: int) -> Partitioner:
    """Return the training images, Dirichlet over the labels; made once per process."""
    images = load("fashion-mnist")["train"]
    return partitioner(
        images, "dirichlet", num_partitions=num_clients, alpha=alpha, seed=seed
    )


@lru_cache(maxsize=256)
def client_images(
    client: int, num_clients: int, alpha: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a client's images: four fifths for training, a fifth for testing."""
    rows = wearers(num_clients, alpha, seed).load_partition(client)
    columns = image_columns(rows.shuffle(seed=seed))
    test = len(rows) // 5
    return (
        {name: x[test:] for name, x in columns.items()},
        {name: x[:test] for name, x in columns.items()},
    )


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    client = int(context.node_config["partition-id"])
    config = context.run_config
    if is_text(config):
        window = int(config["window"])
        train, test = (
            {"text": client_windows(split, client, window)}
            for split in ("train", "test")
        )
        return train, test
    return client_images(
        client,
        int(config["num-clients"]),
        float(config["alpha"]),
        int(config["seed"]),
    )


def is_text(config: UserConfig) -> bool:
    """Whether the clients are speakers."""
    name = config["dataset"]
    if name not in ("shakespeare", "fashion-mnist"):
        raise ValueError(f"dataset={name!r} must be shakespeare or fashion-mnist")
    return name == "shakespeare"
