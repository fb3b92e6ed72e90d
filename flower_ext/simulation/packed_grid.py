"""PackedGrid: thousands of virtual clients on a few workers, as a Flower grid.

::

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        clients = PackedGrid(
            grid, num_clients=1000, client_app="my_app.client_app:app",
            run_config=context.run_config,
        )
        strategy.start(grid=clients, initial_arrays=..., num_rounds=...)

The strategy and the ClientApp stay as they are.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Literal

from flwr.app import Error, Message, MetricRecord, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from flower_ext._flower import (
    NO_REPLY,
    NodeInfo,
    Run,
    in_simulation,
)
from flower_ext.core.errors import one_of, positive, refuse, whole
from flower_ext.server.partial_sums import Summand
from flower_ext.simulation.base_grid import OwnGrid
from flower_ext.simulation.direct_transport import DirectTransport
from flower_ext.simulation.jobs import Outcome, split
from flower_ext.simulation.local import LocalGrid
from flower_ext.simulation.message_transport import MessageTransport
from flower_ext.simulation.packing import Workload
from flower_ext.simulation.ray_transport import RayTransport, Resources
from flower_ext.simulation.transport import Transport

TransportName = Literal["auto", "ray", "messages"]


class PackedGrid(OwnGrid):
    """Logical clients 0 to N-1, many to a worker, for any strategy.

    Each has its own :class:`~flwr.app.Context`: ``partition-id`` (and ``node_id``) is
    its number, ``num-partitions`` is N, and its ``state`` is kept between rounds
    without travelling in messages. An exception in one client is that client's error
    reply. Replies come in the order of the messages, whoever finished first.

    Parameters
    ----------
    grid : Grid, optional
        Flower's, as handed to the ServerApp. Without it Ray is used, and started if it
        does not run: for plain scripts.
    num_clients : int
        Number of logical clients.
    client_app : ClientApp or str
        The ClientApp, or its import string ``"package.module:app"``. Flower's messages
        go to the ClientApp of the nodes, which needs the mod ``packed``.
    transport : {"auto", "ray", "messages"}
        How clients are reached: in Ray actors of the grid's own, or by Flower's
        messages to its nodes. ``"auto"`` is Ray where there is one, in Flower's
        simulations and in scripts, and messages elsewhere, in deployments. In
        ``run_local``, clients of a ``client_app`` run in this process.
    run_config : dict, optional
        What clients find in ``context.run_config``; hand on the server's. With
        messages they find their node's.
    num_workers : int, optional
        Most processes that run clients; by default as many as have the CPUs and GPUs.
        With messages, Flower's nodes are the workers.
    resources : Mapping or callable
        CPUs and GPUs of a client, ``{"num_cpus": 1, "num_gpus": 0.25}``, or a function
        ``(partition_id, run_config)`` that returns them. A GPU is Ray's: its number is
        in ``CUDA_VISIBLE_DEVICES`` of the worker. With messages, see the mod
        ``resources``.
    client_timeout : float, optional
        Seconds a client may take; one that takes longer is stopped, which is its error.
    num_examples : sequence of float, optional
        Sizes of the clients, to deal them out longest first from the first round on;
        by default sizes are learned from the ``num-examples`` that clients report.
    partial_sums : bool (default: True)
        In Ray actors, for strategies that are sums: replies are added up where they are
        made, so that what travels, and the server's memory, do not grow with the
        cohort. The result is that of the same numbers added in another order, in
        float64, the same in every run with as many workers. ``train_metrics_aggr_fn``
        then sees no arrays. With False, replies arrive as they are.

    Notes
    -----
    A worker that dies is replaced, and the clients that it was running are run once
    more, each alone. A client that kills its worker twice gets an error reply. None is
    counted twice: replies of a pack arrive together or not at all.

    Examples
    --------
    In a script, with clients on all CPUs of this machine::

        with PackedGrid(num_clients=1000, client_app=app) as grid:
            FedAvg(fraction_train=0.02).start(grid=grid, initial_arrays=arrays)
    """

    def __init__(
        self,
        grid: Grid | None = None,
        *,
        num_clients: int,
        client_app: ClientApp | str | None = None,
        transport: TransportName = "auto",
        run_config: UserConfig | None = None,
        num_workers: int | None = None,
        resources: Resources | None = None,
        client_timeout: float | None = None,
        num_examples: Sequence[float] | None = None,
        partial_sums: bool = True,
    ) -> None:
        whole("num_clients", num_clients, 1)
        one_of("transport", transport, ("auto", "ray", "messages"))
        if num_workers is not None:
            whole("num_workers", num_workers, 1)
        if client_timeout is not None:
            positive("client_timeout", client_timeout)
        if num_examples is not None and len(num_examples) != num_clients:
            refuse(
                "num_examples",
                f"{len(num_examples)} sizes",
                f"one for each of num_clients={num_clients}",
            )
        super().__init__(grid.run if grid else Run.create_empty(run_id=1))
        if grid is None:
            self._run.override_config = dict(run_config or {})
        if not isinstance(partial_sums, bool):
            refuse("partial_sums", partial_sums, "True or False")
        self._partial_sums = partial_sums
        self._clients = range(num_clients)
        self._nodes: list[NodeInfo] = []
        self._keys = itertools.count()
        self._asked: dict[str, Message] = {}  # until they are answered
        self._replies: dict[str, Message] = {}
        self._workload = Workload(num_examples)
        self._transport: Transport
        if transport == "auto":
            if isinstance(grid, LocalGrid) and client_app is not None:
                self._transport = DirectTransport(
                    client_app,
                    num_clients,
                    self._run.run_id,
                    dict(run_config or {}),
                    client_timeout,
                )
                return
            transport = "ray" if grid is None or in_simulation(grid) else "messages"
        if transport == "ray":
            if client_app is None:
                refuse("client_app", None, "a ClientApp or its import string")
            self._transport = RayTransport(
                grid,
                client_app,
                num_clients,
                self._run.run_id,
                dict(run_config or {}),
                num_workers,
                resources or {"num_cpus": 1},
                client_timeout,
                self._workload,
            )
        else:
            if grid is None:
                refuse("grid", None, "Flower's grid", "messages need its nodes")
            self._transport = MessageTransport(
                grid, num_clients, client_timeout, self._workload
            )

    def __enter__(self) -> "PackedGrid":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; the end of the process does so, too."""
        self._transport.close()

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of the clients, in order."""
        self._look(self._clients)
        return self._clients

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the clients, registered in order."""
        if not self._nodes:
            self._nodes = [
                NodeInfo(node_id=client, registered_at=f"{client:09d}")
                for client in self._clients
            ]
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start the clients of the messages."""
        return self._push(messages, None)

    def _push(self, messages: Iterable[Message], summand: Summand | None) -> list[str]:
        self._looks = 0
        keyed = [(next(self._keys), message) for message in messages]
        for key, message in keyed:
            client = message.metadata.dst_node_id
            if client not in self._clients:
                refuse("dst_node_id", client, f"one of {len(self._clients)} clients")
            message.metadata.__dict__["_message_id"] = str(key)
            self._asked[str(key)] = message
        if keyed:
            self._transport.submit(*split(keyed), summand)
        return [str(key) for key, _ in keyed]

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
        return self._exchange(messages, None, timeout)

    def send_and_sum(
        self, messages: Iterable[Message], summand: Summand, *, timeout: float | None
    ) -> Iterable[Message]:
        """Do as :meth:`send_and_receive`; replies may be added up by the workers."""
        return self._exchange(
            messages, summand if self._partial_sums else None, timeout
        )

    def _exchange(
        self,
        messages: Iterable[Message],
        summand: Summand | None,
        timeout: float | None,
    ) -> list[Message]:
        end = None if timeout is None else time.monotonic() + timeout
        ids = self._push(messages, summand)
        while late := [i for i in ids if i in self._asked]:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                self._transport.give_up(map(int, late))
                reason = f"no reply after timeout={timeout:g} s"
                for i in late:
                    self._answer(Outcome(int(i), None, Error(NO_REPLY, reason)))
                break
            self._collect(left)
        return [self._replies.pop(i) for i in ids]

    def _collect(self, seconds: float | None) -> None:
        for outcome in self._transport.wait(seconds):
            self._answer(outcome)

    def _answer(self, outcome: Outcome) -> None:
        """Make the reply to a message from its outcome, if it is still awaited."""
        asked = self._asked.pop(str(outcome.key), None)
        if asked is None:
            return
        if outcome.content is None:
            reply = Message(outcome.error or Error(NO_REPLY), reply_to=asked)
        else:
            reply = Message(outcome.content, reply_to=asked)
            for record in outcome.content.values():
                size = record.get("num-examples")
                if isinstance(record, MetricRecord) and isinstance(size, int | float):
                    self._workload.learn_size(asked.metadata.dst_node_id, size)
        self._replies[str(outcome.key)] = reply
