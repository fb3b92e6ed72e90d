"""The server: one run per mechanism and epsilon, all from the same start."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from dpftrl.client_app import task
from dpftrl.dataset import central_data
from dpftrl.model import make_model
from dpftrl.strategy import make_strategy
from dpftrl.utils import COLUMNS, PANELS, plot_epsilons
from flower_ext import Tracker
from flower_ext.client import evaluate
from flower_ext.report import write_summary
from flower_ext.tracking import plot

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every mechanism at every epsilon and write the comparison."""
    config = context.run_config
    results = Path(str(config["results"]))
    torch.set_num_threads(1)
    torch.manual_seed(int(config["seed"]))
    initial = make_model(config).state_dict()
    central = central_data(config)

    def evaluate_centrally(_: int, arrays: ArrayRecord) -> MetricRecord:
        model = make_model(config)
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(dict(evaluate(task, model, central)))

    epsilons = [float(epsilon) for epsilon in str(config["epsilons"]).split()]
    runs: dict[str, tuple[str, float | None]] = {}
    for name in str(config["mechanisms"]).split():
        if name == "none":
            runs[name] = name, None
        else:
            runs |= {f"{name}-{e:g}": (name, e) for e in epsilons}
    for run, (name, epsilon) in runs.items():
        make_strategy(name, epsilon, config).start(
            grid,
            ArrayRecord(initial),
            num_rounds=int(config["num-server-rounds"]),
            evaluate_fn=evaluate_centrally,
            tracker=Tracker(results / run),
        )
    write_summary(results, runs, COLUMNS, config=config)
    strictest = [run for run, (_, e) in runs.items() if e in (None, min(epsilons))]
    plot({run: results / run for run in strictest}, PANELS, results / "comparison.png")
    plot_epsilons(results, runs, results / "epsilon.png")
