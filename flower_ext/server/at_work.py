"""The clients that are at work in an asynchronous run, and who comes in next.

Nothing is computed before its virtual time: which clients are done next, and who begins
in their places, follows from their times alone. All contributions of an update are then
computed at once, so that all workers are busy, and a checkpoint has to keep nothing but
messages of clients that have not begun.
"""

import heapq
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

from flwr.app import (
    ArrayRecord,
    Error,
    Message,
    MessageType,
    RecordDict,
)
from flwr.serverapp import Grid

from flower_ext._flower import NO_REPLY
from flower_ext.core.arrays import to_record
from flower_ext.core.errors import refuse
from flower_ext.core.nodes import ordered_nodes, wait_for_nodes
from flower_ext.core.protocol import Config, Decoder, Metrics, Round
from flower_ext.server.asynchronous import Asynchronous, VirtualClock
from flower_ext.server.cohorts import Seats
from flower_ext.server.partial_sums import Version
from flower_ext.server.saved_work import (
    restore_content,
    restore_round,
    save_content,
    save_round,
)

# Of a wait for clients in real time, in seconds.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0


@runtime_checkable
class Withdrawing(Protocol):
    """A grid that stops clients for which nobody waits any more."""

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Forget messages, whether they are answered or not."""


@dataclass(order=True)
class Work:
    """A client at work.

    Attributes
    ----------
    due : float
        The time at which it is done; in real time, at which it is given up.
    client, node : int
        Its place among the nodes, and its node.
    message : Message
        What it was asked.
    round : Round
        In which it was asked, with the model that it was sent.
    """

    due: float
    client: int
    node: int = field(compare=False)
    message: Message = field(compare=False)
    round: Round = field(compare=False)


@runtime_checkable
class Asking(Protocol):
    """A strategy that can ask clients one by one, and sum replies to several models."""

    configrecord_key: str
    fraction_train: float
    min_replies: int

    def no_asynchronous_run(self) -> str:
        """Return why clients must take part in whole rounds; empty if they need not."""

    def let_in(self, seats: Seats | None) -> None:
        """Ask clients as ``seats`` says from now on; None asks for whole rounds."""

    def ask_more(self, arrays: ArrayRecord, grid: Grid) -> list[Message]:
        """Ask further clients to train in the round that was last configured."""

    def last_asked(self) -> tuple[Round, Mapping[int, int]]:
        """Return the round of the clients that were last asked, and their places."""

    def reader_of(self, told: Config) -> Decoder | None:
        """Return what reads the change of a client that was told this."""

    def take_up(self, versions: Mapping[int, Version]) -> None:
        """Expect the replies of these nodes, each to the model of its version."""


def require_asynchronous(
    asynchronous: Asynchronous, strategy: object, grid: Grid
) -> Asking:
    """Return the strategy, if clients may take part in it at any time.

    Raises
    ------
    ValueError
        If not, or if there are fewer clients than are to be at work.
    """
    if not isinstance(asynchronous, Asynchronous):
        cause = "Asynchronous(buffer=10, concurrency=100)"
        refuse("asynchronous", asynchronous, "an Asynchronous, or None", cause)
    bound = f"left out with {type(strategy).__name__}"
    if not isinstance(strategy, Asking):
        cause = "it is no sum over clients, no AdditiveStrategy"
        refuse("asynchronous", asynchronous, bound, cause)
    if cause := strategy.no_asynchronous_run():
        refuse("asynchronous", asynchronous, bound, cause)
    buffer = asynchronous.buffer
    if strategy.fraction_train != 1.0:
        cause = "concurrency says how many clients are at work"
        refuse("fraction_train", strategy.fraction_train, "left out", cause)
    if strategy.min_replies > buffer:
        cause = "of so many contributions an update is made"
        refuse("min_replies", strategy.min_replies, f"<= buffer={buffer}", cause)
    wait_for_nodes(grid, concurrency=asynchronous.concurrency, buffer=buffer)
    return strategy


class AtWork(ABC):
    """Who is at work, and of what the next update is made.

    A round of the run is an update: :meth:`open`, :meth:`begin` with whom the strategy
    has asked, and, while contributions are :attr:`missing`, :meth:`next` and
    :meth:`take`.

    Parameters
    ----------
    asynchronous : Asynchronous
        The settings.
    strategy : Asking
        Makes the messages, and adds up the replies.
    grid : Grid
        Of the clients.
    """

    def __init__(
        self, asynchronous: Asynchronous, strategy: Asking, grid: Grid
    ) -> None:
        self.settings = asynchronous
        self._strategy = strategy
        self._grid = grid
        self._works: list[Work] = []  # a heap, by due time and client
        self._buffer: dict[int, Work] = {}  # by node
        self._busy: set[int] = set()  # nodes at work, or whose contributions wait
        self._round = 0
        self._draws = 0
        self._may_draw = True  # whether anything has changed since the last draw
        self._failed = 0

    @property
    def missing(self) -> int:
        """Contributions that the update lacks; 0 where failures end the round."""
        if self._failed >= self.settings.buffer + self.settings.concurrency:
            return 0
        return self.settings.buffer - len(self._buffer)

    def open(self, number: int, model: ArrayRecord) -> None:
        """Begin a round: let the strategy ask as many clients as there are places."""
        self._round, self._failed = number, 0
        self._buffer.clear()
        self._busy = {work.node for work in self._works}
        self._may_draw = True  # those of the last update, too
        self._seat()

    def _seat(self) -> int:
        """Tell the strategy how many clients it may ask; return that."""
        free = self.settings.concurrency - len(self._works)
        if not self._may_draw or self._is_pending():
            free = 0
        if free:
            self._draws += 1
            self._may_draw = False
        self._let_in(free)
        return free

    def _let_in(self, free: int) -> None:
        seats = Seats(self._busy, free, self._draws, self._away())
        self._strategy.let_in(seats)

    def begin(self, messages: Sequence[Message]) -> None:
        """Let the clients that were asked begin to train."""
        round, places = self._strategy.last_asked()
        for message in messages:
            node = message.metadata.dst_node_id
            client = places[node]
            work = Work(self._due(client), client, node, message, round)
            heapq.heappush(self._works, work)
            self._busy.add(node)

    def _fill(self, ask: Callable[[], list[Message]]) -> None:
        """Let in whom there is place for, with the model of now."""
        if self._seat():
            self.begin(ask())

    @abstractmethod
    def next(self, ask: Callable[[], list[Message]]) -> list[Work]:
        """Return clients that are done next: one or more, at most those missing.

        ``ask`` lets the strategy ask as many others as there are places.
        """

    def _require(self, found: list[Work]) -> list[Work]:
        if not found:
            bound = f"<= {len(self._buffer)}, the clients that may be drawn"
            cause = "nobody is at work, and no other client counts in the update"
            refuse("buffer", self.settings.buffer, bound, cause)
        return found

    def expect(self, works: Sequence[Work]) -> None:
        """Let the strategy expect these replies, beside those that have come in."""
        versions = {}
        for work in (*self._buffer.values(), *works):
            weight = self.settings.weight(self._round - work.round.number)
            versions[work.node] = Version(work.round, weight)
        self._strategy.take_up(versions)

    def take(self, works: Sequence[Work], replies: Iterable[Message]) -> None:
        """Take in replies; who has failed frees its place, and may be asked again."""
        good = {r.metadata.src_node_id for r in replies if r.has_content()}
        for work in works:
            if work.node in good:
                self._buffer[work.node] = work
            else:
                self._failed += 1
                self._busy.discard(work.node)
                self._may_draw = True
        self.expect(())
        self._let_in(0)

    def metrics(self) -> Metrics:
        """Return how stale the contributions of the update were."""
        found = [self._round - work.round.number for work in self._buffer.values()]
        if not found:
            return {}
        return {
            "staleness-mean": sum(found) / len(found),
            "staleness-max": max(found),
        }

    def messages(self, works: Sequence[Work]) -> list[Message]:
        """Return the messages of clients that are done."""
        return [work.message for work in works]

    @abstractmethod
    def exchange_on(self) -> Grid:
        """Return the grid on which the replies of those who are done are had."""

    @abstractmethod
    def _due(self, client: int) -> float:
        """Return when a client that begins now is done, or given up."""

    def _is_pending(self) -> bool:
        """Whether somebody comes in at this very moment, before others may begin."""
        return False

    def _away(self) -> set[int]:
        """Return the nodes that are not to be asked to evaluate."""
        return set()

    def close(self) -> None:
        """Let go of those at work; the strategy asks for whole rounds again."""
        self._strategy.let_in(None)

    def state_dict(self) -> dict[str, object]:
        """Return what later rounds depend on, between two of them."""
        return {"draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self._draws = state["draws"]


class VirtualTime(AtWork):
    """Clients at work under a :class:`~flower_ext.server.asynchronous.VirtualClock`."""

    def __init__(
        self, asynchronous: Asynchronous, strategy: Asking, grid: Grid
    ) -> None:
        super().__init__(asynchronous, strategy, grid)
        self._clock = cast(VirtualClock, asynchronous.clock)
        self._now = 0.0
        self._tasks: Counter[int] = Counter()
        self._models: dict[int, ArrayRecord] = {}  # that were sent, by round

    def open(self, number: int, model: ArrayRecord) -> None:
        """Begin a round, and keep its model as long as somebody is to train it."""
        needed = {work.round.number for work in self._works}
        self._models = {n: x for n, x in self._models.items() if n in needed}
        self._models[number] = model
        super().open(number, model)

    def _due(self, client: int) -> float:
        self._tasks[client] += 1
        return self._now + self._clock.of(client, self._tasks[client])

    def _is_pending(self) -> bool:
        return bool(self._works) and self._works[0].due <= self._now

    def next(self, ask: Callable[[], list[Message]]) -> list[Work]:
        """Let time pass until the update is complete, if nobody fails."""
        found: list[Work] = []
        while len(found) < self.missing:
            self._fill(ask)
            if not self._works:
                break
            found.append(heapq.heappop(self._works))
            self._now = found[-1].due
            self._may_draw = True
        return self._require(found)

    def messages(self, works: Sequence[Work]) -> list[Message]:
        """Return their messages, written now: those of long ago have expired."""
        return [
            Message(work.message.content, work.node, MessageType.TRAIN)
            for work in works
        ]

    def exchange_on(self) -> Grid:
        """Return the grid itself: clients are run now that their time has come."""
        return self._grid

    def metrics(self) -> Metrics:
        """Add the time."""
        return {**super().metrics(), "virtual-seconds": self._now}

    # What a checkpoint asks for ------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Return the time, and the clients at work with what they were sent."""
        rounds = {work.round.number: work.round for work in self._works}
        contents = {id(work.message.content): work for work in self._works}
        number = {key: str(i) for i, key in enumerate(contents)}
        return {
            **super().state_dict(),
            "now": self._now,
            "tasks": sorted(self._tasks.items()),
            "works": [
                [w.due, w.client, w.round.number, number[id(w.message.content)]]
                for w in self._works
            ],
            "rounds": {str(n): save_round(x) for n, x in rounds.items()},
            "contents": {
                number[key]: save_content(
                    w.message.content, self._models[w.round.number]
                )
                for key, w in contents.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the clients of a saved run go on."""
        super().load_state_dict(state)
        self._now = state["now"]
        self._tasks = Counter(dict(state["tasks"]))
        rounds = {int(n): restore_round(x) for n, x in state["rounds"].items()}
        self._models = {n: to_record(x.sent) for n, x in rounds.items()}
        nodes = ordered_nodes(self._grid)
        contents: dict[str, RecordDict] = {}
        for due, client, number, name in state["works"]:
            if name not in contents:
                saved, model = state["contents"][name], self._models[number]
                contents[name] = restore_content(saved, model)
            content = contents[name]
            told = content.config_records[self._strategy.configrecord_key]
            round = replace(rounds[number], upload=self._strategy.reader_of(told))
            message = Message(content, nodes[client], MessageType.TRAIN)
            self._works.append(Work(due, client, nodes[client], message, round))


class RealTime(AtWork):
    """Clients at work in real time.

    Parameters
    ----------
    asynchronous, strategy, grid
        As of :class:`AtWork`.
    timeout : float
        Seconds after which a client is given up.
    """

    def __init__(
        self,
        asynchronous: Asynchronous,
        strategy: Asking,
        grid: Grid,
        timeout: float,
    ) -> None:
        super().__init__(asynchronous, strategy, grid)
        self._timeout = timeout
        self._ids: dict[str, Work] = {}
        self._done: list[tuple[Work, Message]] = []

    def _due(self, client: int) -> float:
        return time.monotonic() + self._timeout

    def _away(self) -> set[int]:
        # What such a client keeps is being changed.
        return {work.node for work in self._works}

    def open(self, number: int, model: ArrayRecord) -> None:
        """Begin a round; who has come in meanwhile is part of it."""
        super().open(number, model)
        self._busy |= {work.node for work, _ in self._done}

    def begin(self, messages: Sequence[Message]) -> None:
        """Send the messages to clients."""
        super().begin(messages)
        by_node = {work.node: work for work in self._works}
        ids = list(self._grid.push_messages(messages)) if messages else []
        for message, name in zip(messages, ids, strict=True):
            self._ids[name] = by_node[message.metadata.dst_node_id]

    def next(self, ask: Callable[[], list[Message]]) -> list[Work]:
        """Wait until somebody is done."""
        pause = _SHORTEST_PAUSE
        while True:
            self._fill(ask)
            self._look()
            if self._done or not self._works:
                break
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._require([work for work, _ in self._done[: self.missing]])

    def _look(self) -> None:
        """See who has come in, and give up who is late."""
        replies = list(self._grid.pull_messages(list(self._ids)))
        found = [(self._ids.pop(r.metadata.reply_to_message_id), r) for r in replies]
        now = time.monotonic()
        late = [name for name, work in self._ids.items() if work.due <= now]
        self._withdraw(late)
        error = Error(NO_REPLY, f"no reply after timeout={self._timeout:g} s")
        for name in late:
            work = self._ids.pop(name)
            found.append((work, Message(error, reply_to=work.message)))
        if found:
            self._done += sorted(found, key=lambda pair: pair[0].client)
            gone = {work.node for work, _ in found}
            self._works = [work for work in self._works if work.node not in gone]
            heapq.heapify(self._works)
            self._may_draw = True

    def _withdraw(self, names: list[str]) -> None:
        if names and isinstance(self._grid, Withdrawing):
            self._grid.withdraw(names)

    def exchange_on(self) -> Grid:
        """Return what hands over the replies that have come in."""
        return cast(Grid, self)  # of whose methods one is called

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the replies to messages of clients that are done."""
        asked = {message.metadata.dst_node_id for message in messages}
        replies = [reply for work, reply in self._done if work.node in asked]
        self._done = [pair for pair in self._done if pair[0].node not in asked]
        return replies

    def close(self) -> None:
        """Stop those who are still at work."""
        self._withdraw(list(self._ids))
        super().close()


def at_work(
    asynchronous: Asynchronous,
    strategy: Asking,
    grid: Grid,
    timeout: float,
) -> AtWork:
    """Return the clients at work of a new run: nobody yet."""
    if asynchronous.clock is not None:
        return VirtualTime(asynchronous, strategy, grid)
    return RealTime(asynchronous, strategy, grid, timeout)
