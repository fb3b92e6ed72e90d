"""The client: plain training, or weighted by group if the server asks for it."""

from bounded_group_loss.dataset import client_data
from bounded_group_loss.model import accuracy, loss, make_model
from flower_ext import Task, client_app
from flower_ext.strategies import BoundedGroupLossClient

task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
app = client_app(task, BoundedGroupLossClient)
