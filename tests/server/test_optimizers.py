"""Server optimizers against Flower's, torch's and hand-computed steps."""

import functools
import math
import pickle
from math import inf, nan

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

from flower_ext.core.arrays import layout
from flower_ext.core.spread import Spread
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    FedExP,
    Muon,
    PeriodicSparsity,
    PolynomialSparsity,
    PruneAfter,
    RefactoredSGD,
    TorchOptimizer,
    Yogi,
    apply_direction,
)

ROUNDS = 5


def told():
    """Make a FedExP that has been told how far the clients' changes are apart."""
    optimizer = FedExP()
    optimizer.see(Spread(mean_square=9.0, square_of_mean=1.0))
    return optimizer


EVERY = {
    "sgd": SGD,
    "refactored": RefactoredSGD,
    "momentum": lambda: SGD(0.7, momentum=0.9),
    "nesterov": lambda: SGD(0.7, momentum=0.9, nesterov=True),
    "adagrad": lambda: Adagrad(beta_1=0.5),
    "adam": Adam,
    "adam-corrected": lambda: Adam(bias_correction=True, initial_accumulator=0),
    "yogi": Yogi,
    "lamb": lambda: LAMB(weight_decay=0.01),
    "muon": Muon,
    "muon-otherwise": lambda: Muon(0.1, excluded=("w",), otherwise=Adam()),
    "fedexp": told,
    "pruned": lambda: PruneAfter(Adam(), PolynomialSparsity(0.5, 2, 5)),
    "regrown": lambda: PruneAfter(Adam(), PeriodicSparsity(0.5, 2), "rigl"),
    "torch-adamw": lambda: TorchOptimizer(functools.partial(torch.optim.AdamW, lr=0.1)),
    "torch-momentum": lambda: TorchOptimizer(
        functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    ),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


def model(seed=0):
    """Arrays of every kind that a model has, 0-d ones included."""
    random = np.random.default_rng(seed)
    return {
        "w": random.normal(size=(3, 2)).astype(np.float32),
        "scale": np.asarray(random.normal(), np.float32),
        "half": random.normal(size=4).astype(np.float16),
        "double": random.normal(size=4),
        "bn.running_mean": random.normal(size=2).astype(np.float32),
        "bn.running_var": random.random(size=2).astype(np.float32),
        "bn.num_batches_tracked": np.array(7),
        "mask": np.array([True, False]),
    }


def directions(like, rounds=ROUNDS, seed=1):
    random = np.random.default_rng(seed)
    return [
        {name: np.asarray(random.normal(size=x.shape)) for name, x in like.items()}
        for _ in range(rounds)
    ]


def run(optimizer, sent, moves):
    """Return the models after every step."""
    found = []
    for move in moves:
        sent = optimizer.step(sent, dict(move))
        found.append(sent)
    return found


def assert_same(left, right):
    assert layout(left) == layout(right)
    for name, array in left.items():
        assert array.tobytes() == right[name].tobytes(), name


# Against Flower's strategies ------------------------------------------------------


def compare(aggregate, reply, optimizer, theirs, first_round=1):
    """Run both over several rounds of random float64 replies; compare every model."""
    random = np.random.default_rng(0)
    ours = AdditiveStrategy(server_optimizer=optimizer)
    sent = {"w": random.normal(size=5), "b": np.array(random.normal())}
    other = sent
    for t in range(ROUNDS):
        replies = [
            reply({n: np.asarray(random.normal(size=x.shape)) for n, x in sent.items()})
            for _ in range(3)
        ]
        sent, _ = aggregate(ours, sent, replies, server_round=t + 1)
        other, _ = aggregate(theirs, other, replies, server_round=t + first_round)
        for name, array in other.items():
            np.testing.assert_allclose(sent[name], array, rtol=1e-11, err_msg=str(t))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_sgd_is_flowers_fedavgm(aggregate, reply, momentum):
    theirs = FedAvgM(server_learning_rate=0.3, server_momentum=momentum)
    compare(aggregate, reply, SGD(0.3, momentum), theirs)


def test_adagrad_without_initial_accumulator_is_flowers_fedadagrad(aggregate, reply):
    theirs = FedAdagrad(eta=0.3, tau=0.01)
    ours = Adagrad(0.3, tau=0.01, initial_accumulator=0)
    compare(aggregate, reply, ours, theirs)


def test_yogi_without_initial_accumulator_is_flowers_fedyogi(aggregate, reply):
    theirs = FedYogi(eta=0.3, beta_1=0.8, beta_2=0.95, tau=0.01)
    ours = Yogi(0.3, 0.8, 0.95, 0.01, initial_accumulator=0)
    compare(aggregate, reply, ours, theirs)


def test_corrected_adam_is_flowers_fedadam_told_one_round_less(aggregate, reply):
    # Flower corrects with t + 1 in round t: one more than Kingma and Ba.
    theirs = FedAdam(eta=0.3, beta_1=0.8, beta_2=0.95, tau=0.01)
    ours = Adam(0.3, 0.8, 0.95, 0.01, initial_accumulator=0, bias_correction=True)
    compare(aggregate, reply, ours, theirs, first_round=0)


# Against torch --------------------------------------------------------------------


def torch_run(factory, sent, moves):
    """Let one torch optimizer live through all rounds, on minus the directions."""
    parameters = [torch.nn.Parameter(torch.tensor(x)) for x in sent.values()]
    optimizer = factory(parameters)
    found = []
    for move in moves:
        for parameter, delta in zip(parameters, move.values(), strict=True):
            parameter.grad = -torch.tensor(delta).to(parameter.dtype)
        optimizer.step()
        found.append(
            {
                name: p.detach().numpy().copy()
                for name, p in zip(sent, parameters, strict=True)
            }
        )
    return found


def parameters_of(arrays, dtype):
    return {name: arrays[name].astype(dtype) for name in ("w", "scale", "double")}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9, 1.0])
def test_momentum_is_that_of_torch(momentum, nesterov):
    sent = parameters_of(model(), np.float64)
    moves = directions(sent)
    factory = functools.partial(
        torch.optim.SGD, lr=0.3, momentum=momentum, nesterov=nesterov
    )
    expected = torch_run(factory, sent, moves)
    found = run(SGD(0.3, momentum, nesterov), sent, moves)
    for left, right in zip(found, expected, strict=True):
        for name, array in right.items():
            np.testing.assert_allclose(left[name], array, rtol=1e-12)


def test_corrected_adam_is_that_of_torch_up_to_where_tau_is_added():
    # torch adds eps after the correction of v: with eps = 0 both are Kingma and Ba.
    sent = parameters_of(model(), np.float64)
    moves = directions(sent)
    factory = functools.partial(torch.optim.Adam, lr=0.3, betas=(0.8, 0.95), eps=0)
    expected = torch_run(factory, sent, moves)
    ours = Adam(0.3, 0.8, 0.95, 1e-300, initial_accumulator=0, bias_correction=True)
    for left, right in zip(run(ours, sent, moves), expected, strict=True):
        for name, array in right.items():
            np.testing.assert_allclose(left[name], array, rtol=1e-11)


FACTORIES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {"lr": 0.1}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "centered": True}),
    "rprop": (torch.optim.Rprop, {"lr": 0.1}),
}
factories = pytest.mark.parametrize(
    ("kind", "options"), FACTORIES.values(), ids=FACTORIES.keys()
)


@factories
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_torch_optimizer_steps_as_if_it_lived_through_all_rounds(
    kind, options, dtype
):
    factory = functools.partial(kind, **options)
    sent = parameters_of(model(), dtype)
    moves = directions(sent, rounds=7)
    expected = torch_run(factory, sent, moves)
    for left, right in zip(
        run(TorchOptimizer(factory), sent, moves), expected, strict=True
    ):
        assert_same(left, right)


def test_torch_keeps_float16_models_in_float32_while_it_steps():
    sent = {"half": np.float16([1.0, 2.0])}
    optimizer = TorchOptimizer(functools.partial(torch.optim.SGD, lr=1, momentum=0.5))
    new = optimizer.step(sent, {"half": np.array([0.5, -0.5])})
    assert new["half"].dtype == np.float16
    assert new["half"].tolist() == [1.5, 1.5]
    assert optimizer.state["momentum_buffer"]["half"].dtype == np.float32


# By hand: Algorithm 2 of Reddi et al. 2021 at the defaults, two equal directions ----

DELTA = 0.5


def one_number(optimizer, rounds):
    """The steps taken by one float64 parameter that is moved by DELTA every round."""
    sent = {"w": np.array([0.0])}
    models = run(optimizer, sent, [{"w": np.array([DELTA])}] * rounds)
    values = [0.0, *(float(m["w"][0]) for m in models)]
    return np.diff(values).tolist()


def test_adagrad_by_hand():
    v1 = 1e-6 + 0.25
    v2 = v1 + 0.25
    assert one_number(Adagrad(), 2) == pytest.approx(
        [
            0.1 * 0.5 / (math.sqrt(v1) + 1e-3),
            0.1 * 0.5 / (math.sqrt(v2) + 1e-3),
        ],
        rel=1e-12,
    )


def test_adam_by_hand():
    v1 = 0.99 * 1e-6 + 0.01 * 0.25
    v2 = 0.99 * v1 + 0.01 * 0.25
    m1 = 0.1 * 0.5
    m2 = 0.9 * m1 + 0.1 * 0.5
    assert one_number(Adam(), 2) == pytest.approx(
        [
            0.1 * m1 / (math.sqrt(v1) + 1e-3),
            0.1 * m2 / (math.sqrt(v2) + 1e-3),
        ],
        rel=1e-12,
    )


def test_yogi_by_hand():
    v1 = 1e-6 + 0.01 * 0.25  # v_0 < Delta^2: it grows
    v2 = v1 + 0.01 * 0.25
    m1 = 0.1 * 0.5
    m2 = 0.9 * m1 + 0.1 * 0.5
    assert one_number(Yogi(), 2) == pytest.approx(
        [
            0.01 * m1 / (math.sqrt(v1) + 1e-3),
            0.01 * m2 / (math.sqrt(v2) + 1e-3),
        ],
        rel=1e-12,
    )


def test_yogi_shrinks_its_second_moment_additively():
    # v_0 = 4 > Delta^2 = 0.25: v_1 = 4 - 0.01 * 0.25.
    optimizer = Yogi(initial_accumulator=4.0)
    one_number(optimizer, 1)
    assert optimizer.state["second"]["w"].tolist() == [4 - 0.0025]


@pytest.mark.parametrize(
    ("optimizer", "decimals"),
    [
        (Adagrad(), [0.0998002, 0.0706108]),
        (Adam(), [0.0980202, 0.1327917]),
        (Yogi(), [0.0098020, 0.0132464]),
    ],
)
def test_two_default_steps_of_a_pocket_calculator(optimizer, decimals):
    assert one_number(optimizer, 2) == pytest.approx(decimals, abs=6e-8)


def test_nesterov_by_hand():
    # m: 0.5, 0.95; steps 0.1 (Delta + 0.9 m): 0.095, 0.1355.
    found = one_number(SGD(0.1, momentum=0.9, nesterov=True), 2)
    assert found == pytest.approx([0.095, 0.1355], rel=1e-12)


def test_momentum_by_hand():
    # m: 0.5, 0.95, 1.355.
    found = one_number(SGD(0.1, momentum=0.9), 3)
    assert found == pytest.approx([0.05, 0.095, 0.1355], rel=1e-12)


def test_default_accumulator_is_tau_squared():
    assert Adam(tau=0.5).initial_accumulator == 0.25
    assert Adam(tau=0.5, initial_accumulator=0).initial_accumulator == 0


# What is no parameter -------------------------------------------------------------


@every
def test_statistics_and_counters_are_averaged_plainly(make):
    sent, optimizer = model(), make()
    for move in directions(sent):
        new = optimizer.step(sent, dict(move))
        for name in ("bn.running_mean", "bn.running_var"):
            expected = np.float32(np.float64(sent[name]) + move[name])
            assert new[name].tolist() == expected.tolist()
        counter = sent["bn.num_batches_tracked"] + round(
            float(move["bn.num_batches_tracked"])
        )
        assert new["bn.num_batches_tracked"] == counter
        sent = {**sent, **{k: new[k] for k in ("w", "scale", "double")}}


@every
def test_no_moments_are_kept_of_statistics_and_counters(make):
    optimizer, sent = make(), model()
    run(optimizer, sent, directions(sent))
    kept = {name for arrays in optimizer.state.values() for name in arrays}
    assert kept <= {"", "w", "scale", "half", "double"}


# The contract of every optimizer --------------------------------------------------


@every
def test_names_order_dtypes_and_shapes_are_kept(make):
    sent = model()
    assert layout(run(make(), sent, directions(sent))[-1]) == layout(sent)


@every
def test_every_parameter_moves(make):
    sent = model()
    new = run(make(), sent, directions(sent))[-1]
    for name in ("w", "scale", "half", "double"):
        assert np.all(new[name] != sent[name])


@every
def test_the_model_that_was_sent_is_not_changed(make):
    sent = model()
    before = {name: array.copy() for name, array in sent.items()}
    make().step(sent, directions(sent)[0])
    assert_same(sent, before)


@every
def test_the_first_step_goes_along_the_direction(make):
    sent = {"w": np.zeros(3, np.float32)}
    new = make().step(sent, {"w": np.array([1.0, -1.0, 0.5])})
    assert np.sign(new["w"]).tolist() == [1, -1, 1]


@every
def test_a_saved_state_continues_bit_for_bit(make):
    sent = model()
    moves = directions(sent, rounds=6)
    whole = run(make(), sent, moves)
    first, second = make(), make()
    half = run(first, sent, moves[:3])[-1]
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for left, right in zip(run(second, half, moves[3:]), whole[3:], strict=True):
        assert_same(left, right)


@every
def test_a_loaded_state_is_a_copy(make):
    sent, moves = model(), directions(model())
    first, second = make(), make()
    run(first, sent, moves)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    before = pickle.dumps(state)
    second.load_state_dict(state)
    run(second, sent, moves)
    assert pickle.dumps(state) == before


@every
def test_a_pickled_optimizer_continues_bit_for_bit(make):
    sent = model()
    moves = directions(sent, rounds=4)
    optimizer = make()
    half = run(optimizer, sent, moves[:2])[-1]
    twin = pickle.loads(pickle.dumps(optimizer))
    expected = run(optimizer, half, moves[2:])[-1]
    assert_same(run(twin, half, moves[2:])[-1], expected)


def test_plain_averaging_keeps_no_state():
    optimizer = SGD()
    run(optimizer, model(), directions(model()))
    assert optimizer.state == {}


def test_plain_averaging_adds_the_direction_exactly():
    new = SGD().step({"w": np.float32([1])}, {"w": np.array([2**-20 + 2**-23])})
    assert new["w"].tolist() == [1 + 2**-20 + 2**-23]


@pytest.mark.parametrize(
    ("sent", "direction", "expected"),
    [
        (np.array(250, np.uint8), 3.4, 253),
        (np.array(5), -2.6, 2),
        (np.array(2**60), 1.2, 2**60 + 1),
        (np.array(True), -0.7, False),
        (np.array(2**63 + 5, np.uint64), 4.0, 2**63 + 9),
        (np.array(1.0, np.float16), 0.5, 1.5),
    ],
)
def test_apply_direction_keeps_the_dtype_and_rounds_integers(sent, direction, expected):
    new = apply_direction(sent, np.array(direction))
    assert isinstance(new, np.ndarray)
    assert new.dtype == sent.dtype
    assert new.tolist() == expected


# Bad arguments --------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, nan, inf, True, "1", None])
@pytest.mark.parametrize("kind", [SGD, Adagrad, Adam, Yogi, LAMB, Muon])
def test_a_bad_learning_rate_is_refused(kind, bad):
    with pytest.raises(
        ValueError, match=rf"^learning_rate={bad!r} must be a finite number > 0$"
    ):
        kind(learning_rate=bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, nan, inf, True, "0.9"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SGD, "momentum"),
        (Adagrad, "beta_1"),
        (Adam, "beta_1"),
        (Adam, "beta_2"),
        (Yogi, "beta_1"),
        (Yogi, "beta_2"),
        (Muon, "momentum"),
    ],
)
def test_a_bad_decay_is_refused(kind, name, bad):
    with pytest.raises(ValueError, match=rf"^{name}={bad!r} must be between 0 and 1$"):
        kind(**{name: bad})


@pytest.mark.parametrize("bad", [0.0, -1e-3, nan, inf, True])
@pytest.mark.parametrize("kind", [Adagrad, Adam, Yogi, LAMB])
def test_a_bad_tau_is_refused_with_what_it_is_for(kind, bad):
    with pytest.raises(
        ValueError, match=rf"^tau={bad!r} must be a finite number > 0: it keeps"
    ):
        kind(tau=bad)


@pytest.mark.parametrize("bad", [-1e-9, nan, inf, True])
@pytest.mark.parametrize("kind", [Adagrad, Adam, Yogi])
def test_a_bad_initial_accumulator_is_refused(kind, bad):
    with pytest.raises(
        ValueError, match=rf"^initial_accumulator={bad!r} must be a finite number >= 0$"
    ):
        kind(initial_accumulator=bad)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match=r"^momentum=0.0 must be > 0 with nesterov"):
        SGD(nesterov=True)


@pytest.mark.parametrize("betas", [(1, 0.9), (0.9, 1.0)])
def test_bias_correction_of_a_moment_that_never_decays_is_refused(betas):
    with pytest.raises(ValueError, match="bias_correction=True must be used with"):
        Adam(0.1, *betas, bias_correction=True)


def test_a_torch_optimizer_needs_a_factory():
    with pytest.raises(ValueError, match="factory='adam' must be callable"):
        TorchOptimizer("adam")


# Words ----------------------------------------------------------------------------


def test_repr_names_the_settings():
    assert repr(SGD(0.5, 0.9)) == "SGD(learning_rate=0.5, momentum=0.9, nesterov=0)"


def test_repr_of_a_torch_optimizer_names_its_kind():
    optimizer = TorchOptimizer(functools.partial(torch.optim.AdamW, lr=1))
    assert "torch.optim.adamw.AdamW" in repr(optimizer)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_refactored_sgd_makes_the_same_product(dtype):
    rng = np.random.default_rng(2)
    a, b, other = "q.lora_A.x.weight", "q.lora_B.x.weight", "head.weight"
    shapes = {a: (3, 7), b: (5, 3), other: (2, 2), "mask": ()}
    sent = {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}
    sent["mask"] = np.asarray(-inf, dtype)
    move = {n: rng.standard_normal(s) for n, s in shapes.items()}
    plain = SGD(0.5).step(sent, dict(move))
    new = RefactoredSGD(0.5).step(sent, dict(move))
    assert layout(new) == layout(plain)
    assert np.array_equal(new[other], plain[other])
    wide = {n: x.astype(np.float64) for n, x in (new | {"sgd": plain[a]}).items()}
    product = plain[b].astype(np.float64) @ wide["sgd"]
    near = 1e-5 if dtype == np.float32 else 1e-1
    assert wide[b] @ wide[a] == pytest.approx(product, abs=near)
    u, s, v = np.linalg.svd(product)
    best = s[0] * np.outer(u[:, 0], v[0])
    assert np.outer(wide[b][:, 0], wide[a][0]) == pytest.approx(best, abs=near)
    alone = {n: x for n, x in sent.items() if n != a}
    kept = RefactoredSGD(0.5).step(alone, {n: move[n] for n in alone})
    assert np.array_equal(kept[b], plain[b])  # its partner is frozen
