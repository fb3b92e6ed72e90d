"""The client: one app for all methods; the server says which it needs."""

from functools import partial

from flower_ext import Task, client_app
from flower_ext.strategies import (
    DittoClient,
    EnsembleClient,
    FedBABUClient,
    FedBNClient,
    FedPerClient,
    FedRepClient,
    FineTunedClient,
    HypClusterClient,
    KNNPerClient,
    LocalOnlyClient,
    MRMTLClient,
)
from personalization.dataset import client_data
from personalization.model import accuracy, loss, make_model, targets

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(
    task,
    DittoClient,
    EnsembleClient,
    FedBABUClient,
    FedBNClient,
    FedPerClient,
    FedRepClient,
    FineTunedClient,
    HypClusterClient,
    partial(KNNPerClient, label=targets),
    LocalOnlyClient,
    MRMTLClient,
)
