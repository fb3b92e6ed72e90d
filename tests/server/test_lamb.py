"""LAMB against its equations, against Adam of here and of torch, and by hand."""

import functools
from math import inf, nan

import numpy as np
import pytest
import torch
from private_runs import KINDS, private
from private_runs import run as run_rounds

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.arrays import from_record
from flower_ext.privacy import PerLayerClipping
from flower_ext.server.optimizers import LAMB, Adam, TorchOptimizer

ROUNDS = 6


def model(seed=0):
    random = np.random.default_rng(seed)
    return {
        "w": random.normal(size=(4, 3)),
        "b": 0.01 * random.normal(size=4),
        "scale": np.asarray(random.normal()),
    }


def directions(like, seed=1):
    random = np.random.default_rng(seed)
    return [
        {name: np.asarray(random.normal(size=x.shape)) for name, x in like.items()}
        for _ in range(ROUNDS)
    ]


def run(optimizer, sent, moves):
    for move in moves:
        sent = optimizer.step(sent, dict(move))
    return sent


def by_the_equations(sent, moves, rate, beta_1, beta_2, epsilon, decay):
    """Algorithm 2 of You et al. with gradients -move, in torch, one array at a time."""
    found = {}
    for name, array in sent.items():
        x = torch.tensor(array)
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for t, move in enumerate(moves, 1):
            g = -torch.tensor(move[name])
            m = beta_1 * m + (1 - beta_1) * g
            v = beta_2 * v + (1 - beta_2) * g**2
            r = (m / (1 - beta_1**t)) / (torch.sqrt(v / (1 - beta_2**t)) + epsilon)
            u = r + decay * x
            x = x - rate * x.norm() / u.norm() * u
        found[name] = x.numpy()
    return found


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_paper_s_algorithm(decay):
    sent = model()
    moves = directions(sent)
    settings = (0.05, 0.8, 0.95, 0.01, decay)
    found = run(LAMB(*settings), sent, moves)
    for name, array in by_the_equations(sent, moves, *settings).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-12)


def test_ratios_of_one_are_the_corrected_adam():
    # Adam here adds tau to the root that is not corrected: it vanishes in both.
    sent = model()
    moves = directions(sent)
    lamb = LAMB(0.3, 0.8, 0.95, 1e-300, trust_ratio=(1, 1))
    adam = Adam(0.3, 0.8, 0.95, 1e-300, initial_accumulator=0, bias_correction=True)
    expected = run(adam, sent, moves)
    for name, array in run(lamb, sent, moves).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ratios_of_one_are_torch_s_adamw_with_its_epsilon(decay):
    sent = model()
    moves = directions(sent)
    lamb = LAMB(0.3, 0.8, 0.95, 0.05, decay, trust_ratio=(1, 1))
    factory = functools.partial(
        torch.optim.AdamW, lr=0.3, betas=(0.8, 0.95), eps=0.05, weight_decay=decay
    )
    expected = run(TorchOptimizer(factory), sent, moves)
    for name, array in run(lamb, sent, moves).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-11)


def test_a_layer_moves_by_a_share_of_its_norm_whatever_the_change_s_size():
    sent = model()
    [move, *_] = directions(sent)
    for size in (1e-3, 1.0, 1e3):
        new = LAMB(0.01, tau=1e-12).step(sent, {n: size * x for n, x in move.items()})
        for name, array in sent.items():
            length = np.linalg.norm(new[name] - array)
            assert length == pytest.approx(0.01 * np.linalg.norm(array), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_with_layers_clipped_ratios_of_one_are_adam_in_private_runs(
    kind, task, initial
):
    """The recipe's two halves, under noise of every kind: the same epsilon, too."""
    adam = Adam(0.01, 0.9, 0.99, 1e-30, initial_accumulator=0, bias_correction=True)
    start, found = from_record(initial), []
    rule = PerLayerClipping.by_size(0.5, start)
    for optimizer in (LAMB(0.01, 0.9, 0.99, 1e-30, trust_ratio=(1, 1)), adam):
        make = functools.partial(AdditiveStrategy, server_optimizer=optimizer)
        strategy = private(make, kind, clipping=rule)
        found.append(run_rounds(strategy, client_app(task), start))
    assert found[0][1] == found[1][1]
    for name, array in found[1][0].items():
        np.testing.assert_allclose(found[0][0][name], array, rtol=1e-4, atol=1e-6)
    flat = private(AdditiveStrategy, kind, clipping=0.5)
    assert run_rounds(flat, client_app(task), start)[1] == found[0][1]


def test_the_first_step_by_hand():
    # m/(1 - beta_1) = 1, sqrt(v/(1 - beta_2)) = 1: r = 1/(1 + 1); ratio 5/(sqrt(2)/2).
    new = LAMB(0.1, tau=1.0).step({"w": np.array([3.0, 4.0])}, {"w": np.ones(2)})
    step = 0.1 * 5 / np.sqrt(2)
    assert new["w"].tolist() == pytest.approx([3 + step, 4 + step], rel=1e-12)


def test_arrays_of_zeros_and_changes_of_zero_have_the_ratio_one():
    sent = {"new": np.zeros(3), "still": np.ones(3)}
    new = LAMB(0.1).step(sent, {"new": np.ones(3), "still": np.zeros(3)})
    assert new["new"].tolist() == pytest.approx([0.1] * 3, rel=1e-5)
    assert new["still"].tolist() == [1.0] * 3


def test_bounds_of_the_ratio():
    sent = {"w": np.array([300.0, 400.0])}  # 500 against a step of sqrt(2)
    move = {"w": np.ones(2)}
    for bounds, ratio in [((0, 10), 10), ((1000, inf), 1000), ((0, inf), 500 / 2**0.5)]:
        new = LAMB(0.1, tau=1e-12, trust_ratio=bounds).step(sent, dict(move))
        step = np.float64([0.1 * ratio] * 2)
        np.testing.assert_allclose(new["w"] - sent["w"], step, rtol=1e-9)


def test_an_array_that_rests_keeps_its_own_count():
    moves = directions(model())
    together, apart = LAMB(), LAMB()
    sent = model()
    first = together.step(sent, dict(moves[0]))
    alone = apart.step({"w": sent["w"]}, {"w": moves[0]["w"]})
    apart.step({"b": sent["b"]}, {"b": moves[0]["b"]})
    assert alone["w"].tobytes() == first["w"].tobytes()
    second = together.step(first, dict(moves[1]))
    alone = apart.step(alone, {"w": moves[1]["w"]})
    assert alone["w"].tobytes() == second["w"].tobytes()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"beta_1": 1.0}, r"^beta_1=1.0 must be in the open interval"),
        ({"beta_2": nan}, r"^beta_2=nan must be in the open interval"),
        ({"weight_decay": -0.1}, r"^weight_decay=-0.1 must be a finite number >= 0"),
        ({"trust_ratio": 1.0}, r"^trust_ratio=1.0 must be two numbers"),
        ({"trust_ratio": (-1, 1)}, r"^trust_ratio\[0\]=-1 must be a finite number"),
        ({"trust_ratio": (2, 1)}, r"^trust_ratio\[1\]=1 must be a number >= 2: it is"),
        ({"trust_ratio": (0, 0)}, r"^trust_ratio=\(0, 0\) must be with a largest"),
    ],
)
def test_bad_arguments(options, error):
    with pytest.raises(ValueError, match=error):
        LAMB(**options)


def test_repr_names_the_bounds():
    assert repr(LAMB()).endswith("weight_decay=0, trust_ratio=(0, inf))")
