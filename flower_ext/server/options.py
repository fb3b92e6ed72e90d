"""The options that every strategy of the pack takes: Flower's own, and the core's."""

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NoReturn, TypedDict, get_args

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from flower_ext.core.sampling import Sampler
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.server.optimizers import ServerOptimizer
from flower_ext.wire.codec import Codec


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


class RoundOptions(FedAvgOptions, total=False):
    """Options passed on to :class:`flower_ext.RoundStrategy`, Flower's among them.

    Parameters
    ----------
    server_optimizer : ServerOptimizer, optional
        Applies the aggregated direction; by default plain averaging, ``SGD(1.0)``.
    sampler : Sampler, optional
        Draws the cohorts; by default ``UniformSampler(seed=0)``. The options
        ``fraction_train``, ``min_train_nodes`` and their like say how many clients.
    min_replies : int (default: 1)
        A round with fewer usable replies keeps the model.
    download, upload : Codec, optional
        How the model travels to clients, and their change back, such as
        ``Chain(TopK(1 / 16), NF4())``; by default as they are. See
        :mod:`flower_ext.wire`.
    """

    server_optimizer: ServerOptimizer | None
    sampler: Sampler | None
    min_replies: int
    download: Codec | None
    upload: Codec | None


class AdditiveOptions(RoundOptions, total=False):
    """Options passed on to :class:`flower_ext.AdditiveStrategy`, with all of these.

    Parameters
    ----------
    mechanism : Mechanism, optional
        Makes the run differentially private, see
        :class:`~flower_ext.privacy.Mechanism`. It says how many clients are drawn, all
        clients weigh the same, and their own metrics are withheld or, with its
        ``evaluation``, noised.
    """

    mechanism: Mechanism | None


# Names that Flower's options had before its Message API, and arguments that belong to
# start(): what is known not to be an option is answered better than by a guess.
_ELSEWHERE = {
    "fraction_fit": "fraction_train",
    "min_fit_clients": "min_train_nodes",
    "min_evaluate_clients": "min_evaluate_nodes",
    "min_available_clients": "min_available_nodes",
    "fit_metrics_aggregation_fn": "train_metrics_aggr_fn",
    "evaluate_metrics_aggregation_fn": "evaluate_metrics_aggr_fn",
    "initial_parameters": "start(initial_arrays=...)",
    "on_fit_config_fn": "start(train_config=...), which configure_train may change",
    "on_evaluate_config_fn": "start(evaluate_config=...)",
    "lr": "start(train_config=ConfigRecord({'lr': ...}))",
    "learning_rate": "server_optimizer=SGD(...), or train_config for the clients'",
    **{
        name: f"start({name}=...)"
        for name in (
            "grid",
            "initial_arrays",
            "num_rounds",
            "timeout",
            "train_config",
            "evaluate_config",
            "evaluate_fn",
            "checkpoint",
            "tracker",
            "callbacks",
            "asynchronous",
        )
    },
}


def by_name(values: Sequence[object], options: FedAvgOptions) -> FedAvgOptions:
    """Give positional arguments the names that they have in Flower's FedAvg."""
    names = list(inspect.signature(FedAvg).parameters)
    if len(values) > len(names):
        raise TypeError(f"{len(values)} positional options, there are {len(names)}")
    named = dict(zip(names, values, strict=False))
    if twice := sorted(named.keys() & options.keys()):
        raise TypeError(f"option {twice[0]!r} is given by position and by name")
    return {**named, **options}  # type: ignore[typeddict-item]


def require_known(cls: type[Strategy], options: FedAvgOptions) -> None:
    """Refuse options that no constructor of a strategy has, with the nearest one."""
    for name in options:
        if name not in FedAvgOptions.__annotations__:
            _refuse_option(cls, name)


def _refuse_option(cls: type[Strategy], name: str) -> NoReturn:
    known: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            for parameter in inspect.signature(base).parameters.values():
                known |= _names(parameter)
    nearest = _ELSEWHERE.get(name) or next(iter(get_close_matches(name, known, 1)), "")
    advice = f"did you mean {nearest}?" if nearest else f"it has {sorted(known)}"
    if name == "mechanism":
        advice = (
            "what it makes of the clients' replies is no sum that noise is added to"
        )
    raise TypeError(f"{cls.__name__} has no option {name!r}: {advice}")


def _names(parameter: inspect.Parameter) -> set[str]:
    """Return what a parameter is called; of ``**options`` the names they may have."""
    if parameter.kind is parameter.VAR_KEYWORD:
        return {
            n for kind in get_args(parameter.annotation) for n in kind.__annotations__
        }
    return set() if parameter.kind is parameter.VAR_POSITIONAL else {parameter.name}
