"""The client mod that runs many virtual clients on one node."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_ext.simulation.clients import Call, client_context, run_client
from flower_ext.simulation.jobs import Job
from flower_ext.simulation.records import Record, own_copies

#: Key of a SuperNode's ``--node-config``: the clients that live on it, ``"0-99,200"``.
HOSTED_KEY = "logical-clients"

PACK_KEY = "packed-clients"
_STATE_KEY = "packed-state"


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
