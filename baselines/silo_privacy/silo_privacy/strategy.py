"""The strategies that are compared; all train the same steps under the same epsilon."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, UserConfig
from flwr.serverapp import Grid

from flower_ext import AdditiveStrategy
from flower_ext.client.dp_sgd import worst_silo
from flower_ext.strategies import MRMTL, LocalOnly


class _Sometimes(AdditiveStrategy):
    """Asks for an evaluation every few rounds."""

    def __init__(self, every: int, **options: object) -> None:
        super().__init__(train_metrics_aggr_fn=worst_silo, **options)  # type: ignore[arg-type]
        self.every = every

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask, or nobody."""
        if server_round % self.every:
            return []
        return super().configure_evaluate(server_round, arrays, config, grid)


class _FedAvg(_Sometimes):
    """One model for all schools."""


class _LocalOnly(_Sometimes, LocalOnly):
    """A model for each school, of its pupils alone."""


class _MRMTL(_Sometimes, MRMTL):
    """A model for each school, pulled towards the mean."""


def make_strategy(name: str, run_config: UserConfig) -> AdditiveStrategy:
    """Make ``local``, ``fedavg``, or ``mrmtl@0.5`` of that strength."""
    kind, _, strength = name.partition("@")
    every = int(run_config["evaluate-every"])
    if kind == "local":
        return _LocalOnly(every)
    if kind == "fedavg":
        return _FedAvg(every)
    if kind == "mrmtl":
        return _MRMTL(every, strength=float(strength))
    raise ValueError(f"strategies={name!r} must name local, fedavg or mrmtl@1")
