"""Taking part in training loops of one's own, however they step."""

from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from flower_ext.client.loops import before_steps, is_received


class OwnSGD(torch.optim.SGD):
    """A step that calls that of the base class."""

    def step(self, closure=None):
        return super().step(closure)


def linear():
    """Return a model of one weight, 0, whose loss has the gradient 4."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def loss_of(model):
    return 4 * model(torch.ones(1, 1)).sum()


def plain(model, optimizer):
    loss_of(model).backward()
    optimizer.step()


def closed(model, optimizer):
    """As Lightning does; gradients exist only once the closure was called."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)


def scaled(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)


fused = partial(torch.optim.SGD, fused=True)


@pytest.mark.parametrize(
    ("loop", "make"),
    [
        (plain, torch.optim.SGD),
        (plain, OwnSGD),
        (closed, torch.optim.SGD),
        (closed, OwnSGD),
        (scaled, torch.optim.SGD),
        (scaled, fused),
    ],
)
def test_gradients_are_those_of_the_step(loop, make):
    model, seen = linear(), []

    def change(parameters, optimizer):
        [(name, p)] = parameters.items()
        seen.append((name, float(p.grad)))
        p.grad += 1

    before_steps(model, change)
    make_one = partial(make, lr=0.5)
    loop(model, make_one(model.parameters()))
    assert seen == [("weight", 4.0)]
    assert model.weight.item() == -2.5


def test_a_step_that_is_skipped_is_none():
    model, seen = linear(), []
    before_steps(model, lambda *found: seen.append(found))
    optimizer = fused(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(float("inf") * loss_of(model)).backward()
    scaler.step(optimizer)
    assert not seen
    assert model.weight.item() == 0


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, partial(torch.compile, backend="eager")]
)
def test_names_are_those_that_were_received(wrap):
    model, seen = linear(), []
    received = ArrayRecord(model.state_dict())
    wrapped = wrap(model)
    before_steps(wrapped, lambda own, _: seen.extend(own), received)
    plain(model, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    assert seen == ["weight"]


def test_a_model_that_was_trained_before_is_refused():
    model = linear()
    received = ArrayRecord(model.state_dict())
    assert is_received(model, received)
    plain(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not is_received(model, received)
    with pytest.raises(ValueError, match="between load_state_dict and the training"):
        before_steps(model, lambda own, _: None, received)
