"""The server: the same run once per method, one results folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, UserConfig
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from flower_ext import Task, Tracker
from flower_ext.client.task import evaluate
from flower_ext.runs.report import write_summary
from private_mails.client_app import METHOD
from private_mails.dataset import columns
from private_mails.model import task_of
from private_mails.strategy import learning_rate, make_strategy
from private_mails.utils import COLUMNS, KINDS, told

app = ServerApp()


def central_evaluation(
    task: Task, test: dict[str, Tensor], config: UserConfig
) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    """Return the evaluation of the last round, and some before, on all test mails."""
    every, last = int(config["evaluate-every"]), int(config["num-server-rounds"])

    def central(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every and server_round != last:
            return None
        trained = task.model(config)
        trained.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(dict(evaluate(task, trained, test)))

    return central


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every method and write the comparison."""
    config = context.run_config
    results = Path(str(config["results"])).expanduser()
    torch.set_num_threads(1)
    names = str(config["strategies"]).split()
    for name in names:
        task = task_of(name, config)
        test = columns(KINDS[name.partition("@")[0]], "test", int(config["tokens"]))

        torch.manual_seed(int(config["seed"]))
        settings = {METHOD: name, "learning-rate": learning_rate(name, config)}
        make_strategy(name, config).start(
            grid,
            ArrayRecord(task.model(config).state_dict()),
            num_rounds=int(config["num-server-rounds"]),
            train_config=ConfigRecord(settings),
            evaluate_fn=central_evaluation(task, test, config),
            tracker=Tracker(results / name),
        )
    write_summary(results, names, COLUMNS, config=config, last=1)
    if watched := int(config["watched"]):
        folder = results.absolute() / "instances"
        print(told(folder, watched, float(config["delta"])))
