"""FRL: Borda counts by brute force, the trained network by hand, and bounded votes."""

import itertools

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn

from flower_ext import LocalGrid, Task, client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import SiloPrivacy
from flower_ext.server.optimizers import SGD
from flower_ext.strategies import FederatedRankLearning, FederatedRankLearningClient
from flower_ext.strategies.federated_rank_learning import (
    RANKING,
    masked,
    places_of,
    ranking,
    scores_at,
    supermask,
)
from flower_ext.wire import NF4, Permutation

EDGES = 24
SENT = {
    "body.weight": np.linspace(-3, 5, EDGES, dtype=np.float32)[::-1].reshape(4, 6),
    "body.bias": np.float32([0.5, 0, 0, -0.5]),
    "steps": np.array(7),
}


@pytest.fixture
def votes():
    """Five rankings of the edges of one layer."""
    rng = np.random.default_rng(0)
    return [rng.permutation(EDGES).reshape(4, 6) for _ in range(5)]


@pytest.fixture
def vote(reply, aggregate):
    """Let clients vote; return the new places, and the metrics of the round."""

    def run(*places, weights=None, sent=SENT, **options):
        contents = [
            reply({}, weight=1.0 if weights is None else weights[i])
            for i in range(len(places))
        ]
        for content, x in zip(contents, places, strict=True):
            if x is not None:
                arrays = {"body.weight": np.asarray(x, np.int32)}
                content[RANKING] = Permutation().encode(arrays)
        strategy = FederatedRankLearning(min_train_nodes=1, min_available_nodes=1)
        new, metrics = aggregate(strategy, sent, contents)
        if new is None:
            return None, metrics
        for name in ("body.bias", "steps"):
            np.testing.assert_array_equal(new[name], sent[name])
        found = places_of(new["body.weight"])
        # They are the scores of a ranking, bit for bit.
        expected = scores_at(found, np.dtype("f4"))
        assert new["body.weight"].tobytes() == expected.tobytes()
        return found, metrics

    return run


# The count --------------------------------------------------------------------------


def test_the_sum_of_places_is_a_borda_count(vote, votes):
    """Each client gives an edge a point for every edge that it ranks below it."""
    points = np.zeros(EDGES)
    for one in votes:
        flat = one.reshape(-1)
        for a, b in itertools.permutations(range(EDGES), 2):
            points[a] += flat[a] > flat[b]
    order = sorted(range(EDGES), key=lambda edge: (points[edge], edge))
    expected = np.empty(EDGES, int)
    expected[order] = range(EDGES)
    assert len(set(points)) < EDGES  # there are ties
    np.testing.assert_array_equal(vote(*votes)[0].reshape(-1), expected)


def test_the_ranking_of_one_client_is_that_of_all(vote, votes):
    np.testing.assert_array_equal(vote(votes[0])[0], votes[0])
    np.testing.assert_array_equal(vote(*[votes[0]] * 4)[0], votes[0])


def test_names_of_clients_and_of_edges_mean_nothing(vote, votes):
    np.testing.assert_array_equal(vote(*votes[::-1])[0], vote(*votes)[0])
    # Of edges that no two sums of are equal: ties go by where an edge is.
    rng = np.random.default_rng(1)
    while True:
        votes = [rng.permutation(EDGES).reshape(4, 6) for _ in range(5)]
        if len(set(sum(votes).reshape(-1))) == EDGES:
            break
    turn = rng.permutation(EDGES)
    turned = [x.reshape(-1)[turn].reshape(4, 6) for x in votes]
    expected = vote(*votes)[0].reshape(-1)[turn]
    np.testing.assert_array_equal(vote(*turned)[0].reshape(-1), expected)


def test_opposite_votes_leave_the_order_to_the_rule(vote, votes):
    found, _ = vote(votes[0], EDGES - 1 - votes[0])
    np.testing.assert_array_equal(found, np.arange(EDGES).reshape(4, 6))


def test_one_client_moves_a_sum_by_its_vote_only(exchange, reply, votes):
    def total(last):
        contents = [reply({}) for _ in votes]
        for content, x in zip(contents, [*votes[:4], last], strict=True):
            arrays = {"body.weight": x.astype(np.int32)}
            content[RANKING] = Permutation().encode(arrays)
        kept = []

        class Spy(FederatedRankLearning):
            def update(self, total, round):
                kept.append(total.arrays["places"]["body.weight"].copy())
                return super().update(total, round)

        strategy = Spy()
        strategy.aggregate_train(1, exchange(strategy, SENT, contents))
        return kept[0]

    honest, attacked = total(votes[4]), total(EDGES - 1 - votes[4])
    assert 0 < np.abs(honest - attacked).max() <= EDGES - 1
    np.testing.assert_array_equal(honest, sum(votes))


def test_examples_count_for_nothing_but_that_there_are_any(vote, votes):
    expected = vote(*votes)[0]
    np.testing.assert_array_equal(vote(*votes, weights=[1, 5, 9, 1e9, 3])[0], expected)
    without = vote(*votes[1:])[0]
    np.testing.assert_array_equal(vote(*votes, weights=[0, 1, 1, 1, 1])[0], without)


def test_scores_keep_only_the_order_of_what_a_run_starts_with(vote, votes):
    odd = {**SENT, "body.weight": SENT["body.weight"] ** 3 * 1e5}
    np.testing.assert_array_equal(vote(*votes, sent=odd)[0], vote(*votes)[0])


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((4, 6)),
        np.arange(EDGES).reshape(4, 6) + 1,
        np.arange(EDGES).reshape(4, 6) - 1,
        np.arange(EDGES).reshape(6, 4),
        np.minimum(np.arange(EDGES), EDGES - 2).reshape(4, 6),
        None,
    ],
    ids=["zeros", "from 1", "from -1", "shape", "repeated", "none"],
)
def test_what_is_no_ranking_is_left_out(vote, votes, x):
    found, metrics = vote(*votes[:3], x)
    np.testing.assert_array_equal(found, vote(*votes[:3])[0])
    assert metrics["num-dropped"] == 1


# The network ------------------------------------------------------------------------


class Net(nn.Module):
    """Convolution, BatchNorm, biases, and a parameter that is none of a layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(48, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.scale * self.head(x)


def test_weights_are_signed_constants_of_the_top_edges():
    model = supermask(Net(), density=0.3, seed=4)
    for layer, fan_in in ((model.conv, 9), (model.head, 48)):
        scores, weight = layer._parameters["weight"], layer.weight
        edges = round(0.3 * scores.numel())
        top = scores.detach().flatten().sort().values[-edges]
        size = (2 / fan_in) ** 0.5
        kept = torch.where(scores >= top, size, 0.0)
        torch.testing.assert_close(weight.detach().abs(), kept)
        assert {-1.0, 1.0} <= set(weight.detach().sign().unique().tolist())
    other = supermask(Net(), density=0.3, seed=5)
    assert not torch.equal(model.head.signed_constants, other.head.signed_constants)
    again = supermask(Net(), density=0.3, seed=4)
    torch.testing.assert_close(model.head.signed_constants, again.head.signed_constants)


def test_names_and_shapes_are_the_plain_model_s():
    plain = {name: x.shape for name, x in Net().state_dict().items()}
    model = supermask(Net())
    assert {name: x.shape for name, x in model.state_dict().items()} == plain
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"conv.weight", "head.weight"}
    model.load_state_dict(Net().state_dict())
    assert supermask(model) is model


def test_the_gradient_goes_straight_through_to_all_scores():
    model = supermask(nn.Linear(6, 3))
    x, goal = torch.randn(5, 6), torch.randn(5, 3)
    (model(x) * goal).sum().backward()
    expected = (goal.T @ x) * model.signed_constants
    torch.testing.assert_close(model._parameters["weight"].grad, expected)
    assert model.bias.grad is None


def test_batch_norm_uses_the_batch_and_keeps_nothing():
    model = supermask(Net())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    x = torch.randn(8, 1, 6, 6)
    trained = model(x)
    model.eval()
    torch.testing.assert_close(model(x), trained)
    for name, y in model.state_dict().items():
        assert torch.equal(y, before[name]), name


@pytest.mark.parametrize(
    "model",
    [nn.Embedding(3, 2), nn.LSTM(2, 2), nn.LayerNorm(3), nn.MultiheadAttention(4, 2)],
    ids=lambda model: type(model).__name__,
)
def test_what_cannot_be_ranked_is_refused(model):
    with pytest.raises(ValueError, match="weights of linear and convolutional layers"):
        supermask(model)
    assert all(p.requires_grad for p in model.parameters())


# Clients ----------------------------------------------------------------------------


def test_a_client_trains_scores_by_hand(linear_task, play):
    """Two full-batch steps on ``(y - w x)^2 / 2`` of a network of one unit."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((8, 6)), 2 * rng.standard_normal(8)
    both = [{"x": x, "y": y}] * 2  # who agree
    app = client_app(linear_task(both, 6), FederatedRankLearningClient)
    start = np.float32([[0.3, -0.2, 0.1, 0.4, -0.5, 0.0]])
    config = {"lr": 0.5, "batch-size": 8, "local-epochs": 2}
    run = play(FederatedRankLearning(seed=2), app, 2, {"weight": start}, 1, config)
    # The signs are part of the network, and not of what is checked here.
    signs = supermask(nn.Linear(6, 1, bias=False), seed=2).signed_constants.numpy()[0]
    np.testing.assert_allclose(np.abs(signs), np.sqrt(2 / 6), rtol=1e-6)
    steps = np.linspace(-1, 1, 6) / np.sqrt(6)
    scores = steps[places_of(start[0])]
    for _ in range(2):
        kept = scores >= np.sort(scores)[-3]
        gap = x @ (signs * kept) - y
        scores = scores - 0.5 * (gap @ x / 8) * signs
    found = run.models[-1]["weight"][0]
    np.testing.assert_allclose(found, steps[places_of(scores)], rtol=1e-6)
    assert not np.array_equal(places_of(scores), places_of(start[0]))


@pytest.fixture(scope="module")
def task():
    """Images of noise, whose label is the sign of their mean, for a small CNN."""

    def data(context):
        generator = torch.Generator().manual_seed(context.node_config["partition-id"])
        x = torch.randn(24, 1, 6, 6, generator=generator)
        columns = {"x": x, "y": (x.mean((1, 2, 3)) > 0).long()}
        return columns, columns

    def loss(model, batch):
        logits = model(batch["x"])
        return nn.functional.cross_entropy(logits, batch["y"], reduction="none")

    return Task(lambda config: Net(), data, loss)


@pytest.fixture(scope="module")
def start():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ArrayRecord(Net().state_dict())


CONFIG = {"lr": 0.4, "batch-size": 8, "momentum": 0.9, "local-epochs": 2}


def run_of(task, start, **options):
    strategy = FederatedRankLearning(**options)
    grid = LocalGrid(client_app(task, FederatedRankLearningClient), 4, CONFIG)
    result = strategy.start(grid, start, num_rounds=3)
    assert all(x["num-replies"] == 4 for x in result.train_metrics_clientapp.values())
    return result


def test_it_learns_and_others_can_load_what_it_learned(task, start):
    result = run_of(task, start)
    losses = [x["loss"] for x in result.evaluate_metrics_clientapp.values()]
    assert losses[-1] < np.log(4) / 2
    new = from_record(result.arrays)
    for name, x in from_record(start).items():
        changed = name in ("conv.weight", "head.weight")
        assert np.array_equal(new[name], x) != changed, name
    model = FederatedRankLearning().model(Net())
    model.load_state_dict(result.arrays.to_torch_state_dict())
    data, _ = task.data(type("C", (), {"node_config": {"partition-id": 0}}))
    with torch.no_grad():
        assert task.loss(model, data).mean() < np.log(4) / 2


def test_a_coded_download_is_the_same_run_in_fewer_bytes(task, start):
    plain = run_of(task, start)
    coded = run_of(task, start, download=Permutation())
    for name, x in from_record(plain.arrays).items():
        assert from_record(coded.arrays)[name].tobytes() == x.tobytes(), name


def test_a_ranking_takes_few_bits_an_edge():
    model = supermask(nn.Linear(300, 200))
    record = ranking(model)
    assert record.count_bytes() * 8 < 60_000 * 16 + 8 * 300  # 16 bits, and a frame


def test_a_loop_of_one_s_own_sends_the_same(task, start):
    """The functions for loops make the model and the ranking of the client half."""
    strategy = FederatedRankLearning(density=0.4, seed=9)
    grid = LocalGrid(client_app(task, FederatedRankLearningClient), 2, CONFIG)
    (message, *_) = strategy.configure_train(1, start, ConfigRecord(), grid)
    own = masked(Net(), message)
    of_half = supermask(Net(), 0.4, 9)
    for left, right in zip(own.modules(), of_half.modules(), strict=True):
        for name, x in left.named_buffers(recurse=False):
            assert torch.equal(x, dict(right.named_buffers(recurse=False))[name])
    own.load_state_dict(message.content["arrays"].to_torch_state_dict())
    sent = from_record(message.content["arrays"])
    like = {n: np.zeros(x.shape, np.int32) for n, x in sent.items() if x.ndim > 1}
    places = Permutation().decode(ranking(own), like)
    for name, x in places.items():
        np.testing.assert_array_equal(x, places_of(sent[name]))


def test_training_that_diverged_is_the_client_s_error():
    model = supermask(nn.Linear(3, 2))
    with torch.no_grad():
        model._parameters["weight"][0, 1] = torch.nan
    with pytest.raises(ValueError, match="choose a lower learning rate"):
        ranking(model)


# Refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"density": 0}, r"density=0 must be in the open interval \(0, 1\)"),
        ({"density": 1.0}, "density=1.0"),
        ({"seed": -1}, "seed=-1 must be an integer >= 0"),
        ({"server_optimizer": SGD(0.5)}, "server_optimizer=.* left out: a ranking"),
        ({"upload": NF4()}, "upload=.* must be left out: rankings travel"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        FederatedRankLearning(**options)


def test_a_start_without_weights_is_refused(task):
    grid = LocalGrid(client_app(task, FederatedRankLearningClient), 2)
    initial = to_record({"bias": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="array of two axes or more: nothing to rank"):
        FederatedRankLearning().start(grid, initial, num_rounds=1)


def test_dp_sgd_does_not_serve_it(task):
    privacy = SiloPrivacy(epsilon=2.0, delta=1e-5, num_rounds=2, clipping_norm=1.0)
    with pytest.raises(ValueError, match="cannot be served by DPSGD"):
        client_app(task, FederatedRankLearningClient, trainer=DPSGD(privacy))
