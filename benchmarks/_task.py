"""The clients of the simulation benchmark again, as a task of this package."""

from _images import images
from _models import make_model
from flwr.app import Context
from torch import Tensor, nn

from flower_ext import Stacked, Task, client_app


def _data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x, y = images(int(context.node_config["partition-id"]))
    columns = {"x": x, "y": y}
    return columns, columns


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["x"])
    return nn.functional.cross_entropy(logits, batch["y"], reduction="none")


task = Task(lambda config: make_model(str(config["model"])), _data, _loss)
app = client_app(task)
stacked = client_app(task, trainer=Stacked())
