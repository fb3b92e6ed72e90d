"""Every name of Flower that is not public, so that a release breaks one file."""

from flwr.common.config import flatten_dict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
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

__all__ = [
    "CLIENT_RAISED",
    "AggregationError",
    "InconsistentMessageReplies",
    "NodeInfo",
    "PrivacyBudgetExhausted",
    "Run",
    "ensure_task_identity",
    "flatten_dict",
    "log",
    "log_strategy_start_info",
]


def ensure_task_identity() -> None:
    """Let ``Message(...)`` be built outside a Flower run; in one, change nothing."""
    if TaskIdentity._run_id is None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
