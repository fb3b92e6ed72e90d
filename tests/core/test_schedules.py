"""Schedules against closed forms and against torch's schedulers."""

import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from flower_ext.core.schedules import (
    Cosine,
    Decay,
    Linear,
    Piecewise,
    WarmUp,
    value_in,
)

ROUNDS = 30


def of_torch(initial, make):
    """Return the learning rates that a scheduler of torch gives round after round."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=initial)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own use of step(epoch)
        scheduler = make(optimizer)
        for _ in range(ROUNDS):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return found


def warm_cosine(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=26)
    return lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[4])


@pytest.mark.parametrize(
    ("schedule", "initial", "make"),
    [
        (
            Cosine(0.3, rounds=30, final=0.01),
            0.3,
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=30, eta_min=0.01),
        ),
        (
            Linear(0.4, rounds=20, final=0.1),
            0.4,
            lambda o: lr_scheduler.LinearLR(o, 1.0, 0.25, total_iters=20),
        ),
        (Decay(0.2, 0.9), 0.2, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        (Decay(0.2, 0.5, every=7), 0.2, lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
        (
            Piecewise({1: 0.2, 6: 0.02, 21: 0.002}),
            0.2,
            lambda o: lr_scheduler.MultiStepLR(o, [5, 20], 0.1),
        ),
        (WarmUp(4, Cosine(0.3, rounds=26)), 0.3, warm_cosine),
    ],
    ids=["cosine", "linear", "exponential", "step", "piecewise", "warm-up"],
)
def test_values_are_those_of_torchs_schedulers(schedule, initial, make):
    found = [schedule(r) for r in range(1, ROUNDS + 1)]
    assert found == pytest.approx(of_torch(initial, make), rel=1e-9, abs=1e-12)
    assert len(set(found)) > 2


@pytest.mark.parametrize("schedule", [Cosine(2.0, 6, 1.0), Linear(2.0, 6, 1.0)])
def test_the_line_and_the_cosine_meet_at_both_ends_and_in_the_middle(schedule):
    assert [schedule(r) for r in (1, 4, 7, 8, 100)] == [2.0, 1.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "schedule",
    [
        Decay(0.3, 1.0),
        Linear(0.3, 5, 0.3),
        Cosine(0.3, 5, 0.3),
        WarmUp(0, 0.3),
        Piecewise({1: 0.3}),
        0.3,
    ],
)
def test_at_its_degenerate_value_each_is_a_constant(schedule):
    assert {value_in(schedule, r) for r in range(1, 20)} == {0.3}


def test_steps_of_a_warm_up_are_even():
    values = [WarmUp(4, 1.0)(r) for r in range(1, 8)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_integers_of_a_piecewise_schedule_stay_integers():
    assert [type(Piecewise({1: 5, 3: 1})(r)) for r in (1, 3)] == [int, int]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Decay(1.0, 1.5), "rate=1.5 must be between 0 and 1"),
        (lambda: Decay(math.nan, 0.5), "initial=nan must be a finite number"),
        (lambda: Decay(1.0, 0.5, 0), "every=0 must be an integer >= 1"),
        (lambda: Cosine("0.1", 5), "initial='0.1' must be a finite number"),
        (lambda: Cosine(0.1, 0), "rounds=0 must be an integer >= 1"),
        (lambda: Linear(0.1, 5, math.inf), "final=inf must be a finite number"),
        (lambda: WarmUp(-1, 0.1), "rounds=-1 must be an integer >= 0"),
        (lambda: WarmUp(2, None), "after=None must be a finite number"),
        (lambda: Piecewise({}), r"rounds in values=\[\] must be 1 and then later"),
        (lambda: Piecewise({2: 0.1}), r"rounds in values=\[2\] must be 1 and"),
        (lambda: Piecewise({1: 1.0, 9: 1.0, 3: 1.0}), "must be 1 and then later ones"),
        (lambda: Piecewise({1: math.nan}), r"values\[1\]=nan must be a finite number"),
    ],
)
def test_what_is_no_schedule_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
