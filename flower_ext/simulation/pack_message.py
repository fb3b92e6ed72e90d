"""What Flower's messages hold for the virtual clients of a node, and their replies.

What is no record travels as JSON in one ConfigRecord: records hold flat lists only.

    message:  packed-clients      number of clients, limit, jobs
              packed-states       the states of the clients, where they travel
              shared/PLACE        a record that several clients get, once
              own/KEY/NAME        a record of one client
    reply:    packed-clients      whom the node hosts, how each client did
              packed-states       the states that changed
              KEY/NAME            a record of a client's reply
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flwr.app import ConfigRecord, Error, RecordDict

from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.records import Record
from flower_ext.simulation.states import Kept, Shelf

PACK_KEY = "packed-clients"
_STATES_KEY = "packed-states"


@dataclass(frozen=True)
class PackMessage:
    """What a node is asked; without jobs, only whom it hosts and what it sees.

    Attributes
    ----------
    num_clients, client_timeout
        As in :class:`~flower_ext.simulation.setting.Setting`.
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
        """Return the content of the Flower message."""
        content = RecordDict()
        # Only those that this node's clients get: there may be a model for each tier.
        for place in sorted({i for job in self.jobs for i in job.shared.values()}):
            content[f"shared/{place}"] = self.shared[place]
        for job in self.jobs:
            for name, record in job.own.items():
                content[f"own/{job.key}/{name}"] = record
        content[PACK_KEY] = _to_json(
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
        content[_STATES_KEY] = _write_states(self.lent)
        return content

    @classmethod
    def read(cls, content: RecordDict) -> "PackMessage":
        """Read what :meth:`write` wrote."""
        said = _from_json(content)
        jobs, shared = [], {}
        for key, client, kind, group, places, names in said["jobs"]:
            own = {name: content[f"own/{key}/{name}"] for name in names}
            jobs.append(Job(key, client, kind, group, places, own))
            shared.update({i: content[f"shared/{i}"] for i in places.values()})
        # Jobs name records by place, so what went to other nodes leaves a gap.
        last, gap = max(shared, default=-1), ConfigRecord()
        records = [shared.get(i, gap) for i in range(last + 1)]
        shelf = Shelf(Path(said["shelf"])) if said["shelf"] else None
        states = content.config_records[_STATES_KEY]
        lent = {int(client): cast(Kept, kept) for client, kept in states.items()}
        limit = said["client-timeout"]
        return cls(said["num-clients"], limit, jobs, records, shelf, lent)


@dataclass(frozen=True)
class PackReply:
    """What a node answers.

    Attributes
    ----------
    hosted : str
        The clients that live on it, or empty if it takes any.
    outcomes : sequence of Outcome
        In the order of the jobs.
    stateful : collection of int
        Keys of jobs whose client has a state on this node now.
    sees_shelf : bool
        Whether the node sees the folder of large states.
    changed : Mapping[int, Kept or None]
        New states of clients whose states travel; None is an empty one.
    """

    hosted: str
    outcomes: Sequence[Outcome]
    stateful: Collection[int]
    sees_shelf: bool
    changed: Mapping[int, Kept | None]

    def write(self) -> RecordDict:
        """Return the content of the Flower message."""
        content = RecordDict()
        answers = []
        for done in self.outcomes:
            for name, record in (done.content or {}).items():
                content[f"{done.key}/{name}"] = record
            error = done.error and [done.error.code, done.error.reason]
            answers.append([done.key, error, done.seconds])
        content[PACK_KEY] = _to_json(
            {
                "hosted": self.hosted,
                "answers": answers,
                "stateful": sorted(self.stateful),
                "sees-shelf": self.sees_shelf,
            }
        )
        content[_STATES_KEY] = _write_states(self.changed)
        return content

    @classmethod
    def read(cls, content: RecordDict) -> "PackReply":
        """Read what :meth:`write` wrote."""
        said = _from_json(content)
        records: dict[int, RecordDict] = defaultdict(RecordDict)
        for name, record in content.items():
            key, _, rest = name.partition("/")  # names of records may have more of them
            if rest:
                records[int(key)][rest] = record
        outcomes = [
            Outcome(key, None, Error(*error), seconds)
            if error
            else Outcome(key, records[key], None, seconds)
            for key, error, seconds in said["answers"]
        ]
        states = content.config_records[_STATES_KEY]
        return cls(
            said["hosted"],
            outcomes,
            frozenset(said["stateful"]),
            said["sees-shelf"],
            {int(client): cast(Kept, kept) or None for client, kept in states.items()},
        )


def _write_states(states: Mapping[int, Kept | None]) -> ConfigRecord:
    # Records hold no None: no bytes are an empty state.
    return ConfigRecord({str(c): kept or b"" for c, kept in states.items()})


def _to_json(what: object) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(what)})


def _from_json(content: RecordDict) -> dict[str, Any]:
    said = json.loads(str(content.config_records[PACK_KEY]["json"]))
    return cast(dict[str, Any], said)
