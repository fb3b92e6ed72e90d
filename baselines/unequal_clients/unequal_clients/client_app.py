"""The client: one app for all methods; the server says which width it trains."""

from flower_ext import Task, client_app
from flower_ext.strategies import FedConvClient, HeteroFLClient
from unequal_clients.dataset import client_data
from unequal_clients.model import accuracy, loss, make_model

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task, HeteroFLClient, FedConvClient)
