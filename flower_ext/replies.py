"""Reading clients' replies: what is usable, what is left out, and why."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING

from flwr.app import ArrayRecord, Message, MetricRecord, MetricRecordValues, RecordDict

from flower_ext._flower import log
from flower_ext.arrays import Arrays, from_record, layout

Aggregate = Callable[[list[RecordDict], str], MetricRecord]


class MalformedReply(ValueError):
    """A reply that a strategy cannot read; it is left out of the sum."""


def read_arrays(reply: RecordDict, key: str, like: Arrays) -> Arrays:
    """Return the arrays of a reply under ``key``, without copying them.

    Raises
    ------
    MalformedReply
        Unless names, shapes and kinds (float, integer, flag) are those of ``like``.
    """
    record = reply.get(key)
    if not isinstance(record, ArrayRecord):
        raise MalformedReply(
            f"no ArrayRecord {key!r} in the reply, only {sorted(reply.array_records)}"
        )
    if set(record) != set(like):
        raise MalformedReply(
            f"arrays of {key!r} are not those expected: missing "
            f"{sorted(set(like) - set(record))[:5]}, unknown "
            f"{sorted(set(record) - set(like))[:5]}"
        )
    try:
        arrays = from_record(record)
    except (ValueError, TypeError, EOFError) as error:
        raise MalformedReply(f"arrays of {key!r} cannot be read: {error}") from error
    for name, array in arrays.items():
        expected = like[name]
        if array.shape != expected.shape or array.dtype.kind != expected.dtype.kind:
            raise MalformedReply(
                f"array {name!r} of {key!r} is {layout({name: array})[name]}, "
                f"expected {layout({name: expected})[name]}"
            )
    return arrays


def read_scalar(reply: RecordDict, key: str, low: float = 0.0) -> float:
    """Return a metric of a reply, a finite number ``>= low``.

    Raises
    ------
    MalformedReply
        If it is missing, a list, not finite or too small.
    """
    found = _find(reply, key)
    if isinstance(found, list) or not low <= found < float("inf"):
        raise MalformedReply(
            f"metric {key!r}={found} must be a finite number >= {low:g}"
        )
    return float(found)


def read_vector(
    reply: RecordDict, key: str, size: int, low: float = 0.0
) -> list[float]:
    """Return a metric of ``size`` finite numbers, see :func:`read_scalar`.

    A vector of one may be sent as a number.
    """
    found = _find(reply, key)
    values = found if isinstance(found, list) else [found]
    if len(values) != size or not all(low <= v < float("inf") for v in values):
        raise MalformedReply(
            f"metric {key!r}={found} must be {size} finite number(s) >= {low:g}"
        )
    return [float(v) for v in values]


def _find(reply: RecordDict, key: str) -> MetricRecordValues:
    for record in reply.values():
        if isinstance(record, MetricRecord) and key in record:
            return record[key]
    raise MalformedReply(f"no metric {key!r} in the reply")


@dataclass
class Sorted:
    """Replies told apart: usable ones in client order, reasons of errors, the rest."""

    usable: list[Message]
    errors: list[str]
    dropped: Counter[str] = field(default_factory=Counter)


def sort_replies(
    replies: Iterable[Message], cohort: Mapping[int, int], *, quiet: bool = False
) -> Sorted:
    """Sort replies by the place of their client in the cohort.

    Parameters
    ----------
    replies : iterable of Message
        In whatever order they arrived.
    cohort : Mapping[int, int]
        Place of every node that was asked. Replies of others are left out, and so are
        all replies of a node that sent several, since none can be told to be right.
    quiet : bool (default: False)
        Log nothing of the errors: they tell who is in the cohort.
    """
    good, errors = [], []
    for reply in replies:
        if reply.has_error():
            errors.append(reply.error.reason or "")
            if not quiet:
                log(
                    INFO,
                    "\t> Received error in reply from node %d: %s",
                    reply.metadata.src_node_id,
                    reply.error.reason,
                )
        else:
            good.append(reply)
    times = Counter(reply.metadata.src_node_id for reply in good)
    result = Sorted([], errors)
    for reply in good:
        node = reply.metadata.src_node_id
        if node not in cohort:
            result.dropped["the client was not asked in this round"] += 1
        elif times[node] > 1:
            result.dropped["the client replied more than once"] += 1
        else:
            result.usable.append(reply)
    result.usable.sort(key=lambda reply: cohort[reply.metadata.src_node_id])
    return result


def log_dropped(dropped: Counter[str], server_round: int) -> None:
    """Warn once for every reason to leave replies out."""
    for reason, times in dropped.items():
        log(WARNING, "round %s: %s reply(s) dropped: %s", server_round, times, reason)


def aggregate_metrics(
    contents: list[RecordDict],
    weighted_by_key: str,
    aggregate: Aggregate,
    consumed: Iterable[str] = (),
) -> MetricRecord:
    """Aggregate the metrics of replies, those that all of them have.

    Flower's average needs the same metrics in every reply; one client that reports
    less must not end the run. Metrics in ``consumed`` are left out, and so are replies
    that weigh nothing: a client without examples knows no loss.
    """
    contents = [c for c in contents if read_scalar(c, weighted_by_key) > 0]
    if not contents:
        return MetricRecord()
    names = [
        {
            (key, name, len(value) if isinstance(value, list) else None)
            for key, record in _metrics(content).items()
            for name, value in record.items()
            if name not in consumed
        }
        for content in contents
    ]
    common = set.intersection(*names)
    if missing := set.union(*names) - common:
        log(
            WARNING,
            "metrics %s are not in every reply, or not as long: left out",
            sorted({f"{key}/{name}" for key, name, _ in missing}),
        )
    kept = {(key, name) for key, name, _ in common}
    chosen = [_only(content, kept, weighted_by_key) for content in contents]
    return MetricRecord(dict(aggregate(chosen, weighted_by_key)))


def _metrics(content: RecordDict) -> dict[str, MetricRecord]:
    """Return what ``content.metric_records`` does, several times faster."""
    return {k: x for k, x in content.items() if isinstance(x, MetricRecord)}


def _only(
    content: RecordDict, kept: set[tuple[str, str]], weighted_by_key: str
) -> RecordDict:
    """Copy a reply with the metrics that are kept; its arrays are the same objects.

    Flower looks for the weight in the first MetricRecord, and adds up metrics of the
    same name: the record with the weight goes first, and the first of a name is kept.
    """
    metrics = _metrics(content)
    if len(metrics) == 1 and len(kept) == sum(map(len, metrics.values())):
        return content  # all that it has is kept
    result = RecordDict({k: x for k, x in content.items() if k not in metrics})
    seen: set[str] = set()
    for key in sorted(metrics, key=lambda key: weighted_by_key not in metrics[key]):
        chosen = {
            name: value
            for name, value in metrics[key].items()
            if (key, name) in kept and name not in seen
        }
        seen.update(chosen)
        if chosen:
            result[key] = MetricRecord(chosen)
    return result
