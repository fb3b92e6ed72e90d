"""The client: one app for all methods; the server says which it needs."""

from drift.dataset import client_data
from drift.model import accuracy, loss, make_model
from flower_ext import Task, client_app
from flower_ext.strategies import (
    FedCurvClient,
    FedDynClient,
    FedNovaClient,
    FedProxClient,
    ScaffoldClient,
)

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(
    task, ScaffoldClient, FedDynClient, FedNovaClient, FedProxClient, FedCurvClient
)
