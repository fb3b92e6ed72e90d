"""Clients behind Flower's own messages: one to each node, with many clients in it.

Works wherever Flower does, on the simulation engine and in a deployment, with the mod
``packed`` in the ClientApp.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from logging import INFO, WARNING

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from flower_ext._flower import NO_REPLY, log
from flower_ext.server.partial_sums import Summand
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.mods import HOSTED_KEY, PACK_KEY, Pack, hear
from flower_ext.simulation.packing import Workload, deal
from flower_ext.simulation.records import Record
from flower_ext.simulation.transport import Transport

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two looks for replies


class MessageTransport(Transport):
    """Sends virtual clients to Flower's nodes.

    Where a client runs: on a node that says by its ``node_config`` that it hosts the
    client, or where the client's state is, or anywhere.

    Parameters
    ----------
    grid : Grid
        Flower's.
    num_clients : int
        Number of virtual clients.
    client_timeout : float or None
        Seconds a client may take.
    workload : Workload
        Knows how long clients take.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        client_timeout: float | None,
        workload: Workload,
    ) -> None:
        self._grid = grid
        self._num_clients = num_clients
        self._client_timeout = client_timeout
        self._workload = workload
        self._hosts: dict[int, frozenset[int] | None] = {}  # None takes any client
        self._homes: dict[int, int] = {}  # the node with a client's state
        self._running: dict[str, tuple[int, list[Job]]] = {}
        self._ready: list[Outcome] = []
        self._pause = _FIRST_PAUSE

    def submit(
        self,
        jobs: Sequence[Job],
        shared: Sequence[Record],
        summand: Summand | None = None,
    ) -> None:
        """Deal jobs out to nodes and send each node its own.

        Nothing is added up: a node must not run code that a message brings along.
        """
        alike: dict[tuple[str, str], list[Job]] = defaultdict(list)
        for job in jobs:
            alike[job.kind, job.group].append(job)
        for (kind, group), same in alike.items():
            messages, packs = [], []
            for node, pack in self._deal(same, self._nodes(kind)).items():
                content = self._write(pack, shared)
                messages.append(Message(content, node, kind, group_id=group))
                packs.append((node, pack))
            ids = self._grid.push_messages(messages)
            self._running.update(zip(ids, packs, strict=True))
        self._pause = _FIRST_PAUSE

    def _write(self, jobs: Sequence[Job], shared: Sequence[Record] = ()) -> RecordDict:
        return Pack(self._num_clients, self._client_timeout, jobs, shared).write()

    def _nodes(self, kind: str) -> list[int]:
        """Return the nodes, once there are any; ask new ones whom they host."""
        while not (nodes := sorted(self._grid.get_node_ids())):
            log(INFO, "Waiting for nodes to connect.")
            time.sleep(1)
        new = [node for node in nodes if node not in self._hosts]
        hello = [Message(self._write([]), node, kind) for node in new]
        for reply in self._grid.send_and_receive(hello) if hello else ():
            node = reply.metadata.src_node_id
            if reply.has_error() or PACK_KEY not in reply.content:
                reason = reply.error.reason if reply.has_error() else "a plain reply"
                raise RuntimeError(
                    f"node {node} knows of no virtual clients: its ClientApp needs the "
                    f"mod, ClientApp(mods=[flower_ext.simulation.packed]); it sent "
                    f"{reason}"
                )
            hosted = str(hear(reply.content)["hosted"])
            self._hosts[node] = parse_clients(hosted) if hosted else None
        return nodes

    def _deal(self, jobs: Sequence[Job], nodes: Sequence[int]) -> dict[int, list[Job]]:
        """Choose a node for every job."""
        packs: dict[int, list[Job]] = defaultdict(list)
        claimed = {client: node for node in nodes for client in self._hosts[node] or ()}
        free = [node for node in nodes if self._hosts[node] is None]
        roaming = []
        for job in jobs:
            home = self._homes.get(job.client)
            if home is not None and home not in nodes:
                del self._homes[job.client]
                self._fail(job, "its node has left with its state; it starts anew")
            elif home is not None:
                packs[home].append(job)
            elif job.client in claimed:
                packs[claimed[job.client]].append(job)
            elif free:
                roaming.append(job)
            else:
                self._fail(job, f"no node hosts it: see {HOSTED_KEY!r} of node-config")
        sizes = [self._workload.size(job.client) for job in roaming]
        taken = [
            sum(self._workload.size(job.client) for job in packs[node]) for node in free
        ]
        for node, chosen in zip(free, deal(sizes, taken), strict=True):
            packs[node] += [roaming[i] for i in chosen]
        return {node: pack for node, pack in packs.items() if pack}

    def _fail(self, job: Job, why: str) -> None:
        log(WARNING, "Client %s: %s", job.client, why)
        error = Error(NO_REPLY, f"client {job.client}: {why}")
        self._ready.append(Outcome(job.key, None, error))

    def wait(self, seconds: float | None) -> list[Outcome]:
        """Look for replies, less and less often."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            for reply in self._grid.pull_messages(list(self._running)):
                self._ready += self._read(reply)
            if self._ready or not self._running:
                ready, self._ready = self._ready, []
                return ready
            left = self._pause if end is None else end - time.monotonic()
            if left <= 0:
                return []
            time.sleep(min(left, self._pause))
            self._pause = min(1.5 * self._pause, _LONGEST_PAUSE)

    def _read(self, reply: Message) -> Iterator[Outcome]:
        """Turn the reply of a node into the outcomes of its clients."""
        node, jobs = self._running.pop(reply.metadata.reply_to_message_id)
        if reply.has_error():
            for job in jobs:
                yield Outcome(job.key, None, reply.error)
            return
        content: dict[int, RecordDict] = defaultdict(RecordDict)
        for key, record in reply.content.items():
            number, _, name = key.partition("/")
            if name:
                content[int(number)][name] = record
        answers = {said["key"]: said for said in hear(reply.content)["answers"]}
        for job in jobs:
            said = answers[job.key]
            if error := said.get("error"):
                yield Outcome(job.key, None, Error(*error), said["seconds"])
                continue
            if said["state"]:
                self._homes[job.client] = node
            else:
                self._homes.pop(job.client, None)
            yield Outcome(job.key, content[job.key], None, said["seconds"])

    def give_up(self, keys: Iterable[int]) -> None:
        """Forget jobs; a node that is at work on them goes on."""
        gone = set(keys)
        for number, (_, jobs) in list(self._running.items()):
            if all(job.key in gone for job in jobs):
                del self._running[number]

    def close(self) -> None:
        """Forget everything that is under way."""
        self._running.clear()


def parse_clients(text: str) -> frozenset[int]:
    """Read a list of clients.

    Examples
    --------
    >>> sorted(parse_clients("0-2, 7"))
    [0, 1, 2, 7]
    """
    clients: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            clients.update(range(int(first), int(last if dash else first) + 1))
        except ValueError:
            raise ValueError(
                f"{HOSTED_KEY}={text!r} must list clients such as '0-99,200'"
            ) from None
    return frozenset(clients)
