"""Users as units in a silo: ELS, ULS and local training of users."""

import doctest
import math
import random
import warnings
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as pld
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg
from one_silo import (
    NOISY,
    NOTHING,
    Conv,
    Dense,
    Filtered,
    Scaled,
    Silo,
    Text,
    Tokens,
    Twice,
    amplifying,
    cancelling,
    close,
    columns,
    cross_entropy,
    first_arrays,
    make_task,
    vector,
)
from torch import nn
from torch.func import functional_call, grad, vmap

import flower_ext.client
from flower_ext import AdditiveStrategy
from flower_ext.audit.bounds import split_counts
from flower_ext.client import (
    DPSGD,
    ELS,
    ULS,
    UserUpdates,
    private_session,
    user_level,
    users,
)
from flower_ext.client.app import client_app
from flower_ext.client.dp_sgd import worst_silo
from flower_ext.client.half import ClientHalf
from flower_ext.client.noisy_steps import PrivateSteps
from flower_ext.client.task import LocalOptimizer
from flower_ext.client.trainer import Plain
from flower_ext.client.user_steps import UserSteps
from flower_ext.client.users import runs_of, side_by_side
from flower_ext.core.arrays import to_record
from flower_ext.privacy import SiloPrivacy, StepLedger
from flower_ext.privacy.accounting.calibration import sampled_epsilon
from flower_ext.privacy.selection import choice_noise_multiplier, noisy_least
from flower_ext.simulation import LocalGrid, PackedGrid
from flower_ext.strategies import Ditto

MODES = ["hooks", "ghost"]
# Users 0 to 4 with five or four examples, one after the other.
SIZE = 23


def private(kind, privacy, most=3, **options):
    promise = SiloPrivacy(**{"max_examples_per_user": most, **privacy})
    return kind(promise, **options)


def silo_of(kind, privacy, task=None, most=3, half=(), **options):
    task = task or make_task(data=columns(SIZE))
    return Silo(task, None, *half, trainer=private(kind, privacy, most, **options))


updates = partial(UserUpdates, users_per_round=2)


@pytest.fixture
def everyone(monkeypatch):
    """Steps draw all users, and divide by as many as they would expect."""

    def draws(self):
        for _ in range(self.plan.count):
            yield torch.arange(self.plan.drawn_from)

    monkeypatch.setattr(PrivateSteps, "draws", draws)


@pytest.fixture
def drawn(monkeypatch):
    """The users that steps draw."""
    found, original = [], PrivateSteps.draws

    def draws(self):
        for chosen in original(self):
            found.append(chosen)
            yield chosen

    monkeypatch.setattr(PrivateSteps, "draws", draws)
    return found


# Where they are one ------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", [Dense, Conv, Tokens])
def test_with_one_example_of_each_user_all_are_dp_sgd_to_the_bit(net, mode):
    data = columns(SIZE)
    data["user"] = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))
    task, arrays = make_task(net, data), first_arrays(net)
    config = {"batch_size": 4, "local_epochs": 2, "momentum": 0.5}
    privacy = {**NOISY, "seed": 3}
    dp_sgd = Silo(task, privacy, mode=mode, release_train_loss=True)
    expected, metrics = dp_sgd.train(arrays, **config)
    for kind in (ELS, ULS):
        options = {"mode": mode, "release_train_loss": True}
        silo = silo_of(kind, privacy, task, most=1, **options)
        found, its = silo.train(arrays, **config)
        close(found, expected, 0)
        assert its["user-epsilon"] == metrics["example-epsilon"]
        assert its["train-loss"] == metrics["train-loss"]


def test_els_is_dp_sgd_with_a_cap_on_users():
    privacy = {**NOISY, "noise_multiplier": 4.0, "seed": 3}
    one = silo_of(ELS, privacy).train(first_arrays(), batch_size=4)
    two = silo_of(DPSGD, privacy).train(first_arrays(), batch_size=4)
    close(one[0], two[0], 0)
    assert one[1] == two[1]


def uls_by_hand(net, arrays, data, seen, clip, most, expected, lr):
    """ULS without noise: gradients per example by torch.func, then per user."""
    model = net()
    model.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()})
    trained = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x, y):
        out = functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(out, y[None])

    names = list(dict.fromkeys(data["user"].tolist()))
    for chosen in seen:
        total = {k: torch.zeros_like(p).double() for k, p in trained.items()}
        for place in chosen.tolist():
            rows = (data["user"] == names[place]).nonzero()[:most, 0]
            of_user = (data["x"][rows], data["y"][rows])
            each = vmap(grad(loss), (None, 0, 0))(trained, *of_user)
            mean = {k: g.double().mean(0) for k, g in each.items()}
            norm = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
            for k in total:
                total[k] += min(1.0, clip / norm) * mean[k]
        for k in trained:
            trained[k] = trained[k] - lr * (total[k] / expected).float()
    return {k: trained.get(k, torch.tensor(a)).numpy() for k, a in arrays.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", [Dense, Conv, Tokens, Scaled])
@pytest.mark.parametrize("clip", [0.05, 0.8])
def test_uls_clips_every_users_mean_gradient_as_torch_func_does(net, mode, clip, drawn):
    data, arrays = columns(SIZE), first_arrays(net)
    data["user"][data["user"] == 1] = 4
    data["user"][[1, 6]] = torch.tensor([1, 5])  # these have one example each
    privacy = {**NOTHING, "clipping_norm": clip, "seed": 2}
    silo = silo_of(ULS, privacy, make_task(net, data), mode=mode)
    found, _ = silo.train(arrays, batch_size=2, local_steps=9, lr=0.5)
    assert len({len(x) for x in drawn}) > 1
    expected = uls_by_hand(net, arrays, data, drawn, clip, 3, 2, 0.5)
    close(found, expected, 1e-5)
    of_examples = uls_by_hand(net, arrays, data, drawn, clip, 1, 2, 0.5)
    assert np.abs(vector(of_examples) - vector(expected)).max() > 1e-3


def test_the_train_loss_of_uls_is_that_of_the_users(everyone):
    data = columns(SIZE)
    silo = silo_of(ULS, {**NOTHING}, make_task(data=data), release_train_loss=True)
    _, metrics = silo.train(first_arrays(), batch_size=5, local_steps=1)
    model = Dense()
    model.load_state_dict({k: torch.tensor(a) for k, a in first_arrays().items()})
    losses = cross_entropy(model, data).detach()
    means = [losses[data["user"] == u][:3].mean() for u in range(5)]
    assert metrics["train-loss"] == pytest.approx(float(np.mean(means)), rel=1e-5)


# What one user can do ----------------------------------------------------------------


def moved_by(kind, weight, net=Dense, privacy=None, most=3, user=2, **config):
    """Return how far a user's examples move a step, over clip / expected."""
    models = []
    for weights in (0.0, weight):
        data = columns(SIZE)
        data["weight"][data["user"] == user] = weights
        promise = {**NOTHING, "clipping_norm": 0.25, **(privacy or {})}
        silo = silo_of(kind, promise, make_task(net, data), most=most)
        reply = {"batch_size": 5, "local_steps": 1, "lr": 1.0, **config}
        models.append(vector(silo.train(first_arrays(net), **reply)[0]))
    return np.linalg.norm(models[1] - models[0]) / (0.25 / 5)


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        (1e-3, 1e-5, 0.1),
        (1e6, 0.999, 1.001),
        (1e30, 0.999, 1.001),  # its square overflows in float32
        (1e-30, 0.0, 1e-6),  # and underflows
        (math.inf, 0.0, 0.0),
        (math.nan, 0.0, 0.0),
    ],
)
def test_one_user_moves_a_step_of_uls_by_at_most_the_clipping_norm(size, low, high):
    def net():
        return nn.Linear(3, 2)

    moved = moved_by(ULS, size, net)
    assert low - 1e-5 <= moved <= high + 1e-5


@pytest.mark.parametrize("most", [1, 3, 4])
@pytest.mark.parametrize("kind", [ELS, ULS])
def test_a_user_whose_examples_agree_moves_the_sum_by_what_is_charged(kind, most):
    models, net = [], partial(nn.Linear, 3, 2)
    for weight in (0.0, 1e6):
        data = columns(20)  # four of each user
        own = data["user"] == 2
        data["x"][own], data["y"][own], data["weight"][own] = torch.ones(3), 1, weight
        trainer = private(kind, {**NOTHING, "clipping_norm": 0.25}, most)
        silo = Silo(make_task(net, data), None, trainer=trainer)
        everyone = 5 if kind is ULS else 5 * most
        config = {"batch_size": everyone, "local_steps": 1, "lr": 4.0 * everyone}
        models.append(vector(silo.train(first_arrays(net), **config)[0]))
    moved = np.linalg.norm(models[1] - models[0])
    charged = trainer.sensitivity(trainer.privacy(None))
    assert charged == (1 if kind is ULS else most)
    assert moved == pytest.approx(charged, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", [Text, Filtered, Twice])
@pytest.mark.parametrize(
    ("weights", "large", "rest"),
    [
        (cancelling, 1.5e6, 300.0),
        (cancelling, 1e20, 1.0),
        (amplifying, 1e8, 1.0),
        (amplifying, 1e-25, 1e-25),
    ],
)
def test_no_weights_let_one_user_move_a_step_by_more(mode, net, weights, large, rest):
    generator = torch.Generator().manual_seed(0)
    size = 24
    tokens = torch.randint(2, 8, (size, 16), generator=generator)
    tokens[5] = torch.tensor([0, 1] * 8)
    # What the one token does to an example, the other undoes in the user's next.
    tokens[13], tokens[21] = 0, 1
    labels = torch.randint(0, 3, (size,), generator=generator)
    arrays, found = weights(net, large, rest), []
    for weight in (0.0, 1.0):
        data = {"x": tokens, "y": labels, "weight": torch.ones(size)}
        data["user"] = torch.arange(size) % 8
        data["weight"][5::8] = weight
        silo = silo_of(
            ULS, {**NOTHING, "clipping_norm": 1.0}, make_task(net, data), mode=mode
        )
        reply = silo.send(arrays, batch_size=8, local_steps=1, lr=8.0)
        assert reply.has_content()
        new = {name: a.numpy() for name, a in reply.content["arrays"].items()}
        found.append({k: new[k].astype(float) - arrays[k] for k in arrays})
    # A change is lost in the rounding of a large weight, which comes after the noise.
    read = [k for k in arrays if np.abs(arrays[k]).max() < 10]
    moved = np.linalg.norm(vector({k: found[1][k] - found[0][k] for k in read}))
    assert moved <= 1 + 1e-4


def test_examples_of_a_user_that_are_apart_are_not_clipped_apart():
    order = side_by_side(torch.tensor([7, 3, 7, 9, 3]))
    assert order.tolist() == [0, 2, 1, 4, 3]
    places, counts = runs_of(torch.tensor([7, 7, 3, 3, 9]))
    assert places.tolist() == [0, 0, 1, 1, 2] and counts.tolist() == [2, 2, 1]
    with pytest.raises(ValueError, match="must be side by side"):
        runs_of(torch.tensor([7, 3, 7]))


class Recorded(ClientHalf):
    """Keeps what a step releases, for the test alone."""

    name = "recorded"
    post_processing = True
    released: list

    def after_backward(self, model):
        self.released.append(model.weight.grad.clone().numpy().ravel())


def scores(trainer, steps, present, batch_size):
    """Return what an attacker reads in each step, who looks for one user."""
    data = columns(20)
    own = data["user"] == 2
    data["weight"][:] = 1e-9
    data["weight"][own] = 1e6 * present
    data["x"][own], data["y"][own] = torch.ones(3), 1
    net = partial(nn.Linear, 3, 2, bias=False)
    half = type("Recorded", (Recorded,), {"released": [], "post_processing": True})
    silo = Silo(make_task(net, data), None, half, trainer=trainer)
    silo.train(
        first_arrays(net),
        client_half="recorded",
        batch_size=batch_size,
        local_steps=steps,
        lr=0.0,
    )
    found = np.stack(half.released).astype(float)
    # The gradient of a step on this user's examples.
    direction = np.repeat([1.0, -1.0], 3)
    return found @ direction / np.linalg.norm(direction)


def attacked(kind, batch_size, noise=0.8):
    """Return the least shift of a step's sum, in standard deviations of its noise."""
    privacy = {"noise_multiplier": noise, "clipping_norm": 1.0, "delta": 1e-3}
    trainer = private(kind, {**privacy, "seed": 1}, 4)
    read = [scores(trainer, 400, present, batch_size) for present in (1.0, 0.0)]
    return split_counts(*read, lambda counts: counts.mu()).mu(confidence=0.999)


def test_an_attack_on_a_user_finds_what_is_claimed_and_no_more(monkeypatch):
    assert 0.4 / 0.8 < attacked(ULS, 5) <= 1 / 0.8
    assert 2 / 0.8 < attacked(ELS, 20) <= 4 / 0.8
    # Were each example clipped by itself, the user would move the sum by more.
    monkeypatch.setattr(UserSteps, "counts", lambda self, batch: None)
    assert attacked(ULS, 5) > 1 / 0.8


# Users that are drawn ----------------------------------------------------------------


@pytest.mark.parametrize("seed", [6, None])
def test_every_user_is_drawn_independently_with_all_its_examples(seed, drawn):
    batches, steps, rate = [], 1000, 0.25
    size = torch.Generator().manual_seed(0)
    data = {"x": torch.zeros(60, 1), "i": torch.arange(60)}
    data["user"] = torch.randint(0, 20, (60,), generator=size)
    num_users = len(data["user"].unique())

    def loss(model, batch):
        batches.append(batch)
        return 0 * model(batch["x"]).sum(1)

    net = partial(nn.Linear, 1, 1)
    silo = silo_of(ULS, {**NOTHING, "seed": seed}, make_task(net, data, loss), most=2)
    silo.train(first_arrays(net), batch_size=5, local_steps=steps)
    table = np.zeros((steps, num_users))
    for row, chosen in zip(table, drawn, strict=True):
        row[chosen.numpy()] = 1
    rate = 5 / num_users
    z = (table.mean(0) - rate) / math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(z).max() < 5
    centred = (table - rate) / math.sqrt(rate * (1 - rate))
    pairs = centred.T @ centred / math.sqrt(steps)
    assert np.abs(pairs[np.triu_indices(num_users, 1)]).max() < 5.5
    follow = (centred[1:] * centred[:-1]).sum(0) / math.sqrt(steps)
    assert np.abs(follow).max() < 5
    names = list(dict.fromkeys(data["user"].tolist()))
    found = [sorted(b["i"].tolist()) for b in batches[-200:]]
    kept = {u: (data["user"] == u).nonzero()[:2, 0].tolist() for u in names}
    expected = [
        sorted(i for place in chosen.tolist() for i in kept[names[place]])
        for chosen in drawn
        if len(chosen)
    ]
    assert found == expected[-200:]


@pytest.mark.parametrize("kind", [ULS, updates])
def test_noise_on_the_sum_has_the_promised_standard_deviation(kind):
    def net():
        return nn.Linear(200, 50)

    def flat(model, batch):
        return 0 * model(batch["x"]).sum(1)

    data = {"x": torch.ones(40, 200), "user": torch.arange(40) % 8}
    arrays = {k: 0 * a for k, a in first_arrays(net).items()}
    privacy = {"noise_multiplier": 1.5, "clipping_norm": 0.2, "delta": 1e-3, "seed": 4}
    silo = silo_of(kind, privacy, make_task(net, data, flat))
    found, _ = silo.train(arrays, batch_size=2, local_steps=1, lr=1.0)
    noise, std = vector(found) * 2, 1.5 * 0.2  # two users are expected
    # z-bounds of 5, which a right code fails with probability below 1e-6
    assert abs(noise.std() / std - 1) < 5 / math.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 5 * std / math.sqrt(noise.size)


@pytest.mark.parametrize(
    ("kind", "config", "name"),
    [
        (ULS, {"batch_size": 6}, "batch-size=6 > users=5"),
        (partial(UserUpdates, users_per_round=9), {}, "users_per_round=9 > users=5"),
    ],
)
def test_a_silo_with_too_few_users_takes_all_and_says_so(kind, config, name, drawn):
    with pytest.warns(UserWarning, match=name):
        _, metrics = silo_of(kind, NOISY).train(first_arrays(), local_steps=1, **config)
    assert [x.tolist() for x in drawn] == [[0, 1, 2, 3, 4]]
    assert metrics["user-epsilon"] == StepLedger().add(1.0, 1.0, 1).epsilon(1e-3)


def test_an_epoch_of_uls_goes_through_the_users(drawn):
    silo_of(ULS, NOISY).train(first_arrays(), batch_size=2, local_epochs=4)
    assert len(drawn) == 4 * 3


# What is charged ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "noise", "epsilon", "digits"),
    [
        (1, 1.0, 2.1253, 4),
        (4, 1.0, 10.02, 2),
        (4, 4.0, 1.4175, 4),
        (16, 4.0, 6.65, 2),
        (16, 16.0, 1.376, 3),
    ],
)
def test_els_is_charged_as_a_mixture_of_gaussians(group, noise, epsilon, digits):
    """Beside dp-accounting's own mixture; G = 1 is the Poisson-sampled Gaussian."""
    promise = SiloPrivacy(
        noise_multiplier=noise,
        clipping_norm=1.0,
        delta=1e-6,
        max_examples_per_user=group,
    )
    ledger = StepLedger.read(None, promise, ELS(promise).sensitivity(promise))
    found = ledger.add(0.01, noise, 1000).epsilon(1e-6)
    assert found == pytest.approx(epsilon, abs=10**-digits)
    uls = StepLedger.read(None, promise, ULS(promise).sensitivity(promise))
    of_one = pld.from_gaussian_mechanism(
        noise, sampling_prob=0.01, value_discretization_interval=1e-4
    )
    assert uls.add(0.01, noise, 1000).epsilon(1e-6) == pytest.approx(
        of_one.self_compose(1000).get_epsilon_for_delta(1e-6), rel=2e-2
    )


@pytest.mark.parametrize("most", [1, 3])
def test_uls_costs_the_same_whatever_the_number_of_examples(most):
    _, metrics = silo_of(ULS, NOISY, most=most).train(
        first_arrays(), batch_size=2, local_steps=7
    )
    expected = sampled_epsilon(7, 1e-3, 1.0, 2 / 5, 1, 1e-3)
    assert metrics["user-epsilon"] == expected
    assert metrics["user-delta"] == 1e-3


def test_a_message_is_one_step_of_user_updates_whatever_its_epochs():
    silo = silo_of(updates, NOISY)
    for server_round in (1, 2):
        _, metrics = silo.train(
            first_arrays(), batch_size=2, local_epochs=3, server_round=server_round
        )
        expected = sampled_epsilon(server_round, 1e-3, 1.0, 2 / 5, 1, 1e-3)
        assert metrics["user-epsilon"] == expected
    found, metrics = silo.train(first_arrays(), local_epochs=0, server_round=3)
    close(found, first_arrays(), 0)
    assert metrics["user-epsilon"] == expected


def test_a_target_is_met_by_steps_that_draw_users():
    target = {"epsilon": 2.0, "delta": 1e-3, "num_rounds": 3, "clipping_norm": 1.0}
    for kind in (ULS, updates):
        silo = silo_of(kind, target)
        for server_round in (1, 2, 3):
            config = {"batch_size": 2, "server_round": server_round}
            _, metrics = silo.train(first_arrays(), **config)
        assert 2.0 * 0.999 < metrics["user-epsilon"] <= 2.0
        with pytest.raises(RuntimeError, match="SiloBudgetExhausted: round 4 would"):
            silo.train(first_arrays(), batch_size=2, server_round=4)


def test_a_ledger_counts_what_all_trainers_spend_on_its_users(tmp_path):
    privacy = {**NOISY, "ledger": tmp_path / "ledger.json"}
    spent, rates = [], []
    for kind, most, rate in [(ULS, 3, 2 / 5), (ELS, 1, 2 / 5), (updates, 2, 2 / 5)]:
        silo = silo_of(kind, privacy, most=most)
        _, metrics = silo.train(first_arrays(), batch_size=2, local_steps=1)
        spent.append(metrics["user-epsilon"])
        rates.append(rate)
    steps = [sampled_epsilon(n, 1e-3, 1.0, 2 / 5, 1, 1e-3) for n in (1, 2, 3)]
    assert spent == steps
    # Of three examples a step of ELS may show more.
    silo_of(ELS, {**privacy, "noise_multiplier": 4.0}, most=3).train(
        first_arrays(), batch_size=3, local_steps=2
    )
    one = StepLedger(1, unit="user").add(2 / 5, 1.0, 3)
    ledger = StepLedger.load(tmp_path / "ledger.json")
    assert ledger.steps == {(2 / 5, 1.0, 1): 3, (3 / 15, 4.0, 3): 2}
    assert ledger.epsilon(1e-3) > one.epsilon(1e-3)
    with pytest.raises(RuntimeError, match="max_examples_per_user=None must be of us"):
        Silo(make_task(), privacy).train(first_arrays(), batch_size=2)
    assert StepLedger.load(tmp_path / "ledger.json") == ledger


# Local training of users --------------------------------------------------------------


@pytest.mark.parametrize("config", [{"local_epochs": 3}, {"local_steps": 2}])
def test_one_user_without_clipping_and_noise_is_a_client_of_fedavg(config):
    data = columns(SIZE)
    data["user"][:] = 7
    task = make_task(data=data)
    config |= {"batch_size": 4, "lr": 0.3, "momentum": 0.5, "max_gradient_norm": 0.5}
    trainer = private(UserUpdates, NOTHING, SIZE, users_per_round=1)
    found, metrics = Silo(task, None, trainer=trainer).train(first_arrays(), **config)
    plain, _ = Silo(task, None, trainer=Plain()).train(first_arrays(), **config)
    close(found, plain, 0)
    assert metrics["num-examples"] == SIZE and "train-loss" not in metrics
    assert np.abs(vector(found) - vector(first_arrays())).max() > 0.05


@pytest.mark.parametrize("clip", [0.02, 0.3, 1e6])
def test_a_silo_sends_the_mean_of_its_users_clipped_changes(clip, monkeypatch):
    chosen = torch.tensor([0, 2, 3])
    monkeypatch.setattr(PrivateSteps, "draws", lambda self: iter([chosen]))
    data, arrays = columns(SIZE), first_arrays()
    config = {"batch_size": 2, "local_epochs": 2, "lr": 0.4, "momentum": 0.5}
    privacy = {**NOTHING, "clipping_norm": clip}
    found, _ = silo_of(updates, privacy, most=4).train(arrays, **config)
    total = 0.0
    for user in chosen.tolist():  # in the data's order users are 0, 1, 2, 3, 4
        own = {k: x[data["user"] == user][:4] for k, x in data.items()}
        silo = Silo(make_task(data=own), None, trainer=Plain())
        change = vector(silo.train(arrays, **config)[0]) - vector(arrays)
        total += change * min(1.0, clip / np.linalg.norm(change))
    np.testing.assert_allclose(
        vector(found), vector(arrays) + total / 2, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("clip", [0.05, 5.0])
def test_one_local_step_on_all_examples_is_a_step_of_uls(clip):
    """A change of one SGD step is the gradient, times the learning rate."""
    rate, config = 0.3, {"local_steps": 1, "lr": 0.3}
    gradients = silo_of(ULS, {**NOTHING, "clipping_norm": clip})
    one, _ = gradients.train(first_arrays(), batch_size=5, **config)
    changes = silo_of(
        partial(UserUpdates, users_per_round=5),
        {**NOTHING, "clipping_norm": rate * clip},
    )
    two, _ = changes.train(first_arrays(), batch_size=3, **config)
    close(one, two, 1e-6)


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 6)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        hidden = torch.tanh(self.hidden(x))
        if self.training:
            self.calls += 1
            self.mean += hidden.detach().mean(0)
        return self.out(self.drop(hidden)) + self.mean[0] + self.calls


def test_one_user_moves_a_round_by_at_most_the_clipping_norm(monkeypatch, everyone):
    """The others start from the same model, whatever layers keep of a user."""
    monkeypatch.setattr(PrivateSteps, "dropout_seed", lambda self: 5)
    kind = partial(UserUpdates, users_per_round=5)
    config = {"local_steps": 4, "batch_size": 2, "lr": 1.0}
    assert moved_by(kind, 1e4, Dropped, **config) == pytest.approx(1, rel=1e-3)
    assert moved_by(kind, math.nan, Dropped, **config) == 0.0
    silo = silo_of(kind, NOTHING, make_task(Dropped, columns(SIZE)))
    found, _ = silo.train(first_arrays(Dropped), **config)
    np.testing.assert_array_equal(found["mean"], first_arrays(Dropped)["mean"])


def augmented(model, batch):
    """A loss that draws from every global generator."""
    noise = np.random.random() + random.random() + float(torch.rand(()))  # noqa: NPY002
    x = batch["x"] + noise
    losses = nn.functional.cross_entropy(model(x), batch["y"], reduction="none")
    return batch["weight"] * losses


def test_what_one_user_draws_does_not_change_what_others_do(monkeypatch):
    """Here all but the last user, who is the same in both, take fewer steps."""
    monkeypatch.setattr(PrivateSteps, "dropout_seed", lambda self: 5)
    chosen = torch.tensor([4])
    found = []
    for others in (torch.arange(5), chosen):
        monkeypatch.setattr(PrivateSteps, "draws", lambda self, u=others: iter([u]))
        data = columns(SIZE)
        data["weight"][data["user"] != 4] = 0.0
        task = make_task(data=data, loss=augmented)
        silo = silo_of(updates, NOTHING, task)
        found.append(silo.train(first_arrays(), local_steps=2, batch_size=2)[0])
    close(*found, 0)
    assert np.abs(vector(found[0]) - vector(first_arrays())).max() > 1e-3


def test_frozen_parameters_have_no_noise():
    for kind in (ULS, updates):
        found, _ = silo_of(kind, NOISY).train(first_arrays(), batch_size=2)
        for name, array in first_arrays().items():
            same = np.array_equal(found[name], array)
            assert same == name.startswith("frozen")


# Other rules -------------------------------------------------------------------------


def test_no_way_of_drawing_has_the_noise_of_another():
    """Of two sums with one noise the difference would be the data's alone."""
    data, found = columns(20), []
    privacy = {**NOISY, "noise_multiplier": 1e6, "seed": 5}
    data["user"] = data["user"].sort().values  # ULS has them in this order
    for kind in (ELS, ULS, partial(UserUpdates, users_per_round=20)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all are drawn
            silo = silo_of(kind, privacy, make_task(data=data), most=4)
            new, _ = silo.train(first_arrays(), batch_size=20, local_steps=1, lr=1.0)
        noise = vector(new) - vector(first_arrays())
        found.append(noise[noise != 0])
    matrix = np.corrcoef(found)
    assert np.abs(matrix - np.eye(3)).max() < 5 / math.sqrt(len(found[0]))


def test_a_second_model_is_charged_as_the_first():
    for kind, steps in ((ULS, 3), (updates, 1)):
        silo = silo_of(kind, NOISY, half=[Ditto.client_half])
        _, metrics = silo.train(
            first_arrays(),
            client_half="ditto",
            ditto_strength=0.1,
            batch_size=2,
            local_epochs=1,
        )
        expected = sampled_epsilon(2 * steps, 1e-3, 1.0, 2 / 5, 1, 1e-3)
        assert metrics["user-epsilon"] == expected


@pytest.mark.parametrize("hook", ["optimizer", "after_backward"])
def test_a_half_that_sees_a_users_gradients_cannot_have_its_users_trained(hook):
    half = type("Looking", (ClientHalf,), {"post_processing": True})
    setattr(half, hook, lambda self, what: None)
    half.name = "looking"
    private(ULS, NOISY).admit(half)
    with pytest.raises(ValueError, match=f"UserUpdates: its {hook} would be given"):
        private(updates, NOISY).admit(half)

    class Hiding(ClientHalf):
        """Has the half that looks trained by the session."""

        name, post_processing, num_trainings = "hiding", True, 2

        def after_training(self, local):
            local.session.train(local.with_model(local.start), half())

    silo = silo_of(updates, NOISY, half=[Hiding])
    reply = silo.send(first_arrays(), client_half="hiding")
    assert f"its {hook} would be given" in reply.error.reason


class Masked(ClientHalf):
    """Sets what is small to zero."""

    name = "masked"
    post_processing = True

    def after_step(self, local):
        self.steps = getattr(self, "steps", 0) + 1
        with torch.no_grad():
            for p in local.model.parameters():
                p[p.abs() < 0.3] = 0.0

    def records(self, local):
        return {}, {"steps": self.steps}


def test_what_comes_after_a_step_comes_after_the_noise():
    silo = silo_of(updates, NOISY, half=[Masked])
    found, metrics = silo.train(
        first_arrays(), client_half="masked", local_epochs=3, batch_size=1
    )
    assert metrics["steps"] == 1
    new = vector(found)
    assert (new == 0).any() and not (np.abs(new[new != 0]) < 0.3).any()


class Normalised(Dense):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)


class Remembering(LocalOptimizer):
    def make(self, parameters, local):
        return torch.optim.SGD(parameters.values(), lr=0.1)


def foreign(parameters, settings):
    return torch.optim.SGD([*parameters, nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (lambda: make_task(Normalised, columns(SIZE)), "layer='BatchNorm1d' must be"),
        (
            lambda: make_task(data=columns(SIZE), optimizer=Remembering()),
            "Task.optimizer='Remembering' must be a function",
        ),
        (
            lambda: make_task(data=columns(SIZE), optimizer=foreign),
            "Task.optimizer must train the parameters that it is given",
        ),
        (
            lambda: make_task(lambda: nn.Linear(3, 2).requires_grad_(False)),
            "model='Linear' must be one with parameters to train",
        ),
    ],
)
def test_what_one_user_could_leave_for_the_next_is_refused(task, why):
    net = task().model({})
    arrays = {name: x.numpy() for name, x in net.state_dict().items()}
    silo = silo_of(updates, NOISY, task())
    reply = silo.send(arrays, batch_size=2)
    assert reply.has_error() and why in reply.error.reason
    assert not [k for k in silo.state() if k.startswith("account")]


@pytest.mark.parametrize("kind", [ELS, ULS, updates])
def test_users_must_be_told(kind):
    trainer = kind(SiloPrivacy(**NOISY))
    with pytest.raises(RuntimeError, match="max_examples_per_user=None must be given"):
        Silo(make_task(), None, trainer=trainer).train(first_arrays())
    silo = silo_of(kind, {**NOISY, "user": "patient"})
    with pytest.raises(RuntimeError, match="user='patient' must be one of the data's"):
        silo.train(first_arrays())
    with pytest.raises(ValueError, match="max_examples_per_user=0 must be"):
        private(kind, NOISY, 0)


def test_bad_arguments_are_refused_with_name_value_and_bound():
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"users_per_round={wrong} must be"):
            private(UserUpdates, NOISY, users_per_round=wrong)
    with pytest.raises(ValueError, match="mode='fast' must be one of"):
        private(ULS, NOISY, mode="fast")


def test_a_delta_that_allows_to_publish_a_user_is_warned_of():
    with pytest.warns(UserWarning, match="delta=0.21 should be < 1 / users=0.2"):
        silo_of(ULS, {**NOISY, "delta": 0.21}).train(first_arrays(), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silo_of(ULS, {**NOISY, "delta": 0.19}).train(first_arrays(), batch_size=2)


def test_a_silo_without_examples_spends_nothing():
    data = {name: column[:0] for name, column in columns(2).items()}
    for kind in (ELS, ULS, updates):
        silo = silo_of(kind, NOISY, make_task(data=data))
        found, metrics = silo.train(first_arrays())
        assert metrics["num-examples"] == 0 and metrics["user-epsilon"] == 0.0
        close(found, first_arrays(), 0)


@pytest.mark.parametrize("kind", [ELS, ULS, updates])
def test_a_federation_of_silos_under_flowers_fedavg(kind):
    def data(context):
        found = columns(40, seed=context.node_config["partition-id"])
        return found, found

    task = make_task()
    task = type(task)(task.model, data, task.loss)
    privacy = {**NOISY, "noise_multiplier": 4.0}
    app = client_app(task, trainer=private(kind, privacy))
    strategy = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=worst_silo)
    config = ConfigRecord({"batch-size": 2, "lr": 0.1, "local-steps": 2})
    result = strategy.start(
        LocalGrid(app, 3), to_record(first_arrays()), 2, train_config=config
    )
    steps = 2 if kind is updates else 4
    group = 3 if kind is ELS else 1
    rate = 2 / 15 if kind is ELS else 2 / 5
    expected = sampled_epsilon(steps, 1e-3, 4.0, rate, group, 1e-3)
    found = result.train_metrics_clientapp[2]["user-epsilon"]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("kind", [ULS, updates])
def test_a_run_that_goes_on_in_other_workers_ends_where_one_without_a_break_does(
    tmp_path, kind
):
    def run(folder, rounds, grid, ledgers):
        def privacy(context):
            ledger = tmp_path / ledgers / f"{context.node_config['partition-id']}.json"
            promise = {**NOISY, "max_examples_per_user": 3, "max_epsilon": 6.0}
            return SiloPrivacy(**promise, ledger=ledger, seed=3)

        (tmp_path / ledgers).mkdir(exist_ok=True)
        app = client_app(make_task(data=columns(SIZE)), trainer=kind(privacy))
        strategy = AdditiveStrategy(
            train_metrics_aggr_fn=worst_silo, fraction_evaluate=0.0
        )
        with grid(app) as opened:
            return strategy.start(
                opened,
                to_record(first_arrays()),
                num_rounds=rounds,
                checkpoint=tmp_path / folder,
                train_config=ConfigRecord({"batch-size": 2, "local-steps": 1}),
            )

    def workers(app):
        return PackedGrid(num_clients=2, client_app=app, num_workers=1)

    whole = run("whole", 3, lambda app: nullcontext(LocalGrid(app, 2)), "one")
    run("parts", 1, workers, "other")
    resumed = run("parts", 3, workers, "other")
    assert resumed.train_metrics_clientapp == whole.train_metrics_clientapp
    spent = sampled_epsilon(3, 1e-3, 1.0, 2 / 5, 1, 1e-3)
    assert whole.train_metrics_clientapp[3]["user-epsilon"] == spent
    new, old = ({k: a.numpy() for k, a in r.arrays.items()} for r in (resumed, whole))
    close(new, old, 0)


class Choosing(ClientHalf):
    """Takes the better of the received model and of zeros."""

    name = "choosing"
    post_processing = True

    def receive(self, local, arrays):
        models = [arrays, {k: 0 * x for k, x in arrays.items()}]
        return models[local.best_of(models)]


def test_a_choice_is_noised_for_all_examples_of_a_user_and_charged_once(
    tmp_path, monkeypatch
):
    scales = []

    def spy(scores, scale, uniforms):
        scales.append(scale)
        return noisy_least(scores, scale, uniforms)

    monkeypatch.setattr(private_session, "noisy_least", spy)
    choice = {"selection_epsilon": 0.5, "loss_cap": 2.0}
    privacy = {**NOISY, **choice, "ledger": tmp_path / "ledger.json"}
    silo = silo_of(ULS, privacy, most=3, half=[Choosing])
    config = {"client_half": "choosing", "batch_size": 2, "local_steps": 4}
    silo.train(first_arrays(), **config)
    assert scales == [3 * 2.0 / 0.5]
    steps = {(1.0, choice_noise_multiplier(0.5), 1): 1, (2 / 5, 1.0, 1): 4}
    assert StepLedger.load(tmp_path / "ledger.json").steps == steps


class Doubled(ClientHalf):
    """An objective of its own, and a term that draws to zero."""

    name = "doubled"
    post_processing = True

    def objective(self, losses, batch):
        return 2 * losses

    def regularizer(self, model):
        return sum(p.square().sum() for p in model.parameters())


def test_what_a_half_adds_is_outside_of_a_users_clipping_and_inside_of_its_training():
    config = {"client_half": "doubled", "lr": 0.1, "local_steps": 1}
    net = partial(nn.Linear, 3, 2)
    task = make_task(net, columns(20))
    clipped = {**NOTHING, "clipping_norm": 0.05}
    found = []
    free = {"regularizer": lambda self, model: None, "post_processing": True}
    for half in (Doubled, type("Free", (Doubled,), free)):
        silo = silo_of(ULS, clipped, task, most=4, half=[half])
        found.append(silo.train(first_arrays(net), batch_size=5, **config)[0])
    term = {k: 0.1 * 2 * a for k, a in first_arrays(net).items()}
    for name in term:
        np.testing.assert_allclose(
            found[1][name] - found[0][name], term[name], rtol=0, atol=1e-6
        )
    # Without clipping the objective has its weight.
    silo = silo_of(ULS, NOTHING, task, most=4, half=[Doubled])
    one, _ = silo.train(first_arrays(net), batch_size=5, **config)
    plain = Silo(task, None, Doubled, trainer=Plain())
    two, _ = plain.train(first_arrays(net), batch_size=20, **config)
    close(one, two, 1e-6)
    # A user's training has it as a client of federated averaging would.
    data = {**columns(20), "user": torch.zeros(20).long()}
    trainer = private(UserUpdates, NOTHING, 20, users_per_round=1)
    silo = Silo(make_task(net, data), None, Doubled, trainer=trainer)
    config["local_steps"] = 3
    one, _ = silo.train(first_arrays(net), batch_size=6, **config)
    two, _ = plain.train(first_arrays(net), batch_size=6, **config)
    close(one, two, 0)


def test_the_trainers_are_in_the_package():
    for name in ("DPSGD", "ELS", "ULS", "UserUpdates"):
        assert name in flower_ext.client.__all__


@pytest.mark.parametrize("module", [users, user_level])
def test_doctests_pass(module):
    assert not doctest.testmod(module).failed
