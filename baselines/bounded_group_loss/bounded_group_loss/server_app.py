"""The server: one run per bound, all from the same start."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from bounded_group_loss.model import make_model
from bounded_group_loss.strategy import make_strategies
from flower_ext import Tracker
from flower_ext.report import write_summary
from flower_ext.tracking import plot

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
    config = context.run_config
    results = Path(str(config["results"]))
    torch.manual_seed(int(config["seed"]))
    initial = make_model(config).state_dict()
    strategies = make_strategies(config)
    for name, strategy in strategies.items():
        strategy.start(
            grid,
            ArrayRecord(initial),
            num_rounds=int(config["num-server-rounds"]),
            tracker=Tracker(results / name),
        )
    columns = {
        "evaluate/accuracy": "accuracy",
        "evaluate/worst-group-loss": "worst loss",
    }
    for constraint in strategies["fedavg"].constraints:
        columns[f"evaluate/group-loss/{constraint}"] = constraint
    write_summary(results, strategies, columns, config=config)
    plot(
        {name: results / name for name in strategies},
        ["evaluate/worst-group-loss", "evaluate/accuracy"],
        results / "comparison.png",
    )
