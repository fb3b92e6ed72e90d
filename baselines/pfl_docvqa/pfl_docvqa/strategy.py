"""The methods that are compared: federated averaging, and what it sends."""

from dataclasses import dataclass

from flwr.app import ConfigRecord, UserConfig

from flower_ext import AdditiveStrategy
from flower_ext.core.sampling import UniformSampler
from flower_ext.server.optimizers import SGD
from flower_ext.wire import NF4, BFloat16, Codec
from pfl_docvqa.model import FULL


@dataclass(frozen=True)
class Method:
    """What is sent both ways, and by how many clients, how often.

    Parameters
    ----------
    codec : Codec, optional
        Of downloads and uploads; None sends float32.
    few : bool
        Whether few clients are asked a few times, to train for many epochs.
    """

    codec: Codec | None = None
    few: bool = False


METHODS = {
    FULL: Method(),
    "lora": Method(),
    "lora-bfloat16": Method(BFloat16()),
    "lora-nf4": Method(NF4()),
    "few": Method(few=True),
    "few-nf4": Method(NF4(), few=True),
}


def method(name: str) -> Method:
    """Return one of :data:`METHODS`."""
    if name not in METHODS:
        raise ValueError(f"strategies={name!r} must name some of {tuple(METHODS)}")
    return METHODS[name]


def setting(name: str, key: str, config: UserConfig) -> int:
    """Return a setting, for methods that ask few clients that with ``-few`` behind."""
    return int(config[f"{key}-few" if method(name).few else key])


def train_config(name: str, config: UserConfig) -> ConfigRecord:
    """Return what clients are told of how to train."""
    rate = config["full-learning-rate" if name == FULL else "learning-rate"]
    epochs = setting(name, "epochs", config)
    return ConfigRecord({"learning-rate": float(rate), "local-epochs": epochs})


def make_strategy(name: str, config: UserConfig) -> AdditiveStrategy:
    """Make a method's strategy; cohorts of one size are the same in all."""
    codec = method(name).codec
    return AdditiveStrategy(
        sampler=UniformSampler(int(config["seed"])),
        # Flower takes the larger of the fraction's clients and the least number.
        fraction_train=1e-6,
        min_train_nodes=setting(name, "clients", config),
        fraction_evaluate=0.0,
        server_optimizer=SGD(1.0),
        download=codec,
        upload=codec,
    )
