"""The client: tasks, client halves, trainers, personal state, and the ClientApp."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flower_ext.client.grass import Grass as Grass

__all__ = ["Grass"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: it needs torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flower_ext.client import grass

    return getattr(grass, name)
