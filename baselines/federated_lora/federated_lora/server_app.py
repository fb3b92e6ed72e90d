"""The server: the same run once per method, one results folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, UserConfig
from flwr.serverapp import Grid, ServerApp

from federated_lora.client_app import METHOD
from federated_lora.dataset import client_data, mails
from federated_lora.model import make_model
from federated_lora.strategy import make_strategy
from federated_lora.utils import COLUMNS, plot_bytes, totals
from flower_ext import RoundStrategy, Tracker
from flower_ext.client.adapters import AdapterModel, adapter_task
from flower_ext.client.lora import load_whole
from flower_ext.client.task import evaluate
from flower_ext.runs.report import write_summary

app = ServerApp()

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def whole(strategy: RoundStrategy, arrays: ArrayRecord) -> ArrayRecord:
    """Return a model with what its base has changed by, if the strategy changes it."""
    with_base = getattr(strategy, "whole", None)
    return arrays if with_base is None else with_base(arrays)


def central_evaluation(
    model: AdapterModel, strategy: RoundStrategy, config: UserConfig
) -> Evaluate:
    """Return the evaluation of some rounds, and the last, of the whole model."""
    task = adapter_task(model, client_data)
    test = mails("test", int(config["tokens"]), int(config["layers"]))
    every, last = int(config["evaluate-every"]), int(config["num-server-rounds"])

    def evaluate_whole(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every and server_round != last:
            return None
        trained = model(config)
        load_whole(trained, whole(strategy, arrays).to_torch_state_dict())
        return MetricRecord(dict(evaluate(task, trained, test)))

    return evaluate_whole


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every method and write the comparison."""
    config = context.run_config
    results = Path(str(config["results"])).expanduser()
    torch.set_num_threads(1)
    names = str(config["strategies"]).split()
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
        model.save(whole(strategy, result.arrays), results / name / "model")
    write_summary(results, names, COLUMNS, config=config, last=1)
    print(totals(results, names))
    plot_bytes(results, names, results / "comparison.png")
