"""The server: the same run once per strategy, one results folder."""

import torch
from flwr.app import ArrayRecord, Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fair_objectives.model import make_model
from fair_objectives.strategy import make_strategy
from fair_objectives.utils import COLUMNS, PANELS, evaluate_schools
from flower_ext.client.several import initial_models
from flower_ext.runs.comparison import compare

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every strategy and write the comparison."""
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
        evaluate_fn=evaluate_schools(config),
    )


def initial(name: str, config: UserConfig) -> ArrayRecord:
    """Return what a method starts from: the same model, or several beside it."""
    several = int(config["num-models"]) if name == "most" else 1
    made = initial_models(lambda: make_model(config), several, seed=int(config["seed"]))
    if several > 1:
        return made
    return ArrayRecord({name.removeprefix("0/"): x for name, x in made.items()})
