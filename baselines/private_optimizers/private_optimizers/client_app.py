"""The client: a user who trains plainly, or a silo that protects its users itself."""

from collections.abc import Callable
from functools import partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flower_ext import Task, client_app
from flower_ext.client import ELS, ULS
from private_optimizers.dataset import client_data
from private_optimizers.model import accuracy, loss, make_model
from private_optimizers.silos import promise

METHOD = "method"


def forget(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Begin every method with silos that have spent nothing.

    Each is what a federation would have run in the place of the others.
    """
    if message.content.config_records["config"].get("server-round") == 1:
        context.state.clear()
    return call_next(message, context)


task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
# Made once: a process keeps them from client to client.
APPS = {
    "plain": client_app(task),
    "els": client_app(task, trainer=ELS(partial(promise, "els")), mods=[forget]),
    "uls": client_app(task, trainer=ULS(partial(promise, "uls")), mods=[forget]),
}

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as the server says."""
    method = message.content.config_records["config"].get(METHOD, "plain")
    return APPS[str(method)](message, context)
