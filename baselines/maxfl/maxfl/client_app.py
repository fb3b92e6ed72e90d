"""The client: plain training, or with MaxFL's half if the server asks for it."""

from flower_ext import Task, client_app
from flower_ext.strategies import MaxFLClient
from maxfl.dataset import client_data
from maxfl.model import accuracy, loss, make_model

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task, MaxFLClient)
