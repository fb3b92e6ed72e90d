"""What optimizers that have another one in them share."""

from typing import ClassVar

from flower_ext.core.errors import refuse
from flower_ext.core.spread import Spread
from flower_ext.server.optimizers.base import ServerOptimizer, State


class Around(ServerOptimizer):
    """An optimizer with another one in it, whose moments are kept beside its own.

    Parameters
    ----------
    inner : ServerOptimizer
        The other one.
    name : str
        What the argument is called, for an error.
    """

    #: Begins the names of the inner optimizer's slots, before a ``/``.
    slot: ClassVar[str] = "inner"

    def __init__(self, inner: ServerOptimizer, name: str) -> None:
        super().__init__()
        if not isinstance(inner, ServerOptimizer):
            refuse(name, inner, "a ServerOptimizer", "an instance, such as SGD()")
        if not inner.keeps_coordinates:
            cause = "what is kept of a coordinate would be that of another"
            refuse(name, inner, "one whose coordinates stay what they are", cause)
        self.inner = inner

    @property
    def needs_spread(self) -> bool:  # type: ignore[override]
        """Whether the inner one does."""
        return self.inner.needs_spread

    def see(self, spread: Spread | None) -> None:
        """Tell the inner one, too."""
        super().see(spread)
        self.inner.see(spread)

    @property
    def kind(self) -> str:
        """Both, since neither continues the moments of another."""
        return f"{type(self).__name__}({self.inner.kind})"

    def state_dict(self) -> State:
        """Return the moments of both."""
        own, inner = super().state_dict(), self.inner.state_dict()
        return own | {f"{self.slot}/{slot}": x for slot, x in inner.items()}

    def load_state_dict(self, state: State) -> None:
        """Take over the moments of both."""
        start = f"{self.slot}/"
        own = {s: x for s, x in state.items() if not s.startswith(start)}
        super().load_state_dict(own)
        self.inner.load_state_dict(
            {s.removeprefix(start): x for s, x in state.items() if s not in own}
        )
