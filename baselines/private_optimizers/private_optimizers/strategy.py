"""The methods that are compared, with the same cohorts and the same epsilon."""

from __future__ import annotations

from flwr.app import UserConfig

from flower_ext import AdditiveStrategy, Mechanism
from flower_ext.core.protocol import Config, Round
from flower_ext.core.sampling import MinSeparationSampler, PoissonSampler, Sampler
from flower_ext.privacy import Clipping, FlatClipping, PerLayerClipping, Workload
from flower_ext.server.optimizers import LAMB, SGD, ServerOptimizer
from flower_ext.strategies import DP2, AdaDPS
from flower_ext.strategies.adadps import (
    PublicGradients,
    PublicMoments,
    PublicStatistics,
)
from private_optimizers.client_app import METHOD, task
from private_optimizers.dataset import (
    num_users,
    public_data,
    sampling_rate,
    word_frequencies,
)
from private_optimizers.model import make_model
from private_optimizers.silos import batch_size
from private_optimizers.utils import setting

CENTRAL = (
    "none",
    "dp-fedavg",
    "dp-fedadam",
    "layers-lamb",
    "dp-ftrl",
    "ada-dps",
    "ada-dps-words",
    "dp2",
)
IN_SILOS = ("els", "uls")


class Silos(AdditiveStrategy):
    """FedAvg of silos, each of which protects its users itself.

    Parameters
    ----------
    told : dict
        What the silos are told: the method, and their settings.
    **options
        Of the strategy.
    """

    def __init__(self, told: Config, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.told = told

    def tell(self, round: Round) -> Config:
        """Tell silos what to do."""
        return self.told


def make_strategy(name: str, config: UserConfig) -> AdditiveStrategy:
    """Make a method: of ``CENTRAL`` without silos, of ``IN_SILOS`` with them."""
    names = IN_SILOS if int(config["silos"]) else CENTRAL
    if name not in names:
        where = f"with silos={config['silos']}"
        raise ValueError(f"methods={name!r} must be among {' '.join(names)} {where}")
    chosen = setting(name, config)
    if silos := int(config["silos"]):
        told: Config = {
            METHOD: name,
            "learning-rate": chosen.rate,
            "local-steps": int(config["silo-steps"]),
            "batch-size": batch_size(name, config),
        }
        nodes = {"min_train_nodes": silos, "min_available_nodes": silos}
        return Silos(told, fraction_evaluate=0.0, **nodes)
    options = {
        "mechanism": _mechanism(name, chosen.norm, config),
        "sampler": _sampler(name, config),
        "server_optimizer": _optimizer(name, chosen.rate, config),
        "fraction_evaluate": 0.0,
    }
    if name.startswith("ada-dps"):
        return AdaDPS(
            public_statistics=_public_statistics(name, config),
            tau=chosen.tau,
            **options,  # type: ignore[arg-type]
        )
    if name == "dp2":
        delay = int(config["delay"])
        return DP2(
            plain_rounds=delay,
            adaptive_rounds=delay,
            adaptive_rate=float(config["adaptive-rate"]),
            tau=chosen.tau,
            **options,  # type: ignore[arg-type]
        )
    return AdditiveStrategy(**options)  # type: ignore[arg-type]


def num_rounds(config: UserConfig) -> int:
    """Return the rounds: as many as noisy means, or fewer of several steps each."""
    releases = int(config["num-server-rounds"])
    if not int(config["silos"]):
        return releases
    steps = int(config["silo-steps"])
    if releases % steps:
        raise ValueError(f"silo-steps={steps} must divide num-server-rounds={releases}")
    return releases // steps


def _sampler(name: str, config: UserConfig) -> Sampler:
    """Return the cohorts: secret, or those of users who have waited for all others."""
    rate = sampling_rate(config)
    if name == "dp-ftrl":
        return MinSeparationSampler(int(1 / rate), seed=int(config["seed"]))
    return PoissonSampler(int(config["seed"]), probability=rate)


def _mechanism(name: str, norm: float, config: UserConfig) -> Mechanism:
    """Return noise that meets epsilon.

    Each user of the data stands for as many of the planned population.
    """
    clipping: Clipping = FlatClipping(norm)
    if name == "layers-lamb":
        model = {k: x.numpy() for k, x in make_model(config).state_dict().items()}
        clipping = PerLayerClipping.by_size(norm, model)
    private = name != "none"
    amplified = name != "dp-ftrl"
    return Mechanism(
        num_rounds=int(config["num-server-rounds"]),
        num_sampled_clients=int(config["num-sampled-clients"]),
        population_size=int(config["population-size"]),
        simulated_cohort=round(sampling_rate(config) * num_users(config)),
        clipping=clipping,
        noise_multiplier=None if private else 0.0,
        max_epsilon=float(config["epsilon"]) if private else None,
        target_delta=float(config["target-delta"]),
        factorization="identity" if amplified else "best",
        # As the server's SGD; independent noise is the same for any.
        workload=Workload(float(config["server-momentum"])),
        amplified=amplified,
        seed=int(config["seed"]),
    )


def _optimizer(name: str, rate: float, config: UserConfig) -> ServerOptimizer:
    if name == "dp-fedadam":
        return LAMB(rate, trust_ratio=(1, 1))  # Adam with bias correction
    if name == "layers-lamb":
        return LAMB(rate)
    return SGD(rate, momentum=float(config["server-momentum"]))


def _public_statistics(name: str, config: UserConfig) -> PublicStatistics:
    if name == "ada-dps-words":
        frequencies = word_frequencies(config)
        return PublicMoments({"weight": (frequencies / frequencies.max()) ** 2})
    return PublicGradients(task, public_data(config), run_config=config)
