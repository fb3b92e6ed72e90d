"""The server: the same run once per method, one results folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, UserConfig
from flwr.serverapp import Grid, ServerApp

from flasc.client_app import METHOD
from flasc.dataset import client_data
from flasc.model import make_model
from flasc.strategy import make_strategy
from flasc.utils import COLUMNS, plot_bytes
from flower_ext import Tracker
from flower_ext.client.adapters import AdapterModel, adapter_task
from flower_ext.client.task import evaluate
from flower_ext.data.clients import mail_tokens
from flower_ext.runs.report import write_summary
from flower_ext.strategies import FLASC

app = ServerApp()

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def central_evaluation(
    model: AdapterModel, strategy: FLASC, config: UserConfig
) -> Evaluate:
    """Return the evaluation of some rounds, and the last, of what clients see."""
    task = adapter_task(model, client_data)
    test = mail_tokens("test", int(config["tokens"]))
    every, last = int(config["evaluate-every"]), int(config["num-server-rounds"])

    def evaluate_masked(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every and server_round != last:
            return None
        trained = model(config)
        trained.load_state_dict(strategy.masked(arrays).to_torch_state_dict())
        return MetricRecord(dict(evaluate(task, trained, test)))

    return evaluate_masked


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every method and write the comparison."""
    config = context.run_config
    results = Path(str(config["results"])).expanduser()
    torch.set_num_threads(1)
    names = str(config["strategies"]).split()
    every = int(config["evaluate-every"])
    for name in names:
        model = make_model(name, config)
        strategy = make_strategy(name, config)
        result = strategy.start(
            grid,
            ArrayRecord(model(config).state_dict()),
            num_rounds=int(config["num-server-rounds"]),
            train_config=ConfigRecord({METHOD: name}),
            evaluate_fn=central_evaluation(model, strategy, config),
            tracker=Tracker(results / name),
        )
        model.save(result.arrays, results / name / "model")
    write_summary(results, names, COLUMNS, config=config, last=2 * every + 1)
    plot_bytes(results, names, results / "comparison.png")
