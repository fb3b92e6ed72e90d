"""Some rounds on each transport; writes down what came out."""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

import flower_ext
from flower_ext import AdditiveStrategy
from flower_ext.server.asynchronous import Asynchronous
from flower_ext.simulation import PackedGrid
from flower_ext.wire import EDEN, NF4, Described, ErrorFeedback

app = ServerApp()
CODECS = {
    "download": Described(NF4()),
    "upload": ErrorFeedback(EDEN(2, unbiased=False)),
}


def collect(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Return the visits and processes of all clients."""
    metrics = [reply["metrics"] for reply in replies]
    return MetricRecord(
        {key: [record[key] for record in metrics] for key in ("visits", "pid")}
    )


def strategy(coded: bool) -> AdditiveStrategy:
    """Return the strategy, perhaps with codecs both ways."""
    return AdditiveStrategy(
        fraction_train=0.5,
        fraction_evaluate=0.0,
        train_metrics_aggr_fn=collect,
        **(CODECS if coded else {}),
    )


def asynchronous(grid: Grid, buffer: int) -> dict[str, object]:
    """Return how four updates went, in real time."""
    strategy = AdditiveStrategy(fraction_evaluate=0.0, train_metrics_aggr_fn=collect)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(np.zeros(4, np.float32))}),
        num_rounds=4,
        asynchronous=Asynchronous(buffer=buffer, concurrency=2 * buffer),
    )
    return {
        "w": result.arrays["w"].numpy().tolist(),
        "visits": [
            record["visits"] for record in result.train_metrics_clientapp.values()
        ],
    }


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy on a grid of each transport; fail in the end, if told to."""
    print("home", os.environ["FLWR_HOME"])
    print("server imports", flower_ext.__file__)
    results = {}
    checkpoint = str(context.run_config["checkpoint"])
    victim = Path(checkpoint) / "victim"
    if checkpoint and not victim.parent.exists():  # the first of two runs
        victim.parent.mkdir()
        victim.write_text(str(os.getpid()), "utf-8")
    for transport in str(context.run_config["transports"]).split():
        clients = PackedGrid(
            grid,
            num_clients=int(context.run_config["num-clients"]),
            client_app="packed_app.client_app:app",
            run_config=context.run_config,
            transport=transport,
        )
        begun = time.monotonic()
        result = strategy(bool(context.run_config["codecs"])).start(
            grid=clients,
            initial_arrays=ArrayRecord({"w": Array(np.zeros(4, np.float32))}),
            num_rounds=int(context.run_config["rounds"]),
            checkpoint=f"{checkpoint}/{transport}" if checkpoint else None,
        )
        results[transport] = {
            "w": result.arrays["w"].numpy().tolist(),
            "visits": [
                record["visits"] for record in result.train_metrics_clientapp.values()
            ],
            "pids": [
                record["pid"] for record in result.train_metrics_clientapp.values()
            ],
            "seconds": time.monotonic() - begun,
        }
        if context.run_config["asynchronous"]:
            results["asynchronous"] = asynchronous(clients, 10)
            results["asynchronous-nodes"] = asynchronous(grid, 1)
        clients.close()
    Path(str(context.run_config["results"])).write_text(json.dumps(results), "utf-8")
    if text := context.run_config["message"]:
        raise ValueError(text)
