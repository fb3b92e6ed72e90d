"""Clipped sums of one layer: bounds of norms against exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flower_ext.privacy import layer_sums
from flower_ext.privacy.example_gradients import Call, OuterProducts
from flower_ext.privacy.layer_sums import (
    SINGLE_SLACK,
    Sequences,
    SingleProducts,
    clipped_layer,
)


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


# Sums in float32 ---------------------------------------------------------------------

UNIT = Fraction(1, 2**24)


class Products(TorchDispatchMode):
    """Notes terms and types of the products of matrices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.seen.append((args[0].shape[1], args[0].dtype, args[1].dtype))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.seen = []
        return super().__enter__()


def vectors(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, n, generator=generator) for n in (4, 3)]


def one_vector(a, b, clip, single=True):
    layer = nn.Linear(a.shape[1], b.shape[1])
    found = clipped_layer([Call(layer, [a], b)], sampler, clip, single=single)
    return [found[p].double() for p in layer.parameters()]


def products(a, b, clip=0.5):
    layer_sums._multiplies_in_single()  # tries it the first time
    with Products() as noted:
        one_vector(a, b, clip)
    return noted.seen


@pytest.mark.parametrize("size", [1, 63, 64, 256, 289, 290, 300, 512, 1000, 1300, 4000])
def test_pieces_are_as_small_as_the_bound_of_their_rounding_asks(size):
    seen = products(*vectors(size))
    assert sum(terms for terms, *_ in seen) == size
    if size <= 1000:
        assert {dtype for _, *dtypes in seen for dtype in dtypes} == {torch.float32}
        most = max(terms for terms, *_ in seen)
        assert 2 * size * (most + 1) * UNIT <= Fraction(SINGLE_SLACK)
        assert (len(seen) == 1) == (size <= 289)
    else:
        assert seen == [(size, torch.float64, torch.float64)]


def stagnating(size, below):
    """Terms that all round to the same side, in the second half of a sum."""
    terms = torch.full((size,), (1.0 - below) * 2.0**-16 * size / 256)
    terms[: size // 2] = 1.0
    return terms


def error_and_bound(a, b, weights):
    """Of a sum in float32, squared: in fractions, of the definition."""
    layer = nn.Linear(a.shape[1], b.shape[1], bias=False)
    found = SingleProducts(layer, a, b).weighted_sum(weights)[layer.weight]
    w, a, b = ([Fraction(x) for x in t.flatten().tolist()] for t in (weights, a, b))
    size, p, d = len(w), len(a) // len(w), len(b) // len(w)
    error = sum(
        (
            Fraction(float(found[j, k]))
            - sum(w[i] * b[i * d + j] * a[i * p + k] for i in range(size))
        )
        ** 2
        for j in range(d)
        for k in range(p)
    )
    total = sum(
        float(w[i])
        * math.hypot(*map(float, a[i * p : i * p + p]))
        * math.hypot(*map(float, b[i * d : i * d + d]))
        for i in range(size)
    )
    k = (size + 1) * UNIT
    return error, (k / (1 - k) * Fraction(total)) ** 2


@pytest.mark.parametrize("below", [0.0, 0.25, 0.49, 0.51, 0.75])
def test_no_terms_that_round_to_one_side_err_by_more_than_the_bound(below):
    size = 256
    a, b = stagnating(size, below)[:, None].expand(-1, 2), torch.ones(size, 2)
    error, bound = error_and_bound(a.clone(), b, torch.ones(size).double())
    assert error <= bound


def test_no_terms_that_a_search_finds_err_by_more_than_the_bound():
    generator = torch.Generator().manual_seed(0)
    size, worst, best = 64, Fraction(0), None
    for step in range(60):  # climbs: the worst so far, with some of its numbers new
        a, b = (torch.rand(size, 2, generator=generator) for _ in range(2))
        w = torch.rand(size, generator=generator).double()
        if best is not None:
            keep = torch.rand(size, generator=generator) < 0.9
            a, b = (
                torch.where(keep[:, None], old, new)
                for old, new in zip(best[:2], (a, b), strict=True)
            )
            w = torch.where(keep, best[2], w)
        error, bound = error_and_bound(a, b, w)
        assert error <= bound, step
        if error / bound > worst:
            worst, best = error / bound, (a, b, w)
    # It is float32's rounding that was looked at.
    assert 1e-3 < math.sqrt(worst) <= 1


@pytest.mark.parametrize("width", [1, 4, 16])
def test_rounding_that_one_example_decides_over_is_within_the_slack(width):
    # With the victim the sum is at 128 before the small terms, and below without it,
    # where float32's numbers lie twice as close: they round up, and down. So it moves
    # by a thousandth more than what was not clipped, in sums that go term by term.
    clip = 1.000002
    terms = torch.full((256, 1), 0.625 * 2.0**-16)
    terms[:128] = 1.0
    sums = []
    for victim in (1.0, 0.0):
        root = math.sqrt(width)
        a, b = terms.expand(-1, width).clone() / root, torch.ones(256, width) / root
        a[0] *= victim
        layer = nn.Linear(width, width, bias=False)
        found = clipped_layer([Call(layer, [a], b)], sampler, clip, single=True)
        sums.append(found[layer.weight].double())
    assert 0.98 < float((sums[0] - sums[1]).norm()) <= clip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    exponents=st.tuples(*[st.integers(-44, 38)] * 4),
    clip=st.sampled_from([1e-9, 1e-6, 0.7, 1e6, 1e31]),
    size=st.sampled_from([3, 256, 700]),
    seed=st.integers(0, 1000),
)
def test_an_example_moves_a_sum_in_float32_by_no_more(exponents, clip, size, seed):
    a, b = vectors(size, seed)
    mine, others = slice(1, 2), slice(2, None)
    for x, rows, exponent in zip(
        (a, b, a, b), (mine, mine, others, others), exponents, strict=True
    ):
        x[rows] = (x[rows].double() * 10.0**exponent).float()
    one = one_vector(a, b, clip)
    b[mine] = 0.0
    other = one_vector(a, b, clip)
    moved = math.hypot(
        *(float((x - y).norm()) for x, y in zip(one, other, strict=True))
    )
    assert moved <= clip


@pytest.mark.parametrize("size", [1, 100, 400, 1300])
def test_the_number_of_examples_does_not_change_what_one_is_clipped_to(size):
    a, b = (x[:1].expand(size, -1) for x in vectors(1))
    sums = one_vector(a, b, 0.01)
    norm = math.hypot(*(float(x.norm()) for x in sums)) / size
    assert norm == pytest.approx((1 - SINGLE_SLACK) * 0.01, rel=1e-5)


def as_float64(a, b, clip):
    return one_vector(a, b, (1 - SINGLE_SLACK) * clip, single=False)


def test_sums_in_float32_are_those_in_float64():
    for size in (5, 256, 600):
        a, b = vectors(size)
        for found, expected in zip(
            one_vector(a, b, 0.5), as_float64(a, b, 0.5), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of_inputs", [True, False])
def test_what_is_not_finite_moves_no_sum_in_float32(bad, of_inputs):
    a, b = vectors(9)
    rest = [x[torch.arange(9) != 4] for x in (a, b)]
    (a if of_inputs else b)[4, 1] = bad
    found, expected = one_vector(a, b, 0.5), one_vector(*rest, 0.5)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_batch_of_which_nothing_is_finite_has_no_sum():
    a, b = vectors(3)
    assert all(not x.any() for x in one_vector(a, b * math.nan, 0.5))


def only_double(a, b, clip):
    seen = products(a, b, clip)
    assert [dtypes for _, *dtypes in seen] == [[torch.float64] * 2]


@pytest.mark.parametrize("clip", [1e-7, 1e31])
def test_clipping_norms_near_the_ends_of_float32_are_for_float64(clip):
    only_double(*vectors(5), clip)


def test_long_inputs_are_for_float64():
    a, b = vectors(5)
    a[2] *= 1e10
    only_double(a, b, 0.5)
    for found, expected in zip(
        one_vector(a, b, 0.5), as_float64(a, b, 0.5), strict=True
    ):  # the same factors, though
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_float64_stays_what_it_is():
    a, b = (x.double() for x in vectors(5))
    only_double(a, b, 0.5)
    for found, expected in zip(
        one_vector(a, b, 0.5), one_vector(a, b, 0.5, single=False), strict=True
    ):
        assert torch.equal(found, expected)


def test_products_in_bfloat16_are_not_taken():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        only_double(*vectors(5), 0.5)
    finally:
        torch.set_float32_matmul_precision(before)
    a, b = vectors(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = one_vector(a, b, 0.5)
    for x, y in zip(found, one_vector(a, b, 0.5), strict=True):
        assert torch.equal(x, y)


def test_a_machine_that_rounds_more_is_noticed(monkeypatch):
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda x, y: real(x.bfloat16().float(), y.bfloat16().float()),
    )
    assert not layer_sums._tried.__wrapped__()
    monkeypatch.undo()
    assert layer_sums._tried.__wrapped__()
    monkeypatch.setattr(layer_sums, "_tried", lambda: False)
    only_double(*vectors(5), 0.5)


def test_gradients_that_are_added_up_in_float32_are_outer_products():
    layer, (a, b) = nn.Linear(4, 3), vectors(6)
    weights = torch.rand(6, dtype=torch.float64)
    one, other = (kind(layer, a, b) for kind in (SingleProducts, OuterProducts))
    for p in layer.parameters():
        assert torch.equal(one.norms()[p], other.norms()[p])
        found, expected = (x.weighted_sum(weights)[p] for x in (one, other))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
