"""Client mods: many virtual clients on one node, and GPUs for clients that differ."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_ext._flower import log
from flower_ext.simulation.clients import Call, client_context, run_client
from flower_ext.simulation.jobs import Job
from flower_ext.simulation.machines import (
    Machine,
    Need,
    ResourcesFunction,
    ray_machines,
    require_room,
)
from flower_ext.simulation.records import Record, own_copies

#: Key of a SuperNode's ``--node-config``: the clients that live on it, ``"0-99,200"``.
HOSTED_KEY = "logical-clients"

PACK_KEY = "packed-clients"
_STATE_KEY = "packed-state"

Mod = Callable[[Message, Context, Call], Message]

_START_SECONDS = 60.0  # that a client waits for GPUs, after which it is said


def packed(message: Message, context: Context, call_next: Call) -> Message:
    """Run the virtual clients that a ``PackedGrid`` put into one message.

    A Flower mod, for packing by Flower's own messages::

        app = ClientApp(mods=[packed])

    Put it before other mods: those then run for each client. A message without virtual
    clients passes through. Each client has a context of its own, whose state is kept in
    that of the node.
    """
    if PACK_KEY not in message.content:
        return call_next(message, context)
    pack = Pack.read(message.content)
    content = RecordDict()
    answers = []
    for job in pack.jobs:
        answer, records = _run_one(pack, job, context, call_next)
        answers.append(answer)
        for name, record in records.items():
            content[f"{job.key}/{name}"] = record
    hosted = str(context.node_config.get(HOSTED_KEY, ""))
    content[PACK_KEY] = say({"answers": answers, "hosted": hosted})
    return Message(content, reply_to=message)


def _run_one(
    pack: "Pack", job: Job, context: Context, call_next: Call
) -> tuple[dict[str, object], RecordDict]:
    """Run one client; return what is to say of it, and the records of its reply."""
    prefix = f"{_STATE_KEY}/{job.client}/"
    state = RecordDict(
        {
            key.removeprefix(prefix): record
            for key, record in context.state.items()
            if key.startswith(prefix)
        }
    )
    own = client_context(
        context.run_id,
        job.client,
        pack.num_clients,
        own_copies(state),
        context.run_config,
        context.node_config,
    )
    outcome = run_client(call_next, job, pack.shared, own, pack.client_timeout)
    answer: dict[str, object] = {"key": job.key, "seconds": outcome.seconds}
    if outcome.content is None:
        assert outcome.error is not None
        answer["error"] = [outcome.error.code, outcome.error.reason]
        return answer, RecordDict()
    for key in state:
        del context.state[prefix + key]
    for key, record in own.state.items():
        context.state[prefix + key] = record
    answer["state"] = bool(own.state)
    return answer, outcome.content


@dataclass
class Pack:
    """What one Flower message asks of the virtual clients on a node."""

    num_clients: int
    client_timeout: float | None
    jobs: Sequence[Job]
    shared: Sequence[Record]

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
                "jobs": [
                    [j.key, j.client, j.kind, j.group, j.shared, list(j.own)]
                    for j in self.jobs
                ],
            }
        )
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
        return cls(said["num-clients"], said["client-timeout"], jobs, records)


def say(what: object) -> ConfigRecord:
    """Write JSON into a record."""
    return ConfigRecord({"json": json.dumps(what)})


def hear(content: RecordDict) -> dict[str, Any]:
    """Read what :func:`say` wrote into a message."""
    said = json.loads(str(content.config_records[PACK_KEY]["json"]))
    return cast(dict[str, Any], said)


def resources(need: Mapping[str, float] | ResourcesFunction) -> Mod:
    """Make a client mod: each client's work gets GPUs of its own, as a Ray task.

    Flower gives all its workers the same GPUs. With this mod they have none
    (``client-resources-num-gpus=0``), and the work of a client is handed to a task that
    has what the client needs. Tasks wait until that is free. Outside Ray, and for a
    client that needs no GPU, the work is done where the message arrives.

    Parameters
    ----------
    need : Mapping or callable
        ``{"num_gpus": 0.25}``, or a function ``(partition_id, run_config)`` that
        returns it. CPUs are those of Flower's worker, which waits meanwhile.

    Returns
    -------
    Mod
        Behind ``packed``, if both are used.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> def need(partition_id, run_config):
    ...     return {"num_gpus": 1 if partition_id < 10 else 0.25}
    >>> app = ClientApp(mods=[resources(need)])
    """
    if not callable(need):
        Need.of(need)

    def mod(message: Message, context: Context, call_next: Call) -> Message:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return call_next(message, context)
        client = int(context.node_config["partition-id"])
        found = Need.of(need(client, context.run_config) if callable(need) else need)
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


def _say_who_waits(client: int, need: Need) -> None:
    import ray

    free = ray.available_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if free < need.num_gpus:
        log(
            WARNING,
            "Client %s has waited %g s for %s: %g GPUs are free, others hold the rest",
            client,
            _START_SECONDS,
            need,
            free,
        )


def _work(
    call_next: Call, message: Message, context: Context
) -> tuple[Message, RecordDict]:
    return call_next(message, context), context.state
