"""A grid of virtual clients: messages become jobs, outcomes become replies."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from flower_ext._flower import (
    NO_REPLY,
    NodeInfo,
    Run,
    ensure_task_identity,
    quick_reply,
)
from flower_ext.core.errors import refuse
from flower_ext.server.partial_sums import Summand
from flower_ext.simulation.jobs import Outcome, split
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import ClientStates
from flower_ext.simulation.transport import Transport

# Flower's strategies look for nodes every second until there are enough, loops of
# one's own more often: what is sooner than a pause after the last does not count.
_PAUSE, _MOST_LOOKS = 0.5, 5


class BaseGrid(Grid):
    """A grid whose clients are there from the start.

    Code that waits for others, by asking for the nodes every second and sending
    nothing, is told that none will come.

    Parameters
    ----------
    run : Run
        What Flower knows of the run.
    setting : Setting
        Of the clients.
    transport : Transport
        Runs them.
    """

    is_fixed = True

    def __init__(self, run: Run, setting: Setting, transport: Transport) -> None:
        ensure_task_identity()
        self._run = run
        self._setting = setting
        self._transport = transport
        self._keys = itertools.count()
        self._asked: dict[str, Message] = {}  # until they are answered
        self._replies: dict[str, Message] = {}  # until they are pulled
        self._nodes: list[NodeInfo] = []
        self._looks = 0  # for nodes, one a pause, since a message was sent
        self._looked = 0.0

    @property
    def states(self) -> ClientStates | None:
        """The clients' states, or None where they are out of reach."""
        return self._transport.states

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the clients, in order."""
        now = time.monotonic()
        if now - self._looked > _PAUSE:
            self._looks += 1
            self._looked = now
        if self._looks > _MOST_LOOKS:
            raise RuntimeError(
                f"the ServerApp waits for more nodes than the "
                f"{self._setting.num_clients} of this federation, and no other will "
                "connect: simulate more clients, or ask for fewer "
                "(min_available_nodes, min_train_nodes, min_evaluate_nodes)"
            )
        return self._setting.nodes

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the clients' nodes, registered in order."""
        if not self._nodes:
            # Flower sorts what is registered as text, hence the zeros.
            self._nodes = [
                NodeInfo(node_id=node, registered_at=f"{client:09d}")
                for client, node in enumerate(self._setting.nodes)
            ]
        return self._nodes

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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start the clients of the messages."""
        return self._push(messages)

    def _push(
        self, messages: Iterable[Message], summand: Summand | None = None
    ) -> list[str]:
        self._looks = 0
        if self.states and not self._asked:
            self.states.tidy()
        nodes = self._setting.nodes
        asked = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in nodes:
                refuse("dst_node_id", node, f"one of {len(nodes)} clients")
            asked.append((next(self._keys), nodes.index(node), message))
        # Once all are known to be good: a refused call leaves nothing behind.
        for key, _, message in asked:
            message.metadata.__dict__["_message_id"] = str(key)
            self._asked[str(key)] = message
        if asked:
            self._transport.submit(*split(asked), summand)
        return [str(key) for key, _, _ in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand over the replies that have arrived, each once."""
        self._collect(0)
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return the replies in the same order.

        A client that has not replied after ``timeout`` seconds is stopped and gets an
        error reply.
        """
        return self._exchange(self.push_messages, messages, timeout)

    def _exchange(
        self,
        push: Callable[[Iterable[Message]], Iterable[str]],
        messages: Iterable[Message],
        timeout: float | None,
    ) -> list[Message]:
        end = None if timeout is None else time.monotonic() + timeout
        ids = list(push(messages))
        while any(i in self._asked for i in ids):
            left = None if end is None else max(0.0, end - time.monotonic())
            # Also when time is up: what has arrived counts, though nobody had looked.
            self._collect(left)
            if left == 0:
                self._give_up([i for i in ids if i in self._asked], timeout)
        return [self._replies.pop(i) for i in ids]

    def _give_up(self, late: Sequence[str], timeout: float | None) -> None:
        self._transport.give_up(map(int, late))
        reason = f"no reply after timeout={timeout:g} s"
        for i in late:
            self._answer(Outcome(int(i), None, Error(NO_REPLY, reason)))

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Stop clients, and forget messages for whose replies nobody waits."""
        gone = set(message_ids)
        self._transport.give_up([int(i) for i in gone if i in self._asked])
        for i in gone:
            self._asked.pop(i, None)
            self._replies.pop(i, None)

    def _collect(self, seconds: float | None) -> None:
        for outcome in self._transport.wait(seconds):
            self._answer(outcome)

    def _answer(self, outcome: Outcome) -> None:
        """Make the reply to a message from its outcome, if it is still awaited."""
        asked = self._asked.pop(str(outcome.key), None)
        if asked is None:
            return
        content, error = outcome.content, None
        if content is None:
            error = outcome.error or Error(NO_REPLY)
        self._replies[str(outcome.key)] = quick_reply(content, error, asked)
