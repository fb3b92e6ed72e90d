"""The client: one app for FedAvg and FedFish; the server says which it needs."""

from collections.abc import Mapping

from flwr.app import ArrayRecord

from fedfish.dataset import client_data
from fedfish.model import accuracy, loss, make_model
from flower_ext import Task, client_app
from flower_ext.client.half import Local
from flower_ext.core.protocol import Metrics
from flower_ext.strategies import FedFishClient


class BarrierClient(FedFishClient):
    """Measures the Client-Server Barrier, and sends no Fisher."""

    name = "barrier"

    def begin(self, local: Local) -> None:
        """Collect nothing."""

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Keep the loss for the barrier."""
        self.keep_loss(local)
        return {}, {}


task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task, FedFishClient, BarrierClient)
