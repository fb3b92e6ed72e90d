"""The server: one run per method, all from the same start."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from flower_ext.runs.comparison import central_evaluation, compare
from private_optimizers.client_app import task
from private_optimizers.dataset import CLASSES, central_data
from private_optimizers.model import make_model
from private_optimizers.strategy import make_strategy, num_rounds
from private_optimizers.utils import COLUMNS, PANELS

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every method and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    if config["data"] not in CLASSES:
        raise ValueError(f"data={config['data']!r} must be one of {' '.join(CLASSES)}")
    central = central_evaluation(task, central_data(config), config)
    # Before the methods are made, some of which draw: all commands begin alike.
    initial = ArrayRecord(make_model(config).state_dict())
    last = num_rounds(config)
    # The last three that are measured are averaged in the summary: silos, whose rounds
    # are many steps, are measured at the end alone.
    final = 1 if int(config["silos"]) else 3
    every = last if int(config["silos"]) else int(config["evaluate-every"])

    def seldom(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every and server_round <= last - final:
            return None
        return central(server_round, arrays)

    compare(
        grid,
        {name: make_strategy(name, config) for name in str(config["methods"]).split()},
        initial,
        num_rounds=last,
        results=str(config["results"]),
        columns=COLUMNS,
        panels=PANELS,
        config=config,
        evaluate_fn=seldom,
    )
