"""The client: local training against hand-written loops, and its determinism."""

import functools
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from ray import cloudpickle
from torch import nn

from flower_ext.client.app import client_app
from flower_ext.client.half import ClientHalf, Local, LocalSettings
from flower_ext.client.seeds import random_seed
from flower_ext.client.task import Task, batches, evaluate, num_examples
from flower_ext.core.arrays import to_record
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.rounds import run_rounds
from flower_ext.simulation.local import LocalGrid

EXAMPLES = 10


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(1).double(), requires_grad=False)

    def forward(self, x):
        return x @ self.w + self.frozen


def data_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return {
        "x": x,
        "y": x @ torch.tensor([1.0, -2, 3]).double(),
        "i": torch.arange(count),
    }


def squared_error(model, batch):
    return (model(batch["x"]) - batch["y"]) ** 2


def linear_task(count=EXAMPLES, loss=squared_error, **options):
    return Task(
        model=lambda config: Linear(),
        data=lambda context: (data_of(count), data_of(count + 3, seed=1)),
        loss=loss,
        **options,
    )


START = {"w": np.array([0.5, 0.5, 0.5]), "frozen": np.array([1.0])}


@pytest.fixture(scope="module")
def send():
    """Send one message to one client; return the content of the reply."""

    def run(
        task,
        *halves,
        run_config=None,
        kind="train",
        client=0,
        content=None,
        arrays=START,
        **config,
    ):
        grid = LocalGrid(client_app(task, *halves), client + 1, run_config)
        if content is None:
            content = RecordDict(
                {
                    "arrays": to_record(arrays),
                    "config": ConfigRecord(
                        {k.replace("_", "-"): v for k, v in config.items()}
                    ),
                }
            )
        node = list(grid.get_node_ids())[client]
        [reply] = grid.send_and_receive([Message(content, node, kind)])
        if reply.has_error():
            raise RuntimeError(reply.error.reason.splitlines()[0])
        return reply.content

    return run


def weights(content, name="w"):
    return content["arrays"][name].numpy()


def descend(steps, learning_rate, momentum=0.0, decay=0.0, max_norm=math.inf):
    """Full-batch descent on the linear task, by its formulas, in NumPy."""
    data = {name: column.numpy() for name, column in data_of(EXAMPLES).items()}
    w, velocity = START["w"].copy(), 0.0
    losses = []
    for _ in range(steps):
        error = data["x"] @ w + START["frozen"] - data["y"]
        losses.append(np.mean(error**2))
        gradient = 2 * data["x"].T @ error / EXAMPLES
        norm = np.linalg.norm(gradient)
        gradient = gradient * min(1, max_norm / norm) + decay * w
        velocity = momentum * velocity + gradient
        w = w - learning_rate * velocity
    return w, losses


# What the settings mean -----------------------------------------------------------

FULL = {"batch_size": EXAMPLES}


@pytest.mark.parametrize("key", ["lr", "learning_rate"])
def test_the_learning_rate_scales_a_step(send, key):
    found = weights(send(linear_task(), **{key: 0.05}, **FULL))
    np.testing.assert_allclose(found, descend(1, 0.05)[0], rtol=1e-12)


def test_a_learning_rate_of_0_keeps_the_model(send):
    assert weights(send(linear_task(), lr=0, **FULL)).tolist() == [0.5, 0.5, 0.5]


def test_local_epochs_are_passes_over_the_data(send):
    found = weights(send(linear_task(), lr=0.05, local_epochs=4, **FULL))
    np.testing.assert_allclose(found, descend(4, 0.05)[0], rtol=1e-12)


def test_local_steps_count_instead_of_epochs(send):
    found = send(linear_task(), lr=0.05, local_epochs=9, local_steps=3, **FULL)
    np.testing.assert_allclose(weights(found), descend(3, 0.05)[0], rtol=1e-12)


def test_momentum_is_that_of_the_local_optimizer(send):
    found = send(linear_task(), lr=0.05, momentum=0.8, local_epochs=4, **FULL)
    expected, _ = descend(4, 0.05, momentum=0.8)
    np.testing.assert_allclose(weights(found), expected, rtol=1e-12)


def test_momentum_starts_anew_with_every_message(send):
    once = weights(send(linear_task(), lr=0.05, momentum=0.8, **FULL))
    np.testing.assert_allclose(once, descend(1, 0.05)[0], rtol=1e-12)


def test_weight_decay_pulls_to_zero(send):
    found = send(linear_task(), lr=0.05, weight_decay=0.3, local_epochs=4, **FULL)
    expected, _ = descend(4, 0.05, decay=0.3)
    np.testing.assert_allclose(weights(found), expected, rtol=1e-12)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1000.0])
def test_gradients_are_scaled_down_to_the_maximal_norm(send, max_norm):
    found = send(
        linear_task(), lr=0.05, max_gradient_norm=max_norm, local_epochs=4, **FULL
    )
    expected, _ = descend(4, 0.05, max_norm=max_norm)
    # torch adds 1e-6 to the norm that it divides by
    np.testing.assert_allclose(weights(found), expected, rtol=1e-5)


def test_train_loss_is_the_mean_over_the_steps(send):
    found = send(linear_task(), lr=0.05, local_epochs=4, **FULL)
    expected = np.mean(descend(4, 0.05)[1])
    assert found["metrics"]["train-loss"] == pytest.approx(expected, rel=1e-12)


def test_num_examples_are_those_of_the_split(send):
    assert send(linear_task())["metrics"]["num-examples"] == EXAMPLES
    found = send(linear_task(), kind="evaluate")
    assert found["metrics"]["num-examples"] == EXAMPLES + 3


def recording_task(seen, count=EXAMPLES):
    def loss(model, batch):
        seen.append(batch["i"].tolist())
        return squared_error(model, batch)

    return linear_task(count, loss)


def test_batches_have_the_batch_size_and_the_last_what_is_left(send):
    seen = []
    send(recording_task(seen), batch_size=4, local_epochs=2)
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2]


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own(send):
    seen = []
    send(recording_task(seen), batch_size=4, local_epochs=2)
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(EXAMPLES))
    assert first != second
    assert first != sorted(first)


def test_local_steps_may_end_within_an_epoch_and_go_on_into_the_next(send):
    seen = []
    send(recording_task(seen), batch_size=4, local_steps=5)
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4]
    assert sorted(sum(seen[:3], [])) == list(range(EXAMPLES))


def test_minibatch_training_equals_a_hand_written_loop(send):
    config = {"lr": 0.02, "batch_size": 3, "local_epochs": 3, "seed": 5}
    found = weights(send(linear_task(), client=2, server_round=7, **config))
    data = data_of(EXAMPLES)
    w = torch.tensor(START["w"], requires_grad=True)
    optimizer = torch.optim.SGD([w], 0.02)
    order = torch.Generator().manual_seed(random_seed(5, 7, 2))
    for _ in range(3):
        for chosen in torch.randperm(EXAMPLES, generator=order).split(3):
            optimizer.zero_grad()
            error = data["x"][chosen] @ w + 1.0 - data["y"][chosen]
            (error**2).mean().backward()
            optimizer.step()
    np.testing.assert_allclose(found, w.detach().numpy(), rtol=1e-12)


def test_a_task_may_bring_its_own_optimizer(send):
    seen = []

    def make(parameters, settings):
        seen.append(settings)
        return torch.optim.Adam(parameters, lr=settings.learning_rate)

    found = weights(send(linear_task(optimizer=make), lr=0.25, **FULL))
    # The first step of Adam is lr * sign(gradient).
    assert np.abs(found - START["w"]) == pytest.approx([0.25] * 3, rel=1e-6)
    assert seen[0].batch_size == EXAMPLES


def test_frozen_parameters_are_sent_back_as_they_came(send):
    assert weights(send(linear_task(), weight_decay=0.5), "frozen").tolist() == [1.0]


def test_the_received_weights_are_those_that_train(send):
    arrays = {"w": np.array([1.0, -2.0, 3.0]), "frozen": np.array([0.0])}
    found = send(linear_task(), arrays=arrays)  # the optimum
    assert weights(found).tolist() == pytest.approx([1, -2, 3], rel=1e-12)
    assert found["metrics"]["train-loss"] == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_model_function_gets_the_run_config(send, kind):
    seen = []

    def make(config):
        seen.append(config["width"])
        return Linear()

    task = Task(make, linear_task().data, squared_error)
    send(task, run_config={"width": 8}, kind=kind)
    assert seen == [8]


def test_the_data_function_gets_the_clients_context(send):
    seen = []

    def data(context):
        seen.append(context.node_config["partition-id"])
        return data_of(EXAMPLES), data_of(EXAMPLES)

    send(Task(lambda config: Linear(), data, squared_error), client=2)
    assert seen == [2]


@pytest.mark.parametrize("missing", ["partition-id", "num-partitions"])
def test_a_node_that_does_not_say_whose_it_is_gets_to_know_how(send, missing):
    """A SuperNode that was started without ``--node-config``."""

    def data(context):
        del context.node_config[missing]
        return context.node_config[missing]

    with pytest.raises(RuntimeError, match=f"one with '{missing}': .* --node-config"):
        send(Task(lambda config: Linear(), data, squared_error))


@pytest.mark.parametrize("key", ["label", "partition-id"])
def test_what_the_data_lacks_is_not_blamed_on_the_node(send, key):
    def data(context):
        return {}[key]

    with pytest.raises(RuntimeError, match=f"KeyError: '{key}'"):
        send(Task(lambda config: Linear(), data, squared_error))


# Where settings come from ---------------------------------------------------------


def test_settings_default_to_the_documented_values():
    documented = re.findall(
        r"(\w+)(?:, (\w+))? : .*\(default: (.+)\)", LocalSettings.__doc__
    )
    expected = {
        name: float(value) for *names, value in documented for name in names if name
    }
    assert expected == {k: float(v) for k, v in vars(LocalSettings()).items()}


def test_the_message_goes_before_the_run_config(send):
    found = send(
        linear_task(), run_config={"lr": 0.5, "local-epochs": 2}, lr=0.05, **FULL
    )
    np.testing.assert_allclose(weights(found), descend(2, 0.05)[0], rtol=1e-12)


@pytest.mark.parametrize("names", [("lr", "learning-rate"), ("learning-rate", "lr")])
def test_both_names_of_the_learning_rate_obey_that_order(names):
    one, two = names
    assert LocalSettings.read({one: 0.5}, {two: 0.1}).learning_rate == 0.5


def test_the_run_config_goes_before_the_defaults():
    settings = LocalSettings.read({}, {"batch-size": 7, "other": "x"})
    assert settings == LocalSettings(batch_size=7)


@pytest.mark.parametrize(
    ("key", "bad", "bound"),
    [
        ("learning-rate", -0.1, "a finite number >= 0"),
        ("learning-rate", math.nan, "a finite number >= 0"),
        ("learning-rate", math.inf, "a finite number >= 0"),
        ("learning-rate", "0.1", "a finite number >= 0"),
        ("learning-rate", True, "a finite number >= 0"),
        ("local-epochs", -1, "an integer >= 0"),
        ("local-epochs", 1.0, "an integer >= 0"),
        ("local-steps", -1, "an integer >= 0"),
        ("batch-size", 0, "an integer >= 1"),
        ("batch-size", True, "an integer >= 1"),
        ("momentum", -0.5, "a finite number >= 0"),
        ("weight-decay", math.nan, "a finite number >= 0"),
        ("max-gradient-norm", 0.0, "a finite number > 0"),
        ("max-gradient-norm", -1.0, "a finite number > 0"),
        ("max-gradient-norm", math.nan, "a finite number > 0"),
        ("seed", -1, "an integer >= 0"),
        ("torch-threads", -1, "an integer >= 0"),
    ],
)
def test_a_bad_setting_is_the_clients_error_with_name_value_and_bound(
    send, key, bad, bound
):
    with pytest.raises(RuntimeError, match="must be") as caught:
        send(linear_task(), **{key: bad})
    assert f"ValueError: {key}={bad!r} must be {bound}" in str(caught.value)


# Determinism ----------------------------------------------------------------------


def train_small(send, task, initial, **options):
    content = RecordDict(
        {
            "arrays": initial,
            "config": ConfigRecord(
                {"lr": 0.1, "batch-size": 4, "server-round": options.pop("round", 1)}
            ),
        }
    )
    seed = options.pop("seed", 0)
    reply = send(task, content=content, run_config={"seed": seed}, **options)
    arrays = {name: array.data for name, array in reply["arrays"].items()}
    return arrays, dict(reply["metrics"])


def test_training_depends_on_seed_round_and_client_only(send, task, initial):
    torch.manual_seed(1)
    expected = train_small(send, task, initial)
    torch.manual_seed(2)
    torch.rand(100)
    assert train_small(send, task, initial) == expected


@pytest.mark.parametrize("other", [{"seed": 1}, {"round": 2}])
def test_another_seed_or_round_trains_otherwise(send, task, initial, other):
    expected = train_small(send, task, initial)
    assert train_small(send, task, initial, **other) != expected


def same_data(task):
    """The task with the data of client 0 for every client."""

    def data(context):
        context.node_config["partition-id"], kept = (
            0,
            context.node_config["partition-id"],
        )
        try:
            return task.data(context)
        finally:
            context.node_config["partition-id"] = kept

    return Task(task.model, data, task.loss, task.metrics)


def test_another_client_trains_otherwise_on_the_same_data(send, task, initial):
    shared = same_data(task)
    one = train_small(send, shared, initial, client=0)
    two = train_small(send, shared, initial, client=1)
    assert one[1]["num-examples"] == two[1]["num-examples"]
    assert one != two


def test_dropout_depends_on_seed_round_and_client_only(send):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return x @ self.drop(self.w)

    task = Task(lambda config: Dropped(), linear_task().data, squared_error)
    arrays = {"w": START["w"]}

    def run(**options):
        # Full batches, weights dropped: nothing but dropout is random.
        options = {"lr": 0.01, "server_round": 1, "local_epochs": 9, **FULL, **options}
        return weights(send(task, arrays=arrays, **options)).tolist()

    torch.manual_seed(1)
    expected = run()
    torch.manual_seed(2)
    assert run() == expected
    # The order of a batch alone changes no more than the rounding.
    for other in ({"seed": 1}, {"server_round": 2}, {"client": 1}):
        assert not np.allclose(run(**other), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_global_random_state_is_as_it_was(send, task, initial, kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    content = RecordDict({"arrays": initial, "config": ConfigRecord()})
    send(task, kind=kind, content=content)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_random_draws_of_model_and_data_functions_are_seeded(send, kind):
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            projection = torch.randn(3, 3, dtype=torch.float64)
            self.register_buffer("projection", projection, persistent=False)

        def forward(self, x):
            return x @ self.projection @ self.w

    def data(context):
        chosen = torch.randperm(EXAMPLES)[:5]
        split = {name: column[chosen] for name, column in data_of(EXAMPLES).items()}
        return split, split

    task = Task(lambda config: Projected(), data, squared_error)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = send(task, kind=kind, arrays={"w": START["w"]}, lr=0.01)
        results.append(dict(found["metrics"]))
    assert results[0] == results[1]


def test_a_random_split_of_a_client_stays_the_same_in_every_round(send):
    seen = {}

    def data(context):
        chosen = torch.randperm(EXAMPLES)[:5]
        split = {name: column[chosen] for name, column in data_of(EXAMPLES).items()}
        client = context.node_config["partition-id"]
        seen.setdefault(client, []).append(chosen.tolist())
        return split, split

    task = Task(lambda config: Linear(), data, squared_error)
    for client in (0, 1):
        for server_round in (1, 2):
            send(task, client=client, server_round=server_round)
        send(task, client=client, server_round=2, kind="evaluate")
    assert all(splits == [splits[0]] * 3 for splits in seen.values())
    assert seen[0] != seen[1]


def test_a_random_model_is_the_same_for_all_clients_and_rounds(send):
    seen = []

    def make(config):
        seen.append(torch.rand(3).tolist())
        return Linear()

    task = Task(make, linear_task().data, squared_error)
    for client in (0, 1):
        for server_round in (1, 2):
            send(task, client=client, server_round=server_round)
    assert seen == [seen[0]] * 4


def test_a_seed_differs_in_every_coordinate():
    seeds = {
        random_seed(a, b, c, d)
        for a in range(4)
        for b in range(4)
        for c in range(4)
        for d in range(4)
    }
    assert len(seeds) == 256
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture
def local():
    """A client at work on its own, at a node without partition."""
    return Local(
        linear_task(),
        Linear(),
        data_of(EXAMPLES),
        data_of(3),
        LocalSettings(batch_size=4),
        ConfigRecord({"server-round": 2, "text": "x"}),
        Context(1, 4711, {}, RecordDict(), {}),
        torch.device("cpu"),
    )


def test_a_client_without_partition_goes_by_its_node(local):
    assert local.client == 4711
    assert local.seed() == random_seed(0, 2, 4711)


def draw():
    """Draw from the global generators that a client's own code may draw from."""
    return [
        float(torch.rand(())),
        float(np.random.rand()),  # noqa: NPY002
        random.random(),
    ]


def test_a_clients_own_random_choices_depend_on_the_seed_alone(task, initial):
    """Of its model in the seed, of its data in the client, of its loss in the round."""

    def drawn(seed, num_rounds=2):
        found = {"model": [], "data": [], "loss": []}

        def noting(name, function):
            def call(*arguments):
                found[name].append(draw())
                return function(*arguments)

            return call

        own = replace(
            task,
            model=noting("model", task.model),
            data=noting("data", task.data),
            loss=noting("loss", task.loss),
        )
        grid = LocalGrid(client_app(own), 2, {"seed": seed, "lr": 0.1})
        draw()  # where a run begins must not matter
        run_rounds(AdditiveStrategy(), grid, initial, num_rounds=num_rounds)
        return found

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again
    for name in first:
        assert all(a != b for a, b in zip(first[name], other[name], strict=True))
        for i in range(3):  # torch, NumPy, Python
            values = {draws[i] for draws in first[name]}
            if name == "model":
                assert len(values) == 1  # what is not sent agrees between clients
            elif name == "data":
                assert len(values) == 2  # one a client, the same in every round
            else:
                assert len(values) > 4


def test_the_global_generators_are_left_as_they_were(task, initial):
    grid = LocalGrid(client_app(task), 2, {"lr": 0.1})

    def reset():
        for seed in (np.random.seed, random.seed, torch.manual_seed):
            seed(5)

    reset()
    expected = [draw(), draw()]
    reset()
    before = draw()
    AdditiveStrategy().start(grid, initial, num_rounds=1)
    assert [before, draw()] == expected


def test_training_on_its_own_leaves_the_global_random_state_as_it_was(local):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    local.fit()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_client_knows_its_steps(local):
    assert (local.steps_per_epoch, local.num_steps) == (3, 3)


def test_a_setting_of_the_server_that_is_no_number_is_refused(local):
    assert local.number("server-round", 9.0) == 2
    assert local.number("missing", 9.0) == 9
    with pytest.raises(ValueError, match=r"config\['text'\]='x' must be a number"):
        local.number("text", 1.0)


def test_the_mean_loss_is_that_of_an_evaluation(local):
    expected = evaluate(local.task, local.model, local.train)["loss"]
    assert local.mean_loss(local.train) == expected
    other = Linear()
    with torch.no_grad():
        other.w.fill_(9.0)
    assert local.mean_loss(local.train, other) > 2 * expected


# Threads --------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Report torch's threads in a loss; put the number back afterwards."""
    before = torch.get_num_threads()
    seen = []

    def loss(model, batch):
        seen.append(torch.get_num_threads())
        return squared_error(model, batch)

    yield linear_task(loss=loss), seen
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_client_has_one_thread_unless_told_otherwise(send, threads, kind):
    task, seen = threads
    torch.set_num_threads(2)
    send(task, kind=kind)
    assert set(seen) == {1}


def test_a_client_has_the_threads_that_it_is_told(send, threads):
    task, seen = threads
    torch.set_num_threads(1)
    send(task, torch_threads=2)
    assert set(seen) == {2}


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_torchs_threads_are_afterwards_as_they_were(send, threads, kind):
    task, _ = threads
    torch.set_num_threads(2)
    send(task, kind=kind)
    assert torch.get_num_threads() == 2


def test_torchs_threads_are_as_they_were_after_an_error_too(send, threads):
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="not those of Task.model"):
        send(threads[0], arrays={"w": START["w"]})
    assert torch.get_num_threads() == 2


def test_torch_threads_0_leaves_torchs_setting_alone(send, threads):
    task, seen = threads
    torch.set_num_threads(2)
    send(task, torch_threads=0)
    assert set(seen) == {2}


# Evaluation -----------------------------------------------------------------------


def absolute_error(model, batch):
    return {"abs": (model(batch["x"]) - batch["y"]).abs(), "i": batch["i"]}


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_evaluation_is_the_mean_over_examples(batch_size):
    task = linear_task(metrics=absolute_error)
    model, data = Linear(), data_of(600)
    error = (model(data["x"]) - data["y"]).detach().numpy()
    found = evaluate(task, model, data, batch_size)
    assert found == pytest.approx(
        {"loss": np.mean(error**2), "abs": np.mean(np.abs(error)), "i": 299.5},
        rel=1e-12,
    )


def test_a_client_evaluates_the_received_model_on_its_test_data(send):
    found = send(linear_task(metrics=absolute_error), kind="evaluate")
    data = {k: v.numpy() for k, v in data_of(EXAMPLES + 3, seed=1).items()}
    error = data["x"] @ START["w"] + 1 - data["y"]
    assert dict(found["metrics"]) == pytest.approx(
        {
            "num-examples": EXAMPLES + 3,
            "loss": np.mean(error**2),
            "abs": np.mean(np.abs(error)),
            "i": 6.0,
        },
        rel=1e-12,
    )
    assert list(found) == ["metrics"]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_in_evaluation_mode_and_restores_the_mode(training):
    modes = []

    def loss(model, batch):
        modes.append(model.training)
        return squared_error(model, batch)

    model = Linear().train(training)
    evaluate(linear_task(loss=loss), model, data_of(5))
    assert modes == [False]
    assert model.training is training


def test_training_is_in_training_mode(send):
    modes = []

    def loss(model, batch):
        modes.append(model.training)
        return squared_error(model, batch)

    send(linear_task(loss=loss), batch_size=5)
    assert modes == [True, True]


def test_evaluation_computes_no_gradients():
    def loss(model, batch):
        found = squared_error(model, batch)
        assert not found.requires_grad
        return found

    assert evaluate(linear_task(loss=loss), Linear(), data_of(5))["loss"] > 0


# No data --------------------------------------------------------------------------


def test_a_client_without_examples_sends_the_model_back_with_weight_0(send):
    found = send(linear_task(0), local_epochs=3)
    assert weights(found).tolist() == START["w"].tolist()
    assert found["metrics"]["num-examples"] == 0
    assert math.isnan(found["metrics"]["train-loss"])


def test_local_steps_on_no_examples_are_none(send):
    found = send(linear_task(0), local_steps=5)
    assert weights(found).tolist() == START["w"].tolist()


def test_evaluation_without_examples_is_nan():
    found = evaluate(linear_task(), Linear(), data_of(0))
    assert math.isnan(found["loss"])


def test_no_epochs_are_no_training(send):
    found = send(linear_task(), local_epochs=0)
    assert weights(found).tolist() == START["w"].tolist()
    assert found["metrics"]["num-examples"] == EXAMPLES
    assert math.isnan(found["metrics"]["train-loss"])


# Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            RecordDict({"model": ArrayRecord(), "config": ConfigRecord()}),
            r"no ArrayRecord 'arrays' in the message, which has \['config', 'model'\]",
        ),
        (RecordDict({"arrays": ArrayRecord()}), r"no ConfigRecord 'config' in the"),
        (
            RecordDict({"arrays": ArrayRecord(), "config": MetricRecord()}),
            r"no ConfigRecord 'config' in the message",
        ),
    ],
)
def test_a_message_without_the_records_is_told_which_keys_to_use(
    send, kind, content, text
):
    with pytest.raises(RuntimeError, match=f"{text}.*arrayrecord_key"):
        send(linear_task(), kind=kind, content=content)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_an_unknown_half_is_named_with_those_that_there_are(send, kind):
    with pytest.raises(
        RuntimeError, match=r"client half 'fedfish', this ClientApp has \['mine', 'pl"
    ):
        send(linear_task(), Mine, kind=kind, client_half="fedfish")


@pytest.mark.parametrize("bad", [3, "mine", object])
def test_halves_must_be_halves(bad):
    with pytest.raises(ValueError, match="halves=.* must be classes derived from"):
        client_app(linear_task(), bad)


def test_an_instance_of_a_half_is_refused_since_each_message_needs_its_own():
    with pytest.raises(ValueError, match="halves=.* must be classes derived from"):
        client_app(linear_task(), Mine())


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"as many examples.*'x': 3, 'y': 2"):
        num_examples({"x": torch.zeros(3), "y": torch.zeros(2)})


def test_data_without_columns_is_refused():
    with pytest.raises(ValueError, match="columns must have"):
        num_examples({})


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_loss_that_is_already_a_mean_is_refused(send, kind):
    def mean(model, batch):
        return squared_error(model, batch).mean()

    with pytest.raises(
        RuntimeError, match=r"'loss' has shape \(\), must be \(1[03],\): one"
    ):
        send(linear_task(loss=mean), kind=kind)


def test_a_metric_that_is_already_a_mean_is_refused(send):
    def metrics(model, batch):
        return {"accuracy": torch.tensor(0.5)}

    with pytest.raises(RuntimeError, match=r"'accuracy' has shape \(\), must be \(13"):
        send(linear_task(metrics=metrics), kind="evaluate")


def test_a_model_that_does_not_fit_the_arrays_is_an_error(send):
    with pytest.raises(RuntimeError, match="not those of Task.model.*missing .*frozen"):
        send(linear_task(), arrays={"w": START["w"]})


# Halves ---------------------------------------------------------------------------


class Mine(ClientHalf):
    """Notes what is called when, and doubles the objective."""

    name = "mine"
    calls: list = []

    def __init__(self, factor=2.0):
        self.factor = factor
        self.calls.append(("new", factor))

    def begin(self, local):
        self.calls.append(("begin", local.model.w.tolist(), local.model.training))

    def objective(self, losses, batch):
        self.calls.append(("objective", tuple(losses.shape), sorted(batch)))
        return self.factor * losses

    def after_backward(self, model):
        self.calls.append(("after_backward", model.w.grad.norm().item()))

    def records(self, local):
        self.calls.append(("records", local.model.w.tolist()))
        return {"more": to_record({"z": np.ones(1)})}, {"mine": 7.0}

    def evaluate(self, local):
        return {"evaluated": float(num_examples(local.test))}


@pytest.fixture
def calls():
    Mine.calls.clear()
    return Mine.calls


def test_a_half_is_called_before_at_and_after_every_step(send, calls):
    send(linear_task(), Mine, client_half="mine", batch_size=5)
    assert [call[0] for call in calls] == [
        "new",
        "begin",
        *["objective", "after_backward"] * 2,
        "records",
    ]


def test_begin_sees_the_received_model_and_records_the_trained_one(send, calls):
    found = send(linear_task(), Mine, client_half="mine")
    assert calls[1][1] == START["w"].tolist()
    assert calls[-1][1] == weights(found).tolist() != START["w"].tolist()


def test_the_objective_gets_one_loss_per_example_and_the_batch(send, calls):
    send(linear_task(), Mine, client_half="mine", batch_size=4)
    shapes = [call[1:] for call in calls if call[0] == "objective"]
    assert shapes == [((n,), ["i", "x", "y"]) for n in (4, 4, 2)]


def test_the_objective_of_the_half_is_minimised(send, calls):
    found = send(linear_task(), Mine, client_half="mine", lr=0.05, **FULL)
    np.testing.assert_allclose(weights(found), descend(1, 0.1)[0], rtol=1e-12)
    expected = 2 * descend(1, 0.1)[1][0]
    assert found["metrics"]["train-loss"] == pytest.approx(expected)


def test_after_backward_sees_gradients_before_they_are_clipped(send, calls):
    send(linear_task(), Mine, client_half="mine", max_gradient_norm=1e-3, **FULL)
    _, norm = next(call for call in calls if call[0] == "after_backward")
    assert norm > 1


def test_gradients_do_not_pile_up_over_steps(send, calls):
    send(linear_task(), Mine, client_half="mine", lr=0, local_epochs=3, **FULL)
    norms = [call[1] for call in calls if call[0] == "after_backward"]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-12)


def test_what_a_half_returns_is_added_to_the_replies(send, calls):
    found = send(linear_task(), Mine, client_half="mine")
    assert found["more"]["z"].numpy().tolist() == [1]
    assert found["metrics"]["mine"] == 7
    found = send(linear_task(), Mine, client_half="mine", kind="evaluate")
    assert found["metrics"]["evaluated"] == EXAMPLES + 3


def test_a_half_may_be_a_partial(send, calls):
    half = functools.partial(Mine, factor=3.0)
    found = send(linear_task(), half, client_half="mine", lr=0.05, **FULL)
    np.testing.assert_allclose(weights(found), descend(1, 0.15)[0], rtol=1e-12)


def test_every_message_gets_a_new_half(send, calls):
    grid = LocalGrid(client_app(linear_task(), Mine), 2)
    content = RecordDict(
        {
            "arrays": to_record(START),
            "config": ConfigRecord({"client-half": "mine"}),
        }
    )
    messages = [Message(content, node, "train") for node in grid.get_node_ids()]
    list(grid.send_and_receive(messages))
    assert calls.count(("new", 2.0)) == 2


def test_without_a_named_half_training_is_plain(send, calls):
    found = send(linear_task(), Mine, lr=0.05, **FULL)
    np.testing.assert_allclose(weights(found), descend(1, 0.05)[0], rtol=1e-12)
    assert calls == []


def test_an_app_made_in_a_script_can_be_sent_to_ray(send):
    app = client_app(linear_task(), functools.partial(Mine, factor=3.0))
    assert cloudpickle.loads(cloudpickle.dumps(app))._registered_funcs.keys() == {
        "train.default",
        "evaluate.default",
    }


# Batches --------------------------------------------------------------------------


def test_batches_without_generator_keep_the_order():
    found = [batch["i"].tolist() for batch in batches(data_of(5), 2)]
    assert found == [[0, 1], [2, 3], [4]]


def test_batches_keep_the_columns_together():
    generator = torch.Generator().manual_seed(0)
    data = data_of(20)
    for batch in batches(data, 7, generator):
        for i, x in zip(batch["i"].tolist(), batch["x"], strict=True):
            assert torch.equal(x, data["x"][i])


def test_no_examples_make_no_batches():
    assert list(batches(data_of(0), 4)) == []


@pytest.mark.parametrize("size", [0, 1, 7, 8, 65, 129])
@pytest.mark.parametrize("batch_size", [1, 4, 8, 80])
@pytest.mark.parametrize("join_last", [False, True])
def test_batches_are_the_rows_of_a_random_order(size, batch_size, join_last):
    data = {"x": torch.arange(size), "y": torch.arange(2.0 * size).view(size, 2)}
    draw = torch.Generator().manual_seed(3)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    expected = [*order.split(batch_size)] if size else []
    if join_last and len(expected) > 1 and len(expected[-1]) == 1:
        expected[-2:] = [torch.cat(expected[-2:])]
    found = [*batches(data, batch_size, draw, join_last=join_last)]
    assert len(found) == len(expected)
    for batch, rows in zip(found, expected, strict=True):
        assert torch.equal(batch["x"], rows)
        assert torch.equal(batch["y"], data["y"][rows])
