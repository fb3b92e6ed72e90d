"""The client: plain local training; the server says how the change travels."""

from compression.dataset import client_data
from compression.model import accuracy, loss, make_model
from flower_ext import Task, client_app

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task)
