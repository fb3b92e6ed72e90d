"""Running apps: in process, and many virtual clients at a time."""

from flower_ext.simulation.local import LocalGrid, run_local

__all__ = ["LocalGrid", "run_local"]
