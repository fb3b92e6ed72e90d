"""Muon against torch's, against the polar factor, and what it leaves to the other."""

import numpy as np
import pytest
import torch

from flower_ext.server.optimizers import (
    SGD,
    Adam,
    Muon,
    RefactoredSGD,
    orthogonalized,
)

ROUNDS = 5
SHAPES = {"wide": (3, 8), "tall": (9, 4), "square": (5, 5)}


def draws(shapes, rounds, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return [
        {
            name: random.normal(size=shape).astype(dtype)
            for name, shape in shapes.items()
        }
        for _ in range(rounds)
    ]


def run(optimizer, sent, moves):
    for move in moves:
        sent = optimizer.step(sent, dict(move))
    return sent


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torch_s_up_to_the_rounding_of_bfloat16(nesterov, decay):
    [sent], moves = draws(SHAPES, 1), draws(SHAPES, ROUNDS, seed=1)
    parameters = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in sent.items()}
    theirs = torch.optim.Muon(
        parameters.values(), lr=0.1, weight_decay=decay, nesterov=nesterov
    )
    for move in moves:
        for name, parameter in parameters.items():
            parameter.grad = -torch.tensor(move[name])
        theirs.step()
    found = run(Muon(0.1, nesterov=nesterov, weight_decay=decay), sent, moves)
    for name, parameter in parameters.items():
        expected = parameter.detach().numpy()
        moved = np.linalg.norm(expected - sent[name])
        assert moved > 0.3
        # bfloat16 has three digits, and each of five steps loses some.
        assert np.linalg.norm(found[name] - expected) < 0.02 * moved


@pytest.mark.parametrize("shape", [(20, 20), (6, 40), (40, 6)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    found = orthogonalized(matrix)
    kept = s > 0.02 * np.linalg.norm(matrix)
    # A diagonal matrix in the bases of the singular vectors.
    diagonal = u.T @ found @ v.T
    assert np.all((np.diag(diagonal)[kept] > 0.6) & (np.diag(diagonal)[kept] < 1.25))
    np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-12)
    assert np.linalg.svd(found)[1][: kept.sum()].std() < 0.2


def test_a_step_of_a_number_by_hand():
    # One by one: x = 1 -> a + b + c, five times.
    x = 1.0
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
    assert orthogonalized(np.array([[7.0]])).item() == pytest.approx(x)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_only_the_direction_of_a_change_counts(size):
    [sent, move] = draws(SHAPES, 2, dtype=np.float64)
    expected = Muon().step(sent, dict(move))
    new = Muon().step(sent, {name: size * x for name, x in move.items()})
    for name, array in expected.items():
        np.testing.assert_allclose(new[name], array, rtol=1e-9)


def test_a_change_of_zero_moves_nothing():
    [sent] = draws(SHAPES, 1)
    zeros = {name: np.zeros(x.shape) for name, x in sent.items()}
    for name, array in Muon().step(sent, zeros).items():
        assert array.tobytes() == sent[name].tobytes()


def test_kernels_are_flattened_behind_their_first_axis():
    shapes = {"kernel": (6, 2, 3, 3)}
    [sent, *moves] = draws(shapes, 1 + ROUNDS, dtype=np.float64)
    found = run(Muon(), sent, moves)["kernel"]
    flat = [{"kernel": x["kernel"].reshape(6, 18)} for x in (sent, *moves)]
    expected = run(Muon(), flat[0], flat[1:])["kernel"]
    assert found.tobytes() == expected.tobytes()


def test_what_is_no_matrix_or_excluded_is_moved_by_the_other():
    shapes = {**SHAPES, "bias": (4,), "scale": (), "head.weight": (2, 4)}
    [sent, *moves] = draws(shapes, 1 + ROUNDS)
    rest = ("bias", "scale", "head.weight")
    for make in (lambda: None, Adam, lambda: SGD(0.5, 0.9)):
        found = run(Muon(excluded=("head",), otherwise=make()), sent, moves)
        others = [{name: x[name] for name in rest} for x in (sent, *moves)]
        expected = run(make() or SGD(), others[0], others[1:])
        matrices = [{name: x[name] for name in SHAPES} for x in (sent, *moves)]
        expected |= run(Muon(), matrices[0], matrices[1:])
        for name, array in expected.items():
            assert found[name].tobytes() == array.tobytes()


def test_moments_of_both_are_kept_side_by_side():
    [sent, move] = draws({"w": (2, 2), "b": (2,)}, 2)
    optimizer = Muon(otherwise=Adam())
    optimizer.step(sent, dict(move))
    found = {slot: set(arrays) for slot, arrays in optimizer.state_dict().items()}
    assert found == {
        "momentum": {"w"},
        "otherwise/first": {"b"},
        "otherwise/second": {"b"},
    }
    assert optimizer.kind == "Muon(Adam)"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nesterov": 1}, r"^nesterov=1 must be True or False"),
        ({"weight_decay": -1}, r"^weight_decay=-1 must be a finite number >= 0"),
        ({"num_steps": 0}, r"^num_steps=0 must be an integer >= 1"),
        ({"excluded": "head"}, r"^excluded='head' must be a sequence of words"),
        ({"otherwise": Adam}, r"^otherwise=.* must be a ServerOptimizer: an"),
        (
            {"otherwise": RefactoredSGD()},
            r"^otherwise=.* must be one whose coord",
        ),
    ],
)
def test_bad_arguments(options, error):
    with pytest.raises(ValueError, match=error):
        Muon(**options)
