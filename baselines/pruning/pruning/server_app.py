"""The server: the same run once for each way to prune, one results folder."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from flower_ext.runs.comparison import central_evaluation, compare
from pruning.client_app import task
from pruning.dataset import central_data
from pruning.model import make_model
from pruning.strategy import make_strategy
from pruning.utils import COLUMNS, PANELS

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Prune in every way and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    central = central_evaluation(task, central_data(config), config)
    every, last = int(config["evaluate-every"]), int(config["num-server-rounds"])

    def seldom(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every and server_round != last:
            return None
        return central(server_round, arrays)

    compare(
        grid,
        {name: make_strategy(name, config) for name in str(config["runs"]).split()},
        ArrayRecord(make_model(config).state_dict()),
        num_rounds=last,
        results=str(config["results"]),
        columns=COLUMNS,
        panels=PANELS,
        config=config,
        evaluate_fn=seldom,
    )
