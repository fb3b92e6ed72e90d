"""What is shown of the comparison."""

from collections.abc import Iterable

PANELS = ["evaluate/worst-group-loss", "evaluate/accuracy"]


def columns(constraints: Iterable[str]) -> dict[str, str]:
    """Return the table's columns: accuracy, and the loss of every group."""
    losses = {f"evaluate/group-loss/{name}": name for name in constraints}
    return {
        "evaluate/accuracy": "accuracy",
        "evaluate/worst-group-loss": "worst loss",
        **losses,
    }
