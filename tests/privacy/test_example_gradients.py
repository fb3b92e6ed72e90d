"""Clipped sums of gradients per example: against one backward pass an example."""

import math

import pytest
import torch
from torch import nn

from flower_ext.privacy import example_gradients
from flower_ext.privacy.example_gradients import (
    Call,
    Explicit,
    OuterProducts,
    Rows,
    clipped_sum,
    parts_of_calls,
)

SIZE = 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def one_by_one(layer, inputs, backprops):
    """Gradients by autograd, of shape ``(examples, *shape)``."""
    found = {p: [] for p in layer.parameters()}
    for one, back in zip(inputs, backprops, strict=True):
        loss = (layer(one[None]) * back[None]).sum()
        for p, gradient in zip(found, torch.autograd.grad(loss, [*found]), strict=True):
            found[p].append(gradient.double())
    return {p: torch.stack(each) for p, each in found.items()}


def linear():
    return nn.Linear(3, 2), torch.randn(SIZE, 3), torch.randn(SIZE, 2)


def embedding():
    tokens = torch.randint(0, 3, (SIZE, 6))  # repeated within an example
    return nn.Embedding(4, 2), tokens, torch.randn(SIZE, 6, 2)


def grid():
    tokens = torch.randint(0, 3, (SIZE, 2, 2))
    return nn.Embedding(4, 2), tokens, torch.randn(SIZE, 2, 2, 2)


def one_token():
    return nn.Embedding(4, 2), torch.randint(0, 3, (SIZE,)), torch.randn(SIZE, 2)


@pytest.mark.parametrize(
    ("part", "make"),
    [(OuterProducts, linear), (Rows, embedding), (Rows, grid), (Rows, one_token)],
)
def test_gradients_that_are_never_formed_are_those_of_autograd(part, make):
    layer, inputs, backprops = make()
    expected = one_by_one(layer, inputs, backprops)
    found = part(layer, inputs, backprops)
    weights = torch.rand(SIZE, dtype=torch.float64)
    weights[2] = 0.0
    sums, norms = found.weighted_sum(weights), found.norms()
    for p, each in expected.items():
        torch.testing.assert_close(norms[p], each.flatten(1).norm(dim=1))
        torch.testing.assert_close(sums[p], torch.einsum("i,i...", weights, each))


@pytest.mark.parametrize("at_a_time", [1, 20, 2**20])
@pytest.mark.parametrize("clip", [0.1, 2.0, 1e30])
def test_a_clipped_sum_is_that_of_the_definition(monkeypatch, at_a_time, clip):
    monkeypatch.setattr(example_gradients, "_AT_A_TIME", at_a_time)
    shapes = [(4, 2), (3,), ()]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    each = {p: torch.randn(SIZE, *p.shape) for p in parameters}
    part = Explicit(
        parameters, SIZE, lambda rows: {p: g[rows] for p, g in each.items()}
    )
    flat = torch.cat([g.reshape(SIZE, -1) for g in each.values()], dim=1).double()
    factors = (clip / flat.norm(dim=1)).clamp(max=1.0)
    found = clipped_sum([part], SIZE, clip)
    for p, g in each.items():
        expected = torch.einsum("i,i...", factors, g.double())
        torch.testing.assert_close(found[p], expected, rtol=2e-6, atol=2e-6)


def of_one(gradients):
    p = nn.Parameter(torch.zeros(gradients.shape[1:]))
    return p, Explicit([p], len(gradients), lambda rows: {p: gradients[rows]})


def test_what_rounds_differently_the_second_time_counts_with_the_larger_norm():
    p = nn.Parameter(torch.zeros(3))
    looks = []

    def of(rows):
        looks.append(rows)
        return {p: torch.full((1, 3), 0.01 if len(looks) == 1 else 1e9)}

    found = clipped_sum([Explicit([p], 1, of)], 1, 1.0)
    assert len(looks) == 2
    assert found[p].norm() <= 1.0


def test_rounding_of_the_sum_does_not_make_an_example_larger(monkeypatch):
    # In float32 steps of three quarters of a unit are lost above 2048, where a unit is
    # twice as large, and are whole units below: one example decides over them all.
    monkeypatch.setattr(example_gradients, "_AT_A_TIME", 1)
    gradients = torch.cat([torch.ones(2049, 1), torch.full((2048, 1), -0.75 / 2**13)])
    sums = []
    for victim in (1.0, 0.0):
        gradients[0] = victim
        p, part = of_one(gradients.clone())
        sums.append(clipped_sum([part], len(gradients), 1.0)[p])
    assert abs(sums[0] - sums[1]) <= 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_example_without_a_finite_gradient_moves_nothing(bad):
    gradients = torch.ones(3, 2)
    gradients[1, 0] = bad
    p, part = of_one(gradients)
    torch.testing.assert_close(
        clipped_sum([part], 3, 10.0)[p], torch.tensor([2.0, 2.0]).double()
    )
    q, other = of_one(torch.ones(3, 2))  # left out where the first is not finite
    assert clipped_sum([part, other], 3, 10.0)[q].tolist() == [2.0, 2.0]
    layer, inputs, backprops = linear()
    expected = one_by_one(layer, inputs, backprops)
    backprops[2, 1], inputs[3, 0] = bad, bad
    found = clipped_sum([OuterProducts(layer, inputs, backprops)], SIZE, 1e9)
    for q, each in expected.items():
        torch.testing.assert_close(found[q], each[[0, 1, 4]].sum(0))
    layer, tokens, backprops = embedding()
    expected = one_by_one(layer, tokens, backprops)
    backprops[2, 1, 0] = bad
    found = clipped_sum([Rows(layer, tokens, backprops)], SIZE, 1e9)
    for q, each in expected.items():
        torch.testing.assert_close(found[q], each[[0, 1, 3, 4]].sum(0))


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e38])
def test_squares_neither_overflow_nor_vanish(size):
    p, part = of_one(torch.tensor([[size, 0.0]]))
    assert float(clipped_sum([part], 1, size / 2)[p][0]) == pytest.approx(size / 2)


def test_layers_that_share_a_parameter_have_one_gradient():
    one, other, alone = (nn.Linear(2, 2, bias=False) for _ in range(3))
    third = nn.Linear(2, 2)
    third.weight = other.weight = one.weight
    values = [(torch.randn(SIZE, 2), torch.randn(SIZE, 2)) for _ in range(4)]
    layers = [one, alone, third, one]
    calls = [Call(m, [a], b) for m, (a, b) in zip(layers, values, strict=True)]

    def sampler(module):
        def explicit(layer, inputs, backprops):
            found = {layer.weight: torch.einsum("ni,nj->nij", backprops, inputs[0])}
            return found if layer.bias is None else {**found, layer.bias: backprops}

        return explicit

    parts = parts_of_calls(calls, sampler)
    assert [type(part) for part in parts] == [OuterProducts, Explicit]
    norms = {p: n for part in parts for p, n in part.norms().items()}
    shared = sum(
        torch.einsum("ni,nj->nij", values[i][1], values[i][0]) for i in (0, 2, 3)
    )
    torch.testing.assert_close(
        norms[one.weight], shared.flatten(1).double().norm(dim=1)
    )
    assert set(norms) == {one.weight, third.bias, alone.weight}


def test_without_gradients_there_is_no_sum():
    assert clipped_sum([], 3, 1.0) == {}
