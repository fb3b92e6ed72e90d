"""Federated averaging whose uploads are coded."""

from collections.abc import Callable, Mapping

from flwr.app import UserConfig

from flower_ext import AdditiveStrategy
from flower_ext.core.sampling import UniformSampler
from flower_ext.server.optimizers import SGD, Adam, ServerOptimizer
from flower_ext.wire import (
    EDEN,
    NF4,
    QSGD,
    BFloat16,
    Chain,
    Codec,
    ErrorFeedback,
    OneBit,
    RandomK,
    Rows,
    TernGrad,
    ThreeLC,
    TopK,
    UniversalCode,
)

# By name, of a number that sets how coarse it is.
CODECS: Mapping[str, Callable[[float], Codec]] = {
    "bfloat16": lambda _: BFloat16(),
    "nf4": lambda _: NF4(),
    "qsgd": lambda bits: QSGD(int(bits)),
    "terngrad": lambda _: TernGrad(),
    "one-bit": lambda _: OneBit(),
    "3lc": ThreeLC,
    "eden": EDEN,
    "universal": UniversalCode,
    "universal-random": lambda step: UniversalCode(step, rounding="stochastic"),
    # Of the adapter's head, too, which would travel whole.
    "topk": lambda density: TopK(density, dense=()),
    "topk-nf4": lambda density: Chain(TopK(density, dense=()), NF4()),
    "random-k": lambda density: RandomK(density, rescaled=True),
    "rows": lambda density: Rows(density, "client", rescaled=True),
}


def make_codec(name: str) -> Codec | None:
    """Make a codec by its name.

    Parameters
    ----------
    name : str
        ``none``, or a key of :data:`CODECS`, with a number where it takes one,
        ``eden:2``; ``+`` at the end is error feedback.
    """
    if name == "none":
        return None
    kind, _, number = name.removesuffix("+").partition(":")
    if kind not in CODECS:
        raise ValueError(f"codecs={name!r} must name some of none {' '.join(CODECS)}")
    codec = CODECS[kind](float(number or 1))
    return ErrorFeedback(codec) if name.endswith("+") else codec


def make_optimizer(config: UserConfig) -> ServerOptimizer:
    """Make the server's optimizer: Adam for the adapter, else SGD."""
    rate = float(config["server-learning-rate"])
    if config["data"] == "mails":
        options = {"tau": 1e-8, "initial_accumulator": 0.0, "bias_correction": True}
        return Adam(rate, **options)
    return SGD(rate)


def make_strategy(name: str, config: UserConfig) -> AdditiveStrategy:
    """Make federated averaging with a codec by its name."""
    return AdditiveStrategy(
        fraction_train=float(config["fraction-train"]),
        fraction_evaluate=0.0,
        sampler=UniformSampler(int(config["seed"])),
        server_optimizer=make_optimizer(config),
        upload=make_codec(name),
    )
