"""An optimizer's state as arrays and numbers, and what is refused of it."""

import pickle
import re

import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from flower_ext.client import OptimizerState
from flower_ext.client.personal import Personal


def step(model, make, state, steps=1, **options):
    """Take steps with a new optimizer, as in a round; return it and what it keeps."""
    optimizer = make(model.parameters())
    kept = OptimizerState(
        optimizer, dict(model.named_parameters()), Personal(state), **options
    )
    for _ in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 1.0 + i)
        optimizer.step()
    return optimizer, kept


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


class Counting(torch.optim.Optimizer):
    """Keeps a number, a whole one, and whatever it is given."""

    def __init__(self, parameters, extra=None):
        super().__init__(parameters, {"lr": 0.1})
        self.extra = extra

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                own = self.state[p]
                own["calls"] = own.get("calls", 0) + 1
                own["sum"] = own.get("sum", 0.0) + 0.1
                own["nothing"] = self.extra


def test_it_is_the_same_bit_for_bit_after_the_state_has_travelled():
    model, state = nn.Linear(3, 2), RecordDict()
    optimizer, kept = step(model, adamw, state, steps=3)
    kept.keep()
    state = pickle.loads(pickle.dumps(state))
    again, _ = step(model, adamw, state, steps=0)
    for p in model.parameters():
        ours, theirs = again.state[p], optimizer.state[p]
        assert ours.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for slot, x in theirs.items():
            assert torch.equal(ours[slot], x) and ours[slot].dtype == x.dtype
    assert float(again.state[model.bias]["step"]) == 3


def test_options_are_those_of_the_round():
    model, state = nn.Linear(3, 2), RecordDict()
    step(model, adamw, state)[1].keep()
    other, _ = step(model, lambda p: torch.optim.AdamW(p, lr=0.5), state)
    assert other.param_groups[0]["lr"] == 0.5


def test_what_is_kept_does_not_change_with_the_next_steps():
    model, state = nn.Linear(1, 1), RecordDict()
    step(model, adamw, state)[1].keep()
    before = {key: record.copy() for key, record in state.items()}
    step(model, adamw, state, steps=2)  # and not kept, as where a client fails
    assert dict(state) == before


def test_numbers_are_kept_as_numbers():
    model, state = nn.Linear(1, 1), RecordDict()
    for calls in (2, 4):
        optimizer, kept = step(model, Counting, state, steps=2)
        kept.keep()
        own = optimizer.state[model.weight]
        assert own["calls"] == calls and isinstance(own["calls"], int)
        assert own["sum"] == pytest.approx(0.1 * calls)


def test_several_are_kept_under_names_of_their_own():
    state, models = RecordDict(), {"one": nn.Linear(1, 1), "two": nn.Linear(2, 1)}
    for name, model in models.items():
        step(model, adamw, state, steps=len(name), name=name)[1].keep()
    for name, model in models.items():
        optimizer, _ = step(model, adamw, state, steps=0, name=name)
        assert optimizer.state[model.weight]["exp_avg"].shape == model.weight.shape


def test_what_has_no_gradient_has_no_state():
    model, state = nn.Linear(1, 1), RecordDict()
    optimizer = adamw(model.parameters())
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    kept = OptimizerState(optimizer, dict(model.named_parameters()), Personal(state))
    kept.keep()
    again, _ = step(model, adamw, state, steps=0)
    assert model.weight in again.state and model.bias not in again.state


def test_a_state_that_is_not_finite_is_told():
    model = nn.Linear(1, 1)
    optimizer, kept = step(model, adamw, RecordDict())
    assert kept.is_finite()
    optimizer.state[model.bias]["exp_avg_sq"].fill_(float("inf"))
    assert not kept.is_finite()


@pytest.mark.parametrize(
    ("other", "make", "text"),
    [
        (
            nn.Linear(3, 2),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
            "optimizer='torch.optim.sgd.SGD' must be torch.optim.adamw.AdamW, whose",
        ),
        (
            nn.Linear(2, 2),
            adamw,
            "group and shape of parameter 'weight'=(0, (2, 2)) must be (0, (2, 3))",
        ),
        (
            nn.Linear(3, 2, bias=False),
            adamw,
            "group and shape of parameter 'bias'=None must be (0, (2,))",
        ),
        (
            nn.Linear(3, 2),
            lambda p: torch.optim.AdamW([{"params": [x]} for x in p], lr=0.1),
            "group and shape of parameter 'bias'=(1, (2,)) must be (0, (2,))",
        ),
    ],
)
def test_what_was_kept_of_something_else_is_refused(other, make, text):
    state = RecordDict()
    step(nn.Linear(3, 2), adamw, state)[1].keep()
    with pytest.raises(ValueError, match=re.escape(text)):
        step(other, make, state)


def test_a_state_that_is_neither_tensor_nor_number_is_refused():
    model, state = nn.Linear(1, 1), RecordDict()
    _, kept = step(model, lambda p: Counting(p, extra=["a"]), state)
    text = "state 'nothing' of 'weight'=['a'] must be a tensor or a number"
    with pytest.raises(ValueError, match=re.escape(text)):
        kept.keep()
    assert not state


def test_options_that_steps_change_are_refused():
    model = nn.Linear(1, 1)
    optimizer, kept = step(model, adamw, RecordDict())
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(ValueError, match="a schedule belongs into train_config"):
        kept.keep()


def test_parameters_without_a_name_are_refused():
    optimizer = adamw([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=re.escape("a tensor of shape (3,)")):
        OptimizerState(optimizer, {}, Personal(RecordDict()))
