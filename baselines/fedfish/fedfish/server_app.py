"""The server: the same run once per strategy, one results folder."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedfish.client_app import task
from fedfish.dataset import central_data
from fedfish.model import make_model
from fedfish.strategy import make_strategy
from fedfish.utils import COLUMNS, PANELS
from flower_ext import Tracker
from flower_ext.client import evaluate
from flower_ext.report import write_summary
from flower_ext.tracking import plot

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
    config = context.run_config
    results = Path(str(config["results"]))
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    initial = make_model(config).state_dict()
    central = central_data(int(config["window"]), int(config["central-windows"]))

    def evaluate_centrally(_: int, arrays: ArrayRecord) -> MetricRecord:
        model = make_model(config)
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(dict(evaluate(task, model, central)))

    names = str(config["strategies"]).split()
    for name in names:
        make_strategy(name, config).start(
            grid,
            ArrayRecord(initial),
            num_rounds=int(config["num-server-rounds"]),
            evaluate_fn=evaluate_centrally,
            tracker=Tracker(results / name),
        )
    write_summary(results, names, COLUMNS, config=config)
    plot({name: results / name for name in names}, PANELS, results / "comparison.png")
