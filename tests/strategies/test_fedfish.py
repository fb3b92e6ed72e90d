"""FedFish: its formula, its limits, its Fisher, and runs with a known solution."""

import logging
import re
from dataclasses import replace
from functools import partial
from math import inf, nan

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flower_ext._flower import InconsistentMessageReplies
from flower_ext.client.app import client_app
from flower_ext.client.seeds import random_seed
from flower_ext.client.task import Task
from flower_ext.core.arrays import Lazy, from_record, to_record
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD, Adam
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies.fedfish import (
    FedFish,
    FedFishClient,
    function_space_mean,
    normalized,
    watch_fisher,
)

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}


# The formula ----------------------------------------------------------------------

numbers = st.floats(-10, 10, width=32, allow_subnormal=False)
squares = st.just(0.0) | st.floats(2**-20, 2**20, width=32)


@st.composite
def cohorts(draw, min_clients=1, fishers=squares):
    """Draw ``(deltas, fishers, weights)``, the first two ``(clients, params)``."""
    clients, params = draw(st.integers(min_clients, 5)), draw(st.integers(1, 4))

    def table(cells):
        row = st.lists(cells, min_size=params, max_size=params)
        rows = draw(st.lists(row, min_size=clients, max_size=clients))
        return np.array(rows, np.float32)

    weight = st.integers(1, 1000)
    weights = draw(st.lists(weight, min_size=clients, max_size=clients))
    return table(numbers), table(fishers), np.array(weights, np.float64)


dampings = st.sampled_from([0.0, 0.1, 3.0, inf])


def aggregate_sums(deltas, fishers, weights, damping):
    """Call the function with the sums over clients, as the strategy does."""
    p, d, f = weights[:, None], deltas.astype(np.float64), fishers.astype(np.float64)
    return function_space_mean(
        {"w": (p * f * d).sum(0)},
        {"w": (p * f).sum(0)},
        {"w": (p * d).sum(0)},
        float(weights.sum()),
        damping,
    )["w"]


def by_definition(deltas, fishers, weights, damping):
    """The formula with F_k + lambda * mean(F), coordinate by coordinate."""
    p = weights / weights.sum()
    plain = [float(p @ column) for column in deltas.T.astype(np.float64)]
    if damping == inf:
        return np.array(plain)
    mean = np.mean([p @ column for column in fishers.T.astype(np.float64)])
    direction = []
    for j, fallback in enumerate(plain):
        f = fishers[:, j].astype(np.float64) + damping * mean
        known = float(p @ f)
        moved = p @ (f * deltas[:, j])
        direction.append(moved / known if known > 0 else fallback)
    return np.array(direction)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(cohorts(), dampings)
def test_formula(cohort, damping):
    expected = by_definition(*cohort, damping)
    assert aggregate_sums(*cohort, damping) == pytest.approx(expected, abs=1e-9)


@settings(derandomize=True, deadline=None)
@given(cohorts(), dampings)
def test_equal_fishers_or_infinite_damping_are_fedavg(cohort, damping):
    deltas, fishers, weights = cohort
    average = weights @ deltas / weights.sum()
    same = np.broadcast_to(fishers[0], fishers.shape)
    assert aggregate_sums(deltas, same, weights, damping) == pytest.approx(
        average, abs=1e-9
    )
    assert aggregate_sums(deltas, fishers, weights, inf) == pytest.approx(
        average, abs=1e-9
    )


@settings(derandomize=True, deadline=None)
@given(cohorts(), st.sampled_from([1e-30, 0.03, 7.0, 1e30]), dampings)
def test_common_scale_of_the_fishers_is_nothing(cohort, scale, damping):
    deltas, fishers, weights = cohort
    fishers = fishers.astype(np.float64)
    assert aggregate_sums(deltas, fishers * scale, weights, damping) == pytest.approx(
        aggregate_sums(deltas, fishers, weights, damping), abs=1e-9
    )


@settings(derandomize=True, deadline=None)
@given(cohorts())
def test_common_rescale_of_a_coordinate_is_nothing_without_damping(cohort):
    deltas, fishers, weights = cohort
    rescale = 10.0 ** np.arange(-2, fishers.shape[1] - 2)
    assert aggregate_sums(deltas, fishers * rescale, weights, 0.0) == pytest.approx(
        aggregate_sums(deltas, fishers, weights, 0.0), abs=1e-9
    )


@settings(derandomize=True, deadline=None)
@given(cohorts(), dampings)
def test_every_coordinate_is_a_convex_combination(cohort, damping):
    found = aggregate_sums(*cohort, damping)
    deltas = cohort[0].astype(np.float64)
    slack = 1e-9 * np.abs(deltas).max(0)
    assert np.all(found >= deltas.min(0) - slack)
    assert np.all(found <= deltas.max(0) + slack)


def test_damping_interpolates_between_fisher_weights_and_equal_ones():
    # Fishers 3 and 1 in one coordinate, equal weights: mean 2. Damped by 0.5 they
    # are 4 and 2.
    for damping, expected in ((0.0, 3 / 4), (0.5, 4 / 6), (inf, 1 / 2)):
        found = aggregate_sums(
            np.array([[1.0], [0.0]]), np.array([[3.0], [1.0]]), np.ones(2), damping
        )
        assert found == pytest.approx([expected])


# The strategy on given replies ----------------------------------------------------


@pytest.fixture(scope="session")
def known(reply):
    """Make a reply that knows its Fisher."""

    def make(arrays, fisher, weight=1.0, **metrics):
        content = reply(arrays, weight, **metrics)
        if fisher is not None:
            content["fisher"] = to_record(fisher)
        return content

    return make


def test_strategy_is_the_formula(known, aggregate):
    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(cohorts(), dampings, st.randoms())
    def check(cohort, damping, random):
        deltas, fishers, weights = cohort
        sent = np.linspace(-1, 1, deltas.shape[1], dtype=np.float32)
        contents = [
            known({"w": sent + delta}, {"w": fisher}, weight)
            for delta, fisher, weight in zip(deltas, fishers, weights, strict=True)
        ]
        expected = sent + by_definition(*cohort, damping)
        for _ in range(2):  # the second time with the clients in another order
            new, metrics = aggregate(
                FedFish(damping=damping, **ANY), {"w": sent}, contents
            )
            assert new["w"].dtype == np.float32
            assert new["w"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
            mean = (weights @ fishers).mean() / weights.sum()
            assert metrics["fisher-mean"] == pytest.approx(mean, rel=1e-6)
            random.shuffle(contents)

    check()


def test_one_client_is_taken_over(known, aggregate):
    trained = {"w": np.float32([1, -2, 3])}
    fisher = {"w": np.float32([0, 1e-6, 1e6])}
    for damping in (0.0, 0.1, inf):
        new, _ = aggregate(
            FedFish(damping=damping, **ANY),
            {"w": np.float32([9, 9, 9])},
            [known(trained, fisher, 7)],
        )
        assert new["w"] == pytest.approx(trained["w"], rel=1e-6)


@pytest.mark.parametrize("fisher", [1e-45, 1e-38, 1e-20, 1e20, 1e38])
def test_tiny_and_huge_fishers_weigh_as_others(known, aggregate, fisher):
    new, _ = aggregate(
        FedFish(damping=0.0),
        {"w": np.float32([0.0])},
        [
            known({"w": np.float32([w])}, {"w": np.float32([fisher])})
            for w in (0.6, 0.2)
        ],
    )
    assert new["w"] == pytest.approx([0.4], rel=1e-6)


def pooled_ols_clients(known):
    """Two clients whose features are orthogonal; each has solved its least squares."""
    features = ([0, 0, 1], [2, 3, 3, 1])
    labels = ([1, 2, 3], [4, 5, 7, 9])
    for columns, targets in zip(features, labels, strict=True):
        x, y = np.eye(4)[columns], np.array(targets)
        own = np.linalg.lstsq(x, y, rcond=None)[0]
        mean_fisher = np.diag(x.T @ x) / len(x)
        yield x, y, known({"w": own}, {"w": mean_fisher}, len(x))


def test_orthogonal_least_squares_is_pooled_least_squares(known, aggregate):
    # The mean Fisher times the number of examples is the Fisher of the sum: the
    # number of examples enters once.
    xs, ys, replies = zip(*pooled_ols_clients(known), strict=True)
    pooled = np.linalg.lstsq(np.concatenate(xs), np.concatenate(ys), rcond=None)[0]
    sent = {"w": np.zeros(4)}
    new, _ = aggregate(FedFish(damping=0.0), sent, list(replies))
    assert new["w"] == pytest.approx([1.5, 6, 4, 6])
    assert new["w"] == pytest.approx(pooled)
    average, _ = aggregate(AdditiveStrategy(), sent, list(replies))
    assert average["w"] == pytest.approx([9 / 14, 45 / 7, 16 / 7, 24 / 7])
    # A Fisher of sums would count the examples twice.
    twice = [
        known(from_record(r["arrays"]), {"w": from_record(r["fisher"])["w"] * n}, n)
        for r, n in zip(replies, (3, 4), strict=True)
    ]
    wrong, _ = aggregate(FedFish(damping=0.0), sent, twice)
    assert wrong["w"][1] == pytest.approx((3 * 3 * 1 + 9 * 4 * 1) / (3 + 4))


def test_what_nobody_knows_is_averaged_plainly(known, aggregate):
    new, _ = aggregate(
        FedFish(damping=0.0),
        {"w": np.float32([0, 0, 0])},
        [
            known({"w": np.float32([1, 1, 1])}, {"w": np.float32([0, 2, 0])}, 3),
            known({"w": np.float32([5, 5, 5])}, {"w": np.float32([0, 0, 4])}, 1),
        ],
    )
    assert new["w"] == pytest.approx([2, 1, 5])


@pytest.mark.parametrize(
    ("damping", "expected"),
    # Damping 1 adds the mean Fisher 4: (12 * 2 + 4 * 4) / (12 + 4).
    [(0.0, 2), (1.0, 2.5), (inf, 3)],
)
def test_client_with_no_information_moves_nothing_but_by_damping(
    known, aggregate, damping, expected
):
    sent = {"w": np.float32([0, 0])}
    knows = known({"w": np.float32([2, 2])}, {"w": np.float32([8, 8])})
    ignorant = known({"w": np.float32([4, 4])}, {"w": np.float32([0, 0])})
    new, metrics = aggregate(FedFish(damping=damping), sent, [knows, ignorant])
    assert new["w"] == pytest.approx([expected, expected])
    assert metrics["num-replies"] == 2


def test_nobody_knows_anything(known, aggregate):
    none = {"w": np.zeros(2, np.float32)}
    contents = [known({"w": np.float32([w, -w])}, none, w) for w in (1, 3)]
    for damping in (0.0, 0.1):
        new, _ = aggregate(FedFish(damping=damping), none, contents)
        assert new["w"] == pytest.approx([2.5, -2.5])


def test_arrays_without_a_fisher_are_averaged_plainly(known, aggregate):
    sent = {
        "w": np.float32([0]),
        "frozen": np.float32([7, 7]),
        "bn.running_var": np.float32([1]),
        "bn.num_batches_tracked": np.array(10),
    }

    def client(w, fisher, weight, var, batches):
        arrays = {
            **sent,
            "w": np.float32([w]),
            "bn.running_var": np.float32([var]),
            "bn.num_batches_tracked": np.array(batches),
        }
        return known(arrays, {"w": np.float32([fisher])}, weight)

    contents = [client(1, 1, 3, 2.0, 13), client(5, 9, 1, 4.0, 17)]
    new, _ = aggregate(FedFish(damping=0.0), sent, contents)
    assert new["w"] == pytest.approx([(3 * 1 + 9 * 5) / 12])
    assert new["frozen"] == pytest.approx([7, 7])
    assert new["bn.running_var"] == pytest.approx([2.5])
    assert new["bn.num_batches_tracked"] == 14
    assert new["bn.num_batches_tracked"].dtype == np.int64


def test_array_that_only_one_client_knows(known, aggregate):
    sent = {"a": np.float32([0]), "b": np.float32([0])}
    one = np.float32([1])
    contents = [
        known({"a": one, "b": one}, {"a": one, "b": one}),
        known({"a": 3 * one, "b": 3 * one}, {"a": one}),
    ]
    new, _ = aggregate(FedFish(damping=0.0), sent, contents)
    assert (new["a"], new["b"]) == (2, 1)


@pytest.mark.parametrize(
    ("fisher", "reason"),
    [
        (None, "no ArrayRecord 'fisher'"),
        ({}, "'fisher' must hold squares"),
        ({"w": np.float32([1, -1e-9])}, "'fisher' must hold squares"),
        ({"w": np.float32([1, nan])}, "not finite"),
        ({"w": np.float32([1, inf])}, "not finite"),
        ({"w": np.float32([1])}, r"is float32\[1\], expected float32\[2\]"),
        ({"w": np.float32([[1, 1]])}, r"is float32\[1, 2\], expected float32\[2\]"),
        ({"w": np.array([1, 1])}, r"is int64\[2\], expected float32\[2\]"),
        (
            {"v": np.float32([1, 1])},
            r"'fisher' must have names of the model's arrays, unknown \['v'\]",
        ),
        ({"w": np.float32([1, 1]), "n": np.array(1)}, r"unknown \['n'\]"),
    ],
)
def test_reply_without_a_usable_fisher_is_dropped(
    known, aggregate, caplog, fisher, reason
):
    caplog.set_level(logging.WARNING, logger="flwr")
    sent = {"w": np.float32([0, 0]), "n": np.array(5)}
    good = known({**sent, "w": np.float32([1, 2])}, {"w": np.float32([1, 1])})
    bad = known({**sent, "w": np.float32([100, 100])}, fisher)
    new, metrics = aggregate(FedFish(), sent, [good, bad, good])
    assert new["w"] == pytest.approx([1, 2])
    assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 1)
    assert re.search(reason, caplog.text)


def test_fishers_of_a_round_under_other_names_end_the_run(known, aggregate):
    """A client that names its Fisher otherwise gets no round without being told."""
    sent = {"layer.lora_A.weight": np.float32([0, 0])}
    squares = {"layer.lora_A.default.weight": np.float32([1, 1])}
    with pytest.raises(InconsistentMessageReplies, match=r"record\(arrays\) takes"):
        aggregate(FedFish(), sent, [known(sent, squares)] * 2)


# Clients of the same scale --------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=50)
@given(cohorts(), st.integers(0, 4), st.sampled_from([1e-30, 1e-3, 1e6, 1e30]))
def test_normalized_fishers_do_not_depend_on_their_scale(cohort, client, factor):
    _, fishers, _ = cohort
    fisher = fishers[client % len(fishers)].astype(np.float64)
    one, other = (
        normalized({"w": x[:1], "b": x[1:]}, size=len(fisher))
        for x in (fisher, fisher * factor)
    )
    for name, term in one.items():
        assert np.asarray(array_of(other[name])) == pytest.approx(array_of(term))
    total = sum(float(array_of(x).sum()) for x in one.values())
    assert total == pytest.approx(1.0 if fisher.any() else 0.0)


def array_of(term):
    return term.numpy() if isinstance(term, Lazy) else term


@pytest.mark.parametrize("damping", [0.0, 0.1, inf])
def test_client_normalization_is_the_formula_with_each_mean_one(
    known, aggregate, damping
):
    rng = np.random.default_rng(2)
    deltas = rng.normal(size=(3, 4)).astype(np.float32)
    fishers = rng.exponential(size=(3, 4)) * [[1e-6], [1.0], [1e4]]
    fishers, weights = fishers.astype(np.float32), np.array([3.0, 1.0, 7.0])
    sent = {"w": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)}

    def split(row):
        return {"w": row[:3], "b": row[3:]}

    contents = [
        known(split(delta), split(fisher), weight)
        for delta, fisher, weight in zip(deltas, fishers, weights, strict=True)
    ]
    strategy = FedFish(damping=damping, normalization="client", **ANY)
    new, _ = aggregate(strategy, sent, contents)
    alike = fishers / fishers.mean(1, keepdims=True)
    expected = by_definition(deltas, alike, weights, damping)
    assert np.concatenate([new["w"], new["b"]]) == pytest.approx(expected, rel=1e-4)


def test_client_normalization_compares_coordinates_of_clients_that_know_parts(
    known, aggregate
):
    sent = {"a": np.float32([0]), "b": np.float32([0])}
    one = np.float32([1])
    contents = [
        known({"a": one, "b": one}, {"a": one, "b": one}),
        known({"a": 3 * one, "b": 3 * one}, {"a": 50 * one}),
        known({"a": 5 * one, "b": 5 * one}, {"a": 0 * one, "b": 0 * one}),
    ]
    new, _ = aggregate(FedFish(damping=0.0, normalization="client"), sent, contents)
    assert new["a"] == pytest.approx([2.0])
    assert new["b"] == pytest.approx([1.0])


# The Fisher that clients send -----------------------------------------------------


@pytest.mark.parametrize("estimator", ["last-epoch", "all-epochs"])
def test_clients_alike_but_for_their_number_of_examples_have_the_same_fisher(
    linear_task, estimator
):
    """At the solution w: the gradient is -e * x, with e standard normal, and F = 1.

    33 examples are batches of 32 and of 1, 5 one short batch.
    """
    rng = np.random.default_rng(0)
    sizes, clients = (5, 33, 64, 320), 40
    data = []
    for n in sizes:
        for _ in range(clients):
            x = rng.choice([-1.0, 1.0], size=(n, 8))
            data.append({"x": x, "y": x @ np.arange(8) + rng.normal(size=n)})
    task = linear_task(data, 8)
    config = {"lr": 0.0, "batch-size": 32, "local-epochs": 2}
    grid = LocalGrid(client_app(task, FedFishClient), len(data), config)
    solution = to_record({"weight": np.arange(8, dtype=np.float32)[None]})
    strategy = FedFish(estimator=estimator)
    messages = strategy.configure_train(1, solution, ConfigRecord(), grid)
    fishers = [
        float(reply.content["fisher"]["weight"].numpy().mean())
        for reply in grid.send_and_receive(messages)
    ]
    means = np.reshape(fishers, (len(sizes), clients)).mean(1)
    # The square of a coordinate has standard deviation of about 2 ** 0.5, and those
    # of a client share e: two of 40 clients' mean are below 0.5.
    assert means == pytest.approx(np.ones(len(sizes)), abs=0.5)


def make_mlp(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def mlp_data(context):
    generator = torch.Generator().manual_seed(10 + context.node_config["partition-id"])
    x = torch.randn(10, 3, generator=generator)
    columns = {"x": x, "y": (x[:, 0] > x[:, 1]).long()}
    return columns, columns


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


MLP = Task(make_mlp, mlp_data, cross_entropy)
CONFIG = {"lr": 0.3, "batch-size": 4, "local-epochs": 3, "seed": 5}
CLIENT, ROUND, PASSES_PER_EPOCH = 1, 2, 3


def answer(strategy, task, client=CLIENT, config=CONFIG, server_round=ROUND):
    """Return one client's reply to a strategy's message."""
    grid = LocalGrid(client_app(task, FedFishClient), 2, config)
    initial = ArrayRecord(task.model(config).state_dict())
    messages = strategy.configure_train(server_round, initial, ConfigRecord(), grid)
    return list(grid.send_and_receive(messages))[client]


def loop_by_hand(epochs, clipped_to=None):
    """Return the trained parameters and the squared gradients of every pass."""
    model, columns = make_mlp({}), mlp_data_of(CLIENT)
    parameters = dict(model.named_parameters())
    order = torch.Generator().manual_seed(random_seed(5, ROUND, CLIENT))
    passes = []
    for _ in range(epochs):
        for chosen in torch.randperm(10, generator=order).split(4):
            batch = {name: column[chosen] for name, column in columns.items()}
            loss = cross_entropy(model, batch).mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            passes.append([len(chosen), [g.square() for g in gradients]])
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            scale = 1.0 if clipped_to is None else min(1.0, clipped_to / float(norm))
            with torch.no_grad():
                for p, g in zip(parameters.values(), gradients, strict=True):
                    p -= 0.3 * scale * g
    return parameters, passes


def mlp_data_of(client):
    context = type("Context", (), {"node_config": {"partition-id": client}})
    return mlp_data(context)[0]


def fisher_of(passes):
    """Squares of the examples' summed gradients over the number of examples."""
    sizes, squares = zip(*passes, strict=True)
    return [
        sum(b**2 * g for b, g in zip(sizes, parameter, strict=True)) / sum(sizes)
        for parameter in zip(*squares, strict=True)
    ]


def close(record, expected):
    """Whether a record of arrays holds the expected tensors, in order."""
    found = from_record(record)
    return len(found) == len(expected) and all(
        np.allclose(array, tensor.detach(), rtol=1e-4, atol=1e-9)
        for array, tensor in zip(found.values(), expected, strict=True)
    )


def test_last_epoch_and_all_epochs_equal_a_loop_by_hand():
    parameters, passes = loop_by_hand(epochs=3)
    assert len(passes) == 3 * PASSES_PER_EPOCH
    last, everything = (
        answer(FedFish(estimator=name), MLP).content
        for name in ("last-epoch", "all-epochs")
    )
    assert list(last["fisher"]) == list(parameters)
    assert close(last["arrays"], list(parameters.values()))
    assert close(last["fisher"], fisher_of(passes[-PASSES_PER_EPOCH:]))
    assert close(everything["fisher"], fisher_of(passes))
    assert not close(last["fisher"], fisher_of(passes))
    assert all(array.dtype == "float32" for array in last["fisher"].values())


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_local_steps_count_the_last_ones(steps):
    config = {**CONFIG, "local-steps": steps}
    _, passes = loop_by_hand(epochs=3)
    last = answer(FedFish(), MLP, config=config).content["fisher"]
    assert close(last, fisher_of(passes[max(0, steps - PASSES_PER_EPOCH) : steps]))
    everything = answer(FedFish(estimator="all-epochs"), MLP, config=config)
    assert close(everything.content["fisher"], fisher_of(passes[:steps]))


def test_fisher_is_of_gradients_before_they_are_clipped():
    parameters, passes = loop_by_hand(epochs=1, clipped_to=0.01)
    config = {**CONFIG, "local-epochs": 1, "max-gradient-norm": 0.01}
    content = answer(FedFish(), MLP, config=config).content
    assert close(content["arrays"], list(parameters.values()))
    assert close(content["fisher"], fisher_of(passes))


def never(model, batch, generator):
    raise AssertionError("labels are drawn for 'sampled' only")


def test_per_example_is_taken_at_the_trained_model_with_the_datas_labels():
    task = replace(MLP, sample_labels=never)
    content = answer(FedFish(estimator="per-example"), task).content
    model = make_mlp({})
    model.load_state_dict(content["arrays"].to_torch_state_dict())
    columns, squares = mlp_data_of(CLIENT), []
    for i in range(10):
        example = {name: column[i : i + 1] for name, column in columns.items()}
        loss = cross_entropy(model, example).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        squares.append([1, [g.square() for g in gradients]])
    assert close(content["fisher"], fisher_of(squares))


def test_sampled_is_the_closed_form_of_a_linear_gaussian_model(linear_task):
    # The gradient of 0.5 * (y - x @ w)**2 is -e * x with e = y - x @ w, and e is a
    # standard normal number when y is drawn from the model: F_j = mean(x_j**2).
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)) * [1.0, 0.3, 2.0]
    tasks = [
        linear_task([{"x": x, "y": labels}] * 2, 3)
        for labels in (rng.normal(size=200), 50 + x[:, 0])
    ]
    config = {"local-epochs": 0, "batch-size": 64}
    strategy, total, rounds = FedFish(estimator="sampled"), np.zeros(3), 30
    for server_round in range(1, rounds + 1):
        first, second = (
            answer(strategy, task, 0, config, server_round).content["fisher"]
            for task in tasks
        )
        # Neither the data's labels nor the model's weights, drawn anew, play a part.
        assert close(first, [torch.tensor(second["weight"].numpy())])
        total += first["weight"].numpy()[0]
    # Var(e**2) = 2: five standard deviations of the mean of 200 terms a round.
    bound = 5 * np.sqrt(2 * (x**4).sum(0) / rounds) / 200
    expected = (x**2).mean(0)
    assert np.all(bound < 0.25 * expected)
    assert np.all(np.abs(total / rounds - expected) < bound)


def test_sampled_needs_a_way_to_draw_labels():
    reply = answer(FedFish(estimator="sampled"), MLP)
    assert reply.has_error()
    assert "estimator='sampled' must be used with a Task that has sample_labels" in (
        reply.error.reason
    )


def test_estimator_unknown_to_the_client_is_refused():
    strategy = FedFish()
    strategy.estimator = "exact"
    reply = answer(strategy, MLP)
    assert reply.has_error()
    assert "estimator='exact' must be one of" in reply.error.reason


def watching_app(batches_per_epoch):
    """A ClientApp with a loop of its own; the lines for FedFish are marked."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        columns = mlp_data(context)[0]
        model = make_mlp({})
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        fisher = watch_fisher(model, batches_per_epoch)  # FedFish
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        client = context.node_config["partition-id"]
        server_round = message.content["config"]["server-round"]
        order = torch.Generator().manual_seed(random_seed(5, server_round, client))
        for _ in range(3):
            for chosen in torch.randperm(10, generator=order).split(4):
                batch = {name: column[chosen] for name, column in columns.items()}
                optimizer.zero_grad()
                cross_entropy(model, batch).mean().backward()
                optimizer.step()
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "fisher": fisher.record(),  # FedFish
                "metrics": MetricRecord({"num-examples": 10}),
            }
        )
        return Message(content, reply_to=message)

    return app


def test_watching_a_loop_of_ones_own_gives_the_same(play):
    initial = {k: v.numpy() for k, v in make_mlp({}).state_dict().items()}
    ours, theirs = (
        play(FedFish(), app, 3, initial, rounds=2, config=CONFIG)
        for app in (client_app(MLP, FedFishClient), watching_app(PASSES_PER_EPOCH))
    )
    assert ours.train(2)["fisher-mean"] == pytest.approx(theirs.train(2)["fisher-mean"])
    for name, array in ours.models[2].items():
        assert theirs.models[2][name] == pytest.approx(array, rel=1e-5, abs=1e-7)
    # Windows of another length are another Fisher.
    other = play(FedFish(), watching_app(9), 3, initial, rounds=1, config=CONFIG)
    assert other.train(1)["fisher-mean"] != pytest.approx(ours.train(1)["fisher-mean"])


def test_watching_needs_batches():
    with pytest.raises(ValueError, match="window=0 must be an integer >= 1: a loader"):
        watch_fisher(make_mlp({}), 0)


# Runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, partial(SGD, 0.5, momentum=0.9), Adam])
def test_infinite_damping_is_fedavg_bit_for_bit(task, initial, play, optimizer):
    # A net with BatchNorm and dropout.
    app, config = client_app(task, FedFishClient), {"batch-size": 4, "lr": 0.1}
    runs = [
        play(strategy, app, 4, from_record(initial), 3, config)
        for strategy in (
            FedFish(damping=inf, server_optimizer=optimizer()),
            FedFish(server_optimizer=optimizer()),
            AdditiveStrategy(server_optimizer=optimizer()),
        )
    ]
    infinite, damped, average = (run.models[3] for run in runs)
    assert all(np.array_equal(infinite[name], average[name]) for name in average)
    assert any(not np.allclose(damped[name], average[name]) for name in average)
    # Statistics have no Fisher.
    first_damped, first_average = runs[1].models[1], runs[2].models[1]
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert np.array_equal(first_damped[name], first_average[name])


def test_server_optimizer_is_applied(known, aggregate):
    sent = {"w": np.float32([1.0])}
    contents = [known({"w": np.float32([3.0])}, {"w": np.float32([1.0])})]
    half, _ = aggregate(FedFish(server_optimizer=SGD(0.5), **ANY), sent, contents)
    assert half["w"] == pytest.approx([2.0])
    adam = Adam(0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    moved, _ = aggregate(FedFish(server_optimizer=adam, **ANY), sent, contents)
    v = 0.99 * 1e-6 + 0.01 * 2.0**2
    assert moved["w"] == pytest.approx([1 + 0.1 * 0.1 * 2.0 / (np.sqrt(v) + 1e-3)])


def ols_clients():
    """Three clients' data; the test data are as many as they please."""
    rng = np.random.default_rng(3)
    for n, tests, w in ((8, 30, [1, -1]), (12, 3, [2, 0]), (20, 11, [-1, 1])):
        x = rng.normal(size=(n, 2))
        train = {"x": x, "y": x @ w + 0.1 * rng.normal(size=n)}
        yield train, {"x": np.ones((tests, 2)), "y": np.full(tests, 9.0)}


def barrier_by_hand(clients, theta):
    """The quadratic form, exact for least squares solved on each client."""
    total = barrier = 0.0
    for train, _ in clients:
        x, n = train["x"], len(train["x"])
        apart = theta - np.linalg.lstsq(x, train["y"], rcond=None)[0]
        barrier += n * 0.5 * apart @ (x.T @ x / n) @ apart
        total += n
    return barrier / total


SOLVE = {"lr": 0.5, "batch-size": 100, "local-steps": 150}
ZERO = {"weight": np.zeros((1, 2), np.float32)}


def test_barrier_is_the_quadratic_form_for_least_squares(linear_task, play):
    clients = list(ols_clients())
    app = client_app(linear_task(clients, 2), FedFishClient)
    for damping in (0.0, inf):
        strategy = FedFish(damping=damping, barrier=True)
        run = play(strategy, app, 3, ZERO, config=SOLVE)
        expected = barrier_by_hand(clients, run.models[1]["weight"][0])
        assert expected > 0.1
        found = run.evaluate()["client-server-barrier"]
        assert found == pytest.approx(expected, rel=1e-4)


def test_barrier_is_of_clients_that_trained_in_this_round(linear_task, play, spied):
    clients = list(ols_clients())
    app, calls = spied(client_app(linear_task(clients, 2), FedFishClient))
    strategy = FedFish(barrier=True, fraction_train=0.4, min_train_nodes=1)
    run = play(strategy, app, 3, ZERO, rounds=4, config=SOLVE)
    cohorts = []
    for server_round in range(1, 5):
        trained = {
            call.client
            for call in calls
            if call.kind == "train" and call.server_round == server_round
        }
        cohorts.append(trained)
        expected = barrier_by_hand(
            [clients[k] for k in sorted(trained)], run.models[server_round]["weight"][0]
        )
        found = run.evaluate(server_round)["client-server-barrier"]
        # One client's model is the aggregate: nothing is lost.
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert len(set(map(frozenset, cohorts))) > 1


def test_barrier_is_nothing_if_all_client_models_are_the_aggregate(linear_task, play):
    same = next(ols_clients())
    app = client_app(linear_task([same] * 3, 2), FedFishClient)
    run = play(FedFish(barrier=True), app, 3, ZERO, config=SOLVE)
    assert run.evaluate()["client-server-barrier"] == pytest.approx(0, abs=1e-6)


def test_fedfish_lowers_the_barrier_where_its_fisher_is_exact(linear_task, play):
    # Orthogonal features: the diagonal Fisher, sampled, is that of the task.
    rng = np.random.default_rng(1)
    clients = []
    for counts in ((40, 2), (2, 40), (30, 10)):
        x = np.repeat(np.eye(2), counts, axis=0)
        clients.append({"x": x, "y": x @ rng.normal(size=2) * 3})
    app = client_app(linear_task(clients, 2), FedFishClient)
    barrier = {
        damping: play(
            FedFish(damping=damping, estimator="sampled", barrier=True),
            app,
            3,
            ZERO,
            config=SOLVE,
        ).evaluate()["client-server-barrier"]
        for damping in (0.0, inf)
    }
    assert barrier[0.0] < 0.7 * barrier[inf]


def test_barrier_costs_nothing_unless_asked_for(linear_task, play, spied):
    app, calls = spied(client_app(linear_task(list(ols_clients()), 2), FedFishClient))
    run = play(FedFish(), app, 3, ZERO, config=SOLVE)
    assert "client-server-barrier" not in run.evaluate()
    assert not any(call.state for call in calls)


def test_client_without_examples_spoils_neither_model_nor_barrier(linear_task, play):
    clients = list(ols_clients())
    nobody = {"x": np.zeros((0, 2)), "y": np.zeros(0)}
    for estimator in ("last-epoch", "per-example"):
        with_it, without = (
            play(
                FedFish(barrier=True, estimator=estimator),
                client_app(linear_task(data, 2), FedFishClient),
                len(data),
                ZERO,
                config=SOLVE,
            )
            for data in ([*clients, nobody], clients)
        )
        assert with_it.models[1]["weight"] == pytest.approx(without.models[1]["weight"])
        found = with_it.evaluate()["client-server-barrier"]
        assert found == pytest.approx(without.evaluate()["client-server-barrier"])


# Settings -------------------------------------------------------------------------


def test_summary_logs_the_settings(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    FedFish(damping=0.25, estimator="per-example", barrier=True).summary()
    for line in ("FedFish settings", "Damping: 0.25", "Fisher: per-example"):
        assert line in caplog.text
    assert "Client-Server Barrier: True" in caplog.text
    assert "Server optimizer: SGD(" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -0.1}, r"damping=-0\.1 must be a number >= 0: infinity is FedAvg"),
        ({"damping": nan}, "damping=nan must be a number >= 0"),
        ({"damping": -inf}, "damping=-inf must be a number >= 0"),
        ({"damping": "0.1"}, "damping='0.1' must be a number >= 0"),
        ({"damping": True}, "damping=True must be a number >= 0"),
        ({"damping": None}, "damping=None must be a number >= 0"),
        ({"estimator": "exact"}, "estimator='exact' must be one of .*'last-epoch'"),
        ({"estimator": ["sampled"]}, r"estimator=\['sampled'\] must be one of"),
        ({"normalization": "mean"}, "normalization='mean' must be one of .*'client'"),
        ({"barrier": "no"}, "barrier='no' must be True or False"),
        ({"min_replies": 0}, "min_replies=0 must be an integer >= 1"),
        ({"fraction_train": 2.0}, "fraction_train=2.0 must be between 0 and 1"),
        ({"server_optimizer": SGD}, "server_optimizer=.*must be a ServerOptimizer"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FedFish(**options)


def test_no_square_beyond_float32_holds_a_model_of_float64_back(aggregate, reply):
    def content(value, square):
        made = reply({"w": np.full(100, value)})
        made["fisher"] = to_record({"w": np.full(100, square)})
        return made

    contents = [content(2.0, 1.0), content(9.0, 1e307), content(4.0, 1.0)]
    new, metrics = aggregate(FedFish(), {"w": np.ones(100)}, contents)
    assert new["w"].tolist() == pytest.approx([3] * 100)
    assert metrics["num-dropped"] == 1


def test_arrays_without_a_fisher_are_not_in_its_mean(aggregate, reply):
    # A buffer has no gradient: its squares are unknown, not zero.
    sent = {"w": np.float32([0.0, 0.0]), "running": np.float32([0.0, 0.0])}
    contents = []
    for value in (1.0, 3.0):
        content = reply({name: x + np.float32(value) for name, x in sent.items()})
        content["fisher"] = to_record({"w": np.float32([2.0, 4.0])})
        contents.append(content)
    _, metrics = aggregate(FedFish(), sent, contents)
    assert metrics["fisher-mean"] == 3.0
