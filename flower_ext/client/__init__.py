"""The client: tasks, client halves, trainers, personal state, and the ClientApp."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flower_ext.client.dice_sgd import DiceSGD as DiceSGD
    from flower_ext.client.dp_sgd import DPSGD as DPSGD
    from flower_ext.client.grass import Grass as Grass
    from flower_ext.client.muon import MuonAdamW as MuonAdamW
    from flower_ext.client.one_pass import OnePassClipping as OnePassClipping
    from flower_ext.client.optimizer_state import OptimizerState as OptimizerState
    from flower_ext.client.user_level import ELS as ELS
    from flower_ext.client.user_level import ULS as ULS
    from flower_ext.client.user_level import UserUpdates as UserUpdates

_HOME = {
    "DiceSGD": "dice_sgd",
    "DPSGD": "dp_sgd",
    "ELS": "user_level",
    "Grass": "grass",
    "MuonAdamW": "muon",
    "OnePassClipping": "one_pass",
    "OptimizerState": "optimizer_state",
    "ULS": "user_level",
    "UserUpdates": "user_level",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: it needs torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
