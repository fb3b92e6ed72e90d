"""What silos promise to their users, and draw for a step."""

from functools import cache

from flwr.app import Context, UserConfig

from flower_ext.privacy import SiloPrivacy, noise_multiplier_for
from private_optimizers.dataset import num_users, sampling_rate, silo_data
from private_optimizers.utils import setting


def promise(method: str, context: Context) -> SiloPrivacy:
    """Return what all silos promise to their users, with ``els`` or ``uls``.

    Epsilon is that of a silo of the planned size: each user of the data stands for as
    many of the planned population, so that the noise is smaller by as much. What the
    silo itself reports is the epsilon of the simulation, which is larger.
    """
    config = context.run_config
    chosen = setting(method, config)
    planned = _planned_noise(
        float(config["epsilon"]),
        float(config["target-delta"]),
        int(config["num-server-rounds"]),
        # The largest of all silos, which differ a little in size.
        min(1.0, batch_size(method, config) / min(_counts(method, config))),
        chosen.group_size if method == "els" else 1,
    )
    return SiloPrivacy(
        noise_multiplier=planned * num_users(config) / int(config["population-size"]),
        clipping_norm=chosen.norm,
        delta=float(config["target-delta"]),
        max_examples_per_user=chosen.group_size,
        seed=int(config["seed"]),
    )


def batch_size(method: str, config: UserConfig) -> int:
    """Return how many examples, or users, a silo draws for a step on average."""
    counts = _counts(method, config)
    return max(1, round(sampling_rate(config) * sum(counts) / len(counts)))


def _counts(method: str, config: UserConfig) -> list[int]:
    """Return how many examples, or users, each silo draws from."""
    most, silos = setting(method, config).group_size, int(config["silos"])
    if method == "uls":
        return [len(range(silo, num_users(config), silos)) for silo in range(silos)]
    users = [silo_data(silo, silos, config)["user"] for silo in range(silos)]
    return [int(x.bincount().clamp(max=most).sum()) for x in users]


@cache
def _planned_noise(
    epsilon: float, delta: float, steps: int, rate: float, most: int
) -> float:
    """Return the noise multiplier where a user is in a step up to ``most`` times."""
    return noise_multiplier_for(
        epsilon, delta, rounds=steps, sampling_probability=rate, group_size=most
    )
