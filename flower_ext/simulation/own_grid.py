"""What the grids of this package have in common."""

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flower_ext._flower import Run, ensure_task_identity


class OwnGrid(Grid):
    """A grid that makes its messages itself."""

    def __init__(self, run: Run) -> None:
        ensure_task_identity()
        self._run = run

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
