"""Clients that keep a megabyte each, and say what memory their worker takes."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def resident():
    """Return the MiB of memory that are this process's own."""
    status = Path("/proc/self/status").read_text("utf-8")
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


@app.train()
def train(message, context):
    """Count in every number of the state."""
    state = context.state.array_records.get("model")
    count = np.zeros(250_000, np.float32) if state is None else state["w"].numpy()
    context.state["model"] = ArrayRecord({"w": Array(count + 1)})
    metrics = MetricRecord({"count": float(count.max()), "mib": resident()})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
