"""What is measured, and what is shown of the comparison."""

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, MetricRecord, UserConfig
from torch import Tensor

from fair_objectives.dataset import num_schools, school
from flower_ext.core.several import unstack

COLUMNS = {
    "central/train-mean": "train: mean",
    "central/train-worst-tenth": "worst tenth",
    "central/train-worst": "worst",
    "central/test-mean": "test: mean",
    "central/test-worst-tenth": "worst tenth",
    "central/test-std": "between schools",
}
PANELS = ["central/train-mean", "central/train-worst-tenth", "central/test-worst-tenth"]


def school_losses(arrays: ArrayRecord, config: UserConfig) -> tuple[Tensor, Tensor]:
    """Return each school's mean loss, on its training and on its test data.

    Of several models a school takes the one that loses least on its training data. A
    school whose training scores are wrong is not measured.
    """
    # Flower's q-FedAvg makes a model of float64 of any.
    record = {k: x.float() for k, x in arrays.to_torch_state_dict().items()}
    models = unstack(record) or [record]
    found = []
    for number in range(int(config["wrong-schools"]), num_schools(config)):
        train, test = school(number, config)
        losses = [
            [_loss(model, split["x"], split["y"]) for split in (train, test)]
            for model in models
        ]
        found.append(min(losses))
    trains, tests = torch.tensor(found, dtype=torch.float64).T
    return trains, tests


def _loss(model: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    predicted = x @ model["weight"][0] + model["bias"]
    return float((predicted - y).square().mean()) / 2


def evaluate_schools(
    config: UserConfig,
) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Return the server's evaluation: how the losses are spread over the schools."""

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        metrics: dict[str, float] = {}
        for split, losses in zip(
            ("train", "test"), school_losses(arrays, config), strict=True
        ):
            worst = losses.sort(descending=True).values
            metrics |= {
                f"{split}-mean": float(losses.mean()),
                f"{split}-worst-tenth": float(worst[: max(1, len(worst) // 10)].mean()),
                f"{split}-worst": float(worst[0]),
                f"{split}-std": float(losses.std(correction=0)),
            }
        return MetricRecord(dict(metrics))

    return evaluate
