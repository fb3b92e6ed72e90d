"""Clients with a model and a momentum of their own, which never travel."""

import os
import signal
import time

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext.core.arrays import from_record, to_record
from flower_ext.simulation import packed

app = ClientApp(mods=[packed])


@app.train()
def train(message, context):
    """Move the own model towards the received one, and that a little back.

    Even clients keep all numbers of their model, which are a file; odd ones only two.
    """
    client = context.node_config["partition-id"]
    config = message.content["config"]
    if [config["server-round"], client] == config.get("kill"):
        os.kill(config["server"], signal.SIGKILL)
        time.sleep(60)
    received = from_record(message.content["arrays"])["w"]
    kept = received if client % 2 == 0 else received[:2]
    state = context.state.array_records.get("own", ArrayRecord())
    own = from_record(state) or {"w": np.sin(kept + client), "v": np.zeros_like(kept)}
    own["v"] = np.float32(0.9) * own["v"] + (kept - own["w"]) / (client + 3)
    own["w"] = own["w"] + own["v"]
    context.state["own"] = to_record(own)
    sent = received.copy()
    sent[: len(own["w"])] += own["w"] / np.float32(7)
    loss = float(np.abs(own["v"]).mean())
    metrics = MetricRecord({"num-examples": 5 + client * client % 7, "loss": loss})
    content = RecordDict({"arrays": to_record({"w": sent}), "metrics": metrics})
    return Message(content, reply_to=message)
