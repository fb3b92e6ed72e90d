"""The options that every strategy of the pack takes: Flower's own, and the core's."""

from collections.abc import Callable
from typing import TypedDict

from flwr.app import MetricRecord, RecordDict

from flower_ext.privacy.mechanism import Mechanism
from flower_ext.sampling import Sampler
from flower_ext.server_optimizer import ServerOptimizer


class FedAvgOptions(TypedDict, total=False):
    """Options passed on to :class:`flwr.serverapp.strategy.FedAvg`.

    Parameters
    ----------
    fraction_train : float (default: 1.0)
        Fraction of nodes asked to train in a round; 0 skips training.
    fraction_evaluate : float (default: 1.0)
        Fraction of nodes asked to evaluate in a round; 0 skips evaluation.
    min_train_nodes : int (default: 2)
        Nodes asked to train at the least.
    min_evaluate_nodes : int (default: 2)
        Nodes asked to evaluate at the least.
    min_available_nodes : int (default: 2)
        Nodes to wait for before a round starts.
    weighted_by_key : str (default: "num-examples")
        Metric of the replies that weighs them.
    arrayrecord_key : str (default: "arrays")
        Key of the model in the messages.
    configrecord_key : str (default: "config")
        Key of the configuration in the messages.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : callable, optional
        ``(list[RecordDict], weighted_by_key) -> MetricRecord``; by default the
        average weighted by ``weighted_by_key``.
    """

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None
    evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None


class AdditiveOptions(FedAvgOptions, total=False):
    """Options passed on to :class:`flower_ext.AdditiveStrategy`, Flower's among them.

    Parameters
    ----------
    server_optimizer : ServerOptimizer, optional
        Applies the aggregated direction; by default plain averaging, ``SGD(1.0)``.
    sampler : Sampler, optional
        Draws the cohorts; by default ``UniformSampler(seed=0)``. How many are drawn is
        said by ``fraction_train``, ``min_train_nodes`` and their like.
    min_replies : int (default: 1)
        A round with fewer usable replies keeps the model.
    mechanism : Mechanism, optional
        Makes the run differentially private, see
        :class:`~flower_ext.privacy.Mechanism`. It says how many clients are drawn, all
        clients weigh the same, and their own metrics are withheld.
    """

    server_optimizer: ServerOptimizer | None
    sampler: Sampler | None
    min_replies: int
    mechanism: Mechanism | None
