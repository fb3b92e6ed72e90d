"""What a strategy's methods and ``evaluate_fn`` return to a run, checked."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord

from flower_ext.core.errors import refuse

_AS_SUPER = "return what super() returns"


def messages_of(name: str, found: object) -> list[Message]:
    """Return what ``configure_train`` or ``configure_evaluate`` has returned."""
    if not isinstance(found, Iterable):
        refuse(f"{name}'s result", found, "an iterable of Messages", _AS_SUPER)
    messages = list(found)
    for message in messages:
        if not isinstance(message, Message):
            refuse(f"{name}'s messages", message, "Messages", _AS_SUPER)
    return messages


def trained(found: object) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Return what ``aggregate_train`` has returned."""
    pair = found if isinstance(found, tuple | list) and len(found) == 2 else (found, 0)
    arrays, metrics = pair
    if pair is not found or not isinstance(arrays, ArrayRecord | None):
        refuse(
            "aggregate_train's result",
            type(arrays).__name__,
            "a pair of ArrayRecord and MetricRecord, each or None",
            "return arrays, metrics, as super() does",
        )
    return arrays, metrics_of("aggregate_train", metrics)


def metrics_of(name: str, found: object) -> MetricRecord | None:
    """Return what a function has measured, of a dict a record."""
    if found is None or isinstance(found, MetricRecord):
        return found
    try:
        return MetricRecord(dict(found))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        refuse(
            f"{name}'s result",
            found,
            "a MetricRecord of numbers and lists of numbers, or None",
            "a tensor or a NumPy value needs .item()",
        )
