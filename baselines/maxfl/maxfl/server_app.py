"""The server: one run per strategy, all from the same start."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flower_ext import Tracker
from flower_ext.report import write_summary
from flower_ext.tracking import plot
from maxfl.model import make_model
from maxfl.strategy import make_strategy

app = ServerApp()

COLUMNS = {
    "evaluate/gm-appeal": "appeal",
    "evaluate/gm-appeal-seen": "seen",
    "evaluate/gm-appeal-unseen": "unseen",
    "evaluate/accuracy": "accuracy",
    "evaluate/preferred-accuracy": "preferred",
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
    config = context.run_config
    results = Path(str(config["results"]))
    torch.manual_seed(int(config["seed"]))
    initial = make_model(config).state_dict()
    names = str(config["strategies"]).split()
    for name in names:
        make_strategy(name, config).start(
            grid,
            ArrayRecord(initial),
            num_rounds=int(config["num-server-rounds"]),
            tracker=Tracker(results / name),
        )
    write_summary(results, names, COLUMNS, config=config)
    plot(
        {name: results / name for name in names},
        ["evaluate/gm-appeal", "evaluate/accuracy"],
        results / "comparison.png",
    )
