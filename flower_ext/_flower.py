"""Every name of Flower that is not public, so that a release breaks one file."""

import logging
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.app.metadata import Metadata
from flwr.common import NDArray
from flwr.common.config import flatten_dict
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp.exception import (
    AggregationError,
    InconsistentMessageReplies,
    PrivacyBudgetExhausted,
)
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info
from flwr.supercore import log
from flwr.supercore.date import now
from flwr.supercore.logger import FLOWER_LOGGER
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
CLIENT_CRASHED = ErrorCode.CLIENT_APP_CRASHED
NO_REPLY = ErrorCode.MESSAGE_UNAVAILABLE

__all__ = [
    "CLIENT_CRASHED",
    "CLIENT_RAISED",
    "NO_REPLY",
    "AggregationError",
    "InconsistentMessageReplies",
    "NodeInfo",
    "PrivacyBudgetExhausted",
    "Run",
    "ensure_task_identity",
    "flatten_dict",
    "in_simulation",
    "log",
    "log_strategy_start_info",
    "make_arrays_by",
    "quick_message",
    "quick_reply",
    "recorddict_to_proto",
    "unchecked",
]

R = TypeVar("R", bound=ArrayRecord | MetricRecord | ConfigRecord | RecordDict)


def ensure_task_identity(run_id: int = 1) -> None:
    """Let ``Message(...)`` be built outside a Flower run; in one, change nothing."""
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = run_id
        TaskIdentity.task_id = TaskIdentity.node_id = 1


# Flower's objects are checked as they are made, which takes longer than a tiny client's
# training. These functions make the same ones of what was checked before.


def unchecked(like: R, values: dict[str, Any]) -> R:
    """Return a record of the kind of another, with other values."""
    record = cast(R, like.copy())
    vars(record)["_data"] = values
    return record


def quick_message(
    content: RecordDict, node: int, kind: str, group: str = "", message_id: str = ""
) -> Message:
    """Return ``Message(content, node, kind, group_id=group)``."""
    run, source, task = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    like = _message_like(kind, group, run, source, task)
    return _made(
        like,
        content,
        None,
        _dst_node_id=node,
        _message_id=message_id,
        _created_at=now().timestamp(),
    )


@lru_cache(maxsize=64)
def _message_like(kind: str, group: str, *identity: int) -> Message:
    return Message(RecordDict(), 0, kind, group_id=group)


def quick_reply(
    content: RecordDict | None, error: Error | None, to: Message
) -> Message:
    """Return ``Message(content or error, reply_to=to)``."""
    asked, time = to.metadata, now().timestamp()
    return _made(
        to,
        content,
        error,
        _message_id="",
        _src_node_id=asked.dst_node_id,
        _dst_node_id=asked.src_node_id,
        _reply_to_message_id=asked.message_id,
        _created_at=time,
        _ttl=asked.created_at + asked.ttl - time,
        _src_task_id=asked.dst_task_id,
        _dst_task_id=asked.src_task_id,
        _delivered_at="",
    )


def _made(
    like: Message, content: RecordDict | None, error: Error | None, **changed: object
) -> Message:
    metadata = Metadata.__new__(Metadata)
    vars(metadata).update(vars(like.metadata), **changed)
    message = Message.__new__(Message)
    vars(message).update(_metadata=metadata, _content=content, _error=error)
    return message


def make_arrays_by(make: Callable[[NDArray], Array]) -> None:
    """Let Flower's arrays be made of NumPy's by a function, in all of this process."""
    Array.from_numpy_ndarray = staticmethod(make)  # type: ignore[method-assign,assignment]


def in_simulation(grid: Grid | None) -> bool:
    """Whether a grid is that of Flower's simulation engine, with its Ray."""
    module = sys.modules.get("flwr.superlink.grid")  # imported by the engine alone
    return module is not None and isinstance(grid, module.InMemoryGrid)


def _say_once(record: logging.LogRecord) -> bool:
    """Keep a line of Flower's from the root logger's consoles; always True.

    Flower's logger has a console of its own. Opacus and absl give the root logger one
    when they are imported, and each line would be there twice. Files and other places
    that the root logger has still get the line.
    """
    for handler in logging.root.handlers:
        if _is_console(handler) and _not_flowers not in handler.filters:
            handler.addFilter(_not_flowers)
    return True


def _not_flowers(record: logging.LogRecord) -> bool:
    shown = any(map(_is_console, FLOWER_LOGGER.handlers))
    return not (shown and record.name == FLOWER_LOGGER.name)


def _is_console(handler: logging.Handler) -> bool:
    inner = getattr(handler, "python_handler", handler)  # absl's has another inside
    return getattr(inner, "stream", None) in (sys.stdout, sys.stderr)


FLOWER_LOGGER.addFilter(_say_once)
