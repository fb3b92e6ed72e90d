"""The mechanisms that are compared, all with the same cohorts and optimizer."""

from flwr.app import UserConfig

from flower_ext.core.sampling import PoissonSampler
from flower_ext.privacy import (
    BandedToeplitz,
    BufferedToeplitz,
    Factorization,
    Identity,
    TreeAggregation,
)
from flower_ext.server.optimizers import SGD
from flower_ext.strategies import DPFTRL

NAMES = ("none", "dp-fedavg", "amplified", "tree", "banded", "blt")


def make_strategy(name: str, max_epsilon: float | None, config: UserConfig) -> DPFTRL:
    """Make DP-FTRL with one of the mechanisms ``NAMES``.

    A client takes part again after population / cohort rounds at the earliest: with a
    larger separation cohorts could not be filled. Amplified DP-FedAvg samples each
    client with probability cohort / population instead.
    """
    if name not in NAMES:
        raise ValueError(f"mechanisms={name!r} must be among {' '.join(NAMES)}")
    cohort = int(config["num-sampled-clients"])
    population = int(config["population-size"])
    rounds = int(config["num-server-rounds"])
    separation = population // cohort
    simulated = int(config["simulated-cohort"])
    # Where clients stand for themselves alone, nobody may know cohorts and noise.
    seed = int(config["seed"]) if simulated else None
    options = {"min_separation": separation}
    if name == "amplified":
        options = {
            "amplified": True,
            "sampler": PoissonSampler(seed, probability=cohort / population),
        }
    return DPFTRL(
        num_rounds=rounds,
        num_sampled_clients=cohort,
        population_size=population,
        simulated_cohort=simulated or None,
        clipping=float(config["clipping-norm"]),
        noise_multiplier=0.0 if max_epsilon is None else None,
        max_epsilon=max_epsilon,
        target_delta=float(config["target-delta"]),
        factorization=_factorization(name, rounds, separation, int(config["memory"])),
        seed=seed,
        server_optimizer=SGD(
            float(config["server-learning-rate"]),
            momentum=float(config["server-momentum"]),
        ),
        fraction_evaluate=0.0,
        **options,
    )


def _factorization(
    name: str, rounds: int, separation: int, memory: int
) -> Factorization:
    """Return the mechanism; the memory of bands and buffers is the same."""
    if name == "tree":
        return TreeAggregation(rounds)
    if name == "banded":
        # With more bands than the separation, the rounds of a client overlap in the
        # noise and its sensitivity grows.
        return BandedToeplitz.optimize(
            rounds, min(memory + 1, separation, rounds), normalize_columns=True
        )
    if name == "blt":
        most = -(-rounds // separation)
        return BufferedToeplitz.optimize(rounds, separation, most, buffers=memory)
    return Identity(rounds)
