"""Running apps: in process, and many virtual clients at a time."""

from flower_ext.server.asynchronous import (
    Asynchronous,
    LogNormal,
    Stragglers,
    VirtualClock,
    inverse_root,
)
from flower_ext.simulation.local import LocalGrid, run_local
from flower_ext.simulation.mods import packed, resources
from flower_ext.simulation.packed_grid import PackedGrid

__all__ = [
    "Asynchronous",
    "LocalGrid",
    "LogNormal",
    "PackedGrid",
    "Stragglers",
    "VirtualClock",
    "inverse_root",
    "packed",
    "resources",
    "run_local",
]
