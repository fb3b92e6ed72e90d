"""What is measured and shown: fairlearn's metrics on everybody's test data."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from fairlearn.metrics import MetricFrame, equalized_odds_difference
from flwr.app import ArrayRecord, MetricRecord, UserConfig
from sklearn.metrics import accuracy_score, log_loss

from bounded_group_loss.dataset import people
from bounded_group_loss.model import make_model
from flower_ext.runs.report import read_summary

PANELS = ["central/worst-group-loss", "central/accuracy"]
COLUMNS = {
    "central/accuracy": "accuracy",
    "central/worst-group-loss": "worst loss",
    "central/worst-group-accuracy": "worst accuracy",
    "central/equalized-odds-difference": "odds gap",
}


def columns(constraints: Iterable[str]) -> dict[str, str]:
    """Return the table's columns: the overall ones, and the loss of every group."""
    return COLUMNS | {f"evaluate/group-loss/{name}": name for name in constraints}


def fairness(
    config: UserConfig,
) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    """Return the server's evaluation of some rounds, by scikit-learn and fairlearn.

    Groups are those that are bounded: with ``by-label``, pairs of group and label.
    """
    test = people(str(config["dataset"]), "test", str(config["group"]))
    label, group = test["y"].numpy(), test["group"].numpy()
    # Equalized odds compare groups among people of the same label, and need the groups.
    bounded = group * 2 + label if config["by-label"] else group
    model = make_model(config)
    every, last = int(config["evaluate-every"]), int(config["num-server-rounds"])

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every and server_round != last:
            return None
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            positive = torch.softmax(model(test["x"]).double(), 1)[:, 1].numpy()
        predicted = (positive > 0.5).astype(int)
        accuracy = MetricFrame(
            metrics=accuracy_score,
            y_true=label,
            y_pred=predicted,
            sensitive_features=bounded,
        )
        losses = MetricFrame(
            metrics=lambda y, p: log_loss(y, p, labels=[0, 1]),
            y_true=label,
            y_pred=positive,
            sensitive_features=bounded,
        )
        return MetricRecord(
            {
                "accuracy": float(accuracy.overall),
                "worst-group-loss": float(losses.group_max()),
                "worst-group-accuracy": float(accuracy.group_min()),
                "equalized-odds-difference": float(
                    equalized_odds_difference(
                        label, predicted, sensitive_features=group
                    )
                ),
            }
        )

    return evaluate


def plot_frontier(results: Path, path: Path) -> None:
    """Draw accuracy against the worst group's loss, one point a run."""
    from matplotlib.figure import Figure

    runs = read_summary(results)["runs"]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    points = np.array(
        [
            [run["central/worst-group-loss"], run["central/accuracy"]]
            for run in runs.values()
        ]
    )
    axes.plot(*points.T, marker="o", linestyle=":")
    for name, point in zip(runs, points, strict=True):
        axes.annotate(name, point, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="loss of the worst group", ylabel="accuracy")
    figure.savefig(path)
