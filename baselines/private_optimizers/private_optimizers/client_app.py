"""The client: a user who trains plainly, or a silo that protects its users itself."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flower_ext import Task, client_app
from flower_ext.client import ELS, ULS
from private_optimizers.dataset import client_data
from private_optimizers.model import accuracy, loss, make_model
from private_optimizers.silos import promise

METHOD = "method"
# What of the run config is the server's alone.
_SERVERS = ("methods", "results")


def forget(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Begin every method with silos that have spent nothing.

    Each is what a federation would have run in the place of the others.
    """
    if message.content.config_records["config"].get("server-round") == 1:
        context.state.clear()
    return call_next(message, context)


def look_away(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Keep from silos what is the server's alone.

    A silo's draws depend on all that it is told: with these, they would be others in
    every folder of results.
    """
    known = {k: x for k, x in context.run_config.items() if k not in _SERVERS}
    return call_next(message, replace(context, run_config=known))


task = Task(model=make_model, data=client_data, loss=loss, metrics=accuracy)
# Made once: a process keeps them from client to client.
APPS = {
    "plain": client_app(task),
    "els": client_app(
        task, trainer=ELS(partial(promise, "els")), mods=[forget, look_away]
    ),
    "uls": client_app(
        task, trainer=ULS(partial(promise, "uls")), mods=[forget, look_away]
    ),
}

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as the server says."""
    method = message.content.config_records["config"].get(METHOD, "plain")
    return APPS[str(method)](message, context)
