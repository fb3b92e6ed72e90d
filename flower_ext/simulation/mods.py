"""Client mods: many virtual clients on one node, and GPUs for clients that differ."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from logging import WARNING
from typing import cast

from flwr.app import Context, Message, RecordDict

from flower_ext._flower import log
from flower_ext.simulation.clients import Call, run_clients
from flower_ext.simulation.machines import (
    ClientResources,
    Machine,
    Resources,
    ray_machines,
    require_room,
)
from flower_ext.simulation.pack_message import PACK_KEY, PackMessage, PackReply
from flower_ext.simulation.records import own_copy
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import PackStates, Shelf

#: Key of a SuperNode's ``--node-config``: the clients that live on it, ``"0-99,200"``.
HOSTED_KEY = "logical-clients"

_STATE_KEY = "client-state"

Mod = Callable[[Message, Context, Call], Message]

_START_SECONDS = 60.0  # that a client waits for GPUs, after which it is said


def packed(message: Message, context: Context, call_next: Call) -> Message:
    """Run the virtual clients that a ``PackedGrid`` put into one message.

    A Flower mod, for packing by Flower's own messages::

        app = ClientApp(mods=[packed])

    Put it before other mods: those then run for each client. A message without virtual
    clients passes through. Each client has a context of its own. Its state comes and
    goes with the message where the server has it in reach, in simulations; in a
    deployment it is kept in the state of the node.
    """
    if PACK_KEY not in message.content:
        return call_next(message, context)
    pack = PackMessage.read(message.content)
    if pack.shelf:
        _require_simulation(pack.shelf)
    setting = Setting(
        None,
        range(pack.num_clients),
        context.run_id,
        context.run_config,
        context.node_config,
        pack.client_timeout,
    )
    own = NodeStates(context.state)
    lent = PackStates(pack.lent, pack.shelf) if pack.shelf else None
    outcomes = [*run_clients(call_next, setting, pack.jobs, pack.shared, lent or own)]
    reply = PackReply(
        hosted=str(context.node_config.get(HOSTED_KEY, "")),
        outcomes=outcomes,
        # The server must send these here again.
        stateful={job.key for job in pack.jobs if job.client in own},
        sees_shelf=pack.shelf is not None and pack.shelf.is_here(),
        changed=lent.changed if lent else {},
    )
    return Message(reply.write(), reply_to=message)


def _require_simulation(shelf: Shelf) -> None:
    """Keep states and files from a server that takes this node for a simulated one."""
    if shelf.is_own():
        return
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or not _is_actor():
        raise PermissionError(
            "the server asks for what clients keep, which does not leave this node"
        )


def _is_actor() -> bool:
    """Whether this process is one of Ray's actors, as Flower's simulated nodes are."""
    import ray

    return ray.get_runtime_context().get_actor_id() is not None


class NodeStates:
    """The states of a node's clients, in the state of the node itself.

    For deployments, where no state leaves its node. Flower keeps that of the node as
    long as the SuperNode lives. It holds records and no folders of them, hence the
    prefix.
    """

    def __init__(self, state: RecordDict) -> None:
        self._state = state
        self._names: dict[int, list[str]] = defaultdict(list)
        for key in state:  # once for all clients of a message
            if key.startswith(f"{_STATE_KEY}/"):
                _, client, name = key.split("/", 2)
                self._names[int(client)].append(name)

    def __contains__(self, client: int) -> bool:
        return bool(self._names[client])

    def read(self, client: int) -> RecordDict:
        """Return a copy of a client's state: one that fails must not spoil it."""
        return RecordDict(
            {
                name: own_copy(self._state[_state_key(client, name)])
                for name in self._names[client]
            }
        )

    def write(self, client: int, state: RecordDict) -> None:
        """Put a client's state in the place of the one before."""
        for name in self._names.pop(client, ()):
            del self._state[_state_key(client, name)]
        for name, record in state.items():
            self._state[_state_key(client, name)] = record
            self._names[client].append(name)


def _state_key(client: int, name: str) -> str:
    return f"{_STATE_KEY}/{client}/{name}"


def resources(each: ClientResources) -> Mod:
    """Make a client mod: each client's work gets GPUs of its own, as a Ray task.

    Flower gives all its workers the same GPUs. With this mod they have none
    (``client-resources-num-gpus=0``), and the work of a client is handed to a task that
    has the client's resources. Tasks wait until these are free. Outside Ray, and for a
    client that takes no GPU, the work is done where the message arrives.

    Parameters
    ----------
    each : Mapping or callable
        ``{"num_gpus": 0.25}``, or a function ``(partition_id, run_config)`` that
        returns it. CPUs are those of Flower's worker, which waits meanwhile.

    Returns
    -------
    Mod
        Behind ``packed``, if both are used.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> def shares(partition_id, run_config):
    ...     return {"num_gpus": 1 if partition_id < 10 else 0.25}
    >>> app = ClientApp(mods=[resources(shares)])
    """
    if not callable(each):
        Resources.of(each)  # a mistake is told now, and not by every client

    def mod(message: Message, context: Context, call_next: Call) -> Message:
        # Looked up and not imported: a SuperNode may have no Ray.
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return call_next(message, context)
        client = int(context.node_config["partition-id"])
        found = Resources.of(
            each(client, context.run_config) if callable(each) else each
        )
        if not found.num_gpus:
            return call_next(message, context)
        # CPUs are not asked for: Flower's worker holds them while it waits.
        machines = [
            Machine(m.name, math.inf, m.gpus) for m in ray_machines(ray.nodes())
        ]
        require_room(machines, {found: client})
        _require_none_held()
        # Not tried again: a client that kills its task would kill the next one, too.
        task = ray.remote(_work).options(
            num_cpus=0, num_gpus=found.num_gpus, max_retries=0
        )
        answer = task.remote(call_next, message, context)
        if not ray.wait([answer], timeout=_START_SECONDS)[0]:
            _say_who_waits(client, found)
        # The task had copies: what the client changed in its state came back with it.
        reply, context.state = ray.get(answer)
        return cast(Message, reply)

    return mod


def _require_none_held() -> None:
    """Refuse to wait for GPUs that the waiting worker itself holds."""
    import ray

    if not _is_actor():  # but a driver, to which Ray gives no GPUs
        return
    worker = ray.get_runtime_context()
    assigned = worker.get_assigned_resources()  # type: ignore[no-untyped-call]
    if held := assigned.get("GPU", 0):
        raise ValueError(
            f"the worker holds {held:g} GPUs, for which the mod 'resources' would wait "
            "for ever: run with --federation-config 'client-resources-num-gpus=0'; a "
            "PackedGrid with resources of its own needs no mod"
        )


def _say_who_waits(client: int, resources: Resources) -> None:
    import ray

    free = ray.available_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if free < resources.num_gpus:
        log(
            WARNING,
            "Client %s has waited %g s for %s: %g GPUs are free, others hold the rest",
            client,
            _START_SECONDS,
            resources,
            free,
        )


def _work(
    call_next: Call, message: Message, context: Context
) -> tuple[Message, RecordDict]:
    return call_next(message, context), context.state
