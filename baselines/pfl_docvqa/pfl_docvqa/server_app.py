"""The server: the same run once per method, one results folder."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, UserConfig
from flwr.serverapp import Grid, ServerApp

from flower_ext import Tracker
from flower_ext.client.adapters import AdapterModel
from flower_ext.runs.comparison import Evaluate
from flower_ext.runs.report import write_summary
from flower_ext.server.byte_log import ByteLog
from pfl_docvqa.client_app import METHOD
from pfl_docvqa.model import FULL, make_model
from pfl_docvqa.strategy import make_strategy, setting, train_config
from pfl_docvqa.utils import COLUMNS, answers, score, true_answers, usual_answers

app = ServerApp()


def central_evaluation(
    model: AdapterModel, config: UserConfig, rounds: int
) -> Evaluate:
    """Return the evaluation after some rounds, and the last."""
    truths, every = true_answers("test"), int(config["evaluate-every"])

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        skipped = server_round % every and server_round != rounds
        if skipped or not server_round:  # what all start from is measured once
            return None
        trained = model(config)
        trained.load_state_dict(arrays.to_torch_state_dict())
        return score(answers(trained, "test"), truths)

    return evaluate


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every method; write the comparison, and what is known without a run.

    The file ``references.json`` has the scores of the model that all start from, and of
    the answer that is the most frequent for each question.
    """
    config = context.run_config
    results = Path(str(config["results"])).expanduser()
    torch.set_num_threads(1)
    names = str(config["strategies"]).split()
    for name in names:
        model = make_model(name, config)
        rounds = setting(name, "num-server-rounds", config)
        result = make_strategy(name, config).start(
            grid,
            ArrayRecord(model(config).state_dict()),
            num_rounds=rounds,
            train_config=ConfigRecord({**train_config(name, config), METHOD: name}),
            evaluate_fn=central_evaluation(model, config, rounds),
            tracker=Tracker(results / name),
            callbacks=[ByteLog(results / name / "bytes.csv")],
        )
        model.save(result.arrays, results / name / "model")
    model = make_model(FULL, config)(config)
    known = {"base": answers(model, "test"), "usual": usual_answers()}
    scores = {name: dict(score(x, true_answers("test"))) for name, x in known.items()}
    (results / "references.json").write_text(json.dumps(scores, indent=2) + "\n")
    write_summary(results, names, COLUMNS, config=config, last=1)
