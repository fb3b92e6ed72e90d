"""A script: five rounds with a checkpoint; the server is killed after one of them.

``python crashing_server.py FOLDER KILL_AFTER_ROUND``; round 0 is never.
"""

import json
import os
import signal
import sys

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord

from flower_ext import AdditiveStrategy
from flower_ext.simulation import PackedGrid


def main(folder, kill_after):
    """Run or resume, and print the final model."""

    def look(server_round, arrays):
        if server_round == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    with PackedGrid(num_clients=20, client_app="virtual:app", num_workers=2) as grid:
        result = AdditiveStrategy(fraction_train=0.25, fraction_evaluate=0.0).start(
            grid,
            ArrayRecord({"w": Array(np.zeros(3, np.float32))}),
            num_rounds=5,
            train_config=ConfigRecord({"stateful": False}),
            evaluate_fn=look,
            checkpoint=folder,
        )
    print(
        json.dumps(
            {
                "w": result.arrays["w"].numpy().tolist(),
                "rounds": sorted(result.train_metrics_clientapp),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
