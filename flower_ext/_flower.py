"""Every name of Flower that is not public, so that a release breaks one file."""

import logging
import sys

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
    "recorddict_to_proto",
]


def ensure_task_identity(run_id: int = 1) -> None:
    """Let ``Message(...)`` be built outside a Flower run; in one, change nothing."""
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = run_id
        TaskIdentity.task_id = TaskIdentity.node_id = 1


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
