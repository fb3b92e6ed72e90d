"""Clients that say which GPUs they see, and count their visits."""

import os
import time

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext.simulation import packed, resources


def need(partition_id, run_config):
    """Return a whole GPU for client 0, a quarter for others, none from 8 on."""
    if partition_id >= 8:
        return {"num_gpus": run_config.get("many", 0)}
    return {"num_gpus": 1 if partition_id == 0 else 0.25}


app = ClientApp(mods=[packed, resources(need)])


@app.train()
def train(message, context):
    """Report what is seen."""
    visits = context.state.metric_records.get("visits", MetricRecord({"n": 0}))
    visits["n"] += 1
    context.state["visits"] = visits
    time.sleep(0.1)
    if message.content.config_records.get("config", {}).get("fail"):
        raise ValueError("told to fail")
    seen = ConfigRecord({"gpus": os.environ.get("CUDA_VISIBLE_DEVICES") or "none"})
    metrics = MetricRecord({"visits": visits["n"], "pid": os.getpid()})
    return Message(RecordDict({"where": seen, "metrics": metrics}), reply_to=message)
