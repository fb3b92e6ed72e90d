"""Every name of Flower that is not public, so that a release breaks one file."""

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
