"""flower-ext: federated strategies for Flower's Message API.

The strategies are in ``flower_ext.strategies``; what they share is here.
"""

from importlib.metadata import version

from flower_ext.additive import AdditiveStrategy
from flower_ext.client import ClientHalf, Task, client_app
from flower_ext.simulation.local import LocalGrid, run_local
from flower_ext.tracking import Tracker

__version__ = version("flower-ext")

__all__ = [
    "AdditiveStrategy",
    "ClientHalf",
    "LocalGrid",
    "Task",
    "Tracker",
    "__version__",
    "client_app",
    "run_local",
]
