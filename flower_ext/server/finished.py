"""What callbacks are told: of a run before its first round, and of finished rounds.

Under a mechanism they are told what may leave the server, and no more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message, MetricRecord

from flower_ext.core.protocol import Metrics
from flower_ext.wire.traffic import Traffic, measure, parts

PHASES = ("train", "evaluate", "central")


@dataclass(frozen=True)
class ClientReply:
    """What one client has said in one phase of a round.

    Attributes
    ----------
    phase : str
        ``"train"`` or ``"evaluate"``.
    client : int
        Its place among the nodes, the same in every run.
    metrics : Mapping
        The metrics of its reply, ``num-examples`` among them.
    up : Traffic
        Bytes and numbers of its reply.
    error : str
        Why it failed; empty if it did not.
    """

    phase: str
    client: int
    metrics: Metrics
    up: Traffic
    error: str = ""

    def row(self, number: int) -> dict[str, object]:
        """Return the reply as one flat table, with the number of its round."""
        row: dict[str, object] = {
            "round": number,
            "phase": self.phase,
            "client": self.client,
            "bytes/up": self.up.serialized,
        }
        if self.error:
            row["error"] = self.error
        return row | {f"{self.phase}/{key}": x for key, x in self.metrics.items()}


def client_replies(
    phase: str, replies: Iterable[Message], places: Mapping[int, int]
) -> list[ClientReply]:
    """Return what clients have replied, in client order, without their arrays.

    Parameters
    ----------
    phase : str
        ``"train"`` or ``"evaluate"``.
    replies : iterable of Message
        The replies. Those that are part of a partial sum still have their metrics.
    places : Mapping[int, int]
        The place of each node among the nodes.
    """
    found = []
    for reply in replies:
        node = reply.metadata.src_node_id
        if node not in places:
            continue
        metrics: Metrics = {}
        if reply.has_content():
            for record in reply.content.metric_records.values():
                metrics |= record
        error = (reply.error.reason or "failed") if reply.has_error() else ""
        up = measure([reply])
        found.append(ClientReply(phase, places[node], metrics, up, error))
    return sorted(found, key=lambda reply: reply.client)


@dataclass(frozen=True)
class Sent:
    """What one message took.

    Attributes
    ----------
    phase : str
        ``"train"`` or ``"evaluate"``.
    client : int
        The place among the nodes of the client that sent or received it.
    up : bool
        Whether the client sent it, to the server.
    bytes : Mapping[str, int]
        Of each array, and of the rest, see :func:`~flower_ext.wire.traffic.parts`.
    """

    phase: str
    client: int
    up: bool
    bytes: Mapping[str, int]


def sent_messages(
    phase: str, messages: Iterable[Message], places: Mapping[int, int], *, up: bool
) -> list[Sent]:
    """Return what messages took, in client order; one without a content took nothing.

    Parameters
    ----------
    phase : str
        ``"train"`` or ``"evaluate"``.
    messages : iterable of Message
        To clients, or from them.
    places : Mapping[int, int]
        The place of each node among the nodes.
    up : bool
        Whether they are from clients.
    """
    known: dict[int, Mapping[str, int]] = {}
    found = []
    for message in messages:
        about = message.metadata
        node = about.src_node_id if up else about.dst_node_id
        if node not in places or not message.has_content():
            continue
        content = message.content
        if id(content) not in known:  # one may be shared by many messages
            known[id(content)] = parts(content)
        found.append(Sent(phase, places[node], up, known[id(content)]))
    return sorted(found, key=lambda sent: sent.client)


@dataclass(frozen=True)
class FinishedRound:
    """The results of one round.

    Attributes
    ----------
    number : int
        Number of the round, from 1.
    arrays : ArrayRecord
        The model after it: the run's own, not to be changed.
    train, evaluate, central : MetricRecord or None
        Metrics of the clients' training, of their evaluation, of ``evaluate_fn``.
    seconds_train, seconds_evaluate : float or None
        From the first message sent to the last reply received.
    down, up : Traffic or None
        What was sent to and received from all clients in both phases. Seconds and
        traffic are None where cohorts are secret, of which they would tell the size.
    clients : tuple of ClientReply
        The replies of all clients, if a callback asks for them.
    messages : tuple of Sent
        What each message took, down and up, if a callback asks for it.
    """

    number: int
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    train: MetricRecord | None = None
    evaluate: MetricRecord | None = None
    central: MetricRecord | None = None
    seconds_train: float | None = 0.0
    seconds_evaluate: float | None = 0.0
    down: Traffic | None = Traffic()
    up: Traffic | None = Traffic()
    clients: tuple[ClientReply, ...] = ()
    messages: tuple[Sent, ...] = ()

    def row(self) -> dict[str, object]:
        """Return the round as one flat table, ``train/loss`` and the like."""
        row: dict[str, object] = {"round": self.number}
        for phase in PHASES:
            for key, value in (getattr(self, phase) or {}).items():
                row[f"{phase}/{key}"] = value
        for phase in ("train", "evaluate"):
            if (seconds := getattr(self, f"seconds_{phase}")) is not None:
                row[f"seconds/{phase}"] = round(seconds, 4)
        for way, traffic in (("down", self.down), ("up", self.up)):
            if traffic is None:
                continue
            row |= {
                f"bytes/{way}": traffic.serialized,
                f"encoded-bytes/{way}": traffic.encoded,
                f"parameters/{way}": traffic.parameters,
                f"messages/{way}": traffic.messages,
            }
        return row

    def numbers(self) -> dict[str, float]:
        """Return the columns of :meth:`row` that hold one number each."""
        return {
            key: value
            for key, value in self.row().items()
            if isinstance(value, int | float) and key != "round"
        }


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first round.

    Attributes
    ----------
    num_rounds : int
        Rounds of the whole run.
    done : int
        Rounds that are already done, in a run that is continued.
    strategy : str
        Name of the strategy's class.
    settings : Mapping
        The strategy's settings by name.
    evaluates : bool
        Whether there is an ``evaluate_fn``, the source of central metrics.
    private : bool
        Whether the run is under a mechanism.
    withheld : bool
        Whether the clients' own metrics are withheld, as a mechanism does.
    noised : tuple of str
        Metrics of their evaluations that are released nevertheless, with noise and
        perhaps not in every round.
    hidden : bool
        Whether cohorts are secret, so that seconds and bytes are withheld as well.
    restored : bool
        Whether the callback has just been given its saved state; otherwise it is new.
    """

    num_rounds: int
    done: int = 0
    strategy: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    evaluates: bool = True
    private: bool = False
    withheld: bool = False
    noised: tuple[str, ...] = ()
    hidden: bool = False
    restored: bool = False
