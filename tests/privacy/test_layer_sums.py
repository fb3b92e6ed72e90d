"""Clipped sums of one layer: bounds of norms against exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flower_ext.privacy import layer_sums
from flower_ext.privacy.example_gradients import Call
from flower_ext.privacy.layer_sums import Sequences, clipped_layer


def exact(a, b):
    """The squared norm of the sum of outer products, in fractions."""
    a, b = ([[Fraction(x) for x in row] for row in m.tolist()] for m in (a, b))
    return sum(
        sum(v[i] * u[j] for u, v in zip(a, b, strict=True)) ** 2
        for i in range(len(b[0]))
        for j in range(len(a[0]))
    )


def bound_of(a, b):
    layer = nn.Linear(a.shape[1], b.shape[1], bias=False)
    part = Sequences(layer, a[None], b[None], examples=1, additions=len(a) + 1)
    return float(part.norms()[layer.weight])


def cancelling(size, rest, generator):
    """Places in pairs whose terms cancel, but for a rest."""
    a, b = (torch.randn(3, n, generator=generator).double() for n in (4, 2))
    change = rest * torch.randn(3, 4, generator=generator).double()
    return size * torch.cat([a, change - a]), torch.cat([b, b])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.integers(-30, 30),
    rest=st.integers(-20, 0),
    seed=st.integers(0, 10_000),
)
def test_a_bound_is_never_below_the_norm(size, rest, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = cancelling(10.0**size, 10.0**rest, generator)
    assert Fraction(bound_of(a, b)) ** 2 >= exact(a, b)


def test_without_what_rounding_takes_it_would_be():
    below = 0
    for seed in range(20):
        a, b = cancelling(1e6, 1e-9, torch.Generator().manual_seed(seed))
        square = float(((a @ a.T) * (b @ b.T)).sum())
        below += Fraction(square) < Fraction(99, 100) * exact(a, b)
    assert below > 5


def test_ordinary_gradients_have_their_norm():
    torch.manual_seed(0)
    a, b = torch.randn(30, 8).double(), torch.randn(30, 5).double()
    assert bound_of(a, b) == pytest.approx(math.sqrt(exact(a, b)), rel=1e-10)


def test_what_cancels_counts_with_what_a_large_sum_rounds():
    a, b = torch.tensor([[3.0], [-3.0]]).double(), torch.ones(2, 1).double()
    layer = nn.Linear(1, 1, bias=False)
    part = Sequences(layer, a[None], b[None], examples=1000, additions=50_000)
    # A sum of a thousand such examples, after 50,000 additions to each number, in both
    # of two runs, errs by half of a millionth of the clipping norm.
    norm = float(part.norms()[layer.weight])
    assert 2 * 50_000 * 2.0**-53 * 1000 * 6.0 / norm == pytest.approx(0.5e-6)


@pytest.fixture(params=[True, False])
def never_formed(request, monkeypatch):
    monkeypatch.setattr(layer_sums, "_without_forming", lambda *_: request.param)
    monkeypatch.setattr(layer_sums, "_AT_A_TIME", 100)  # 2 examples
    monkeypatch.setattr(layer_sums, "_IN_CACHE", 60)
    return request.param


def sampler(_):
    def formed(layer, inputs, backprops):
        weight = torch.einsum("nti,ntj->nij", backprops, inputs[0])
        return {layer.weight: weight, layer.bias: backprops.sum(1)}

    return formed


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("clip", [0.3, 1e30])
def test_the_sum_is_that_of_the_definition(never_formed, large, clip, monkeypatch):
    monkeypatch.setattr(layer_sums, "_LARGE", 0 if large else 10**6)
    torch.manual_seed(0)
    layer, a, b = nn.Linear(4, 3), torch.randn(7, 5, 4), torch.randn(7, 5, 3)
    b[2, 1, 0] = math.nan
    b[4] = 0.0
    found = clipped_layer([Call(layer, [a], b)], sampler, clip)
    each = sampler(layer)(layer, [a.double()], b.double())
    norms = [g.flatten(1).norm(dim=1) for g in each.values()]
    factors = (clip / torch.stack(norms).norm(dim=0)).clamp(max=1.0)
    fine = factors.isfinite()
    assert fine.tolist() == [True, True, False, True, True, True, True]
    for p, g in each.items():
        expected = torch.einsum("n,n...->...", factors[fine], g[fine])
        torch.testing.assert_close(found[p], expected, rtol=3e-6, atol=3e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=st.integers(-30, 30), rest=st.integers(-14, 0), seed=st.integers(0, 1000))
@pytest.mark.parametrize("never", [True, False])
def test_an_example_moves_a_sum_by_no_more(never, size, rest, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = [cancelling(10.0**size, 10.0**rest, generator) for _ in range(16)]
    a, b = (torch.stack(x).float() for x in zip(*pairs, strict=True))
    layer = nn.Linear(4, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_sums, "_without_forming", lambda *_: never)
        one = clipped_layer([Call(layer, [a], b)], sampler, 0.7)
        b[3] = 0.0
        other = clipped_layer([Call(layer, [a], b)], sampler, 0.7)
    moved = math.sqrt(sum(float((one[p] - x).norm() ** 2) for p, x in other.items()))
    assert moved <= 0.7
