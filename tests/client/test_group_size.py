"""How many examples of a user: rules on public data, against simulation by hand."""

import doctest
import math
from functools import partial

import numpy as np
import pytest
import torch
from one_silo import Dense, columns, cross_entropy, make_task
from torch import nn
from torch.func import functional_call, grad, vmap

from flower_ext.client import group_size
from flower_ext.client.group_size import (
    GradientMoments,
    els_group_size,
    gradient_moments,
    uls_error,
    uls_group_size,
)
from flower_ext.privacy.accounting.calibration import noise_multiplier_for

TARGET = {"epsilon": 2.0, "delta": 1e-5, "num_steps": 50}


def test_els_takes_the_median():
    assert els_group_size([5]) == 5
    assert els_group_size([9, 1, 4]) == 4
    assert els_group_size([1, 2, 4, 9]) == 2  # the lower one
    with pytest.raises(ValueError, match="sizes=0 must be"):
        els_group_size([1, 0])
    with pytest.raises(ValueError, match=r"sizes=\[\] must be at least one"):
        els_group_size([])


def test_moments_are_those_of_gradients_per_example():
    data, model = columns(23, seed=4), Dense()
    names = {k for k, p in model.named_parameters() if p.requires_grad}
    trained = {k: p.detach() for k, p in model.named_parameters() if k in names}

    def loss(parameters, x, y):
        out = functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(out, y[None])

    each = vmap(grad(loss), (None, 0, 0))(trained, data["x"], data["y"])
    rows = torch.cat([g.reshape(23, -1) for g in each.values()], 1).double().numpy()
    users = data["user"].numpy()
    means = np.stack([rows[users == u].mean(0) for u in range(5)])
    off = sum(((rows[users == u] - means[u]) ** 2).sum() for u in range(5))
    counts = np.bincount(users)
    within = off / (23 - 5)
    spread = ((means - means.mean(0)) ** 2).sum() / 4
    found = gradient_moments(make_task(), model, data)
    assert found.within == pytest.approx(within, rel=1e-5)
    between = spread - within * (1 / counts).mean()
    assert found.between == pytest.approx(max(0.0, between), abs=1e-6)
    mean = (means.mean(0) ** 2).sum() - spread / 5
    assert found.mean == pytest.approx(max(0.0, mean), rel=1e-4)
    assert found.num_parameters == rows.shape[1]


def test_moments_are_unbiased():
    """Of gradients that are the data: a location, a user's own, an example's own."""

    class Location(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

    def loss(model, batch):
        return (batch["x"] * model.w).sum(1)

    task, found = make_task(Location, loss=loss), []
    generator = torch.Generator().manual_seed(0)
    users = torch.tensor([0] * 2 + [1] * 3 + [2] + [3] * 4)
    for _ in range(300):
        own = 2.0 * torch.randn(4, 3, generator=generator)
        x = 1.5 + own[users] + torch.randn(10, 3, generator=generator)
        moments = gradient_moments(task, Location(), {"x": x, "user": users})
        found.append((moments.between, moments.within))
    # Three coordinates of variance 4, and of 1; the first is cut at 0 now and then.
    between, within = np.mean(found, axis=0)
    assert within == pytest.approx(3.0, rel=0.05)
    assert between == pytest.approx(12.0, rel=0.1)


def simulated(moments, group_size, sizes, users, budget, rng, runs=4000):
    """Return the mean squared error of a step of ULS on Gaussian gradients."""
    d = moments.num_parameters
    kept = np.minimum(sizes, group_size)
    drawn = min(users, budget / kept.mean())
    noise = noise_multiplier_for(
        TARGET["epsilon"],
        TARGET["delta"],
        rounds=TARGET["num_steps"],
        sampling_probability=drawn / users,
    )
    own = moments.between + moments.within * (1 / kept).mean()
    clip = math.sqrt(moments.mean + own)
    location = np.full(d, math.sqrt(moments.mean / d))
    errors = []
    for _ in range(runs):
        counts = rng.choice(kept, users)
        spread = np.sqrt((moments.between + moments.within / counts) / d)
        gradients = location + spread[:, None] * rng.normal(size=(users, d))
        chosen = rng.random(users) < drawn / users
        total = gradients[chosen].sum(0) + noise * clip * rng.normal(size=d)
        errors.append(((total / drawn - location) ** 2).sum())
    return np.mean(errors)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_error_of_a_step_is_that_of_a_simulation(size):
    moments = GradientMoments(2.0, 1.0, 8.0, num_parameters=4)
    sizes = [1, 2, 4, 9]
    found = uls_error(
        size, moments, sizes=sizes, num_users=30, examples_per_step=20, **TARGET
    )
    rng = np.random.default_rng(size)
    simulation = simulated(moments, size, np.array(sizes), 30, 20, rng)
    assert found == pytest.approx(simulation, rel=0.08)


def test_examples_that_are_alike_are_not_worth_a_user():
    choose = partial(uls_group_size, sizes=[64], num_users=1000, **TARGET)
    alike = GradientMoments(1.0, 4.0, 0.0, num_parameters=1000)
    assert choose(alike, examples_per_step=64) == 1
    apart = GradientMoments(1.0, 0.1, 400.0, num_parameters=1000)
    # Large steps: sampling saves little, and more users mean more noise.
    assert choose(apart, examples_per_step=50_000) == 64
    # G is a bound on what users have, and on what a step can look at.
    few = partial(uls_group_size, num_users=1000, **TARGET)
    assert few(apart, sizes=[3, 5], examples_per_step=50_000) == 4
    assert few(apart, sizes=[64], examples_per_step=2) <= 2
    assert choose(apart, examples_per_step=50_000, candidates=[3, 5]) == 5


def test_bad_arguments_are_refused():
    moments = GradientMoments(1.0, 1.0, 1.0, num_parameters=3)
    choose = partial(
        uls_group_size, moments, sizes=[3], num_users=9, examples_per_step=4
    )
    with pytest.raises(ValueError, match="examples_per_step=0 must be"):
        choose(examples_per_step=0, **TARGET)
    with pytest.raises(ValueError, match="num_users=0 must be"):
        choose(num_users=0, **TARGET)
    with pytest.raises(ValueError, match=r"candidates=\[\] must be"):
        choose(candidates=[], **TARGET)
    with pytest.raises(ValueError, match="group_size=0 must be"):
        choose(candidates=[0], **TARGET)
    with pytest.raises(ValueError, match="within=-1"):
        GradientMoments(1.0, 1.0, -1.0, num_parameters=3)
    for users in ([0, 0, 0], [0, 1, 2]):
        data = {**columns(3), "user": torch.tensor(users)}
        with pytest.raises(ValueError, match="of at least two users, one of whom"):
            gradient_moments(make_task(loss=cross_entropy), Dense(), data)
    with pytest.raises(ValueError, match="user='who' must be one of the data's"):
        gradient_moments(make_task(), Dense(), columns(4), user="who")


def test_doctests_pass():
    assert not doctest.testmod(group_size).failed
