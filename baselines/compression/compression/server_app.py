"""The server: the same run once per codec, one results folder."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from compression.client_app import TASKS
from compression.dataset import central_data
from compression.strategy import make_strategy
from compression.utils import COLUMNS, PANELS
from flower_ext.runs.comparison import central_evaluation, compare

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run with every codec and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    if config["data"] not in TASKS:
        raise ValueError(f"data={config['data']!r} must be one of {' '.join(TASKS)}")
    task = TASKS[str(config["data"])]
    initial = ArrayRecord(task.model(config).state_dict())
    central = central_evaluation(task, central_data(config), config)
    every, last = int(config["evaluate-every"]), int(config["num-server-rounds"])

    def seldom(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every and server_round != last:
            return None
        return central(server_round, arrays)

    compare(
        grid,
        {name: make_strategy(name, config) for name in str(config["codecs"]).split()},
        initial,
        num_rounds=last,
        results=str(config["results"]),
        columns=COLUMNS,
        panels=PANELS,
        config=config,
        evaluate_fn=seldom,
    )
