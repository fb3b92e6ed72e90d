"""Models as people have them: masks of -inf, tied weights, BatchNorm."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.client.encoding import encoded
from flower_ext.client.half import ClientHalf
from flower_ext.client.task import batches, tied_names
from flower_ext.core.arrays import from_record, subtract, to_record
from flower_ext.core.contribution import Contribution
from flower_ext.core.ties import equal_in_model
from flower_ext.privacy import Mechanism
from flower_ext.server.optimizers import SGD, Adam
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import (
    FLASC,
    BoundedGroupLoss,
    BoundedGroupLossClient,
    FedFish,
    FedFishClient,
    FLASCClient,
    MaxFL,
    MaxFLClient,
)
from flower_ext.wire.registry import decode

HALVES = (FedFishClient, FLASCClient, MaxFLClient, BoundedGroupLossClient)


def noisy(rounds=3, clients=4, **changes):
    return AdditiveStrategy(
        mechanism=Mechanism(
            num_rounds=rounds,
            num_sampled_clients=clients,
            population_size=clients,
            noise_multiplier=1.0,
            target_delta=1e-3,
            seed=1,
            **changes,
        )
    )


STRATEGIES = {
    "fedavg": AdditiveStrategy,
    "adam": lambda: AdditiveStrategy(server_optimizer=Adam()),
    "fedfish": lambda: FedFish(damping=0.0),
    "flasc": lambda: FLASC(server_optimizer=SGD()),
    "maxfl": lambda: MaxFL(warmup_steps=2),
    "bounded group loss": lambda: BoundedGroupLoss(groups=["a", "b"], upper_bound=1.0),
    "noise": noisy,
}
every = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def state(model):
    return to_record({k: x.numpy() for k, x in model.state_dict().items()})


def run(strategy, model, data, rounds=3, clients=4, **start):
    app = client_app(Task(lambda config: model(), data, cross_entropy), *HALVES)
    grid = LocalGrid(app, clients, {"lr": 0.1, "batch-size": 8})
    return strategy.start(grid, state(model()), num_rounds=rounds, **start)


# Masks of -inf --------------------------------------------------------------------


class Masked(nn.Module):
    """A layer whose weights count where a mask, a buffer, is not -inf."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("never", torch.tensor([math.nan, math.inf]))

    def forward(self, x):
        return self.linear(x) @ self.mask.softmax(-1)


def four_columns(context):
    generator = torch.Generator().manual_seed(context.node_config["partition-id"])
    x = torch.randn(16, 4, generator=generator)
    columns = {"x": x, "y": x.argmax(1), "group": (x[:, 0] > 0).long()}
    return columns, columns


@every
def test_what_is_not_finite_and_unchanged_stops_no_training(strategy):
    result = run(strategy(), Masked, four_columns)
    first, last = from_record(state(Masked())), from_record(result.arrays)
    assert not np.array_equal(first["linear.weight"], last["linear.weight"])
    for name in ("mask", "never"):
        np.testing.assert_array_equal(first[name], last[name])
    assert all(
        m.get("num-dropped", 0) == 0 for m in result.train_metrics_clientapp.values()
    )


@pytest.mark.parametrize("mechanism", [False, True])
def test_what_becomes_finite_or_ceases_to_be_is_no_contribution(
    aggregate, reply, mechanism
):
    def strategy():
        return noisy(clients=3) if mechanism else AdditiveStrategy()

    inf, nan = math.inf, math.nan
    sent = {"w": np.float32([1, -inf, inf, nan]), "v": np.ones(2, np.float32)}
    good = reply({"w": np.float32([2, -inf, inf, nan]), "v": np.float32([2, 3])})
    for bad in ([1, 0, inf, nan], [-inf, -inf, inf, nan], [1, inf, inf, nan], [1] * 4):
        contents = [good, reply({"w": np.float32(bad), "v": sent["v"]}), good]
        found, metrics = aggregate(strategy(), sent, contents)
        contents[1] = RuntimeError("lost")
        expected, _ = aggregate(strategy(), sent, contents)
        assert metrics["num-dropped"] == 1
        for name, x in expected.items():
            np.testing.assert_array_equal(found[name], x)


def test_unchanged_is_no_change():
    x = np.float32([math.nan, math.inf, -math.inf, 1, 2])
    y = np.float32([math.nan, math.inf, -math.inf, 1, 5])
    assert subtract(y, x).numpy().tolist() == [0, 0, 0, 0, 3]
    assert not np.isfinite(subtract(x[::-1], x).numpy()[:2]).any()
    assert Contribution({"delta": {"w": subtract(y, x)}}).can_move({"w": x})


# One tensor under several names ---------------------------------------------------


class Tied(nn.Module):
    """An output layer that is the embedding, under a third name as well."""

    def __init__(self, names=3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.mid = nn.Embedding(12, 4), nn.Linear(4, 4)
        if names > 1:
            self.head = nn.Linear(4, 12, bias=False)
            self.head.weight = self.embed.weight
        if names > 2:
            self.again = self.embed

    def forward(self, x):
        return torch.tanh(self.mid(self.embed(x))) @ self.embed.weight.T


def tokens(context):
    generator = torch.Generator().manual_seed(context.node_config["partition-id"])
    x = torch.randint(0, 12, (24,), generator=generator)
    columns = {"x": x, "y": (x + 1) % 12, "group": x % 2}
    return columns, columns


def test_the_names_of_a_tensor_are_told_with_the_first():
    first = "embed.weight"
    assert tied_names(Tied()) == {"head.weight": first, "again.weight": first}
    assert tied_names(Tied(names=1)) == {}
    assert tied_names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {}


@every
def test_the_copies_of_a_tensor_are_one(strategy):
    arrays = from_record(run(strategy(), Tied, tokens).arrays)
    for name in ("head.weight", "again.weight"):
        np.testing.assert_array_equal(arrays[name], arrays["embed.weight"])


@pytest.mark.parametrize(
    "strategy",
    [
        *(make for name, make in STRATEGIES.items() if name != "flasc"),
        lambda: FLASC(upload_density=0.3, download_density=1, server_optimizer=SGD()),
    ],
    ids=[*(name for name in STRATEGIES if name != "flasc"), "flasc"],
)
def test_a_tensor_of_three_names_is_trained_as_that_of_one(strategy):
    """Noise apart, which is not the same for other arrays; clipping is."""
    if strategy is noisy:

        def strategy():
            plan = {"num_rounds": 3, "num_sampled_clients": 4, "population_size": 4}
            mechanism = Mechanism(
                **plan, noise_multiplier=0, target_delta=1e-3, clipping=0.1
            )
            return AdditiveStrategy(mechanism=mechanism)

    one = from_record(run(strategy(), lambda: Tied(1), tokens).arrays)
    three = from_record(run(strategy(), Tied, tokens).arrays)
    for name, array in one.items():
        np.testing.assert_allclose(three[name], array, rtol=1e-5, atol=1e-7)


def test_flasc_chooses_its_mask_as_if_a_tensor_had_one_name():
    """From the second round on: the first does not know what clients will tell."""
    models = [], []
    for made, names in zip(models, (1, 3), strict=True):
        strategy = FLASC(download_density=0.4, upload_density=1, server_optimizer=SGD())
        run(strategy, lambda names=names: Tied(names), tokens, rounds=1)
        weights = from_record(state(Tied(names)))
        grid = LocalGrid(ClientApp(), 4)
        asked = strategy.configure_train(2, state(Tied(names)), ConfigRecord(), grid)
        made.append(decode(next(iter(asked)).content["arrays"], weights).masks)
    [one], [three] = models
    for name, mask in one.items():
        np.testing.assert_array_equal(three[name], mask)
    np.testing.assert_array_equal(three["head.weight"], one["embed.weight"])


def test_a_resumed_run_knows_which_names_are_one_tensor(tmp_path):
    def flasc():
        return FLASC(download_density=0.4, upload_density=1, server_optimizer=SGD())

    whole = from_record(run(flasc(), Tied, tokens, rounds=3).arrays)
    run(flasc(), Tied, tokens, rounds=1, checkpoint=tmp_path)
    resumed = from_record(run(flasc(), Tied, tokens, checkpoint=tmp_path).arrays)
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array)


class Clones(nn.Module):
    """Layers that start alike, as those of ``nn.TransformerEncoder`` do."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_layers_that_only_start_alike_stay_apart():
    for name, strategy in STRATEGIES.items():
        if name != "noise":
            arrays = from_record(run(strategy(), Clones, four_columns, rounds=1).arrays)
            assert not np.array_equal(arrays["a.weight"], arrays["b.weight"])


def test_under_a_mechanism_layers_that_only_start_alike_are_refused():
    with pytest.raises(
        EveryClientFailed, match="'a.weight' and 'b.weight' for one tensor"
    ):
        run(noisy(), Clones, four_columns)


@pytest.mark.parametrize("told", [{}, {"b": "a"}, {"c": "a"}])
def test_under_a_mechanism_no_reply_says_what_is_one_tensor(aggregate, reply, told):
    """Whatever is told, or whether anybody replies: presence must not show in it."""
    sent = {
        "a": np.float32([1, 2]),
        "b": np.float32([1, 2]),
        "c": np.float32([3, 4]),
        "zeros": np.zeros(2, np.float32),
        "bias": np.zeros(2, np.float32),
    }
    content = reply({name: x + 1 for name, x in sent.items()})
    content["tied"] = ConfigRecord(told)
    for contents in ([content] * 3, [RuntimeError("lost")] * 3):
        new, _ = aggregate(noisy(clients=3), sent, contents)
        np.testing.assert_array_equal(new["a"], new["b"])
        assert not np.array_equal(new["a"], new["c"])
        assert not np.array_equal(new["zeros"], new["bias"])


def test_a_model_shows_its_ties():
    x, zero, one = np.float32([1, 2]), np.zeros(2), np.ones((2, 2))
    layer = {"weight": x, "bias": zero, "norm.scale": one}

    def model(**layers):
        return {
            f"{k}.{n}": a for k, arrays in layers.items() for n, a in arrays.items()
        }

    assert equal_in_model(model(a=layer, b={"weight": 2 * x})) == {}
    assert equal_in_model(model(a=layer, b=layer)) == {
        f"b.{name}": f"a.{name}" for name in layer
    }
    # A bias of its own, or one that differs: the weight alone is the other's.
    for own in ({"bias": zero}, {"bias": zero + 1, "norm.scale": one}):
        tied = equal_in_model(model(a=layer, b={"weight": x, **own, "more": one}))
        assert tied == {"b.weight": "a.weight"}
    # All that there is of a layer, be it less than the other one has.
    assert equal_in_model(model(a=layer, b={"weight": x})) == {"b.weight": "a.weight"}


@pytest.mark.parametrize(
    ("own", "twin", "tied"),
    [
        # Biases of their own, which differ, beside a weight that is shared.
        ({"bias": np.ones(2)}, {"bias": np.full(2, 3.0)}, ["weight"]),
        # A counter, or a bias of one number, tells nothing, unless it differs.
        ({"count": np.array(1), "b": np.zeros(2)}, {}, ["weight", "b"]),
        ({"count": np.array(1), "b": np.zeros(2)}, {"count": np.array(2)}, ["weight"]),
    ],
)
def test_a_shared_weight_beside_what_is_not_shared(own, twin, tied):
    x, zero = np.float32([1, 2]), np.zeros(2)
    layers = {
        "other": {"weight": 5 * x, "bias": zero, "b": zero},
        "a": {"weight": x, **own},
        "c": {"weight": x, **own, **twin},
    }
    arrays = {f"{k}.{n}": a for k, found in layers.items() for n, a in found.items()}
    assert equal_in_model(arrays) == {f"c.{n}": f"a.{n}" for n in tied}


def test_loops_that_do_not_tell_are_believed_when_all_return_copies(aggregate, reply):
    """FedFish's Fisher is there under one name only."""

    def content(value, other, fisher):
        arrays = {"a": np.float32([value, 2]), "b": np.float32([other, 2])}
        made = reply(arrays)
        made["fisher"] = to_record({"a": np.float32([fisher, 1])})
        return made

    sent = {"a": np.float32([1, 1]), "b": np.float32([1, 1])}
    tied, _ = aggregate(
        FedFish(damping=0.0), sent, [content(2, 2, 3), content(6, 6, 1)]
    )
    assert tied["a"].tolist() == tied["b"].tolist() == [3, 2]
    apart, _ = aggregate(
        FedFish(damping=0.0), sent, [content(2, 2, 3), content(6, 5, 1)]
    )
    assert apart["a"].tolist() == [3, 2]
    assert apart["b"].tolist() == [3.5, 2]


@pytest.mark.parametrize(
    "options", [{}, {"error_feedback": True}, {"precision": "nf4"}]
)
def test_copies_stay_one_under_flascs_mod(options):
    """In a loop that does not tell, of which only a part of what it returns travels."""
    app = ClientApp(mods=[encoded()])

    @app.train()
    def train(message, context):
        model = Tied()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        cross_entropy(model, tokens(context)[0]).mean().backward()
        optimizer.step()
        metrics = MetricRecord({"num-examples": 24})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    strategy = FLASC(describe_arrays=True, fraction_evaluate=0.0, **options)
    grid = LocalGrid(app, 4)
    arrays = from_record(strategy.start(grid, state(Tied()), num_rounds=3).arrays)
    assert not np.array_equal(arrays["embed.weight"], Tied().embed.weight.detach())
    for name in ("head.weight", "again.weight"):
        np.testing.assert_array_equal(arrays[name], arrays["embed.weight"])


@pytest.mark.parametrize(
    "claim",
    [
        {"b": "a"},
        {"b": "nobody"},
        {"nobody": "a"},
        {"b": "c"},
        {"b": 3},
        {"b": ["a"]},
        {"a": "b", "b": "a"},
    ],
)
def test_one_client_cannot_tie_what_others_have_apart(aggregate, reply, claim):
    def content(value):
        arrays = {"a": [value, 2], "b": [value + 1, 2], "c": [value]}
        return reply({k: np.float32(x) for k, x in arrays.items()})

    liar = content(9)
    liar["tied"] = ConfigRecord(claim)
    sent = {k: np.zeros(n, np.float32) for k, n in {"a": 2, "b": 2, "c": 1}.items()}
    new, _ = aggregate(AdditiveStrategy(), sent, [content(1), content(2), liar])
    assert new["a"].tolist() != new["b"].tolist()


# BatchNorm ------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)
            )

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("strategy", [AdditiveStrategy, FedFish])
def test_noise_leaves_variances_positive_for_200_rounds(strategy):
    # Two clients: the fewer share the noise, the more of it is in the average.
    mechanism = noisy(rounds=200, clients=2).private_sum.mechanism
    lowest = []

    def look(server_round, arrays):
        lowest.append(from_record(arrays)["net.1.running_var"].min())
        finite = all(map(_finite, from_record(arrays).values()))
        return MetricRecord({"finite": int(finite)})

    result = run(
        strategy(mechanism=mechanism), Normed, four_columns, 200, 2, evaluate_fn=look
    )
    assert min(lowest) > 0
    assert all(m["finite"] for m in result.evaluate_metrics_serverapp.values())


def _finite(array):
    return int(np.isfinite(array).all())


def test_without_noise_variances_are_the_clients_mean():
    """They fall by more than a half in a round, from 1 towards about 0.1."""

    def small(context):
        columns, _ = four_columns(context)
        return ({**columns, "x": columns["x"] * 0.01},) * 2

    app = client_app(Task(lambda config: Normed(), small, cross_entropy))
    grid = LocalGrid(app, 3, {"lr": 0.1, "batch-size": 2})
    result = AdditiveStrategy().start(grid, state(Normed()), num_rounds=1)
    assert from_record(result.arrays)["net.1.running_var"].max() < 0.5


def of_sizes(*sizes):
    def data(context):
        columns, _ = four_columns(context)
        size = sizes[context.node_config["partition-id"]]
        repeats = -(-size // 16)
        cut = {k: torch.cat([x] * repeats)[:size] for k, x in columns.items()}
        return cut, cut

    return data


@pytest.mark.parametrize(
    "half", [AdditiveStrategy, FedFish, lambda: MaxFL(warmup_steps=3)]
)
def test_a_single_example_ends_no_client(half):
    result = run(half(), Normed, of_sizes(1, 9, 17, 2), rounds=2)
    assert result.train_metrics_clientapp[2]["num-replies"] == 4
    assert all(map(_finite, from_record(result.arrays).values()))


def steps(model, size, **config):
    seen = []

    class Counts(ClientHalf):
        name = "plain"

        def objective(self, losses, batch):
            seen.append(len(batch["y"]))
            return losses

        def after_step(self, local):
            assert local.num_steps == -(-size // 8) - (size == 9 and model is Normed)

    app = client_app(
        Task(lambda config: model(), of_sizes(size), cross_entropy), Counts
    )
    grid = LocalGrid(app, 1, {"lr": 0.1, "batch-size": 8})
    options = dict.fromkeys(
        ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1
    )
    AdditiveStrategy(**options).start(grid, state(model()), num_rounds=1)
    return seen


def test_only_where_batchnorm_would_raise_is_the_last_batch_joined():
    assert steps(Normed, 9) == [9]
    assert steps(Normed, 10) == [8, 2]
    assert steps(Normed, 1) == [1]
    assert steps(Masked, 9) == [8, 1]


def test_a_layer_that_takes_single_examples_keeps_its_batches():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x):
            return self.norm(x.reshape(-1, 1, 2, 2)).reshape(-1, 4)

    assert steps(Images, 9) == [8, 1]


def test_joined_batches_have_every_example_once():
    data = {"x": torch.arange(9)}
    cut = [batch["x"].tolist() for batch in batches(data, 4, join_last=True)]
    assert cut == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert [len(b["x"]) for b in batches(data, 3, join_last=True)] == [3, 3, 3]
    assert [len(b["x"]) for b in batches(data, 16, join_last=True)] == [9]
