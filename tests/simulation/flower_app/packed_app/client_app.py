"""A client that counts its visits and moves the model by a momentum of its own."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

import flower_ext
from flower_ext.simulation import packed


def coded(
    message: Message,
    context: Context,
    call_next: Callable[[Message, Context], Message],
) -> Message:
    """Decode and encode where the server does; without, nobody waits for torch."""
    if not context.run_config["codecs"]:
        return call_next(message, context)
    from flower_ext.client.encoding import encoded

    return encoded()(message, context, call_next)


app = ClientApp(mods=[packed, coded])


def _end(context: Context, config: ConfigRecord) -> None:
    """In round 2, stay; or kill the server, if its process is in a file."""
    if config["server-round"] == 2 and context.run_config["stay"]:
        time.sleep(600)
    victim = Path(str(context.run_config["checkpoint"])) / "victim"
    if config["server-round"] == 2 and victim.is_file():
        os.kill(int(victim.read_text()), signal.SIGKILL)
        victim.rename(victim.with_name("killed"))
        time.sleep(60)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move the model by the momentum, which odd clients keep in a large state."""
    client = int(context.node_config["partition-id"])
    print("client imports", flower_ext.__file__)
    _end(context, message.content.config_records["config"])
    step = float(context.run_config["step"])
    visits = context.state.metric_records.get("visits", MetricRecord({"n": 0}))
    visits["n"] = int(visits["n"]) + 1
    context.state["visits"] = visits
    momentum = np.zeros(20_000 if client % 2 else 1, np.float32)
    if "momentum" in context.state:
        momentum = context.state.array_records["momentum"]["v"].numpy()
    momentum = momentum / 2 + np.float32(step * client)
    context.state["momentum"] = ArrayRecord({"v": Array(momentum)})
    moved = {
        name: Array(np.asarray(array.numpy() + momentum[0]))
        for name, array in message.content.array_records["arrays"].items()
    }
    metrics = MetricRecord(
        {"num-examples": client + 1, "visits": visits["n"], "pid": os.getpid()}
    )
    content = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
    return Message(content, reply_to=message)
