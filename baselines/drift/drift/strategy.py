"""The strategies that are compared, with the same cohorts, seeds and options."""

from collections.abc import Hashable
from dataclasses import replace
from random import Random
from typing import Any

from flwr.app import UserConfig

from flower_ext import AdditiveStrategy
from flower_ext.core.protocol import Payload, Round
from flower_ext.core.sampling import UniformSampler
from flower_ext.server.optimizers import FedExP
from flower_ext.strategies import FedCurv, FedDyn, FedNova, FedProx, Scaffold


class Epochs(AdditiveStrategy):
    """Tells every client how many local epochs to train."""

    #: The least and the most; drawn for every client, and for every round or for all.
    local_epochs = (1, 1)
    epochs_last = False
    seed = 0

    def variant(self, client: int, round: Round) -> Hashable:
        """Return the client's epochs."""
        number = 0 if self.epochs_last else round.number
        return Random(f"{self.seed} {number} {client}").randint(*self.local_epochs)

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Send what the method sends, and the epochs."""
        payload = super().payload(None, round)
        return replace(payload, config={**payload.config, "local-epochs": variant})


class FedAvgEpochs(Epochs):
    """FedAvg."""


class FedProxEpochs(Epochs, FedProx):
    """FedProx."""


class ScaffoldEpochs(Epochs, Scaffold):
    """Scaffold."""


class FedDynEpochs(Epochs, FedDyn):
    """FedDyn."""


class FedNovaEpochs(Epochs, FedNova):
    """FedNova."""


class FedCurvEpochs(Epochs, FedCurv):
    """FedCurv."""


class FedExPEpochs(Epochs):
    """FedAvg with FedExP on the server."""

    def __init__(self, **options: Any) -> None:
        super().__init__(server_optimizer=FedExP(), **options)


KINDS: dict[str, tuple[type[Epochs], dict[str, str]]] = {
    "fedavg": (FedAvgEpochs, {}),
    "fedprox": (FedProxEpochs, {"proximal_mu": "proximal-mu"}),
    "scaffold": (ScaffoldEpochs, {}),
    "feddyn": (FedDynEpochs, {"alpha": "feddyn-alpha"}),
    "fednova": (FedNovaEpochs, {}),
    "fedcurv": (FedCurvEpochs, {"strength": "fedcurv-strength"}),
    "fedexp": (FedExPEpochs, {}),
}


def make_strategy(name: str, config: UserConfig) -> Epochs:
    """Make ``scaffold``, ``scaffold@16`` with 16 local epochs, or ``scaffold@1-16``.

    With a range the epochs of every client are drawn from it, in every round, or once
    if ``epochs-last`` is set.
    """
    kind, _, epochs = name.partition("@")
    least, _, most = (epochs or str(config["local-epochs"])).partition("-")
    if kind not in KINDS:
        raise ValueError(f"strategies={name!r} must name one of {sorted(KINDS)}")
    make, settings = KINDS[kind]
    strategy = make(
        fraction_train=float(config["fraction-train"]),
        fraction_evaluate=0.0,
        sampler=UniformSampler(int(config["seed"])),
        **{option: float(config[key]) for option, key in settings.items()},
    )
    strategy.local_epochs = int(least), int(most or least)
    strategy.epochs_last = bool(config["epochs-last"])
    strategy.seed = int(config["seed"])
    return strategy
