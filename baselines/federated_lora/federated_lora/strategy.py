"""The methods that are compared."""

from flwr.app import UserConfig

from flower_ext import AdditiveStrategy, RoundStrategy
from flower_ext.core.sampling import UniformSampler
from flower_ext.server.optimizers import SGD, RefactoredSGD
from flower_ext.strategies import FedExLoRA, FlexLoRA, StackedLoRA
from flower_ext.strategies.flasc import FLASC, Tier
from flower_ext.wire import NF4

DENSE = {"download_density": 1.0, "upload_density": 1.0}
NAMES = (
    "lora",
    "lora-sorted",
    "ffa",
    "flasc",
    "stacked",
    "flex",
    "fedex",
    "stacked-nf4",
    "fedex-nf4",
    "stacked-tiers",
    "flex-tiers",
    "het-lora",
    "het-lora-sorted",
)


def make_strategy(name: str, run_config: UserConfig) -> RoundStrategy:
    """Make a strategy, with the same cohorts, seeds and steps as others.

    Parameters
    ----------
    name : str
        One of :data:`NAMES`. Tiers are clients of a quarter, half and all of the ranks.
    run_config : UserConfig
        See ``pyproject.toml``.
    """
    rank = int(run_config["rank"])
    ranks = (rank // 4, rank // 2, rank)
    tiers = tuple(Tier(rank=r) for r in ranks)
    alpha = {"lora_alpha": int(run_config["lora-alpha"])}
    nf4 = {"download": NF4(), "upload": NF4()}
    held = {**DENSE, "tiers": tiers, "aggregation": "senders"}
    sparse = {"download_density": 0.5, "upload_density": 0.25, "precision": "nf4"}
    kinds = {
        "lora": (AdditiveStrategy, {}),
        "lora-sorted": (AdditiveStrategy, {"server_optimizer": RefactoredSGD()}),
        "ffa": (AdditiveStrategy, {}),
        "flasc": (FLASC, {**sparse, "server_optimizer": SGD()}),
        "stacked": (StackedLoRA, alpha),
        "flex": (FlexLoRA, alpha),
        "fedex": (FedExLoRA, alpha),
        "stacked-nf4": (StackedLoRA, {**alpha, **nf4}),
        "fedex-nf4": (FedExLoRA, {**alpha, **nf4}),
        "stacked-tiers": (StackedLoRA, {**alpha, "ranks": ranks}),
        "flex-tiers": (FlexLoRA, {**alpha, "ranks": ranks}),
        "het-lora": (FLASC, {**held, "server_optimizer": SGD()}),
        "het-lora-sorted": (FLASC, {**held, "server_optimizer": RefactoredSGD()}),
    }
    if name not in kinds:
        raise ValueError(f"strategies={name!r} must name some of {NAMES}")
    make, settings = kinds[name]
    return make(
        sampler=UniformSampler(int(run_config["seed"])),
        fraction_evaluate=0.0,
        **settings,
    )
