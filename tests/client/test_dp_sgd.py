"""DP-SGD in a silo: against plain SGD, per-example clipping by hand, dp-accounting."""

import doctest
import math
import pickle
import re
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as pld
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from one_silo import (
    EXAMPLES,
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

from flower_ext import AdditiveStrategy
from flower_ext.client import dp_sgd, noisy_steps, users
from flower_ext.client.app import client_app
from flower_ext.client.dp_sgd import DPSGD, worst_silo
from flower_ext.client.half import ClientHalf, Proximal
from flower_ext.client.noisy_steps import NoisySteps
from flower_ext.client.personal import Personal
from flower_ext.client.private_session import PRIVATE, mark_of
from flower_ext.client.trainer import Plain
from flower_ext.client.users import keep_per_user
from flower_ext.core.arrays import to_record
from flower_ext.privacy import SiloPrivacy, StepLedger, silo_account
from flower_ext.strategies import BoundedGroupLoss, FedFish, MaxFL

ACCOUNT = "account/example-level-dp"


@pytest.fixture
def seen(monkeypatch):
    """The batches that are drawn."""
    found = []

    class Recording(NoisySteps):
        def batches(self):
            for batch in super().batches():
                found.append(batch)
                yield batch

    monkeypatch.setattr(dp_sgd, "NoisySteps", Recording)
    return found


def by_hand(net, arrays, seen, clip, expected, lr, momentum=0.0, decay=0.0):
    """DP-SGD without noise: gradients per example by torch.func."""
    model = net()
    model.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()})
    trained = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    velocity = {k: torch.zeros_like(p) for k, p in trained.items()}

    def loss(parameters, x, y):
        out = functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(out, y[None])

    for batch in seen:
        total = {k: torch.zeros_like(p) for k, p in trained.items()}
        if len(batch["y"]):
            each = vmap(grad(loss), (None, 0, 0))(trained, batch["x"], batch["y"])
            flat = [g.reshape(len(g), -1) for g in each.values()]
            norms = sum(g.square().sum(1) for g in flat).sqrt()
            scale = (clip / norms).clamp(max=1.0)
            total = {k: torch.einsum("i,i...", scale, g) for k, g in each.items()}
        for k in trained:
            direction = total[k] / expected + decay * trained[k]
            velocity[k] = momentum * velocity[k] + direction
            trained[k] = trained[k] - lr * velocity[k]
    return {k: trained.get(k, torch.tensor(a)).numpy() for k, a in arrays.items()}


# The step ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_without_noise_and_clipping_it_is_plain_sgd_on_the_same_batches(mode, seen):
    arrays = first_arrays()
    silo = Silo(make_task(), {**NOTHING, "seed": 1}, mode=mode)
    config = {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.01}
    found, metrics = silo.train(arrays, batch_size=2, local_epochs=5, **config)
    assert len(seen) == 30 and any(len(batch["y"]) == 0 for batch in seen)
    model = Dense()
    model.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()})
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=0.3,
        momentum=0.5,
        weight_decay=0.01,
    )
    for batch in seen:
        optimizer.zero_grad(set_to_none=False)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        (cross_entropy(model, batch).sum() / 2).backward()
        optimizer.step()
    close(found, {k: t.numpy() for k, t in model.state_dict().items()}, 1e-6)
    assert metrics["example-epsilon"] == math.inf
    assert not np.allclose(found["out.weight"], arrays["out.weight"], atol=1e-2)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("net", [Dense, Conv, Tokens, Scaled])
@pytest.mark.parametrize("clip", [0.1, 0.8])
def test_both_modes_clip_every_example_as_torch_func_does(net, mode, clip, seen):
    arrays = first_arrays(net)
    privacy = {**NOTHING, "clipping_norm": clip, "seed": 2}
    silo = Silo(make_task(net), privacy, mode=mode)
    found, _ = silo.train(arrays, batch_size=4, local_epochs=2, lr=0.5, momentum=0.5)
    expected = by_hand(net, arrays, seen, clip, 4, 0.5, momentum=0.5)
    close(found, expected, 1e-5)
    unclipped = by_hand(net, arrays, seen, 1e9, 4, 0.5, momentum=0.5)
    assert np.abs(vector(unclipped) - vector(expected)).max() > 1e-3


def test_both_modes_add_the_same_noise():
    arrays = first_arrays()
    one, two = (
        Silo(make_task(), {**NOISY, "seed": 3}, mode=mode).train(arrays, batch_size=4)
        for mode in ("hooks", "ghost")
    )
    close(one[0], two[0], 1e-5)
    assert one[1] == two[1]


def flat(model, batch):
    """A loss without a gradient, so that a step is its noise."""
    return 0 * model(batch["x"]).sum(1)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("seed", [4, None])
def test_noise_on_the_sum_has_the_promised_standard_deviation(mode, seed):
    def net():
        return nn.Linear(200, 50)

    data = {"x": torch.ones(40, 200)}
    task = make_task(net, data, flat)
    arrays = {k: 0 * a for k, a in first_arrays(net).items()}
    privacy = {"noise_multiplier": 1.5, "clipping_norm": 0.2, "delta": 1e-3}
    silo = Silo(task, {**privacy, "seed": seed}, mode=mode)
    found, _ = silo.train(arrays, batch_size=8, local_steps=4, lr=1.0)
    noise = vector(found) * 8 / math.sqrt(4)  # expected batch, independent steps
    std, count = 1.5 * 0.2, noise.size
    # z-bounds of 5, which a right code fails with probability below 1e-6
    assert abs(noise.std() / std - 1) < 5 / math.sqrt(2 * count)
    assert abs(noise.mean()) < 5 * std / math.sqrt(count)
    again, _ = silo.train(arrays, batch_size=8, local_steps=4, lr=1.0)
    product = np.mean(vector(again) * 4 / std * noise / std)
    assert abs(product) < 5 / math.sqrt(count)  # new in every round


def test_an_empty_batch_is_a_step_that_leaves_only_frozen_parameters_alone(seen):
    arrays = first_arrays()
    silo = Silo(make_task(), {**NOISY, "seed": 0})
    for server_round in range(1, 30):
        seen.clear()
        found, metrics = silo.train(
            arrays, batch_size=1, local_steps=1, lr=1.0, server_round=server_round
        )
        if not len(seen[0]["y"]):
            break
    assert len(seen[0]["y"]) == 0
    moved = {k: float(np.abs(found[k] - arrays[k]).min()) for k in arrays}
    assert all((moved[k] == 0) == k.startswith("frozen") for k in moved)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
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
def test_one_example_moves_a_step_by_at_most_clip_over_expected_batch(
    mode, size, low, high, monkeypatch
):
    def net():
        return nn.Linear(3, 2)

    # Of other data a seed would draw another batch; the divisor is not its size.
    monkeypatch.setattr(noisy_steps, "_poisson", lambda *how: np.arange(7))
    clip, lr, models = 0.25, 0.7, []
    for weight in (0.0, size):
        data = columns(EXAMPLES)
        data["weight"][5] = weight
        privacy = {**NOTHING, "clipping_norm": clip}
        silo = Silo(make_task(net, data), privacy, mode=mode)
        found, _ = silo.train(first_arrays(net), batch_size=9, local_steps=1, lr=lr)
        models.append(vector(found))
    moved = np.linalg.norm(models[1] - models[0]) / (lr * clip / 9)
    assert low - 1e-6 <= moved <= high + 1e-6


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("net", [Text, Filtered, Twice])
@pytest.mark.parametrize(
    ("weights", "large", "rest"),
    [
        (cancelling, 1e4, 3.0),
        (cancelling, 1.5e6, 300.0),
        (cancelling, 1.5e8, 2e4),
        (cancelling, 1e20, 1.0),
        (amplifying, 1e8, 1.0),
        (amplifying, 1e12, 1e-3),
        (amplifying, 1e-25, 1e-25),
    ],
)
def test_no_weights_let_one_example_move_a_step_by_more(
    mode, net, weights, large, rest
):
    generator = torch.Generator().manual_seed(0)
    size = 24
    tokens = torch.randint(2, 8, (size, 16), generator=generator)
    tokens[5] = torch.tensor([0, 1] * 8)
    labels = torch.randint(0, 3, (size,), generator=generator)
    arrays, found = weights(net, large, rest), []
    for weight in (0.0, 1.0):
        data = {"x": tokens, "y": labels, "weight": torch.ones(size)}
        data["weight"][5] = weight
        privacy = {**NOTHING, "clipping_norm": 1.0}
        silo = Silo(make_task(net, data), privacy, mode=mode)
        reply = silo.send(arrays, batch_size=size, local_steps=1, lr=float(size))
        assert reply.has_content()
        new = {name: a.numpy() for name, a in reply.content["arrays"].items()}
        found.append({k: new[k].astype(float) - arrays[k] for k in arrays})
    # A change is lost in the rounding of a large weight, which comes after the noise.
    read = [k for k in arrays if np.abs(arrays[k]).max() < 10]
    moved = np.linalg.norm(vector({k: found[1][k] - found[0][k] for k in read}))
    assert moved <= 1 + 1e-4


# Batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [6, None])
def test_every_example_is_in_a_batch_independently(seed, seen):
    steps, rate = 1000, 0.25
    data = {"x": torch.zeros(20, 1), "i": torch.arange(20)}
    task = make_task(lambda: nn.Linear(1, 1), data, flat)
    silo = Silo(task, {**NOTHING, "seed": seed})
    silo.train(first_arrays(lambda: nn.Linear(1, 1)), batch_size=5, local_steps=steps)
    table = np.zeros((steps, 20))
    for row, batch in zip(table, seen, strict=True):
        row[batch["i"].numpy()] = 1
        assert len(set(batch["i"].tolist())) == len(batch["i"])
    z = (table.mean(0) - rate) / math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(z).max() < 5
    # Correlations of examples with each other, and of a step with the next.
    centred = (table - rate) / math.sqrt(rate * (1 - rate))
    pairs = centred.T @ centred / math.sqrt(steps)
    assert np.abs(pairs[np.triu_indices(20, 1)]).max() < 5.5
    follow = (centred[1:] * centred[:-1]).sum(0) / math.sqrt(steps)
    assert np.abs(follow).max() < 5


def test_a_batch_size_above_the_number_of_examples_takes_all(seen):
    silo = Silo(make_task(), NOISY)
    _, metrics = silo.train(first_arrays(), batch_size=99, local_epochs=2)
    assert [len(batch["y"]) for batch in seen] == [EXAMPLES] * 2
    exact = SiloPrivacy(**NOISY)
    expected = StepLedger().add(1.0, exact.noise_multiplier, 2).epsilon(1e-3)
    assert metrics["example-epsilon"] == expected


def test_a_silo_without_examples_spends_nothing():
    data = {name: column[:0] for name, column in columns(2).items()}
    found, metrics = Silo(make_task(data=data), NOISY).train(first_arrays())
    assert metrics == {
        "num-examples": 0,
        "example-epsilon": 0.0,
        "example-delta": 1e-3,
    }
    close(found, first_arrays(), 0)


# Accounting -------------------------------------------------------------------------


def sampled(noise, rate, count):
    loss = pld.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=1e-3
    )
    return loss.self_compose(count)


def test_epsilon_is_that_of_dp_accounting_and_adds_up_over_rounds():
    silo = Silo(make_task(), NOISY)
    for server_round in (1, 2, 3):
        _, metrics = silo.train(
            first_arrays(), batch_size=3, local_epochs=2, server_round=server_round
        )
        expected = sampled(1.0, 3 / EXAMPLES, 8 * server_round)
        assert metrics["example-epsilon"] == pytest.approx(
            expected.get_epsilon_for_delta(1e-3), rel=1e-5
        )
        assert metrics["example-delta"] == 1e-3
    # Every silo has an account of its own.
    _, other = silo.train(first_arrays(), batch_size=3, local_epochs=2, client=1)
    assert other["example-epsilon"] == pytest.approx(
        sampled(1.0, 3 / EXAMPLES, 8).get_epsilon_for_delta(1e-3), rel=1e-5
    )


def test_rounds_with_other_batch_sizes_are_composed():
    silo = Silo(make_task(), NOISY)
    silo.train(first_arrays(), batch_size=3, local_steps=5)
    silo.train(first_arrays(), batch_size=6, local_steps=2)
    _, metrics = silo.train(first_arrays(), batch_size=3, local_steps=1)
    expected = sampled(1.0, 0.25, 6).compose(sampled(1.0, 0.5, 2))
    assert metrics["example-epsilon"] == pytest.approx(
        expected.get_epsilon_for_delta(1e-3), rel=1e-5
    )


def test_the_account_survives_a_restart_of_the_client():
    silo, restarted = Silo(make_task(), NOISY), Silo(make_task(), NOISY)
    silo.train(first_arrays(), batch_size=3, local_steps=5)
    kept = pickle.loads(pickle.dumps(silo.state()))
    restarted.grid.states.write(0, kept)
    again = restarted.train(first_arrays(), batch_size=3, local_steps=5)[1]
    straight = silo.train(first_arrays(), batch_size=3, local_steps=5)[1]
    assert again == straight
    assert again["example-epsilon"] == pytest.approx(
        sampled(1.0, 0.25, 10).get_epsilon_for_delta(1e-3), rel=1e-5
    )


def saved_run(folder, rounds, privacy, task=None, clients=2, **config):
    """A run that is saved, or goes on, with clients that remember nothing."""
    silo = Silo(task or make_task(), privacy, clients=clients)
    server = AdditiveStrategy(train_metrics_aggr_fn=worst_silo, fraction_evaluate=0.0)
    return server.start(
        silo.grid,
        to_record(first_arrays()),
        num_rounds=rounds,
        checkpoint=folder,
        train_config=ConfigRecord({"batch-size": 3, "local-steps": 4, **config}),
    )


def of_partition(folder, **promise):
    return lambda context: SiloPrivacy(
        **promise, ledger=folder / f"{context.node_config['partition-id']}.json"
    )


def forget(monkeypatch):
    """Do as another process."""
    monkeypatch.setattr(silo_account, "_remembered", {})


@pytest.mark.parametrize("ledger", [True, False])
@pytest.mark.parametrize(
    "promise",
    [
        {**NOISY, "max_epsilon": 3.4},
        {"epsilon": 2.0, "num_rounds": 4, "delta": 1e-3, "clipping_norm": 0.5},
    ],
)
def test_a_run_that_goes_on_ends_where_an_uninterrupted_one_does(
    tmp_path, monkeypatch, promise, ledger
):
    def promised(name):
        (tmp_path / name).mkdir()
        seeded = {**promise, "seed": 3}
        return of_partition(tmp_path / name, **seeded) if ledger else seeded

    whole = saved_run(tmp_path / "whole", 6, promised("one"))
    parts = promised("other")
    saved_run(tmp_path / "parts", 2, parts)
    if ledger:
        forget(monkeypatch)
    resumed = saved_run(tmp_path / "parts", 6, parts)
    assert resumed.train_metrics_clientapp == whole.train_metrics_clientapp
    assert "example-epsilon" not in whole.train_metrics_clientapp[6]
    new, old = ({k: a.numpy() for k, a in r.arrays.items()} for r in (resumed, whole))
    close(new, old, 0)


def test_a_run_that_goes_on_with_nothing_left_to_spend_keeps_its_model(tmp_path):
    (tmp_path / "ledgers").mkdir()
    privacy = of_partition(tmp_path / "ledgers", **NOISY, max_epsilon=3.4)
    done = saved_run(tmp_path / "run", 4, privacy)
    more = saved_run(tmp_path / "run", 6, privacy)
    assert "example-epsilon" not in more.train_metrics_clientapp[5]
    for name, array in more.arrays.items():
        np.testing.assert_array_equal(array.numpy(), done.arrays[name].numpy())


def test_a_run_that_goes_on_without_an_account_is_refused(tmp_path, monkeypatch):
    run, ledgers = tmp_path / "run", tmp_path / "ledgers"
    ledgers.mkdir()
    saved_run(run, 2, NOISY)
    forget(monkeypatch)
    with pytest.raises(Exception, match="round 3 is the first that it knows of"):
        saved_run(run, 3, NOISY)
    asked = []

    def loss(model, batch):
        asked.append(batch)
        return cross_entropy(model, batch)

    # Nor does a ledger know of rounds from before it was there.
    for privacy in (NOISY, of_partition(ledgers, **NOISY)):
        errors = replies_of(privacy, loss)
        assert all("ledger=" in error for error in errors) and not asked
    StepLedger().save(ledgers / "0.json")
    error, other = replies_of(of_partition(ledgers, **NOISY), loss)
    assert error == "" and "StepLedger().save(ledger) says so" in other


def replies_of(privacy, loss):
    """What is wrong with the replies to a message of round 3, resumed after 2."""
    silo = Silo(make_task(loss=loss), privacy, clients=2)
    run = ConfigRecord({"name": "x", "resumed-after": 2})
    replies = [
        silo.send(first_arrays(), client=i, server_round=3, batch_size=3, run=run)
        for i in range(2)
    ]
    return [reply.error.reason if reply.has_error() else "" for reply in replies]


def test_a_silo_that_does_not_know_of_earlier_rounds_needs_a_ledger(tmp_path):
    silo = Silo(make_task(), NOISY)
    with pytest.raises(RuntimeError, match="round 2 is the first that it knows of"):
        silo.train(first_arrays(), server_round=2)
    silo.train(first_arrays(), server_round=1)
    silo.train(first_arrays(), server_round=2)
    # With one it may join when it likes.
    kept = Silo(make_task(), {**NOISY, "ledger": tmp_path / "ledger.json"})
    kept.train(first_arrays(), server_round=5)


def test_all_runs_on_a_ledger_add_up_to_one_budget(tmp_path):
    ledger = tmp_path / "ledger.json"
    privacy = {**NOISY, "max_epsilon": 5.0, "ledger": ledger}
    spent, steps = [], 0
    while True:
        reply = Silo(make_task(), privacy).send(
            first_arrays(), batch_size=3, local_steps=5
        )
        if reply.has_error():
            break
        steps += 5
        spent.append(reply.content["metrics"]["example-epsilon"])
        expected = sampled(1.0, 0.25, steps).get_epsilon_for_delta(1e-3)
        assert spent[-1] == pytest.approx(expected, rel=1e-2)
    assert "SiloBudgetExhausted" in reply.error.reason and len(spent) > 2
    assert StepLedger.load(ledger) == StepLedger(1, {(0.25, 1.0, 1): steps})
    # Another batch size, another client and another promise are the same people.
    other = Silo(make_task(), {**privacy, "noise_multiplier": 3.0, "max_epsilon": 9.0})
    _, metrics = other.train(first_arrays(), batch_size=6, local_steps=1, client=2)
    composed = sampled(1.0, 0.25, steps).compose(sampled(3.0, 0.5, 1))
    assert metrics["example-epsilon"] == pytest.approx(
        composed.get_epsilon_for_delta(1e-3), rel=1e-2
    )


def test_a_new_target_is_not_met_with_the_noise_of_the_old_one(tmp_path):
    ledger = tmp_path / "ledger.json"
    target = {"delta": 1e-3, "num_rounds": 2, "clipping_norm": 1.0, "ledger": ledger}
    for epsilon in (1.0, 1.0, 3.0):
        silo = Silo(make_task(), {**target, "epsilon": epsilon})
        silo.train(first_arrays(), batch_size=3, local_steps=4)
    noises = list(StepLedger.load(ledger).steps.items())
    assert [count for _, count in noises] == [8, 4]
    assert noises[1][0][1] < noises[0][0][1]


def test_steps_are_on_the_disk_before_the_first_is_taken(tmp_path):
    ledger, found = tmp_path / "ledger.json", []

    def loss(model, batch):
        found.append(StepLedger.load(ledger).total)
        if found[-1]:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    silo = Silo(make_task(loss=loss), {**NOISY, "ledger": ledger})
    with pytest.raises(KeyboardInterrupt):
        silo.train(first_arrays(), batch_size=12, local_steps=3)
    assert found[-1] == 3 and StepLedger.load(ledger).total == 3


def test_nothing_is_trained_where_the_ledger_cannot_be_written(tmp_path, monkeypatch):
    def full(path, record):
        raise OSError(28, "No space left on device")

    privacy = {**NOISY, "ledger": tmp_path / "ledger.json"}
    silo, steps = Silo(make_task(), privacy), []
    monkeypatch.setattr(silo_account, "save_record", full)
    monkeypatch.setattr(NoisySteps, "take", lambda *how: steps.append(how))
    with pytest.raises(RuntimeError, match="No space left on device"):
        silo.train(first_arrays())
    assert not steps and ACCOUNT not in silo.state()


def test_the_ledger_reads_what_it_wrote():
    privacy = SiloPrivacy(**NOISY, max_examples_per_user=3, user="who")
    ledger = StepLedger(3, unit="who")
    ledger = ledger.add(0.1, 1.0, 4).add(0.2, 1.0, 5).add(0.1, 1.0, 6)
    assert ledger.steps == {(0.1, 1.0, 3): 10, (0.2, 1.0, 3): 5}
    assert StepLedger.read(ledger.record(), privacy) == ledger
    assert StepLedger.read(ledger.record()) == ledger
    assert ledger.add(0.5, 1.0, 0) == ledger
    assert StepLedger.read(None, privacy).epsilon(1e-5) == 0.0


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"max_examples_per_user": 1}),
        ({"max_examples_per_user": 1}, {}),
        (
            {"max_examples_per_user": 3},
            {"max_examples_per_user": 3, "user": "ward"},
        ),
    ],
)
def test_what_was_spent_on_one_unit_is_not_counted_for_another(before, now):
    """A user with a hundred examples has lost more than one of them."""
    ledger = StepLedger.read(None, SiloPrivacy(**NOISY, **before)).add(0.1, 1.0, 4)
    other = SiloPrivacy(**NOISY, **now)
    with pytest.raises(ValueError, match="max_examples_per_user=.* as in the rounds b"):
        StepLedger.read(ledger.record(), other)
    empty = StepLedger().record()
    assert StepLedger.read(empty, other) == StepLedger.read(None, other)


def test_a_target_is_met_at_the_planned_rounds_and_not_before():
    target = {"epsilon": 2.0, "delta": 1e-3, "num_rounds": 3, "clipping_norm": 1.0}
    silo = Silo(make_task(), target)
    spent = []
    for server_round in (1, 2, 3):
        _, metrics = silo.train(first_arrays(), batch_size=3, server_round=server_round)
        spent.append(metrics["example-epsilon"])
    assert 2.0 * 0.999 < spent[2] <= 2.0
    assert spent[0] < spent[1] < spent[2]
    with pytest.raises(RuntimeError, match="SiloBudgetExhausted: round 4 would"):
        silo.train(first_arrays(), batch_size=3, server_round=4)


def test_the_noise_of_a_target_is_the_noise_that_is_added():
    def net():
        return nn.Linear(200, 50)

    task = make_task(net, {"x": torch.ones(40, 200)}, flat)
    target = {"epsilon": 1.0, "delta": 1e-3, "num_rounds": 2, "clipping_norm": 0.2}
    silo = Silo(task, target)
    arrays = {k: 0 * a for k, a in first_arrays(net).items()}
    for server_round in (1, 2):
        found, metrics = silo.train(
            arrays, batch_size=8, local_steps=1, lr=1.0, server_round=server_round
        )
        noise = vector(found) * 8 / 0.2
    assert metrics["example-epsilon"] == pytest.approx(
        sampled(noise.std(), 0.2, 2).get_epsilon_for_delta(1e-3), rel=0.1
    )


def test_a_round_beyond_the_budget_trains_nothing_and_spends_nothing():
    calls = []

    def loss(model, batch):
        calls.append(len(batch["y"]))
        return cross_entropy(model, batch)

    silo = Silo(make_task(loss=loss), {**NOISY, "max_epsilon": 3.0})
    _, first = silo.train(first_arrays(), batch_size=3, local_steps=4)
    calls.clear()
    before = pickle.dumps(dict(silo.state()[ACCOUNT]))
    reply = silo.send(first_arrays(), batch_size=3, local_steps=400, server_round=2)
    assert reply.has_error() and not reply.has_content()
    assert "would exceed max_epsilon=3.0 at delta=0.001" in reply.error.reason
    assert f"{first['example-epsilon']:.6g} is spent" in reply.error.reason
    assert calls == []
    assert pickle.dumps(dict(silo.state()[ACCOUNT])) == before
    # A round that still fits is trained.
    silo.train(first_arrays(), batch_size=3, local_steps=1, server_round=3)


def test_a_round_without_noise_exceeds_every_budget():
    silo = Silo(make_task(), {**NOTHING, "max_epsilon": 1e9})
    with pytest.raises(RuntimeError, match="SiloBudgetExhausted"):
        silo.train(first_arrays())


# Users ------------------------------------------------------------------------------


def test_users_keep_their_first_examples():
    users = torch.tensor([4, 4, 1, 4, 1, 0])
    assert keep_per_user(users, 1).tolist() == [0, 2, 5]
    assert keep_per_user(users, 2).tolist() == [0, 1, 2, 4, 5]
    assert keep_per_user(users, 9).tolist() == [0, 1, 2, 3, 4, 5]
    assert keep_per_user(users[:0], 1).tolist() == []
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        users = torch.randint(0, 6, (30,), generator=generator)
        kept, counts = [], dict.fromkeys(range(6), 0)
        for i, user in enumerate(users.tolist()):
            counts[user] += 1
            if counts[user] <= 3:
                kept.append(i)
        assert keep_per_user(users, 3).tolist() == kept
    with pytest.raises(ValueError, match="integers of shape"):
        keep_per_user(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="most=0 must be"):
        keep_per_user(torch.zeros(3).long(), 0)


def test_user_level_privacy_caps_users_and_counts_a_mixture_of_gaussians(seen):
    data = columns(23)  # users 0 to 4 with five or four examples
    privacy = {
        "noise_multiplier": 4.0,
        "clipping_norm": 1.0,
        "delta": 1e-2,
        "max_examples_per_user": 2,
        "seed": 1,
    }
    silo = Silo(make_task(data=data), privacy)
    _, metrics = silo.train(first_arrays(), batch_size=5, local_epochs=5)
    assert metrics["num-examples"] == 10
    rows = {tuple(row) for batch in seen for row in batch["x"].tolist()}
    assert rows == {tuple(row) for row in data["x"][:10].tolist()}
    q = 0.5
    loss = pld.from_mixture_gaussian_mechanism(
        4.0,
        [0.0, 1.0, 2.0],
        [(1 - q) ** 2, 2 * q * (1 - q), q**2],
        value_discretization_interval=1e-3,
    )
    expected = loss.self_compose(10).get_epsilon_for_delta(1e-2)
    assert metrics["user-epsilon"] == pytest.approx(expected, rel=1e-5)
    assert metrics["user-delta"] == 1e-2
    assert "example-epsilon" not in metrics


def test_the_user_column_must_be_there():
    privacy = {**NOISY, "max_examples_per_user": 2, "user": "patient"}
    with pytest.raises(RuntimeError, match="user='patient' must be one of the data's"):
        Silo(make_task(), privacy).train(first_arrays())


# What is refused --------------------------------------------------------------------


def refused(net, mode="hooks", loss=cross_entropy, data=None):
    silo = Silo(make_task(net, data, loss), NOISY, mode=mode)
    reply = silo.send(first_arrays(net), batch_size=4)
    assert reply.has_error() and ACCOUNT not in silo.state()
    return reply.error.reason.splitlines()[0]


class Normalised(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.hidden = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4, **options)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.norm(self.hidden(x)))


class FrozenNorm(Normalised):
    def __init__(self):
        super().__init__()
        self.norm.requires_grad_(False)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        return self.out(x - x.mean(0))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 2)
        self.norm = nn.Identity()
        self.norm.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.norm.mean += x.detach().mean(0)
        return self.out(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 2, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(-1))[0][:, -1]


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = nn.Linear(1, 2)

    def forward(self, x):
        return self.each(x.T.unsqueeze(-1)).mean(0)  # (time, batch, 1)


class Dora(nn.Module):
    """Its magnitude needs the layer as well, as peft's does."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 2)
        self.magnitude = Magnitude()

    def forward(self, x):
        return self.magnitude(self.out(x), layer=self.out)


class Magnitude(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x, *, layer):
        return self.weight * x / layer.weight.norm(dim=1)


class ByKeyword(nn.Module):
    """Opacus sees positional inputs only."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        return self.out(input=x)


class Renormalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 2, max_norm=1.0).requires_grad_(False)
        self.out = nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.embed((x[:, 0] > 0).long()))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        return x @ self.inner.weight.T + self.inner.bias


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Normalised, "layer 'norm' (BatchNorm1d) cannot be trained"),
        (partial(Normalised, affine=False), "layer 'norm' (BatchNorm1d) cannot"),
        (
            partial(Normalised, track_running_stats=False),
            "layer 'norm' (BatchNorm1d) cannot",
        ),
        (FrozenNorm, "layer 'norm' (BatchNorm1d) cannot be trained"),
        (Recurrent, "layer 'lstm' (LSTM) cannot be trained"),
        (Centred, "must not depend on the other examples"),
        (Counting, "buffer 'norm.mean' changed in training"),
        (Dora, "layer 'magnitude' (Magnitude) cannot be trained"),
        (Renormalised, "layer 'embed' (Embedding) cannot be trained"),
        (ByKeyword, "the model has no gradient per example"),
        (TimeFirst, "the batch must be the first dimension in every layer"),
        (Bare, "Task.loss must use parameters through model(...)"),
    ],
)
def test_models_without_a_gradient_per_example_are_refused(net, mode, why):
    assert why in refused(net, mode)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_loss_that_goes_round_the_layers_is_refused(mode):
    def penalised(model, batch):
        return cross_entropy(model, batch) + model.out.weight.square().sum()

    found = refused(Dense, mode, penalised)
    assert "parameter 'out.weight': Opacus does not see all of" in found
    # Norms are raw data.
    assert not any(character.isdigit() for character in found)


class HalfFrozen(Dense):
    def __init__(self, dtype, trained):
        super().__init__()
        self.frozen.to(dtype)
        self.out.to(dtype if trained else torch.float32)

    def forward(self, x):
        x = torch.tanh(self.norm(self.hidden(x))).to(self.frozen.weight.dtype)
        return self.out(self.frozen(x).to(self.out.weight.dtype)).float()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_for_what_is_frozen(mode, dtype):
    silo = Silo(make_task(partial(HalfFrozen, dtype, True)), NOISY, mode=mode)
    single = first_arrays(partial(HalfFrozen, torch.float32, True))
    with pytest.raises(RuntimeError, match="parameter 'out.weight'=torch.*float16 mus"):
        silo.train(single, batch_size=4)
    silo = Silo(make_task(partial(HalfFrozen, dtype, False)), NOISY, mode=mode)
    reply = silo.send(single, batch_size=4)
    # Flower's records have no bfloat16.
    assert reply.has_content() == (dtype == torch.float16)


def test_an_optimizer_steps_what_it_was_given_and_no_more():
    def everything(parameters, settings):
        return torch.optim.SGD([*parameters, nn.Parameter(torch.ones(1))], lr=0.1)

    task = make_task(optimizer=everything)
    with pytest.raises(RuntimeError, match="Task.optimizer must train the parameters"):
        Silo(task, NOISY).train(first_arrays(), batch_size=4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_weights_that_two_layers_share_have_one_gradient(mode, seen):
    arrays = first_arrays(Tied)
    privacy = {**NOTHING, "clipping_norm": 0.3, "seed": 2}
    silo = Silo(make_task(Tied), privacy, mode=mode)
    found, _ = silo.train(arrays, batch_size=4, lr=0.5)
    expected = by_hand(Tied, arrays, seen, 0.3, 4, 0.5)
    np.testing.assert_allclose(found["one.weight"], expected["one.weight"], atol=1e-5)
    np.testing.assert_array_equal(found["one.weight"], found["two.weight"])


def test_a_model_that_diverged_is_refused():
    def infinite(model, batch):
        return cross_entropy(model, batch) * math.inf

    assert "has the received model diverged?" in refused(Dense, loss=infinite)


def test_a_model_without_parameters_to_train_is_refused():
    def frozen():
        return nn.Linear(3, 2).requires_grad_(False)

    assert "must be one with parameters to train" in refused(frozen)


def test_a_gradient_norm_of_the_whole_batch_is_refused():
    with pytest.raises(RuntimeError, match="max-gradient-norm=1.0 must be left out"):
        Silo(make_task(), NOISY).train(first_arrays(), max_gradient_norm=1.0)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"clipping_norm": 0.0}, "clipping_norm=0.0 must be a number > 0"),
        ({"clipping_norm": 1e-150}, "clipping_norm=1e-150 must be >= 1e-100"),
        ({"clipping_norm": math.inf}, "clipping_norm=inf must be finite"),
        ({"delta": 0.0}, "delta=0.0 must be in the open interval"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0 must be"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan must be"),
        ({"noise_multiplier": 0.01}, "noise_multiplier=0.01 must be 0 or >= 0.1"),
        ({"noise_multiplier": None}, "give one of them"),
        ({"epsilon": 1.0, "num_rounds": 2}, "give one of them"),
        ({"noise_multiplier": None, "epsilon": 1.0}, "for a planned number of rounds"),
        ({"num_rounds": 2}, "for a planned number of rounds"),
        ({"max_epsilon": 0.0}, "max_epsilon=0.0 must be"),
        (
            {
                "noise_multiplier": None,
                "epsilon": 2.0,
                "num_rounds": 1,
                "max_epsilon": 1.0,
            },
            "max_epsilon=1.0 must be >= epsilon=2.0",
        ),
        ({"max_examples_per_user": 0}, "max_examples_per_user=0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
    ],
)
def test_bad_promises_are_refused_with_name_value_and_bound(options, bound):
    with pytest.raises(ValueError) as caught:
        SiloPrivacy(**{**NOISY, **options})
    assert bound in str(caught.value)


def test_a_bad_half_is_refused():
    with pytest.raises(ValueError, match="mode='fast' must be one of"):
        DPSGD(SiloPrivacy(**NOISY), mode="fast")
    with pytest.raises(ValueError, match="privacy=1.0 must be a SiloPrivacy"):
        DPSGD(1.0)
    with pytest.raises(RuntimeError, match=r"privacy\(context\)=None must be"):
        Silo(make_task(), lambda context: None).train(first_arrays())


def test_a_large_delta_is_warned_of():
    with pytest.warns(UserWarning, match="delta=0.2 should be < 1 / examples"):
        Silo(make_task(), {**NOISY, "delta": 0.2}).train(first_arrays())


def test_without_opacus_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(RuntimeError, match=r"pip install 'flower-ext\[dp\]'"):
        Silo(make_task(), NOISY).train(first_arrays())


def test_the_seed_is_not_shown():
    assert "31337" not in repr(SiloPrivacy(**NOISY, seed=31337))


# Determinism ------------------------------------------------------------------------


class Dropped(Dense):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_seed_gives_the_same_reply_to_the_same_message_only(mode):
    def run(secret=1, first=0, data=0, net=Dropped, **message):
        task = make_task(net, columns(EXAMPLES, data))
        silo = Silo(task, {**NOISY, "seed": secret}, mode=mode)
        message = {"server_round": 1, "batch_size": 4, **message}
        for _ in range(first + 1):
            found, _ = silo.train(first_arrays(), **message)
        return vector(found)

    torch.manual_seed(1)
    expected = run()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    np.testing.assert_array_equal(run(), expected)
    assert torch.equal(torch.get_rng_state(), before)
    others = [run(secret=2), run(server_round=0), run(client=1), run(first=1)]
    others += [run(seed=9), run(lr=0.2), run(data=1), run(local_epochs=2)]
    others += [run(secret=None), run(secret=None)]
    for i, other in enumerate(others):
        assert not np.allclose(other, expected)
        assert all(not np.allclose(other, later) for later in others[i + 1 :])


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize(
    "other", ["model", "data", "settings", "frozen", "config", "beside", "personal"]
)
def test_no_other_message_has_its_noise_cancelled_by_a_seed(mode, other, monkeypatch):
    """Of two replies with one noise the difference would be the data's alone."""

    def noise_of(changed):
        arrays, data = first_arrays(), columns(EXAMPLES)
        if changed == "data":
            data["weight"][3] = 0.0
        elif changed in ("model", "frozen"):
            name = "out.bias" if changed == "model" else "frozen.bias"
            arrays[name] += 1e-6
        config = {"weight_decay": 1e-9 if changed == "settings" else 0.0}
        config["strength"] = 0.5 if changed == "config" else 0.0
        config["beside"] = {"x": np.full(2, 0.5 if changed == "beside" else 0.0)}
        privacy = {**NOISY, "noise_multiplier": 1e6, "seed": 5}
        silo = Silo(make_task(data=data), privacy, mode=mode)
        own = 0.5 if changed == "personal" else 0.0
        state, own = RecordDict(), 0.5 if changed == "personal" else 0.0
        Personal(state).save(own={"w": torch.tensor(own)})
        mark = {PRIVATE: mark_of(state)}
        Personal(state).save(**mark)
        silo.grid.states.write(0, state)
        found, _ = silo.train(arrays, batch_size=4, local_steps=1, **config)
        return np.concatenate(
            [np.ravel(found[k] - arrays[k]) for k in arrays if "frozen" not in k]
        )

    first = noise_of(None)
    np.testing.assert_array_equal(noise_of(None), first)
    assert np.abs(noise_of(other) - first).mean() > 0.1 * np.abs(first).mean()


# What leaves the silo ---------------------------------------------------------------


def test_losses_are_withheld_unless_asked_for():
    task = make_task(metrics=lambda model, batch: {"accuracy": batch["weight"]})
    _, metrics = Silo(task, NOISY).train(first_arrays())
    assert set(metrics) == {"num-examples", "example-epsilon", "example-delta"}
    reply = Silo(task, NOISY).send(first_arrays(), "evaluate")
    assert dict(reply.content["metrics"]) == {"num-examples": EXAMPLES}
    asked = Silo(task, NOISY, release_evaluation=True)
    reply = asked.send(first_arrays(), "evaluate")
    assert set(reply.content["metrics"]) == {"num-examples", "loss", "accuracy"}
    assert "train-loss" not in asked.train(first_arrays())[1]


def test_the_train_loss_is_that_of_the_batches(seen):
    silo = Silo(
        make_task(),
        NOTHING,
        release_train_loss=True,
        mode="ghost",
    )
    _, metrics = silo.train(first_arrays(), batch_size=6, local_steps=3, lr=0.0)
    model = Dense()
    model.load_state_dict({k: torch.tensor(a) for k, a in first_arrays().items()})
    with torch.no_grad():
        total = sum(float(cross_entropy(model, batch).sum()) for batch in seen)
    assert metrics["train-loss"] == pytest.approx(total / 18, rel=1e-5)


# Which halves it serves -------------------------------------------------------------


HOOKS = [name for name, x in vars(ClientHalf).items() if callable(x)]
UNSEEING = {"make_model", "objective", "regularizer", "after_backward"}


def overriding(hook, parent=ClientHalf, **attributes):
    """A half with one hook of its own, which does what the parent's does."""

    def same(self, *arguments):
        return getattr(parent, hook)(self, *arguments)

    return type("Mine", (parent,), {"name": "mine", hook: same, **attributes})


def admitted(half):
    try:
        client_app(make_task(), half, trainer=DPSGD(SiloPrivacy(**NOISY)))
    except ValueError as error:
        assert "cannot be served by DPSGD" in str(error)
        return False
    return True


@pytest.mark.parametrize("hook", HOOKS)
def test_a_half_whose_hooks_see_data_must_vouch_for_them(hook):
    declared = overriding(hook, post_processing=True)
    assert admitted(overriding(hook)) == (hook in UNSEEING)
    assert admitted(declared) == (hook != "batches")
    # A parent speaks for itself, a child for what it inherits too.
    assert admitted(overriding(hook, declared)) == (hook in UNSEEING)
    child = type("Child", (overriding(hook),), {"post_processing": True})
    assert admitted(child) == (hook != "batches")
    assert not admitted(type("Child", (child,), {"post_processing": False}))


def test_a_parent_does_not_vouch_for_what_comes_in_beside_it():
    vouching = type("Vouching", (ClientHalf,), {"post_processing": True})
    assert not admitted(type("Both", (vouching, overriding("records")), {"name": "x"}))


def test_a_parent_does_not_vouch_for_its_methods_where_a_child_replaces_them():
    class Reporting(ClientHalf):
        name = "reporting"
        post_processing = True

        def records(self, local):
            return {}, self.told(local)

        def told(self, local):
            return {}

    leaking = {"told": lambda self, local: {"x": float(local.train["x"].sum())}}
    assert admitted(Reporting)
    assert not admitted(type("Leaking", (Reporting,), leaking))
    assert admitted(type("Named", (Reporting,), {"name": "named", "strength": 2.0}))


@pytest.mark.parametrize("hook", ["regularizer", "after_backward"])
def test_what_an_objective_saw_cannot_come_in_after_the_noise(hook):
    """Each alone is harmless; together they carry raw losses around the noise."""

    class Keeping(ClientHalf):
        name = "keeping"

        def objective(self, losses, batch):
            self.seen = losses.detach().mean()
            return losses

    def later(self, model):
        return self.seen * next(model.parameters()).sum()

    assert admitted(Keeping)
    assert not admitted(type("Leaking", (Keeping,), {hook: later}))
    both = {hook: later, "post_processing": True}
    assert admitted(type("Vouching", (Keeping,), both))


def test_an_object_with_hooks_of_its_own_is_refused():
    class Sly(ClientHalf):
        name = "sly"

        def __init__(self):
            self.records = lambda local: ({}, {"x": float(local.train["x"].sum())})

    silo = Silo(make_task(), NOISY, Sly)
    with pytest.raises(
        RuntimeError, match=r"Sly's hooks=\['records'\] must be methods"
    ):
        silo.train(first_arrays(), client_half="sly")
    assert ACCOUNT not in silo.state()


@pytest.mark.parametrize("hook", ["receive", "begin", "after_training", "records"])
@pytest.mark.parametrize("look", ["loss_of", "measure", "mean_loss"])
def test_a_half_that_vouches_is_shown_no_loss_in_training(hook, look):
    def looking(self, local, *how):
        getattr(local, look)(local.train if look == "mean_loss" else local.start)
        return getattr(ClientHalf, hook)(self, local, *how)

    half = type("Looking", (ClientHalf,), {hook: looking, "post_processing": True})
    half.name = "looking"
    with pytest.raises(RuntimeError, match="read the silo's data without noise"):
        Silo(make_task(), NOISY, half).train(first_arrays(), client_half="looking")
    plain = Silo(make_task(), NOISY, half, trainer=Plain())
    plain.train(first_arrays(), client_half="looking")


def test_a_half_that_a_function_makes_is_looked_at_before_it_trains():
    def make():
        return overriding("records")()

    make.name = "mine"
    silo = Silo(make_task(), NOISY, make)
    with pytest.raises(RuntimeError, match="Mine cannot be served by DPSGD"):
        silo.train(first_arrays(), client_half="mine")
    assert ACCOUNT not in silo.state()


@pytest.mark.parametrize("strategy", [FedFish, MaxFL, BoundedGroupLoss])
def test_strategies_that_read_raw_data_are_refused(strategy):
    half = strategy.client_half
    assert not admitted(half)
    silo = Silo(make_task(), NOISY)
    options = {"groups": ["a"], "upper_bound": 1.0} if half.name[0] == "b" else {}
    with pytest.raises(Exception, match="the strategy needs the client half") as caught:
        strategy(fraction_evaluate=0.0, **options).start(
            silo.grid, to_record(first_arrays()), num_rounds=1
        )
    assert half.name in str(caught.value)
    assert ACCOUNT not in silo.state()


# Halves with terms and models of their own -------------------------------------------


class Prox(ClientHalf):
    """Drawn to a model that is 2 away from the received one in every coordinate."""

    name = "prox"
    post_processing = True
    away, strength = 2.0, 0.5

    def begin(self, local):
        towards = {k: x + self.away for k, x in local.start.items()}
        self.term = Proximal(towards, self.strength)

    def regularizer(self, model):
        return self.term(model)


ALL = {"batch_size": EXAMPLES, "lr": 0.3}


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_half_without_noise_and_clipping_trains_as_it_does_by_plain_steps(mode):
    class Weighed(Prox):
        def objective(self, losses, batch):
            return (1 + batch["x"][:, 0] ** 2) * losses

        def after_backward(self, model):
            for p in model.parameters():
                # Gradients of single examples are nobody's to see.
                assert getattr(p, "grad_sample", None) is None
                if p.requires_grad:
                    p.grad *= 0.5

        def after_step(self, local):
            with torch.no_grad():
                local.model.out.bias.clamp_(-0.01, 0.01)

    Weighed.post_processing = True
    config = {**ALL, "momentum": 0.5, "local_epochs": 4, "client_half": "prox"}
    found = {}
    for name, trainer in {
        "plain": Plain(),
        "private": DPSGD(SiloPrivacy(**NOTHING), mode=mode, release_train_loss=True),
    }.items():
        silo = Silo(make_task(), NOTHING, Weighed, trainer=trainer)
        found[name] = silo.train(first_arrays(), **config)
    # The order of the examples in a sum is all that differs.
    close(found["private"][0], found["plain"][0], 1e-6)
    losses = [metrics["train-loss"] for _, metrics in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    without, _ = Silo(make_task(), NOTHING).train(first_arrays(), **ALL, local_epochs=4)
    moved = np.abs(vector(without) - vector(found["private"][0])).max()
    assert moved > 0.1


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_proximal_term_is_outside_of_clipping(mode):
    """One step: the clipped mean, as without the term, and the whole of the term."""
    privacy = {**NOTHING, "clipping_norm": 0.01}
    config = {**ALL, "local_steps": 1}
    plain, _ = Silo(make_task(), privacy, mode=mode).train(first_arrays(), **config)
    silo = Silo(make_task(), privacy, Prox, mode=mode)
    found, _ = silo.train(first_arrays(), client_half="prox", **config)
    for name, array in plain.items():
        drawn = 0.0 if name.startswith("frozen") else -0.3 * 0.5 * -2.0
        np.testing.assert_allclose(found[name], array + drawn, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0, 1e6])
def test_what_an_example_adds_to_an_objective_is_clipped(weight, monkeypatch):
    class Weighed(ClientHalf):
        name = "weighed"

        def objective(self, losses, batch):
            return torch.where(batch["x"][:, 0] == marked, weight * losses, losses)

    def net():
        return nn.Linear(3, 2)

    monkeypatch.setattr(noisy_steps, "_poisson", lambda *how: np.arange(EXAMPLES))
    marked = columns(EXAMPLES)["x"][5, 0]
    clip, lr = 0.25, 0.7
    models = []
    for half in ("plain", "weighed"):
        silo = Silo(make_task(net), {**NOTHING, "clipping_norm": clip}, Weighed)
        config = {"batch_size": 9, "local_steps": 1, "lr": lr, "client_half": half}
        models.append(vector(silo.train(first_arrays(net), **config)[0]))
    moved = np.linalg.norm(models[1] - models[0]) / (lr * clip / 9)
    assert moved <= 1 + 1e-6
    # Every gradient is longer than the clip, so that only a weight of 0 is seen.
    assert moved == pytest.approx(float(weight == 0), abs=1e-4)


def test_an_objective_that_mixes_examples_is_refused():
    class Mixing(ClientHalf):
        name = "mixing"

        def objective(self, losses, batch):
            return losses * losses.softmax(0).detach()

    silo = Silo(make_task(), NOISY, Mixing)
    with pytest.raises(RuntimeError, match="the client half's objective mixes them"):
        silo.train(first_arrays(), client_half="mixing")
    assert ACCOUNT not in silo.state()


class Remembers(Dense):
    """Keeps what it has seen in an attribute, as layers with a loss of their own."""

    def forward(self, x):
        self.seen = x.detach().square().mean()
        return super().forward(x)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_regularizer_of_what_the_model_has_seen_is_refused(mode):
    class Activity(ClientHalf):
        name = "activity"

        def regularizer(self, model):
            return model.seen * model.out.weight.square().sum()

    assert admitted(Activity)
    silo = Silo(make_task(Remembers), NOISY, Activity, mode=mode)
    with pytest.raises(RuntimeError, match="a regularizer must know no data"):
        silo.train(first_arrays(), client_half="activity")
    assert ACCOUNT not in silo.state()


class Two(ClientHalf):
    """Trains the received model, then one of its own that starts from the same."""

    name = "two"
    post_processing = True
    num_trainings = 2

    def after_training(self, local):
        other = local.with_model(local.start)
        other.fit()
        local.personal.save(own=other.end)

    def records(self, local):
        return {"own": local.personal.arrays("own", like=local.start)}, {}


class One(Two):
    post_processing = True

    def after_training(self, local):
        local.personal.save(own=local.start)


def both_models(silo, **config):
    reply = silo.send(first_arrays(), client_half="two", **config)
    assert reply.has_content(), reply.error.reason
    keys = ("arrays", "own")
    return [
        {name: a.numpy() for name, a in reply.content[key].items()} for key in keys
    ], dict(reply.content["metrics"])


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_second_model_leaves_the_first_as_it_is(mode):
    options = {**NOISY, "seed": 3}
    (first, own), _ = both_models(Silo(make_task(), options, Two, mode=mode), **ALL)
    (alone, _), _ = both_models(Silo(make_task(), options, One, mode=mode), **ALL)
    close(first, alone, 0)
    assert not np.allclose(vector(own), vector(first), atol=1e-2)


@pytest.mark.parametrize("secret", [3, None])
def test_a_second_model_has_noise_and_batches_of_its_own(secret, seen):
    """With the noise of the first the difference of the two would be free of it."""
    loud = {"noise_multiplier": 1e6, "clipping_norm": 1.0, "delta": 1e-3}
    silo = Silo(make_task(), {**loud, "seed": secret}, Two)
    config = {"batch_size": 6, "local_steps": 1, "lr": 1e-4}
    (first, own), _ = both_models(silo, **config)
    # A later round sends the same model; the client's own one begins there again.
    (later, again), _ = both_models(silo, **config)
    noises = [
        np.concatenate(
            [(x[k] - first_arrays()[k]).ravel() for k in x if "frozen" not in k]
        )
        for x in (first, own, later, again)
    ]
    for i, one in enumerate(noises):
        for other in noises[i + 1 :]:
            assert np.abs(one - other).mean() > 0.1 * np.abs(one).mean()
            correlation = np.corrcoef(one, other)[0, 1]
            assert abs(correlation) < 5 / math.sqrt(len(one))
    drawn = {tuple(sorted(batch["x"][:, 0].tolist())) for batch in seen}
    assert len(drawn) > 1


def test_a_second_model_is_charged_before_the_first_is_trained(tmp_path):
    ledger, found = tmp_path / "ledger.json", []

    def loss(model, batch):
        found.append(StepLedger.load(ledger).total)
        return cross_entropy(model, batch)

    silo = Silo(make_task(loss=loss), {**NOISY, "ledger": ledger}, Two)
    _, metrics = both_models(silo, batch_size=3, local_steps=4)
    expected = sampled(1.0, 3 / EXAMPLES, 8).get_epsilon_for_delta(1e-3)
    assert metrics["example-epsilon"] == pytest.approx(expected, rel=1e-5)
    assert StepLedger.load(ledger) == StepLedger(1, {(0.25, 1.0, 1): 8})
    charged = found.index(8)
    assert set(found[:charged]) == {0} and set(found[charged:]) == {8}


def test_a_budget_for_one_model_is_none_for_two():
    calls = []

    def loss(model, batch):
        calls.append(batch)
        return cross_entropy(model, batch)

    config = {"batch_size": 3, "local_steps": 20}
    one = sampled(1.0, 0.25, 20).get_epsilon_for_delta(1e-3)
    privacy = {**NOISY, "max_epsilon": one * 1.01}
    silo = Silo(make_task(loss=loss), privacy, Two)
    reply = silo.send(first_arrays(), client_half="two", **config)
    assert "SiloBudgetExhausted" in reply.error.reason and not calls
    assert ACCOUNT not in silo.state() and not list(Personal(silo.state()))
    silo.train(first_arrays(), **config)


def test_a_target_is_met_by_all_models_together():
    target = {"epsilon": 2.0, "delta": 1e-3, "num_rounds": 2, "clipping_norm": 1.0}
    silo = Silo(make_task(), target, Two)
    for server_round in (1, 2):
        _, metrics = both_models(silo, batch_size=3, server_round=server_round)
    assert 2.0 * 0.999 < metrics["example-epsilon"] <= 2.0


def longer(self, local):
    settings = replace(local.settings, local_steps=9)
    replace(local.with_model(local.start), settings=settings).fit()


def on_other_data(self, local):
    some = {name: column[:5] for name, column in local.train.items()}
    replace(local.with_model(local.start), train=some).fit()


def once_more(self, local):
    for _ in range(2):
        local.with_model(local.start).fit()


@pytest.mark.parametrize("training", [longer, on_other_data, once_more])
def test_a_model_that_is_not_charged_is_refused(training):
    half = type("Greedy", (Two,), {"after_training": training, "post_processing": True})
    silo = Silo(make_task(), NOISY, half)
    with pytest.raises(RuntimeError, match="is not charged: .* num_trainings=2"):
        silo.train(first_arrays(), client_half="two", batch_size=4, local_steps=2)


def test_users_are_capped_for_every_model(seen):
    privacy = {**NOISY, "max_examples_per_user": 1, "noise_multiplier": 4.0}
    _, metrics = both_models(Silo(make_task(), privacy, Two), batch_size=5)
    assert metrics["num-examples"] == 5
    assert len(seen) == 2
    assert all(len(batch["y"]) == 5 for batch in seen)


def test_halves_of_one_app_share_an_account_and_keep_their_promise():
    silo = Silo(make_task(), NOISY, Two, Prox)
    config = {"batch_size": 3, "local_steps": 2}
    both_models(silo, **config)
    silo.train(first_arrays(), client_half="prox", **config)
    _, metrics = silo.train(first_arrays(), **config)
    expected = sampled(1.0, 0.25, 8).get_epsilon_for_delta(1e-3)
    assert metrics["example-epsilon"] == pytest.approx(expected, rel=1e-5)


def test_personal_state_that_was_not_kept_privately_is_refused():
    plain = Silo(make_task(), NOISY, Two, trainer=Plain())
    both_models(plain, batch_size=4)
    silo = Silo(make_task(), NOISY, Two)
    silo.grid.states.write(0, plain.state())
    with pytest.raises(RuntimeError, match=r"personal state=\['own'\] must be kept"):
        silo.train(first_arrays(), client_half="two", batch_size=4)
    assert ACCOUNT not in silo.state()
    both_models(Silo(make_task(), NOISY, Two), batch_size=4)


@pytest.mark.parametrize("before", ["evaluate", "no steps", "a private round"])
def test_nothing_makes_personal_state_private_but_private_training(before):
    """The server chooses the messages, so that none may launder raw state."""
    plain = Silo(make_task(), NOISY, Two, trainer=Plain())
    both_models(plain, batch_size=4)
    silo, config = Silo(make_task(), NOISY, Two), {"client_half": "two"}
    if before == "a private round":
        both_models(silo, batch_size=4)
        mark = {k: x for k, x in silo.state().items() if k.endswith(PRIVATE)}
        silo = Silo(make_task(), NOISY, Two)
        silo.grid.states.write(0, RecordDict({**mark, **plain.state()}))
    else:
        silo.grid.states.write(0, plain.state())
    if before == "evaluate":
        assert silo.send(first_arrays(), "evaluate", **config).has_content()
    if before == "no steps":
        with pytest.raises(RuntimeError, match=r"personal state=\['own'\] must be"):
            silo.train(first_arrays(), local_epochs=0, **config)
    with pytest.raises(RuntimeError, match=r"personal state=\['own'\] must be kept"):
        silo.train(first_arrays(), batch_size=4, **config)
    assert ACCOUNT not in silo.state()


def test_a_half_may_forget_what_it_kept():
    class Forgetting(Two):
        post_processing = True

        def records(self, local):
            local.personal.drop("own")
            return {}, {}

    silo = Silo(make_task(), NOISY, Forgetting)
    for _ in range(3):
        silo.train(first_arrays(), client_half="two", batch_size=4)


def test_an_evaluation_keeps_nothing_of_what_it_has_seen():
    class Remembering(ClientHalf):
        name = "remembering"
        post_processing = True

        def evaluate(self, local):
            local.personal.save(seen=local.mean_loss(local.train))
            return {}

        def records(self, local):
            return {}, {"seen": local.personal.number("seen", 0.0)}

    silo, config = Silo(make_task(), NOISY, Remembering), {"client_half": "remembering"}
    reply = silo.send(first_arrays(), "evaluate", **config)
    assert "an evaluation may not change personal state" in reply.error.reason
    _, metrics = silo.train(first_arrays(), **config)
    assert metrics["seen"] == 0.0


def test_a_model_of_another_round_does_not_hide_the_round_from_the_account():
    """``alone`` is of round 0, in which a silo need not know what was spent before."""

    class Alone(Two):
        post_processing = True

        def begin(self, local):
            local.alone(1).fit()

        def after_training(self, local):
            pass

        def records(self, local):
            return {}, {}

    silo = Silo(make_task(), NOISY, Alone)
    with pytest.raises(RuntimeError, match="round 7 is the first that it knows of"):
        silo.train(first_arrays(), client_half="two", server_round=7, local_steps=1)


class Patients(nn.Linear):
    """Says what it stumbled over, as a library does."""

    def forward(self, x):
        if (x == 9.0).any():
            raise KeyError(f"unknown value {float(x.max())}")
        return super().forward(x)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("net", [lambda: Patients(3, 2), lambda: nn.Linear(3, 2)])
def test_errors_do_not_quote_the_data(net, kind, caplog):
    data = columns(EXAMPLES)
    data["x"][-1], data["y"][-1] = 9.0, 77
    arrays = {k: x.numpy() for k, x in net().state_dict().items()}
    # All examples are in the batch, and none is looked at before the first step.
    told = Silo(make_task(net, data), NOISY).send(arrays, kind, batch_size=EXAMPLES)
    reason = told.error.reason.partition("Traceback")[0]
    assert "the log of the client" in reason
    assert not re.search("Target|unknown", told.error.reason)
    assert re.search("Target 77|unknown value 9.0|data-dependent", caplog.text)


def test_personal_state_comes_back_without_the_account(tmp_path):
    """As from a checkpoint, where what is spent is in the ledger only."""
    privacy = {**NOISY, "ledger": tmp_path / "ledger.json"}
    before, after = (Silo(make_task(), privacy, Two) for _ in range(2))
    both_models(before, batch_size=4)
    kept = {k: x for k, x in before.state().items() if k != ACCOUNT}
    after.grid.states.write(0, RecordDict(kept))
    _, metrics = both_models(after, batch_size=4, server_round=2)
    expected = sampled(1.0, 1 / 3, 12).get_epsilon_for_delta(1e-3)
    assert metrics["example-epsilon"] == pytest.approx(expected, rel=1e-5)


def test_fine_tuning_for_an_evaluation_is_charged_as_a_round_is():
    class Tuned(ClientHalf):
        name = "tuned"
        post_processing = True

        def model_to_evaluate(self, local):
            personal = local.with_model(local.start)
            personal.fit()
            return personal.end

    silo = Silo(make_task(), NOISY, Tuned, release_evaluation=True)
    told = {"client_half": "tuned", "batch_size": 4, "local_steps": 3}
    _, before = silo.train(first_arrays(), **told)
    measured = silo.send(first_arrays(), "evaluate", **told).content["metrics"]
    _, after = silo.train(first_arrays(), server_round=2, **told)
    plain = Silo(make_task(), NOISY, release_evaluation=True)
    untuned = plain.send(first_arrays(), "evaluate").content["metrics"]
    assert measured["loss"] != untuned["loss"]
    for metrics, steps in ((before, 3), (after, 9)):
        expected = sampled(1.0, 1 / 3, steps).get_epsilon_for_delta(1e-3)
        assert metrics["example-epsilon"] == pytest.approx(expected, rel=1e-5)


def test_what_a_half_measures_at_an_evaluation_is_withheld():
    class Telling(Two):
        post_processing = True

        def model_to_evaluate(self, local):
            return local.personal.arrays("own", like=local.start)

        def evaluate(self, local):
            return {"told": local.mean_loss(local.train)}

    silo = Silo(make_task(), NOISY, Telling)
    reply = silo.send(first_arrays(), "evaluate", client_half="two")
    assert dict(reply.content["metrics"]) == {"num-examples": EXAMPLES}
    asked = Silo(make_task(), NOISY, Telling, release_evaluation=True)
    reply = asked.send(first_arrays(), "evaluate", client_half="two")
    assert "release_evaluation=True must be False" in reply.error.reason


def test_what_a_half_measures_of_test_data_may_be_released():
    class Testing(Two):
        post_processing = True

        def model_to_evaluate(self, local):
            return local.personal.arrays("own", like=local.start)

        def evaluate(self, local):
            return {"told": local.loss_of(self.model_to_evaluate(local), local.test)}

    asked = Silo(make_task(), NOISY, Testing, release_evaluation=True)
    reply = asked.send(first_arrays(), "evaluate", client_half="two")
    metrics = reply.content["metrics"]
    assert metrics["told"] == metrics["loss"] and len(metrics) == 3


def test_a_half_does_not_see_the_loss_that_is_withheld():
    class Copying(ClientHalf):
        name = "copying"
        post_processing = True

        def release(self, metrics):
            return {**metrics, "seen": sorted(metrics)}

    class Named(Copying):
        post_processing = True

        def records(self, local):
            return {}, {"train-loss": 1.0, "mine": 2.0}

        def release(self, metrics):
            return metrics

    silo = Silo(make_task(), NOISY, Named)
    _, metrics = silo.train(first_arrays(), client_half="copying")
    assert "train-loss" not in metrics and metrics["mine"] == 2.0
    seen = []
    Copying.release = lambda self, metrics: seen.extend(metrics) or metrics
    Silo(make_task(), NOISY, Copying).train(first_arrays(), client_half="copying")
    assert sorted(seen) == ["example-delta", "example-epsilon", "num-examples"]


# Federations ------------------------------------------------------------------------


def different(context):
    """Silo i promises 1, 2 or 4."""
    return SiloPrivacy(
        epsilon=[1.0, 2.0, 4.0][context.node_config["partition-id"]],
        delta=1e-3,
        num_rounds=2,
        clipping_norm=1.0,
        seed=7,
    )


@pytest.mark.parametrize("strategy", [AdditiveStrategy, FedAvg])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_federation_of_silos_with_budgets_of_their_own(strategy, mode):
    silo = Silo(make_task(data=columns(60)), different, mode=mode)
    server = strategy(train_metrics_aggr_fn=worst_silo)
    result = server.start(
        silo.grid,
        to_record(first_arrays()),
        num_rounds=2,
        train_config=ConfigRecord({"lr": 0.5, "batch-size": 12}),
    )
    metrics = result.train_metrics_clientapp[2]
    assert 4.0 * 0.99 < metrics["example-epsilon"] <= 4.0
    assert metrics["example-delta"] == 1e-3
    assert result.train_metrics_clientapp[1]["example-epsilon"] < 3.9
    final = {k: a.numpy() for k, a in result.arrays.items()}
    assert not np.allclose(final["out.weight"], first_arrays()["out.weight"])
    frozen = first_arrays()["frozen.weight"]
    np.testing.assert_allclose(final["frozen.weight"], frozen, rtol=1e-6)
    # The two rounds are spent; a third is refused by every silo.
    replies = [silo.send(first_arrays(), client=i, batch_size=12) for i in range(3)]
    assert all("SiloBudgetExhausted" in reply.error.reason for reply in replies)


def test_a_silo_without_budget_does_not_stop_the_others():
    def privacy(context):
        short = context.node_config["partition-id"] == 1
        return SiloPrivacy(**NOISY, max_epsilon=1.0 if short else None)

    silo = Silo(make_task(data=columns(60)), privacy)
    result = AdditiveStrategy(train_metrics_aggr_fn=worst_silo).start(
        silo.grid,
        to_record(first_arrays()),
        num_rounds=1,
        train_config=ConfigRecord({"batch-size": 12}),
    )
    metrics = result.train_metrics_clientapp[1]
    assert metrics["num-errors"] == 1 and metrics["num-replies"] == 2
    assert metrics["example-epsilon"] == pytest.approx(
        sampled(1.0, 0.2, 5).get_epsilon_for_delta(1e-3), rel=1e-5
    )


def test_the_worst_silo_counts_and_the_rest_is_averaged(reply):
    def one(weight, epsilon, other):
        metrics = {"example-epsilon": epsilon, "user-delta": epsilon, "other": other}
        return reply(None, weight, **metrics)

    found = worst_silo([one(1, 5.0, 1.0), one(3, 2.0, 5.0)], "num-examples")
    assert dict(found) == {"example-epsilon": 5.0, "user-delta": 5.0, "other": 4.0}


@pytest.mark.parametrize("module", [dp_sgd, users])
def test_doctests_pass(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
