"""What a virtual client is asked, and what came of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Error, Message, RecordDict

from flower_ext.simulation.records import Record


@dataclass(frozen=True)
class Job:
    """One message to one virtual client.

    Attributes
    ----------
    key : int
        Names the message among all of a run.
    client : int
        The virtual client, 0 to N-1.
    kind, group : str
        ``message_type`` and ``group_id`` of the message.
    shared : dict[str, int]
        Names of records and their places among those shared by several messages.
    own : dict[str, Record]
        Records that this message alone has.
    """

    key: int
    client: int
    kind: str
    group: str
    shared: dict[str, int]
    own: dict[str, Record]


@dataclass(frozen=True)
class Outcome:
    """The reply to a job: content or an error, and how long the client took."""

    key: int
    content: RecordDict | None
    error: Error | None = None
    seconds: float = 0.0


def split(
    messages: Sequence[tuple[int, int, Message]],
) -> tuple[list[Job], list[Record]]:
    """Tell records that several messages share from those of one.

    Parameters
    ----------
    messages : sequence of (int, int, Message)
        With their keys and clients.

    Returns
    -------
    list of Job
        In the order of the messages.
    list of Record
        The shared ones; strategies put one model into all messages of a round.
    """
    # By identity: comparing arrays would cost more than sending them twice.
    times = Counter(
        id(record) for *_, message in messages for record in message.content.values()
    )
    places: dict[int, int] = {}
    shared: list[Record] = []
    named: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
    jobs = []
    for key, client, message in messages:
        said = message.metadata
        own, where = {}, []
        for name, record in message.content.items():
            if times[id(record)] == 1:
                own[name] = record
                continue
            if id(record) not in places:
                places[id(record)] = len(shared)
                shared.append(record)
            where.append((name, places[id(record)]))
        # One object for many jobs, which are pickled together.
        those = named.setdefault(tuple(where), dict(where))
        jobs.append(Job(key, client, said.message_type, said.group_id, those, own))
    return jobs, shared
