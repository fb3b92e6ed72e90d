"""The server: the same run once per strategy, one results folder."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flower_ext.runs.comparison import compare
from unequal_clients.model import make_model
from unequal_clients.strategy import make_strategy
from unequal_clients.utils import COLUMNS, PANELS

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
    )
