"""The server: one run per strategy, all from the same start."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flower_ext.runs.comparison import compare
from maxfl.model import make_model
from maxfl.strategy import make_strategy
from maxfl.utils import COLUMNS, PANELS

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
    config = context.run_config
    torch.manual_seed(int(config["seed"]))
    initial = ArrayRecord(make_model(config).state_dict())
    names = str(config["strategies"]).split()
    compare(
        grid,
        {name: make_strategy(name, config) for name in names},
        initial,
        num_rounds=int(config["num-server-rounds"]),
        results=str(config["results"]),
        columns=COLUMNS,
        panels=PANELS,
        config=config,
    )
