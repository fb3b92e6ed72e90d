"""The server: the same run once per strategy, one results folder."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedfish.client_app import task
from fedfish.dataset import central_data
from fedfish.model import make_model
from fedfish.personalization import evaluation
from fedfish.strategy import make_strategy
from fedfish.utils import PANELS, columns
from flower_ext.runs.comparison import central_evaluation, compare

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    initial = ArrayRecord(make_model(config).state_dict())
    central = central_evaluation(task, central_data(config), config)
    names = str(config["strategies"]).split()
    compare(
        grid,
        {name: make_strategy(name, config) for name in names},
        initial,
        num_rounds=int(config["num-server-rounds"]),
        results=str(config["results"]),
        columns=columns(config),
        panels=PANELS,
        config=config,
        evaluate_fn=evaluation(central, config),
    )
