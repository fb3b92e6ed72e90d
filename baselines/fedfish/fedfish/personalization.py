"""What the model is worth to clients that fine-tune it on a few examples.

The server has everybody's data here, which it would not have elsewhere.
"""

from statistics import mean

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    MetricRecord,
    RecordDict,
    UserConfig,
)

from fedfish.client_app import task
from fedfish.dataset import client_data, num_clients
from flower_ext.client.half import Local, LocalSettings
from flower_ext.client.personalization import evaluate_fine_tuned
from flower_ext.client.task import evaluate, num_examples
from flower_ext.core.protocol import Metrics
from flower_ext.runs.comparison import Evaluate

MOST_CLIENTS = 40  # of each kind


def evaluation(central: Evaluate, config: UserConfig) -> Evaluate:
    """Return ``central`` that after the last round also measures personalisation."""
    steps = int(config["finetune-steps"])

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        metrics = central(server_round, arrays)
        if metrics and steps and server_round == int(config["num-server-rounds"]):
            metrics.update(personalized(arrays, config))
        return metrics

    return evaluate_fn


def personalized(arrays: ArrayRecord, config: UserConfig) -> Metrics:
    """Return mean accuracies before and after, of clients that trained and others."""
    trained = range(int(config["num-training-clients"]))
    others = range(len(trained), num_clients(config))
    found: Metrics = {}
    for kind, clients in (("same", trained), ("shifted", others)):
        # Spread over all of them: speakers are in the order of the plays.
        some = clients[:: max(1, len(clients) // MOST_CLIENTS)][:MOST_CLIENTS]
        pairs = [_accuracies(client, arrays, config) for client in some]
        if tested := [pair for pair in pairs if pair is not None]:
            before, after = zip(*tested, strict=True)
            found[f"accuracy-{kind}"] = mean(before)
            found[f"finetuned-accuracy-{kind}"] = mean(after)
    return found


def _accuracies(
    client: int, arrays: ArrayRecord, config: UserConfig
) -> tuple[float, float] | None:
    """Return a client's accuracies; None if it has too few examples to test any."""
    context = Context(1, client, {"partition-id": client}, RecordDict(), dict(config))
    train, test = client_data(context)
    if not num_examples(test):
        return None
    rate = config["finetune-learning-rate"]
    model = task.model(config)
    model.load_state_dict(arrays.to_torch_state_dict())
    local = Local(
        task=task,
        model=model,
        train=train,
        test=test,
        settings=LocalSettings.read({**config, "learning-rate": rate}),
        config=ConfigRecord(),
        context=context,
        device=torch.device("cpu"),
    )
    tuned = evaluate_fine_tuned(
        local,
        num_steps=int(config["finetune-steps"]),
        num_examples=int(config["finetune-examples"]),
    )
    return evaluate(task, model, test)["accuracy"], float(tuned["accuracy"])  # type: ignore[arg-type]
