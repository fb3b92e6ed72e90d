"""The server: the same run once per strategy, one results folder."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from drift.client_app import task
from drift.dataset import central_data
from drift.model import make_model
from drift.strategy import make_strategy
from drift.utils import COLUMNS, PANELS
from flower_ext.runs.comparison import central_evaluation, compare

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    compare(
        grid,
        {
            name: make_strategy(name, config)
            for name in str(config["strategies"]).split()
        },
        ArrayRecord(make_model(config).state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        results=str(config["results"]),
        columns=COLUMNS,
        panels=PANELS,
        config=config,
        evaluate_fn=central_evaluation(task, central_data(), config),
    )
