"""Client mods: many virtual clients on one node, and GPUs for clients that differ."""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_ext._flower import log
from flower_ext.simulation.clients import Call, run_client
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.machines import (
    ClientResources,
    Machine,
    Resources,
    ray_machines,
    require_room,
)
from flower_ext.simulation.records import Record, own_copy
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import Kept, PackStates, Shelf

#: Key of a SuperNode's ``--node-config``: the clients that live on it, ``"0-99,200"``.
HOSTED_KEY = "logical-clients"

PACK_KEY = "packed-clients"
STATES_KEY = "packed-states"
_STATE_KEY = "packed-state"

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
    pack = Pack.read(message.content)
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
    content = RecordDict()
    answers = []
    for job in pack.jobs:
        outcome = run_client(call_next, setting, job, pack.shared, lent or own)
        answers.append(_say_outcome(outcome, job.client in own))
        for name, record in (outcome.content or RecordDict()).items():
            content[f"{job.key}/{name}"] = record
    hosted = str(context.node_config.get(HOSTED_KEY, ""))
    sees = pack.shelf is not None and pack.shelf.is_here()
    content[PACK_KEY] = say({"answers": answers, "hosted": hosted, "sees-shelf": sees})
    if lent:
        content[STATES_KEY] = write_states(lent.changed)
    return Message(content, reply_to=message)


def _say_outcome(outcome: Outcome, has_state: bool) -> dict[str, object]:
    """Return what is to say of a client, beside the records of its reply."""
    error = outcome.error and [outcome.error.code, outcome.error.reason]
    return {
        "key": outcome.key,
        "seconds": outcome.seconds,
        "error": error,
        "state": has_state,
    }


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


def write_states(states: Mapping[int, Kept | None]) -> ConfigRecord:
    """Write states that travel into a record; no bytes are an empty state."""
    return ConfigRecord({str(c): b"" if k is None else k for c, k in states.items()})


def read_states(record: ConfigRecord) -> dict[int, Kept | None]:
    """Read what :func:`write_states` wrote."""
    return {int(c): cast(Kept, kept) or None for c, kept in record.items()}


@dataclass
class Pack:
    """What one Flower message asks of the virtual clients on a node.

    Attributes
    ----------
    num_clients, client_timeout
        As in :class:`Setting`.
    jobs, shared
        What the clients are asked, and the records that several jobs name.
    shelf : Shelf or None
        Where large states are. Without it, states are kept on the node.
    lent : Mapping[int, Kept]
        The states of those clients that have one.
    """

    num_clients: int
    client_timeout: float | None
    jobs: Sequence[Job]
    shared: Sequence[Record]
    shelf: Shelf | None = None
    lent: Mapping[int, Kept] = field(default_factory=dict)

    def write(self) -> RecordDict:
        """Return the content of the Flower message: shared records are in it once."""
        content = RecordDict()
        for place in sorted({i for job in self.jobs for i in job.shared.values()}):
            content[f"shared/{place}"] = self.shared[place]
        for job in self.jobs:
            for name, record in job.own.items():
                content[f"own/{job.key}/{name}"] = record
        content[PACK_KEY] = say(
            {
                "num-clients": self.num_clients,
                "client-timeout": self.client_timeout,
                "shelf": str(self.shelf.folder) if self.shelf else None,
                "jobs": [
                    [j.key, j.client, j.kind, j.group, j.shared, list(j.own)]
                    for j in self.jobs
                ],
            }
        )
        content[STATES_KEY] = write_states(self.lent)
        return content

    @classmethod
    def read(cls, content: RecordDict) -> "Pack":
        """Read what :meth:`write` wrote."""
        said = hear(content)
        jobs, shared = [], {}
        for key, client, kind, group, places, names in said["jobs"]:
            own = {name: content[f"own/{key}/{name}"] for name in names}
            jobs.append(Job(key, client, kind, group, places, own))
            shared.update({i: content[f"shared/{i}"] for i in places.values()})
        last = max(shared, default=-1)
        unused = ConfigRecord()
        records = [shared.get(i, unused) for i in range(last + 1)]
        shelf = Shelf(Path(said["shelf"])) if said["shelf"] else None
        lent = read_states(content.config_records[STATES_KEY])
        return cls(
            said["num-clients"],
            said["client-timeout"],
            jobs,
            records,
            shelf,
            {client: kept for client, kept in lent.items() if kept is not None},
        )


def say(what: object) -> ConfigRecord:
    """Write JSON into a record."""
    return ConfigRecord({"json": json.dumps(what)})


def hear(content: RecordDict) -> dict[str, Any]:
    """Read what :func:`say` wrote into a message."""
    said = json.loads(str(content.config_records[PACK_KEY]["json"]))
    return cast(dict[str, Any], said)


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
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return call_next(message, context)
        client = int(context.node_config["partition-id"])
        found = Resources.of(
            each(client, context.run_config) if callable(each) else each
        )
        if not found.num_gpus:
            return call_next(message, context)
        machines = [
            Machine(m.name, math.inf, m.gpus) for m in ray_machines(ray.nodes())
        ]
        require_room(machines, {found: client})
        _require_none_held()
        task = ray.remote(_work).options(
            num_cpus=0, num_gpus=found.num_gpus, max_retries=0
        )
        answer = task.remote(call_next, message, context)
        if not ray.wait([answer], timeout=_START_SECONDS)[0]:
            _say_who_waits(client, found)
        reply, context.state = ray.get(answer)
        return cast(Message, reply)

    return mod


def _require_none_held() -> None:
    """Refuse to wait for GPUs that the waiting worker itself holds."""
    import ray

    worker = ray.get_runtime_context()
    if worker.get_actor_id() is None:
        return
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
