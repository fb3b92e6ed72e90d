"""What the grids of this package have in common."""

import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flower_ext._flower import Run, ensure_task_identity

# Flower's strategies look for nodes every second until there are enough, loops of
# one's own more often: what is sooner than a pause after the last does not count.
_PAUSE, _MOST_LOOKS = 0.5, 5


class OwnGrid(Grid):
    """A grid that makes its messages itself, with nodes that are there from the start.

    Code that waits for others, by asking for the nodes every second and sending
    nothing, is told that none will come.
    """

    is_fixed = True

    def __init__(self, run: Run) -> None:
        ensure_task_identity()
        self._run = run
        self._looks = 0  # for nodes, one a pause, since a message was sent
        self._looked = 0.0

    def _look(self, nodes: Iterable[int]) -> None:
        now = time.monotonic()
        if now - self._looked > _PAUSE:
            self._looks += 1
            self._looked = now
        if self._looks > _MOST_LOOKS:
            raise RuntimeError(
                f"the ServerApp waits for more nodes than the {len(list(nodes))} of "
                "this federation, and no other will connect: simulate more clients, or "
                "ask for fewer (min_available_nodes, min_train_nodes, "
                "min_evaluate_nodes)"
            )

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; ``Message(...)`` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
