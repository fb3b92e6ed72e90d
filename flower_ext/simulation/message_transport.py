"""Clients behind Flower's own messages: one to each node, with many clients in it.

Works wherever Flower does, on the simulation engine and in a deployment, with the mod
``packed`` in the ClientApp.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from logging import INFO, WARNING

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from flower_ext._flower import NO_REPLY, log
from flower_ext.server.partial_sums import Summand
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.mods import HOSTED_KEY
from flower_ext.simulation.pack_message import PACK_KEY, PackMessage, PackReply
from flower_ext.simulation.packing import Workload, pack_evenly
from flower_ext.simulation.records import Record
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import ClientStates
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
    setting : Setting
        Of the clients. Their app, resources and workers are those of the nodes.
    in_reach : bool
        Whether clients' states travel with their work, as in simulations. In a
        deployment a state belongs to its node, which it does not leave.
    """

    def __init__(self, grid: Grid, setting: Setting, *, in_reach: bool) -> None:
        self.states = None
        if in_reach:
            self.states = ClientStates(setting.num_clients, setting.state_memory)
        self._grid = grid
        self._setting = setting
        self.workload: Workload = Workload(setting.num_examples)
        self._hosts: dict[int, frozenset[int] | None] = {}  # None takes any client
        self._homes: dict[int, int] = {}  # the node that keeps a client's state
        self._see_shelf: set[int] = set()  # the nodes that see the folder of states
        self._running: dict[str, tuple[int, list[Job]]] = {}
        self._ready: list[Outcome] = []
        self._pause = _FIRST_PAUSE

    def submit(
        self,
        jobs: Sequence[Job],
        shared: Sequence[Record],
        summand: Summand | None = None,
    ) -> None:
        """Choose a node for every job, and send each node its own.

        Nothing is added up: a node must not run code that a message brings along.
        """
        # A Flower message has one type and one group.
        alike: dict[tuple[str, str], list[Job]] = defaultdict(list)
        for job in jobs:
            alike[job.kind, job.group].append(job)
        for (kind, group), same in alike.items():
            messages, packs = [], []
            for node, pack in self._choose_nodes(same, self._nodes(kind)).items():
                content = self._write(pack, shared, node)
                messages.append(Message(content, node, kind, group_id=group))
                packs.append((node, pack))
            ids = self._grid.push_messages(messages)
            self._running.update(zip(ids, packs, strict=True))
        self._pause = _FIRST_PAUSE  # the first replies of a round may come soon

    def _write(
        self, jobs: Sequence[Job], shared: Sequence[Record], node: int
    ) -> RecordDict:
        setting, states = self._setting, self.states
        pack = PackMessage(setting.num_clients, setting.client_timeout, jobs, shared)
        if states:
            clients, named = (job.client for job in jobs), node in self._see_shelf
            lent = states.lend(clients, named=named)
            pack = replace(pack, shelf=states.shelf(), lent=lent)
        return pack.write()

    def _nodes(self, kind: str) -> list[int]:
        """Return the nodes, once there are any; ask new ones whom they host."""
        # Sorted: who runs where must not depend on who connected first.
        while not (nodes := sorted(self._grid.get_node_ids())):
            log(INFO, "Waiting for nodes to connect.")
            time.sleep(1)
        new = [node for node in nodes if node not in self._hosts]
        # Of the kind that will follow, for which the app surely has a function.
        hello = [Message(self._write([], [], node), node, kind) for node in new]
        for reply in self._grid.send_and_receive(hello) if hello else ():
            node = reply.metadata.src_node_id
            if reply.has_error() or PACK_KEY not in reply.content:
                reason = reply.error.reason if reply.has_error() else "a plain reply"
                raise RuntimeError(
                    f"node {node} knows of no virtual clients: its ClientApp needs the "
                    f"mod, ClientApp(mods=[flower_ext.simulation.packed]); it sent "
                    f"{reason}"
                )
            found = PackReply.read(reply.content)
            self._hosts[node] = parse_clients(found.hosted) if found.hosted else None
            if found.sees_shelf:
                self._see_shelf.add(node)
        return nodes

    def _choose_nodes(
        self, jobs: Sequence[Job], nodes: Sequence[int]
    ) -> dict[int, list[Job]]:
        """Choose a node for every job."""
        packs: dict[int, list[Job]] = defaultdict(list)
        claimed = {client: node for node in nodes for client in self._hosts[node] or ()}
        free = [node for node in nodes if self._hosts[node] is None]
        roaming = []
        for job in jobs:
            # Its state comes first: anywhere else the client would start anew.
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
        # Nodes with work of their own already get less of the rest.
        sizes = [self.workload.size(job.client) for job in roaming]
        taken = [
            sum(self.workload.size(job.client) for job in packs[node]) for node in free
        ]
        for node, chosen in zip(free, pack_evenly(sizes, taken), strict=True):
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

    def _read(self, reply: Message) -> Sequence[Outcome]:
        """Turn the reply of a node into the outcomes of its clients."""
        node, jobs = self._running.pop(reply.metadata.reply_to_message_id)
        if reply.has_error():
            return [Outcome(job.key, None, reply.error) for job in jobs]
        found = PackReply.read(reply.content)
        outcomes = {outcome.key: outcome for outcome in found.outcomes}
        # Of the jobs that are still awaited: others were given up meanwhile, and their
        # clients are as they were.
        done = [(job.client, outcomes[job.key]) for job in jobs]
        for job in jobs:
            if job.key in found.stateful:
                self._homes[job.client] = node
            else:
                self._homes.pop(job.client, None)
        if self.states:
            awaited = {job.client for job in jobs}
            changed = {c: k for c, k in found.changed.items() if c in awaited}
            self.states.take_back(changed)
        self.workload.learn(jobs[0].kind, done)
        return [outcome for _, outcome in done]

    def give_up(self, keys: Iterable[int]) -> None:
        """Forget jobs; a node that is at work on them goes on."""
        gone = set(keys)
        for number, (node, jobs) in list(self._running.items()):
            left = [job for job in jobs if job.key not in gone]
            self._running[number] = node, left
            if not left:
                del self._running[number]

    def close(self) -> None:
        """Forget everything that is under way, and the clients' states."""
        self._running.clear()
        if self.states:
            self.states.close()


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
