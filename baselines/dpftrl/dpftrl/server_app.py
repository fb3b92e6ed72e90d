"""The server: one run per mechanism and epsilon, all from the same start."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from dpftrl.client_app import task
from dpftrl.dataset import central_data
from dpftrl.model import make_model
from dpftrl.strategy import make_strategy
from dpftrl.utils import COLUMNS, PANELS, plot_epsilons
from flower_ext.runs.comparison import COMPARISON_FILE, central_evaluation, compare
from flower_ext.server.tracking import plot

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every mechanism at every epsilon and write the comparison."""
    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    initial = ArrayRecord(make_model(config).state_dict())
    epsilons = [float(epsilon) for epsilon in str(config["epsilons"]).split()]
    runs: dict[str, tuple[str, float | None]] = {}
    for name in str(config["mechanisms"]).split():
        if name == "none":
            runs[name] = name, None
        else:
            runs |= {f"{name}-{e:g}": (name, e) for e in epsilons}
    results = Path(str(config["results"])).expanduser()
    compare(
        grid,
        {run: make_strategy(*setting, config) for run, setting in runs.items()},
        initial,
        num_rounds=int(config["num-server-rounds"]),
        results=results,
        columns=COLUMNS,
        panels=PANELS,
        config=config,
        evaluate_fn=central_evaluation(task, central_data(config), config),
    )
    # compare() has drawn all runs, which are too many curves: only the strictest
    # epsilon.
    strictest = [run for run, (_, e) in runs.items() if e in (None, min(epsilons))]
    plot({run: results / run for run in strictest}, PANELS, results / COMPARISON_FILE)
    plot_epsilons(results, runs, results / "epsilon.png")
