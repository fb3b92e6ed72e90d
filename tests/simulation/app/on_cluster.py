"""A script: clients on a Ray cluster of two machines, one of which leaves."""

import json
import sys
import threading
import time

import numpy as np
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from ray.cluster_utils import Cluster

from flower_ext.simulation import PackedGrid

ARRAYS = ArrayRecord({"w": Array(np.zeros(50_000, np.float32))})


def ask(grid, clients, **config):
    """Ask clients; say where each ran, how often, or its error."""
    content = RecordDict({"arrays": ARRAYS, "config": ConfigRecord(config)})
    messages = [Message(content, client, "train") for client in clients]
    return [
        {"error": reply.error.reason}
        if reply.has_error()
        else {
            "machine": reply.content["where"]["machine"],
            "visits": reply.content["metrics"]["visits"],
        }
        for reply in grid.send_and_receive(messages, timeout=60)
    ]


def main():
    """Two rounds on both machines, one in which one leaves, two on what is left."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False},
    )
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    grid = PackedGrid(num_clients=8, client_app="virtual:app")
    rounds = [ask(grid, range(8)), ask(grid, range(8))]
    leave = threading.Timer(1.0, cluster.remove_node, [second, False])
    leave.start()
    everyone = list(range(8))
    rounds.append(ask(grid, range(8), sleep=everyone, seconds=0.5))
    leave.join()
    while sum(node["Alive"] for node in ray.nodes()) > 1:
        time.sleep(0.05)
    rounds += [ask(grid, range(8)), ask(grid, range(8))]
    print(json.dumps(rounds))
    grid.close()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
