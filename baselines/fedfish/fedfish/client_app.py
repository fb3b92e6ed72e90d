"""The client: one app for FedAvg and FedFish; the server says which it needs."""

from fedfish.dataset import client_data
from fedfish.model import accuracy, loss, make_model
from flower_ext import Task, client_app
from flower_ext.strategies import FedFishClient

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task, FedFishClient)
