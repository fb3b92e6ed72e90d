"""The server: the same run once per method, one results folder."""

import torch
from flwr.app import ArrayRecord, Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from flower_ext.client.several import initial_models
from flower_ext.runs.comparison import compare
from personalization.model import make_model
from personalization.strategy import make_strategy
from personalization.utils import COLUMNS, PANELS

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every method and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    names = str(config["strategies"]).split()
    compare(
        grid,
        {name: make_strategy(name, config) for name in names},
        {name: initial(name, config) for name in names},
        num_rounds=int(config["num-server-rounds"]),
        results=str(config["results"]),
        columns=COLUMNS,
        panels=PANELS,
        config=config,
    )


def initial(name: str, config: UserConfig) -> ArrayRecord:
    """Return what a method starts from: the same model, or several beside it."""
    torch.manual_seed(int(config["seed"]))
    if name in ("hypcluster", "ensemble"):
        number, seed = int(config["num-models"]), int(config["seed"])
        return initial_models(lambda: make_model(config), number, seed=seed)
    return ArrayRecord(make_model(config).state_dict())
