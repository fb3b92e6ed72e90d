"""The server: the same run once per strategy, one results folder."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from drift.client_app import task
from drift.dataset import central_data
from drift.model import make_model
from drift.strategy import make_strategy
from drift.utils import AVERAGE, COLUMNS, PANELS
from flower_ext import AverageLast
from flower_ext.runs.comparison import central_evaluation, compare

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    central = central_evaluation(task, central_data(), config)
    average = AverageLast()
    averaged = average.evaluated(central)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        found = dict(central(server_round, arrays) or {})
        of_two = dict(averaged(server_round, arrays) or {})
        return MetricRecord({**found, **{AVERAGE + k: x for k, x in of_two.items()}})

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
        evaluate_fn=evaluate,
        callbacks=lambda _: [average],
    )
