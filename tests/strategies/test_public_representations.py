"""PublicRepresentations: the head alone, in full or in public directions."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.public import PublicProjection, public_subspace
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import Mechanism, SiloPrivacy
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.simulation import LocalGrid, PackedGrid
from flower_ext.strategies import PublicRepresentations, PublicRepresentationsClient
from flower_ext.wire import BFloat16, TopK

FEATURES, CLASSES, CLIENTS = 6, 3, 3
CONFIG = {"lr": 0.5, "batch-size": 8}
PLAN = {
    "num_rounds": 3,
    "num_sampled_clients": CLIENTS,
    "population_size": CLIENTS,
    "target_delta": 1e-2,
    "clipping": 0.05,
    "seed": 3,
}


def rows(client):
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(20, 4, generator=generator)
    y = (x @ torch.randn(4, CLASSES, generator=generator.manual_seed(99))).argmax(1)
    return {"x": x, "y": y}


def data(context):
    found = rows(context.node_config["partition-id"])
    return found, found


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def encoder():
    """Return what was trained in public: with statistics, and with dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = nn.Sequential(
            nn.Linear(4, FEATURES), nn.BatchNorm1d(FEATURES), nn.Dropout(0.5)
        )
    found[1].running_mean += 0.2
    return found


def head(matrix=None):
    """Return a head that starts where one of another width does, up to rotation."""
    found = nn.Linear(FEATURES, CLASSES)
    start = np.linspace(-0.3, 0.4, FEATURES * CLASSES).reshape(CLASSES, FEATURES)
    start = start if matrix is None else start @ matrix
    found.weight.data = torch.tensor(start, dtype=torch.float32)
    found.bias.data.fill_(0.1)
    return found


def net(config=None, matrix=None):
    layers = OrderedDict(encoder=encoder())
    if matrix is not None:
        layers["projection"] = PublicProjection(matrix)
    layers["head"] = head(matrix)
    return nn.Sequential(layers)


def orthonormal(k, seed=0):
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((FEATURES, k)))[0]


def arrays(matrix=None):
    return {n: x.numpy().copy() for n, x in net(matrix=matrix).state_dict().items()}


def grid(matrix=None, model=None, kind=LocalGrid, **options):
    task = Task(model or (lambda config: net(matrix=matrix)), data, loss)
    app = client_app(task, PublicRepresentationsClient, **options)
    return kind(app, CLIENTS, CONFIG)


def run(clients, strategy=None, matrix=None, rounds=3, **start):
    strategy = strategy or PublicRepresentations(head="head.*")
    initial = to_record(arrays(matrix))
    result = strategy.start(clients, initial, num_rounds=rounds, **start)
    assert result.train_metrics_clientapp[rounds]["num-errors"] == 0
    return from_record(result.arrays)


# The head alone ---------------------------------------------------------------------


class Tapped(LocalGrid):
    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.seen = [*getattr(self, "seen", []), *messages, *replies]
        return replies


def featured():
    """Return the task of a head alone, on features that were computed before."""

    def features(context):
        found = rows(context.node_config["partition-id"])
        with torch.no_grad():
            found["x"] = encoder().eval()(found["x"])
        return found, found

    model = lambda config: nn.Sequential(OrderedDict(head=head()))  # noqa: E731
    return Task(model, features, loss)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"upload": TopK(0.5), "download": BFloat16()},
        {"mechanism": Mechanism(**PLAN, noise_multiplier=1.0)},
    ],
    ids=["plain", "codecs", "mechanism"],
)
def test_it_is_fedavg_of_the_head_on_features_bit_for_bit(options):
    """What is public is a function; dropout is off, and statistics stay."""
    found = run(grid(), PublicRepresentations(head="head.*", **options))
    app = client_app(featured())
    initial = {n: x for n, x in arrays().items() if n.startswith("head.")}
    expected = from_record(
        AdditiveStrategy(**options)
        .start(LocalGrid(app, CLIENTS, CONFIG), to_record(initial), num_rounds=3)
        .arrays
    )
    for name, x in arrays().items():
        if name in expected:
            assert np.array_equal(found[name], expected[name])
            assert not np.array_equal(found[name], x)
        else:
            assert np.array_equal(found[name], x)


def private(**options):
    plan = {"noise_multiplier": 1.0, "clipping_norm": 0.1, "delta": 1e-3, "seed": 5}
    return DPSGD(SiloPrivacy(**{**plan, **options}))


def test_a_private_silo_noises_the_head_only():
    found = run(grid(trainer=private()))
    quiet = run(grid(trainer=private(noise_multiplier=0.0)))
    for name, x in arrays().items():
        assert np.array_equal(found[name], x) == (not name.startswith("head."))
        assert np.array_equal(quiet[name], x) == (not name.startswith("head."))
    assert not np.array_equal(found["head.weight"], quiet["head.weight"])


def test_only_the_head_travels():
    clients = grid(kind=Tapped)
    run(clients)
    assert len(clients.seen) == 2 * 2 * 3 * CLIENTS
    for message in clients.seen:
        for record in message.content.array_records.values():
            assert set(record) == {"head.weight", "head.bias"}


def test_packed_and_resumed_runs_are_the_same_bit_for_bit(tmp_path):
    expected = run(grid())
    app = client_app(Task(net, data, loss), PublicRepresentationsClient)
    inner = LocalGrid(app, 1)
    options = {"num_clients": CLIENTS, "client_app": app, "run_config": CONFIG}
    with PackedGrid(inner, **options) as packed:
        found = run(packed)
    run(grid(), rounds=1, checkpoint=tmp_path)
    resumed = run(grid(), checkpoint=tmp_path)
    for name, x in expected.items():
        assert np.array_equal(found[name], x) and np.array_equal(resumed[name], x)


def test_a_server_may_know_the_head_alone():
    initial = {n: x for n, x in arrays().items() if n.startswith("head.")}
    strategy = PublicRepresentations(head="*")
    result = strategy.start(grid(), to_record(initial), num_rounds=3)
    found, expected = from_record(result.arrays), run(grid())
    assert found.keys() == initial.keys()
    for name, x in found.items():
        assert np.array_equal(x, expected[name])


def test_another_encoder_is_refused():
    def other(config):
        found = net()
        found.encoder[0].weight.data[0, 0] += 1e-6
        return found

    with pytest.raises(EveryClientFailed, match="must be the server's public one"):
        run(grid(model=other), rounds=1)


# Public directions ------------------------------------------------------------------


def in_features(found, matrix):
    return found["head.weight"] @ np.asarray(matrix, np.float32).T


@pytest.mark.parametrize("level", ["clients", "examples"])
def test_all_directions_are_the_plain_run_in_other_coordinates(level):
    """Clipping sees the same norms; the noise of one round is the same, rotated."""
    turn = orthonormal(FEATURES)

    def one(matrix, noise, rounds):
        trainer, options = {}, {}
        if level == "clients":
            options["mechanism"] = Mechanism(**PLAN, noise_multiplier=noise)
        else:
            trainer["trainer"] = private(noise_multiplier=noise)
        strategy = PublicRepresentations(head="head.*", **options)
        whole = ConfigRecord({"batch-size": 20})  # the same whatever is received
        clients = grid(matrix, **trainer)
        return run(clients, strategy, matrix, rounds, train_config=whole)

    plain, turned = one(None, 0.0, 3), one(turn, 0.0, 3)
    for found, expected in (
        (in_features(turned, turn), plain["head.weight"]),
        (turned["head.bias"], plain["head.bias"]),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)
    # Clipping was at work: without it the step is another.
    assert np.abs(plain["head.weight"] - run(grid())["head.weight"]).max() > 1e-2
    if level == "clients":  # in a silo, noise is drawn from what was received
        noise, own = (
            one(matrix, 1.0, 1)["head.weight"] - one(matrix, 0.0, 1)["head.weight"]
            for matrix in (None, turn)
        )
        np.testing.assert_allclose(own, noise, atol=1e-6)
        assert np.abs(noise).max() > 1e-3


@pytest.mark.parametrize("k", [1, FEATURES])
def test_the_norm_of_the_noise_grows_as_the_root_of_k(k):
    """A head on k directions, seen in the features, where nobody moves it."""
    matrix = orthonormal(k)
    squares = []
    for seed in range(60):
        plan = {**PLAN, "seed": seed, "num_rounds": 1}
        mechanism = Mechanism(**plan, noise_multiplier=1.0)
        strategy = PublicRepresentations(head="*", mechanism=mechanism)
        start = to_record({"weight": np.zeros((CLASSES, k), np.float32)})
        squares.append(np.sum((noisy_round(strategy, start) @ matrix.T) ** 2))
    scale = PLAN["clipping"] / CLIENTS
    # The mean of 60 chi-square variables with c k degrees of freedom, 5 deviations.
    degrees = CLASSES * k
    bound = 5 * np.sqrt(2 * degrees / 60)
    assert abs(np.mean(squares) / scale**2 - degrees) < bound


def noisy_round(strategy, start):
    """Return the model after a round in which nobody moves."""
    k = start["weight"].shape[1]
    model = lambda config: nn.Linear(k, CLASSES, bias=False)  # noqa: E731

    def nothing(context):
        found = {"x": torch.zeros(2, k), "y": torch.zeros(2, dtype=torch.long)}
        return found, found

    app = client_app(Task(model, nothing, loss), PublicRepresentationsClient)
    result = strategy.start(LocalGrid(app, CLIENTS, CONFIG), start, num_rounds=1)
    return from_record(result.arrays)["weight"]


def test_a_head_behind_a_projection_has_the_projected_gradient():
    matrix = orthonormal(2)
    x = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(0))
    small, layer = nn.Linear(2, CLASSES), PublicProjection(matrix)
    full = nn.Linear(FEATURES, CLASSES)
    p = torch.tensor(matrix, dtype=torch.float32)
    full.weight.data, full.bias.data = small.weight.data @ p.T, small.bias.data
    labels = torch.tensor([0, 1, 2, 0, 1])
    for model, features in ((small, layer(x)), (full, x)):
        nn.functional.cross_entropy(model(features), labels).backward()
    torch.testing.assert_close(small.weight.grad, full.weight.grad @ p)
    torch.testing.assert_close(layer(x), x @ p)


def test_a_subspace_is_that_of_the_singular_vectors():
    rng = np.random.default_rng(0)
    public = rng.standard_normal((50, FEATURES)) * [5, 4, 3, 2, 1, 0.5] + 1
    found = public_subspace(public, 3)
    _, _, right = np.linalg.svd(public)
    np.testing.assert_allclose(np.abs(right[:3] @ found), np.eye(3), atol=1e-10)
    assert (found[np.abs(found).argmax(0), range(3)] > 0).all()
    PublicProjection(found)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.eye(3)[0], r"public_projection's shape=\(3,\) must be \(features, k\)"),
        (np.ones((2, 3)), "1 <= k <= features"),
        (np.zeros((3, 0)), "1 <= k <= features"),
        ([[np.nan], [1.0]], "public_projection=.*must be finite"),
        (2 * np.eye(3), "off by 3.*must be orthonormal: take Q of numpy.linalg.qr"),
        (np.eye(3)[:, [0, 0]], "must be orthonormal"),
    ],
)
def test_what_does_not_keep_lengths_is_refused(matrix, words):
    with pytest.raises(ValueError, match=words):
        PublicProjection(matrix)


def test_what_is_no_head_and_no_subspace_is_refused():
    with pytest.raises(ValueError, match="public_rows=.*finite numbers"):
        public_subspace([[1.0, np.inf]], 1)
    with pytest.raises(ValueError, match="dimensions=2 must be <= 1, the rank"):
        public_subspace([[1.0, 2.0], [2.0, 4.0]], 2)
    with pytest.raises(ValueError, match="head=.* must be a pattern.*must be trained"):
        PublicRepresentations(head=[])
    with pytest.raises(ValueError, match="head='tail.*' must be a filter that matches"):
        run(grid(), PublicRepresentations(head="tail.*"))
    with pytest.raises(ValueError, match="a filter of what is trained"):
        run(grid(), PublicRepresentations(head="*running_mean"))
    tied = {"a.weight": np.eye(2), "head.weight": np.eye(2)}
    with pytest.raises(ValueError, match="matches both 'a.weight' and 'head.weight'"):
        PublicRepresentations(head="head.*").head(tied)
