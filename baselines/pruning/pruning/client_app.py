"""The client: plain local training; it knows nothing of masks."""

from flower_ext import Task, client_app
from pruning.dataset import client_data
from pruning.model import accuracy, loss, make_model

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task)
