"""What crosses rounds: objects that can be saved, several of them by name."""

import secrets
from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """What can be saved, and continued."""

    def state_dict(self) -> dict[str, object]:
        """Return JSON values and arrays, nested by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""


def states_of(parts: Mapping[str, Stateful]) -> dict[str, object]:
    """Return the states of some parts, by name."""
    return {name: part.state_dict() for name, part in parts.items()}


def load_states(parts: Mapping[str, Stateful], saved: object) -> None:
    """Let each part take over its state; one that was not saved stays as it is."""
    states = cast("Mapping[str, Mapping[str, Any]]", saved)
    for name, part in parts.items():
        if name in states:
            part.load_state_dict(states[name])


def new_id() -> float:
    """Return a number that no other state, or round, of any run has.

    It is a float, of as many bytes as any other in a message.
    """
    return float(secrets.randbits(53))
