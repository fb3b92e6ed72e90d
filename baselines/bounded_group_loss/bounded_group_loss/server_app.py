"""The server: one run per bound, all from the same start."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from bounded_group_loss.model import make_model
from bounded_group_loss.strategy import make_strategies
from bounded_group_loss.utils import PANELS, columns, fairness, plot_frontier
from flower_ext.runs.comparison import compare

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
    config = context.run_config
    results = Path(str(config["results"])).expanduser()
    torch.manual_seed(int(config["seed"]))
    strategies = make_strategies(config)
    compare(
        grid,
        strategies,
        ArrayRecord(make_model(config).state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        results=results,
        columns=columns(strategies["fedavg"].constraints),
        panels=PANELS,
        config=config,
        evaluate_fn=fairness(config),
    )
    plot_frontier(results, results / "frontier.png")
