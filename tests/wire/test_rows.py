"""Rows of matrices: which ones, in how many bytes, and what they are on average."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext.wire import (
    NF4,
    AnyOf,
    Chain,
    Described,
    ErrorFeedback,
    RandomK,
    Rows,
    Sending,
    TopK,
    Voted,
)
from flower_ext.wire.codec import PAYLOAD, num_values
from flower_ext.wire.mask_codes import entropy_bytes
from flower_ext.wire.rows import draw_rows, inclusion, row_norms, shared_rows
from flower_ext.wire.wrappers import upload


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


ARRAYS = {
    "w": normal(20, 6),
    "conv": normal(8, 3, 2, 2),
    "b": normal(20),
    "n": np.array(3),
}


def sent(codec, arrays=ARRAYS, seed=0):
    record = codec.encode(arrays, Sending(np.random.default_rng(seed)))
    return codec.decode(record, arrays)


def rows_of(found):
    return np.flatnonzero(found.reshape(len(found), -1).any(1)).tolist()


def num_bytes(codec, arrays):
    """Return the bytes behind what begins every record of two stages."""
    return len(codec.encode(arrays)[PAYLOAD].numpy()) - (4 + 1 + 2 * 2 + 4 + 8)


# Which rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["round", "client", "norm", "largest"])
def test_whole_rows_travel_and_all_that_has_none(choice):
    found = sent(Rows(0.25, choice))
    for name, count in (("w", 5), ("conv", 2)):
        rows = rows_of(found[name])
        assert len(rows) == count
        assert np.array_equal(found[name][rows], ARRAYS[name][rows])
    assert np.array_equal(found["b"], ARRAYS["b"]) and found["n"] == 3


def test_rows_of_a_round_are_those_of_all_clients_and_change_with_it():
    codec = Rows(0.25)
    drawn = [
        [rows_of(sent(codec.at(r), seed=client)["w"]) for client in range(3)]
        for r in (1, 2, 3)
    ]
    assert all(one == two == three for one, two, three in drawn)
    assert len({tuple(rows[0]) for rows in drawn}) == 3
    again = Rows(0.25, seed=1).at(1)
    assert rows_of(sent(again)["w"]) != drawn[0][0]
    # Of a chain, and of other values, they are the same; another name has its own.
    chained = Chain(Rows(0.25), NF4()).at(1)
    other = {"w": normal(20, 6, seed=9), "v": normal(20, 6)}
    found = sent(chained, other, seed=5)
    assert rows_of(found["w"]) == drawn[0][0] != rows_of(found["v"])


def test_rows_of_clients_are_their_own():
    codec = Rows(0.25, "client").at(1)
    drawn = {tuple(rows_of(sent(codec, seed=client)["w"])) for client in range(5)}
    assert len(drawn) == 5


def test_every_row_is_drawn_alike():
    drawn = np.zeros(20)
    for r in range(1, 501):
        drawn[rows_of(sent(Rows(0.25).at(r), {"w": ARRAYS["w"]})["w"])] += 1
    # Of each row a binomial number, whose standard deviation is 9.7.
    assert np.abs(drawn - 125).max() < 5 * 9.7


def test_the_largest_rows_are_those_of_brute_force():
    x = normal(30, 4)
    x[[3, 8]] = x[5]  # of equal rows those that come first
    found = rows_of(sent(Rows(0.2, "largest"), {"w": x})["w"])
    order = np.argsort(-np.linalg.norm(x.astype(float), axis=1), kind="stable")
    assert found == sorted(order[:6])


def test_tied_arrays_have_the_same_rows():
    arrays = {"a": normal(40, 3), "b": normal(40, 3)}
    for choice in ("round", "client", "norm", "largest"):
        sending = Sending(np.random.default_rng(1), tied={"a": "b"})
        codec = Rows(0.2, choice)
        found = codec.decode(codec.encode(arrays, sending), arrays)
        assert rows_of(found["a"]) == rows_of(found["b"])
        alone = codec.encode({"b": arrays["b"]}, Sending(np.random.default_rng(1)))
        expected = codec.decode(alone, {"b": arrays["b"]})["b"]
        assert rows_of(found["b"]) == rows_of(expected)


def test_what_is_dense_or_not_finite_travels_whole():
    x = normal(20, 6)
    x[3, 1] = np.nan
    found = sent(Rows(0.1, dense=("head",)), {"x": x, "head.weight": ARRAYS["w"]})
    assert np.array_equal(found["x"], x, equal_nan=True)
    assert np.array_equal(found["head.weight"], ARRAYS["w"])


def test_a_single_row_is_the_least():
    assert len(rows_of(sent(Rows(1e-9))["w"])) == 1
    assert np.array_equal(sent(Rows(1e-9), {"w": normal(1, 9)})["w"], normal(1, 9))


# How many bytes -----------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["round", "client"])
@pytest.mark.parametrize(("rows", "columns"), [(20, 6), (7, 1), (1000, 3)])
def test_rows_that_are_drawn_need_no_places(choice, rows, columns):
    arrays = {"w": normal(rows, columns), "b": normal(rows)}
    count = max(int(0.25 * rows), 1)
    expected = 16 + 2 + 4 * (count * columns + rows)
    assert num_bytes(Rows(0.25, choice), arrays) == expected
    assert num_values(Rows(0.25, choice).encode(arrays)) == count * columns + rows


@pytest.mark.parametrize("choice", ["norm", "largest"])
def test_rows_that_are_told_take_a_mask_of_rows(choice):
    arrays = {"w": normal(1000, 3)}
    # The code's name, count and length, and at most a bit for each of the rows.
    taken = num_bytes(Rows(0.1, choice), arrays) - (16 + 1 + 4 * 100 * 3)
    assert 0 < taken <= 1 + 8 + 1.1 * entropy_bytes(100, 1000)


# On average ---------------------------------------------------------------------------


def projections(codec, draws, rows=9):
    """Return P P^T of many draws: what becomes of the unit matrix."""
    unit = {"w": np.eye(rows, dtype=np.float64)}
    return np.stack(
        [sent(codec.at(seed + 1), unit, seed)["w"] for seed in range(draws)]
    )


@pytest.mark.parametrize("choice", ["round", "client", "norm"])
def test_the_mean_of_the_projections_is_the_unit_matrix(choice):
    """E[P P^T] = I, and each has r rows of 1 / (r q)."""
    found = projections(Rows(0.4, choice, rescaled=True), 600)
    assert set(np.unique(found)) == {0.0, 9 / 3}
    assert (np.count_nonzero(found, axis=(1, 2)) == 3).all()
    error = np.abs(found.mean(0) - np.eye(9))
    assert error.max() < 5 * np.sqrt(3 - 1) / np.sqrt(600)


@pytest.mark.parametrize("choice", ["round", "client", "norm"])
def test_it_is_right_on_average(choice):
    x = np.sinh(normal(12, 4))
    x[5] = 0
    draws = 600
    codec = Rows(0.4, choice, rescaled=True)
    found = np.stack(
        [sent(codec.at(i + 1), {"w": x}, i)["w"] for i in range(draws)]
    ).astype(float)
    sigma = np.maximum(found.std(0), found.std(0).mean())
    assert (np.abs(found.mean(0) - x) <= 5 * sigma / np.sqrt(draws)).all()
    assert np.array_equal(found[:, 5], np.zeros((draws, 4)))


def test_draws_by_norm_have_the_least_variance():
    """The closed form: sum of |x_j|^2 (1 / p_j - 1); for uniform draws p_j = r / m."""
    x = np.sinh(2 * normal(12, 4)).astype(np.float32)
    norms = row_norms(x)
    squares = {}
    for choice, p in (("norm", inclusion(norms, 4)), ("client", np.full(12, 4 / 12))):
        codec = Rows(0.4, choice, rescaled=True)
        error = [((sent(codec, {"w": x}, i)["w"] - x) ** 2).sum() for i in range(600)]
        squares[choice] = (norms**2 * (1 / p - 1)).sum()
        sigma = np.std(error) / np.sqrt(600)
        assert abs(np.mean(error) - squares[choice]) < 5 * sigma
    assert squares["norm"] < 0.5 * squares["client"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=1, max_size=30),
    st.integers(1, 30),
)
def test_probabilities_are_in_proportion_as_far_as_they_can(norms, count):
    norms, count = np.array(norms), min(count, len(norms))
    p = inclusion(norms, count)
    positive = np.count_nonzero(norms)
    assert p.sum() == pytest.approx(min(count, positive), abs=1e-9)
    assert (p >= 0).all() and (p <= 1).all() and not p[norms == 0].any()
    unsure = (p < 1) & (norms > 0)
    if unsure.any():
        factors = p[unsure] / norms[unsure]
        assert factors == pytest.approx(factors[0])
        # What is sure would have been drawn at least once.
        assert (norms[p >= 1] * factors[0] >= 1 - 1e-9).all()
    for start in (0.0, 0.37, 1 - 2**-53):
        rows = draw_rows(p, start)
        assert abs(len(rows) - min(count, positive)) <= 1
        assert set(np.flatnonzero(p >= 1)) <= set(rows)
        assert (np.diff(rows) > 0).all()


def test_rows_that_are_hardly_above_zero():
    assert inclusion(np.array([5e-324, 0.0]), 1).tolist() == [1, 0]
    assert inclusion(np.array([1e308, 1e308, 1e308]), 1) == pytest.approx(1 / 3)


def test_rows_that_are_not_finite_come_first():
    for bad in (np.nan, np.inf):
        assert inclusion(np.array([1.0, bad, 2.0]), 1).tolist() == [0, 1, 0]


def test_error_feedback_sends_every_row_in_time():
    codec = ErrorFeedback(Rows(0.25))
    change = {"w": normal(20, 6)}
    kept, total = None, np.zeros((20, 6))
    for r in range(1, 60):
        now = codec.at(r)
        nothing = {"w": np.zeros((20, 6), np.float32)}
        record, kept, _ = upload(now, change if r == 1 else nothing, kept, Sending())
        total += now.decode(record, change)["w"]
    assert np.array_equal(total, change["w"]) and not kept["w"].any()


# What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Rows(0), "density=0 must be in"),
        (lambda: Rows(1.5), "density=1.5"),
        (lambda: Rows(0.5, "top"), "choice='top' must be one of"),
        (lambda: Rows(0.5, "largest", rescaled=True), "rescaled=True must be False"),
        (lambda: Rows(0.5, rescaled=1), "rescaled=1"),
        (lambda: Rows(0.5, seed=-1), "seed=-1"),
        (lambda: Rows(0.5, seed=lambda r: r), "seed="),
        (lambda: Rows(0.5, dense="head"), "dense='head'"),
        (lambda: Chain(TopK(0.5), Rows(0.5), NF4()), "nothing has a shape"),
        (lambda: Chain(Rows(0.5), Rows(0.5), NF4()), "nothing has a shape"),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# The rows that a client knows before it trains ----------------------------------------


def test_rows_of_the_round_are_found_in_any_codec():
    rows = Rows(0.25)
    for codec in (
        rows,
        Chain(rows, NF4()),
        Described(ErrorFeedback(Chain(rows, TopK(0.5), NF4()))),
        ErrorFeedback(Voted(TopK(0.5), rows, tradeoff=0, chosen=1)),
        ErrorFeedback(AnyOf(Chain(rows, NF4()), TopK(0.5))),
    ):
        assert shared_rows(codec.at(3)) == rows.at(3)
        assert shared_rows(codec.at(3)).server_round == 3
    own = (Rows(0.25, choice) for choice in ("client", "norm", "largest"))
    for codec in (None, NF4(), RandomK(0.5), Chain(TopK(0.5), NF4()), *own):
        assert shared_rows(codec) is None


def test_they_are_those_that_travel():
    rows = Rows(0.25).at(4)
    found = sent(Chain(rows, NF4()))
    for name in ("w", "conv"):
        picked = rows.pick(name, ARRAYS[name].shape, lambda: None, rows.round_seed)
        assert picked.rows.tolist() == rows_of(found[name])
    assert rows.pick("b", (20,), lambda: None, rows.round_seed) is None
