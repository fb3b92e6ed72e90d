"""Reading clients' replies: what is usable, what is left out, and why."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from logging import INFO, WARNING

import numpy as np
from flwr.app import (
    ArrayRecord,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.common import NDArray

from flower_ext._flower import log
from flower_ext.core.arrays import Arrays, from_record, layout

Aggregate = Callable[[list[RecordDict], str], MetricRecord]

NOT_FINITE = "the contribution is not finite, or beyond what the model can hold"
LONG_INTEGERS = "a number in it has more than 64 bits"

# Larger numbers are of no use to a model in float32, and make sums overflow.
_LARGEST = float(np.finfo(np.float32).max)


class MalformedReply(ValueError):
    """A reply that a strategy cannot read; it is left out of the round."""

    #: The place of the client whose reply it is, where that is known.
    client: int | None = None


def unreadable(error: Exception) -> str:
    """Return the reason for leaving out a reply whose reading raised an error."""
    return f"reading it raised {type(error).__name__}: {error}"


def array_key(reply: RecordDict, key: str, others: Iterable[str] = ()) -> str:
    """Return where a reply's model is: under ``key``, or in its only ArrayRecord.

    Flower's FedAvg takes the only one whatever its key is. Records whose keys are in
    ``others`` are not models.
    """
    found = [
        name
        for name, record in reply.items()
        if isinstance(record, ArrayRecord) and name not in others
    ]
    return found[0] if key not in found and len(found) == 1 else key


def read_arrays(reply: RecordDict, key: str, like: Arrays) -> Arrays:
    """Return the arrays of a reply under ``key``, without copying them.

    Raises
    ------
    MalformedReply
        Unless names, shapes and kinds (float, integer, flag) are those of ``like``, and
        no float is beyond the range of its dtype there.
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
    # A client may send a wider float than the model has, such as a float16 model as
    # float32; what does not fit would become infinite in the model.
    for name, array in arrays.items():
        expected = like[name]
        if array.shape != expected.shape or array.dtype.kind != expected.dtype.kind:
            raise MalformedReply(
                f"array {name!r} of {key!r} is {layout({name: array})[name]}, "
                f"expected {layout({name: expected})[name]}"
            )
        if not _fits(array, expected.dtype):
            raise MalformedReply(
                f"array {name!r} of {key!r} has numbers beyond {expected.dtype}"
            )
    return arrays


def _fits(array: NDArray, dtype: np.dtype[np.generic]) -> bool:
    """Whether wider floats stay as finite as they are in a narrower dtype."""
    if array.dtype.kind != "f" or array.dtype.itemsize <= dtype.itemsize:
        return True
    with np.errstate(over="ignore"):
        return bool(np.all(np.isfinite(array.astype(dtype)) | ~np.isfinite(array)))


def read_scalar(reply: RecordDict, key: str, low: float = 0.0) -> float:
    """Return a metric of a reply, a finite number ``>= low``.

    Raises
    ------
    MalformedReply
        If it is missing, a list, not finite, too small, or beyond float32.
    """
    found = _find(reply, key)
    if isinstance(found, list) or not low <= found <= _LARGEST:
        raise MalformedReply(
            f"metric {key!r}={found} must be a finite number >= {low:g}, of float32"
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
    if len(values) != size or not all(low <= v <= _LARGEST for v in values):
        raise MalformedReply(
            f"metric {key!r}={found} must be {size} finite number(s) >= {low:g}, of "
            "float32"
        )
    return [float(v) for v in values]


def has_metric(reply: RecordDict, key: str) -> bool:
    """Whether a reply has a metric of that name."""
    return any(key in x for x in reply.values() if isinstance(x, MetricRecord))


def _find(reply: RecordDict, key: str) -> MetricRecordValues:
    for record in reply.values():
        if isinstance(record, MetricRecord) and key in record:
            return record[key]
    names = sorted({name for r in reply.metric_records.values() for name in r})
    nearest = get_close_matches(key, names, 1)
    raise MalformedReply(
        f"no metric {key!r} in the reply, "
        + (f"though there is {nearest[0]!r}" if nearest else f"only {names[:5]}")
    )


@dataclass
class Sorted:
    """Usable replies in client order, reasons of errors, reasons of dropped replies."""

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
        In the order of their arrival.
    cohort : Mapping[int, int]
        The place of every node that was asked. Replies of other nodes are left out, and
        so are all replies of a node that sent several, since nothing says which of them
        is right.
    quiet : bool (default: False)
        Whether errors are not logged, since they tell who is in the cohort.
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
        elif has_long_integers(reply.content):
            result.dropped[LONG_INTEGERS] += 1
        else:
            result.usable.append(reply)
    result.usable.sort(key=lambda reply: cohort[reply.metadata.src_node_id])
    return result


def has_long_integers(content: RecordDict) -> bool:
    """Whether an integer is too long to travel, as it can only be in a simulation."""
    return any(
        isinstance(number, int) and number.bit_length() > 63
        for record in content.values()
        if not isinstance(record, ArrayRecord)
        for value in record.values()
        for number in (value if isinstance(value, list) else (value,))
    )


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
    """Aggregate those metrics that all replies have.

    Flower's average raises unless every reply has the same metrics under the same key.
    Here one client that reports fewer, or under another key, does not end the run, and
    neither does an error in a function of the user's own. Metrics in ``consumed`` are
    left out, and so are replies of weight 0: a client without examples has no loss.
    """
    contents = [c for c in contents if _weighs(c, weighted_by_key)]
    if not contents:
        return MetricRecord()
    every = [_metrics(content, weighted_by_key) for content in contents]
    names = [
        {(name, _length(value)) for name, (_, value) in metrics.items()}
        for metrics in every
    ]
    common = {x for x in set.intersection(*names) if x[0] not in consumed}
    missing = {name for name, _ in set.union(*names) - common if name not in consumed}
    if missing:
        log(
            WARNING,
            "metrics %s are not in every reply, or not as long: left out",
            sorted(missing),
        )
    # The record in which most replies have a metric; the weight's first, since Flower
    # looks for it in the first record.
    homes = {
        name: Counter(metrics[name][0] for metrics in every).most_common(1)[0][0]
        for name in sorted({x for x, _ in common}, key=lambda x: x != weighted_by_key)
    }
    chosen = [
        _only(content, metrics, homes)
        for content, metrics in zip(contents, every, strict=True)
    ]
    try:
        return MetricRecord(dict(aggregate(chosen, weighted_by_key)))
    except Exception as error:  # no reply ends a run
        log(WARNING, "the metrics are left out: %s", unreadable(error), exc_info=True)
        return MetricRecord()


def _weighs(content: RecordDict, key: str) -> bool:
    try:
        return read_scalar(content, key) > 0
    except MalformedReply:  # it is in the sum by another weight
        return False


def _length(value: MetricRecordValues) -> int | None:
    return len(value) if isinstance(value, list) else None


def _metrics(
    content: RecordDict, first: str
) -> dict[str, tuple[str, MetricRecordValues]]:
    """Return a reply's metrics by name: the key of their record, and their value.

    If a name occurs twice, the value in the record of the metric ``first`` counts.
    """
    records = [(k, x) for k, x in content.items() if isinstance(x, MetricRecord)]
    records.sort(key=lambda item: first not in item[1])
    found: dict[str, tuple[str, MetricRecordValues]] = {}
    for key, record in records:
        for name, value in record.items():
            found.setdefault(name, (key, value))
    return found


def _only(
    content: RecordDict,
    metrics: Mapping[str, tuple[str, MetricRecordValues]],
    homes: Mapping[str, str],
) -> RecordDict:
    """Copy a reply with the metrics that are kept; its arrays are the same objects."""
    records = [x for x in content.values() if isinstance(x, MetricRecord)]
    if len(records) == 1 and {name: key for name, (key, _) in metrics.items()} == homes:
        return content  # all that it has is kept, where it is
    result = RecordDict(
        {k: x for k, x in content.items() if not isinstance(x, MetricRecord)}
    )
    moved: dict[str, dict[str, MetricRecordValues]] = {}
    for name, key in homes.items():
        moved.setdefault(key, {})[name] = metrics[name][1]
    for key, values in moved.items():
        result[key] = MetricRecord(values)
    return result
