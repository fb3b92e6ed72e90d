"""Running apps: in process, and many virtual clients at a time."""

from flower_ext.simulation.local import LocalGrid, run_local
from flower_ext.simulation.mods import packed, resources
from flower_ext.simulation.packed_grid import PackedGrid

__all__ = ["LocalGrid", "PackedGrid", "packed", "resources", "run_local"]
