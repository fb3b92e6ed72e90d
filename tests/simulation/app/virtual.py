"""A ClientApp whose virtual clients do what the message tells them.

In a module of its own, which workers import.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext.simulation import packed

app = ClientApp(mods=[packed])
loaded = [time.time()]  # when this process loaded the module


def _clients(config, key):
    value = config.get(key, [])
    return value if isinstance(value, list) else [value]


def _eat(mib, killed):
    """Take memory up to a limit: the process's own, or the kernel's, which kills."""
    if not killed:
        used = int(Path("/proc/self/statm").read_text().split()[0])
        limit = used * resource.getpagesize() + mib * 2**20
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        eaten = []
        while True:
            if killed and len(eaten) == mib:
                os.kill(os.getpid(), signal.SIGKILL)  # as Linux does
            eaten.append(np.ones(2**17))
    finally:
        if not killed:
            resource.setrlimit(resource.RLIMIT_AS, before)


def _misbehave(client, config):
    if client in _clients(config, "raise"):
        raise ValueError(f"client {client} was told to fail")
    if client in _clients(config, "exit"):
        sys.exit(f"client {client} was told to leave")
    if client in _clients(config, "sleep"):
        time.sleep(float(config.get("seconds", 60)))
    if client in _clients(config, "stuck"):
        # What no Python code can interrupt: a signal that is blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)
    if client in _clients(config, "kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if client in _clients(config, "eat"):
        _eat(int(config["mib"]), killed=bool(config.get("killed", False)))
    if "kill-once" in config:
        mark = Path(str(config["kill-once"]))
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def _machine():
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return "none"
    return ray.get_runtime_context().get_node_id()


@app.train()
def train(message, context):
    """Add the client's number to the model; count its visits in its state."""
    client = context.node_config["partition-id"]
    content = message.content
    config = content.config_records.get("config", ConfigRecord())
    _misbehave(client, config)
    visits = context.state.metric_records.get("visits", MetricRecord({"n": 0}))
    visits["n"] += 1
    if client in _clients(config, "raise-late"):
        raise ValueError("after the state was changed")
    if config.get("stateful", True):
        context.state["visits"] = visits
    arrays = content.array_records.get("arrays", ArrayRecord())
    return Message(
        RecordDict(
            {
                "arrays": ArrayRecord(
                    {
                        name: Array(np.asarray(array.numpy() + np.float32(client)))
                        for name, array in arrays.items()
                    }
                ),
                "metrics": MetricRecord(
                    {
                        "num-examples": client + 1,
                        "visits": visits["n"],
                        "pid": os.getpid(),
                        "node": context.node_id,
                        "partitions": context.node_config["num-partitions"],
                        "run-config": context.run_config.get("x", 0),
                        "loaded": loaded[0],
                    }
                ),
                "where": ConfigRecord(
                    {
                        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES") or "none",
                        "machine": _machine(),
                    }
                ),
            }
        ),
        reply_to=message,
    )


@app.evaluate()
def evaluate(message, context):
    """Report the mean of the model."""
    arrays = message.content["arrays"]
    mean = float(np.mean([array.numpy().mean() for array in arrays.values()]))
    metrics = MetricRecord({"num-examples": 1, "mean": mean})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.query("number")
def query(message, context):
    """Report the client's number."""
    number = MetricRecord({"client": context.node_config["partition-id"]})
    return Message(RecordDict({"m": number}), reply_to=message)
