"""The client: MaxFL's half for all strategies, so that all are measured alike."""

from collections.abc import Mapping

from flwr.app import ArrayRecord
from torch import Tensor, nn

from flower_ext import Task, client_app
from flower_ext.client.half import Local, Proximal
from flower_ext.client.personalization import evaluate_fine_tuned
from flower_ext.client.task import num_examples
from flower_ext.core.protocol import Metrics
from flower_ext.strategies import MaxFLClient
from maxfl.dataset import client_data
from maxfl.model import accuracy, loss, make_model

LOSS = "received-loss"
PROXIMAL_MU = "proximal-mu"


class Client(MaxFLClient):
    """Also tells its loss, may stay near the received model, and fine-tune."""

    def __init__(self) -> None:
        super().__init__()
        self._term: Proximal | None = None
        self._loss = 0.0

    def begin(self, local: Local) -> None:
        """Measure the received model's loss, and remember the model."""
        super().begin(local)
        self._loss = local.mean_loss(local.train)
        self._term = Proximal(local.start, local.number(PROXIMAL_MU, 0.0))

    def regularizer(self, model: nn.Module) -> Tensor | None:
        """Return FedProx' proximal term."""
        return self._term and self._term(model)

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Add the loss of the received model."""
        arrays, metrics = super().records(local)
        return arrays, {**metrics, LOSS: self._loss}

    def evaluate(self, local: Local) -> Metrics:
        """Add, near the end of the run, the accuracy after fine-tuning."""
        metrics = super().evaluate(local)
        config = local.context.run_config
        steps = int(config["finetune-steps"])
        is_near_end = local.server_round > int(config["num-server-rounds"]) - 3
        if steps and is_near_end and num_examples(local.test):
            found = evaluate_fine_tuned(local, num_steps=steps)
            metrics["finetuned-accuracy"] = found["accuracy"]
        return metrics


task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task, Client)
