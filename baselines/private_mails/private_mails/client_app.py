"""The silo: it trains by DP-SGD what the method of the message trains."""

import math
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flower_ext import DPSGD, client_app
from flower_ext.client.trainer import Plain, Trainer
from flower_ext.privacy import BoundedGaussian, InstanceReport, SiloPrivacy
from flower_ext.strategies import PublicRepresentationsClient
from private_mails.model import task_of

METHOD = "method"

app = ClientApp()


def promise(context: Context) -> SiloPrivacy:
    """Return what the silo promises for each of its mails.

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


def private_trainer(context: Context) -> DPSGD:
    """Return DP-SGD, with bounded noise and accounts of single mails if asked for."""
    config = context.run_config
    bound, watched = float(config["bound"]), int(config["watched"])
    noise = BoundedGaussian(-bound, bound) if bound else None
    report = None
    if watched:
        folder = Path(str(config["results"])).expanduser().absolute() / "instances"
        folder.mkdir(parents=True, exist_ok=True)
        report = InstanceReport(folder, tuple(range(watched)))
    return DPSGD(promise, mode="ghost", noise=noise, instances=report)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train privately, or plainly where epsilon is infinite."""
    config = message.content.config_records["config"]
    if config["server-round"] == 1:
        # Each method begins with a silo that has spent nothing: it is what a
        # federation would have run in the place of the others.
        context.state.clear()
    name = str(config[METHOD])
    private = not math.isinf(float(context.run_config["epsilon"]))
    trainer: Trainer = private_trainer(context) if private else Plain()
    task = task_of(name, context.run_config)
    made = client_app(task, PublicRepresentationsClient, trainer=trainer)
    return made(message, context)
