"""The server: the same tokens once per method, one results folder."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from diloco.client_app import task
from diloco.dataset import central_data
from diloco.model import make_model
from diloco.strategy import Method
from diloco.utils import COLUMNS
from flower_ext import Tracker
from flower_ext.runs.comparison import central_evaluation
from flower_ext.runs.report import write_summary
from flower_ext.server.rounds import run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every method and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    methods = [Method(name, config) for name in str(config["methods"]).split()]
    initial = ArrayRecord(make_model(config).state_dict())
    central = central_evaluation(task, central_data(config), config)
    every = int(config["evaluate-every"])
    results = Path(str(config["results"])).expanduser()

    for method in methods:

        def seldom(
            server_round: int, arrays: ArrayRecord, method: Method = method
        ) -> MetricRecord | None:
            if server_round * method.steps % every and server_round != method.rounds:
                return None
            found = central(server_round, arrays)
            tokens = server_round * method.tokens
            return MetricRecord({**found, "tokens": tokens} if found else {})

        run_rounds(
            method.strategy(),
            grid,
            initial,
            num_rounds=method.rounds,
            evaluate_fn=seldom,
            tracker=Tracker(results / method.name.replace("/", "-")),
            callbacks=method.callbacks(),
            new_clients=True,
        )
    names = {method.name.replace("/", "-"): None for method in methods}
    write_summary(results, names, COLUMNS, config=config)
