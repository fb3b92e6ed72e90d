"""Template: a sum by hand, and its client half."""

import math

import numpy as np
import pytest

from flower_ext.client.app import client_app
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies.template import WEIGHT, Template, TemplateClient

SENT = {"w": np.float32([1, 2])}
ANY = {"min_train_nodes": 0, "min_available_nodes": 0}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1), [3, 3]),  # as FedAvg: changes (0, 2) and (4, 0), averaged
        ((1, 3), [4, 2.5]),
        ((0, 1), [5, 2]),
    ],
)
def test_sum_by_hand(aggregate, reply, weights, expected):
    models = [{"w": np.float32([1, 4])}, {"w": np.float32([5, 2])}]
    contents = [
        reply(model, weight=7, **{WEIGHT: float(q)})
        for model, q in zip(models, weights, strict=True)
    ]
    new, metrics = aggregate(Template(**ANY), SENT, contents)
    assert new["w"].tolist() == expected
    assert metrics["mean-weight"] == sum(weights) / 2


def test_client_weighs_itself_by_its_loss(task, initial):
    def weight(strength):
        grid = LocalGrid(client_app(task, TemplateClient), 1, {"lr": 0.1})
        strategy = Template(strength=strength, fraction_evaluate=0.0, **ANY)
        result = strategy.start(grid, initial, num_rounds=1)
        return result.train_metrics_clientapp[1]["mean-weight"]

    assert weight(0.0) == 1  # the limit: all clients weigh the same
    once = math.log(weight(1.0))
    assert once > 0
    assert math.log(weight(2.0)) == pytest.approx(2 * once)


@pytest.mark.parametrize("strength", [-1, math.inf, math.nan, "1"])
def test_strength_is_a_number(strength):
    with pytest.raises(ValueError, match="strength="):
        Template(strength=strength)
