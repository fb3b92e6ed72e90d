"""flower-ext: federated strategies for Flower's Message API.

The strategies are in ``flower_ext.strategies``; what they share is here. Names are
imported when they are first used, so that ``import flower_ext`` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flower_ext.client.app import client_app as client_app
    from flower_ext.client.dp_sgd import DPSGD as DPSGD
    from flower_ext.client.half import ClientHalf as ClientHalf
    from flower_ext.client.stacked import Stacked as Stacked
    from flower_ext.client.task import Task as Task
    from flower_ext.client.trainer import Plain as Plain
    from flower_ext.core.contribution import Contribution as Contribution
    from flower_ext.core.contribution import Total as Total
    from flower_ext.core.protocol import Payload as Payload
    from flower_ext.core.protocol import Reply as Reply
    from flower_ext.core.protocol import Round as Round
    from flower_ext.core.replies import MalformedReply as MalformedReply
    from flower_ext.privacy.mechanism import Mechanism as Mechanism
    from flower_ext.server.additive import AdditiveStrategy as AdditiveStrategy
    from flower_ext.server.average_last import AverageLast as AverageLast
    from flower_ext.server.callbacks import KeepBest as KeepBest
    from flower_ext.server.callbacks import Schedule as Schedule
    from flower_ext.server.callbacks import StopWhen as StopWhen
    from flower_ext.server.strategy import RoundStrategy as RoundStrategy
    from flower_ext.server.tracking import Tracker as Tracker
    from flower_ext.server.votes import CodecVote as CodecVote
    from flower_ext.simulation.local import LocalGrid as LocalGrid
    from flower_ext.simulation.local import run_local as run_local
    from flower_ext.simulation.packed_grid import PackedGrid as PackedGrid

__version__ = version("flower-ext")

_HOME = {
    "AdditiveStrategy": "server.additive",
    "AverageLast": "server.average_last",
    "ClientHalf": "client.half",
    "CodecVote": "server.votes",
    "Contribution": "core.contribution",
    "DPSGD": "client.dp_sgd",
    "KeepBest": "server.callbacks",
    "LocalGrid": "simulation.local",
    "MalformedReply": "core.replies",
    "Mechanism": "privacy.mechanism",
    "PackedGrid": "simulation.packed_grid",
    "Payload": "core.protocol",
    "Plain": "client.trainer",
    "Stacked": "client.stacked",
    "Reply": "core.protocol",
    "Round": "core.protocol",
    "RoundStrategy": "server.strategy",
    "Schedule": "server.callbacks",
    "StopWhen": "server.callbacks",
    "Task": "client.task",
    "Total": "core.contribution",
    "Tracker": "server.tracking",
    "client_app": "client.app",
    "run_local": "simulation.local",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
