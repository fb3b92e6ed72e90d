"""A client that counts its visits and moves the model by its number."""

import os

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext.simulation import packed

app = ClientApp(mods=[packed])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move the model by a step times the client's number."""
    client = int(context.node_config["partition-id"])
    step = float(context.run_config["step"])
    visits = context.state.metric_records.get("visits", MetricRecord({"n": 0}))
    visits["n"] = int(visits["n"]) + 1
    context.state["visits"] = visits
    moved = {
        name: Array(np.asarray(array.numpy() + np.float32(step * client)))
        for name, array in message.content.array_records["arrays"].items()
    }
    metrics = MetricRecord(
        {"num-examples": client + 1, "visits": visits["n"], "pid": os.getpid()}
    )
    content = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
    return Message(content, reply_to=message)
