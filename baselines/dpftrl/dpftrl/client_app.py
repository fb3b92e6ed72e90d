"""The client: plain training; all of the privacy is the server's."""

from dpftrl.dataset import client_data
from dpftrl.model import accuracy, loss, make_model
from flower_ext import Task, client_app

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task)
