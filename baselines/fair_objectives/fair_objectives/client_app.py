"""The client: one app for all methods; the server says which it needs."""

from flwr.app import ArrayRecord

from fair_objectives.dataset import client_data
from fair_objectives.model import loss, make_model, mse
from flower_ext import ClientHalf, Task, client_app
from flower_ext.client.half import Local
from flower_ext.core.protocol import Metrics
from flower_ext.strategies import (
    AgnosticFLClient,
    BoundedGroupLossClient,
    MaxFLClient,
    MosTClient,
    TERMClient,
)

LOSS = "received-loss"


class MeasuringClient(ClientHalf):
    """Plain training that tells the loss of the received model: for q-FedAvg."""

    name = "measuring"
    asked_by = "measure-received"

    def begin(self, local: Local) -> None:
        """Measure the received model."""
        self._loss = local.mean_loss(local.train)

    def records(self, local: Local) -> tuple[dict[str, ArrayRecord], Metrics]:
        """Return its loss."""
        return {}, {LOSS: self._loss}


task = Task(model=make_model, data=client_data, loss=loss, metrics=mse)
app = client_app(
    task,
    AgnosticFLClient,
    BoundedGroupLossClient,
    MaxFLClient,
    MeasuringClient,
    MosTClient,
    TERMClient,
)
