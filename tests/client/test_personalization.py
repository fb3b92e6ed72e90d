"""Fine-tuning a copy of the received model, against gradient descent by hand."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict

from flower_ext import Task
from flower_ext.client.half import Local, LocalSettings
from flower_ext.client.personalization import evaluate_fine_tuned

RATE = 0.1


@pytest.fixture
def local():
    """Fit y = w x from w = 0; the test set is one example with y = 3 x."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    x = torch.tensor([[1.0], [2.0], [50.0]]).double()
    y = torch.tensor([3.0, 6.0, -7.0]).double()

    def loss(model, batch):
        return (model(batch["x"]).squeeze(1) - batch["y"]) ** 2

    return Local(
        task=Task(lambda config: model, lambda context: ({}, {}), loss),
        model=model,
        train={"x": x, "y": y},
        test={"x": x[:1], "y": y[:1]},
        settings=LocalSettings(learning_rate=RATE, batch_size=8),
        config=ConfigRecord(),
        context=Context(1, 1, {"partition-id": 0}, RecordDict(), {}),
        device=torch.device("cpu"),
    )


def descend(steps):
    w, x, y = 0.0, np.array([1.0, 2.0]), np.array([3.0, 6.0])
    for _ in range(steps):
        w -= RATE * np.mean(2 * x * (w * x - y))
    return (w - 3.0) ** 2


@pytest.mark.parametrize("steps", [1, 4])
def test_it_is_gradient_descent_on_the_first_examples(local, steps):
    found = evaluate_fine_tuned(local, num_steps=steps, num_examples=2)
    assert found == {"loss": pytest.approx(descend(steps), rel=1e-9)}


def test_the_received_model_stays_and_gradients_are_on_within_an_evaluation(local):
    with torch.no_grad():
        found = evaluate_fine_tuned(local, num_steps=1)
    assert found["loss"] != pytest.approx(9.0)
    assert float(local.model.weight.detach()) == 0.0
    assert len(local.train["x"]) == 3


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"num_steps": 1, "num_examples": 0}])
def test_no_steps_and_no_examples_are_refused(local, bad):
    with pytest.raises(ValueError, match="=0 must be"):
        evaluate_fine_tuned(local, **bad)
