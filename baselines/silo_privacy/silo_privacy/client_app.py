"""The client: a school that trains by DP-SGD, whichever strategy asks."""

import math
from collections.abc import Callable

from flwr.app import Context, Message

from flower_ext import DPSGD, ClientHalf, Task, client_app
from flower_ext.client.half import Local
from flower_ext.client.trainer import Plain, Session
from flower_ext.privacy import SiloPrivacy
from flower_ext.strategies import LocalOnlyClient, MRMTLClient
from silo_privacy.dataset import client_data
from silo_privacy.model import loss, make_model, mse


def promise(context: Context) -> SiloPrivacy:
    """Return what the school promises to each of its pupils.

    In a simulation all promise the same, so that it is in the run config. A deployed
    silo has its own in ``context.node_config``, and no seed.
    """
    config = context.run_config
    return SiloPrivacy(
        epsilon=float(config["epsilon"]),
        delta=float(config["delta"]),
        num_rounds=int(config["num-server-rounds"]),
        clipping_norm=float(config["clipping-norm"]),
        seed=int(config["seed"]),
    )


class SchoolTrainer(Plain):
    """DP-SGD; plain steps, the baseline, where epsilon is infinite."""

    # Test errors are not private: they are what this study measures.
    private = DPSGD(promise, release_evaluation=True)

    def session(self, local: Local, half: ClientHalf) -> Session:
        """Train by one or the other."""
        if math.isinf(float(local.context.run_config["epsilon"])):
            return super().session(local, half)
        return self.private.session(local, half)


def forget(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Begin every strategy with schools that have kept and spent nothing.

    Each is what a federation would have run in the place of the others. A school that
    did train for all of them would add up what they spend, and stop.
    """
    first = message.content.config_records["config"].get("server-round") == 1
    if first and message.metadata.message_type == "train":
        context.state.clear()
    return call_next(message, context)


task = Task(model=make_model, data=client_data, loss=loss, metrics=mse)
app = client_app(
    task, LocalOnlyClient, MRMTLClient, trainer=SchoolTrainer(), mods=[forget]
)
