"""HypCluster: sums by hand, populations that are recovered, and who is refused."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import AdditiveStrategy
from flower_ext.client.app import client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.half import Local
from flower_ext.client.several import choose, choosing, initial_models
from flower_ext.client.task import Task
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.contribution import WEIGHT_OF, Total
from flower_ext.core.protocol import Reply, Round
from flower_ext.core.several import change_of_one, stack, unstack
from flower_ext.privacy import Mechanism, SiloPrivacy, StepLedger
from flower_ext.privacy.selection import choice_noise_multiplier, noisy_least
from flower_ext.server.optimizers import SGD, Adam, TorchOptimizer
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies.hypcluster import HypCluster, HypClusterClient
from flower_ext.wire import ErrorFeedback, TopK

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
TWO = stack([{"w": np.float32([1, 2])}, {"w": np.float32([-3, 0])}])


@pytest.fixture
def clustered(reply):
    """Make the reply of a client that trained one of the models."""

    def make(model, cluster, examples=1):
        return reply({"w": np.float32(model)}, weight=examples, cluster=cluster)

    return make


def test_every_model_moves_by_the_mean_of_those_that_chose_it(aggregate, clustered):
    contents = [
        clustered([1, 4], 0, 1),
        clustered([5, 2], 0, 3),
        clustered([-1, 1], 1, 7),
    ]
    new, metrics = aggregate(HypCluster(2, **ANY), TWO, contents)
    assert new["0/w"].tolist() == [4, 2.5]  # (1 * (0, 2) + 3 * (4, 0)) / 4 from (1, 2)
    assert new["1/w"].tolist() == [-1, 1]
    assert (metrics["cluster-size-0"], metrics["cluster-size-1"]) == (2, 1)
    assert "cluster" not in metrics


@pytest.mark.parametrize(
    "optimizer",
    [SGD(0.5, momentum=0.9), Adam(0.1), TorchOptimizer(torch.optim.Adam)],
    ids=["momentum", "adam", "torch"],
)
def test_a_model_that_nobody_chose_stays_under_any_server_optimizer(
    aggregate, clustered, optimizer
):
    strategy = HypCluster(2, server_optimizer=optimizer, **ANY)
    both = [clustered([1, 4], 0), clustered([-1, 1], 1)] + [clustered([1, 4], 0)]
    first, _ = aggregate(strategy, TWO, both)
    moments = {
        slot: x["1/w"].copy() for slot, x in optimizer.state.items() if "1/w" in x
    }
    second, metrics = aggregate(strategy, first, [clustered([1, 9], 0)] * 3, 2)
    assert metrics["cluster-size-1"] == 0
    assert second["1/w"].tolist() == first["1/w"].tolist() != TWO["1/w"].tolist()
    assert second["0/w"].tolist() != first["0/w"].tolist()
    assert moments
    for slot, x in moments.items():
        assert optimizer.state[slot]["1/w"].tolist() == x.tolist()


def test_under_noise_a_model_of_hardly_any_client_stays():
    strategy = HypCluster(2, **ANY)
    total = Total(
        {f"delta-{j}": {f"{j}/w": np.ones(2)} for j in range(2)},
        weights={"delta-0": 2.0, "delta-1": 0.5},
        noise={WEIGHT_OF + "delta-0": 0.5, WEIGHT_OF + "delta-1": 0.5},
    )
    found = strategy.update(total, Round(1, TWO, private=True))
    assert found.keys() == {"0/w"}
    assert found["0/w"].tolist() == [0.5, 0.5]


# Populations ------------------------------------------------------------------------

TRUE = np.array([[1.0, -2.0], [-1.0, 0.5]])
NEAR = stack([{"weight": np.float32([w + 0.4])} for w in TRUE])


def population(w, seed, size=12):
    x = np.random.default_rng(seed).standard_normal((size, 2))
    return {"x": x, "y": x @ w}


@pytest.fixture
def people(linear_task):
    """Make six clients of two populations, which alternate."""
    clients = [population(TRUE[i % 2], i) for i in range(6)]
    return client_app(linear_task(clients, 2), HypClusterClient)


STEPS = {"lr": 0.3, "batch-size": 12, "local-epochs": 3}


def test_two_populations_are_recovered(people, play):
    played = play(HypCluster(2), people, 6, NEAR, rounds=25, config=STEPS)
    for j, w in enumerate(TRUE):
        np.testing.assert_allclose(played.models[-1][f"{j}/weight"][0], w, atol=1e-5)
    for server_round in (1, 25):
        metrics = played.train(server_round)
        assert (metrics["cluster-size-0"], metrics["cluster-size-1"]) == (3, 3)
    assert played.evaluate(25)["loss-seen"] < 1e-10
    assert played.evaluate(25)["loss-seen-p90"] < 1e-10


def test_what_an_upload_leaves_out_comes_with_the_same_model(people, play, monkeypatch):
    """Clients that take the models in turns are clients of two runs."""
    monkeypatch.setattr(Local, "best_of", lambda self, _: self.server_round % 2)
    upload = ErrorFeedback(TopK(0.5))
    config = {"lr": 0.1, "batch-size": 12}  # one step: no order matters
    both = play(HypCluster(2, upload=upload), people, 6, NEAR, rounds=6, config=config)
    for j, start in enumerate(unstack(NEAR)):
        alone = AdditiveStrategy(upload=upload)
        found = play(alone, people, 6, start, rounds=3, config=config)
        np.testing.assert_allclose(
            unstack(both.models[-1])[j]["weight"], found.models[-1]["weight"], rtol=1e-5
        )


def test_models_in_another_order_give_the_result_in_that_order(people, play):
    swapped = stack(unstack(NEAR)[::-1])
    one, other = (
        play(HypCluster(2), people, 6, start, rounds=3, config=STEPS).models[-1]
        for start in (NEAR, swapped)
    )
    for name, x in stack(unstack(one)[::-1]).items():
        np.testing.assert_array_equal(other[name], x)


def test_of_equal_models_the_first_is_chosen(people, play):
    alike = stack([unstack(NEAR)[0]] * 2)
    played = play(HypCluster(2), people, 6, alike, config=STEPS)
    assert played.train()["cluster-size-0"] == 6
    np.testing.assert_array_equal(played.models[-1]["1/weight"], alike["1/weight"])


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.5, 0.25], 1),
        ([0.25, 0.25, 0.1, 0.1], 2),
        ([math.nan, 3.0], 1),
        ([math.inf, math.nan], 0),
        ([-1.0, -2.0], 1),
    ],
)
def test_choose(losses, expected):
    assert choose(losses) == expected


def test_a_client_is_evaluated_with_the_model_of_its_training_data(linear_task, play):
    # The test data are of the other population, whose model would lose nothing there.
    clients = [(population(TRUE[i], i), population(TRUE[1 - i], 9)) for i in range(2)]
    clients += [clients[0]]
    task = linear_task(clients, 2)
    exact = stack([{"weight": np.float32([w])} for w in TRUE])
    strategy = HypCluster(2, fraction_train=0.0)  # so that no client has ever trained
    played = play(strategy, client_app(task, HypClusterClient), 3, exact)
    x = population(TRUE[0], 9)["x"]
    expected = 0.5 * np.mean((x @ (TRUE[0] - TRUE[1])) ** 2)
    assert played.evaluate()["loss-unseen"] == pytest.approx(expected, rel=1e-5)


def test_the_mod_gives_a_loop_of_ones_own_the_same(linear_task, people, play):
    clients = [population(TRUE[i % 2], i) for i in range(6)]
    task = linear_task(clients, 2)

    def loss(arrays, context):
        data, _ = task.data(context)
        return float(((data["x"] @ arrays["weight"][0] - data["y"]) ** 2).mean())

    app = ClientApp(mods=[choosing(loss)])
    seen = []

    @app.train()
    def train(message: Message, context) -> Message:
        model = task.model({})
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data, _ = task.data(context)
        optimizer = torch.optim.SGD(model.parameters(), lr=STEPS["lr"])
        for _ in range(STEPS["local-epochs"]):
            optimizer.zero_grad()
            task.loss(model, data).mean().backward()
            optimizer.step()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(data["y"])}),
        }
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context) -> Message:
        seen.append(message.content["arrays"].to_torch_state_dict()["weight"].tolist())
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    ours, theirs = (
        play(HypCluster(2), made, 6, NEAR, rounds=2, config=STEPS)
        for made in (app, people)
    )
    for name, x in theirs.models[-1].items():
        np.testing.assert_allclose(ours.models[-1][name], x, rtol=1e-5)
    assert ours.train(2)["cluster-size-0"] == 3
    assert seen[-2:] == [ours.models[-1][f"{j}/weight"].tolist() for j in range(2)]


# Tied tensors, and where models start -------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


@pytest.mark.parametrize("private", [False, True])
def test_a_tied_tensor_moves_under_all_its_names(private, play):
    generator = torch.Generator().manual_seed(0)
    data = {
        "x": torch.randn(6, 2, generator=generator),
        "y": torch.tensor([0, 1] * 3),
    }
    task = Task(
        lambda config: Tied(),
        lambda context: (data, data),
        lambda model, b: nn.functional.cross_entropy(
            model(b["x"]), b["y"], reduction="none"
        ),
    )
    start = initial_models(Tied, 2)
    plan = {"num_rounds": 3, "num_sampled_clients": 3, "population_size": 3}
    plan |= {"noise_multiplier": 0.1, "target_delta": 1e-2, "seed": 1, "clipping": 1.0}
    options = {"mechanism": Mechanism(**plan)} if private else {}
    strategy = HypCluster(2, **options)
    app = client_app(task, HypClusterClient)
    models = play(strategy, app, 3, from_record(start), rounds=2, config={"lr": 0.5})
    first, *_, last = models.models
    moved = [
        j
        for j in range(2)
        if (first[f"{j}/embed.weight"] != last[f"{j}/embed.weight"]).any()
    ]
    assert moved
    for j in range(2):
        np.testing.assert_array_equal(
            last[f"{j}/head.weight"], last[f"{j}/embed.weight"]
        )


def test_under_a_mechanism_a_tied_tensor_counts_once(reply):
    model = {"embed": np.float32([1, 2]), "head": np.float32([1, 2])}
    sent = stack([model, model])
    round = Round(1, sent, private=True, ties=HypCluster(2).find_ties(sent))
    found = change_of_one(
        Reply(reply({n: x + 1 for n, x in model.items()}), 0), round, 1
    )
    assert {n: x.numpy().tolist() for n, x in found.items()} == {"1/embed": [1, 1]}


def make_net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_models_start_apart_or_from_one_model_but_for_the_last_layer():
    one, other = unstack(from_record(initial_models(make_net, 2)))
    assert all((one[name] != other[name]).any() for name in one)
    torch.manual_seed(5)
    trained = ArrayRecord(make_net().state_dict())
    warm = from_record(trained)
    for model in (
        found := unstack(from_record(initial_models(make_net, 3, warm=trained)))
    ):
        assert {n for n, x in model.items() if (x == warm[n]).all()} == {
            "0.weight",
            "0.bias",
        }
    assert (found[0]["2.weight"] != found[1]["2.weight"]).any()
    assert torch.equal(
        torch.tensor(found[1]["2.bias"]), torch.tensor(other["2.bias"])
    )  # of the same seed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"warm": ArrayRecord(nn.Linear(3, 4).state_dict())}, "warm="),
        ({"num_models": 0}, "num_models=0 must be an integer >= 1"),
    ],
)
def test_no_start(options, says):
    with pytest.raises(ValueError, match=says):
        initial_models(make_net, **{"num_models": 2, **options})


# Who is refused -----------------------------------------------------------------------


@pytest.mark.parametrize("clients", [2, 1])
def test_as_many_clusters_as_clients(people, clients):
    strategy = HypCluster(2, **ANY)
    says = rf"num_clusters=2 must be < {clients} clients: as many clusters as clients"
    with pytest.raises(ValueError, match=says):
        strategy.start(LocalGrid(people, clients), to_record(NEAR), num_rounds=1)


@pytest.mark.parametrize(
    "start",
    [
        {"weight": np.float32([[0, 1]])},
        stack([{"weight": np.float32([[0, 1]])}] * 2),
        stack([{"weight": np.float32([[0, 1]])}] * 4),
        stack([{"weight": np.float32([[0] * n])} for n in (1, 2, 2)]),
    ],
    ids=["one", "two", "four", "unlike"],
)
def test_starts_that_are_not_so_many_models(people, start):
    says = "initial_arrays=.* must be num_clusters=3 models of one form"
    with pytest.raises(ValueError, match=says):
        HypCluster(3).start(LocalGrid(people, 6), to_record(start), num_rounds=1)


@pytest.mark.parametrize("clusters", [0, -1, 1.5, "2", True])
def test_clusters_are_a_number(clusters):
    with pytest.raises(ValueError, match="num_clusters="):
        HypCluster(clusters)


def test_a_cluster_that_does_not_exist_is_left_out(aggregate, clustered):
    contents = [clustered([1, 4], 0), clustered([9, 9], 2), clustered([9, 9], 0.5)]
    new, metrics = aggregate(HypCluster(2, **ANY), TWO, contents)
    assert new["0/w"].tolist() == [1, 4]
    assert metrics["num-dropped"] == 2


def test_a_change_that_a_model_cannot_hold_is_left_out(aggregate, clustered):
    contents = [clustered([1, 4], 0), clustered([3e38, 0], 0), clustered([-3, 0], 1)]
    new, metrics = aggregate(HypCluster(2, **ANY), TWO, contents)
    assert new["0/w"].tolist() == [1, 4]
    assert metrics["num-dropped"] == 1


# Silos that train with DP-SGD ---------------------------------------------------------

QUIET = {"noise_multiplier": 0.0, "clipping_norm": math.inf, "delta": 1e-3}
LOUD = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "delta": 1e-3}
CHOICE = {"selection_epsilon": 0.5, "loss_cap": 2.0}


@pytest.fixture
def silos(linear_task):
    """Make six silos of two populations, in one of which an example loses a lot."""

    def make(privacy, **changed):
        clients = [population(TRUE[i % 2], i) for i in range(6)]
        clients[0]["y"][0] = 1e6
        clients[0] |= changed
        return client_app(
            linear_task(clients, 2),
            HypClusterClient,
            trainer=DPSGD(SiloPrivacy(**privacy)),
        )

    return make


def losses_by_hand(start, data, cap):
    """Return the sums of the clipped losses of each model."""
    return [
        np.minimum(0.5 * (data["y"] - data["x"] @ m["weight"][0]) ** 2, cap).sum()
        for m in unstack(start)
    ]


def test_without_noise_the_choice_and_the_training_are_those_of_plain_clients(
    silos, play, linear_task
):
    clients = [population(TRUE[i % 2], i) for i in range(6)]
    clients[0]["y"][0] = 1e6
    plain = client_app(linear_task(clients, 2), HypClusterClient)
    quiet = silos({**QUIET, "selection_epsilon": math.inf, "loss_cap": 1e15})
    ours, theirs = (
        play(HypCluster(2), app, 6, NEAR, rounds=2, config=STEPS)
        for app in (quiet, plain)
    )
    for name, x in theirs.models[-1].items():
        np.testing.assert_allclose(ours.models[-1][name], x, rtol=1e-4)
    assert ours.train(2)["cluster-size-0"] == theirs.train(2)["cluster-size-0"]
    assert ours.train(2)["example-epsilon"] == math.inf


def test_losses_are_clipped_and_the_noise_is_that_of_the_cap(silos, play, monkeypatch):
    seen = []

    def spy(scores, scale, uniforms):
        seen.append((list(scores), scale))
        assert np.all((uniforms > 0) & (uniforms < 1)) and len(set(uniforms)) == 2
        return noisy_least(scores, scale, uniforms)

    monkeypatch.setattr("flower_ext.client.private_session.noisy_least", spy)
    play(HypCluster(2), silos({**LOUD, **CHOICE}), 6, NEAR, config=STEPS)
    data = population(TRUE[0], 0)
    data["y"][0] = 1e6
    scores, scale = seen[0]
    assert scores == pytest.approx(losses_by_hand(NEAR, data, 2.0), rel=1e-5)
    assert scale == 2.0 / 0.5
    without = {name: column[1:] for name, column in data.items()}
    gaps = np.array(scores) - losses_by_hand(NEAR, without, 2.0)
    assert gaps == pytest.approx(2.0, rel=1e-4)  # of both models, and no more


def test_choices_are_charged_with_the_steps(silos, play):
    app = silos({**LOUD, **CHOICE, "seed": 1})
    played = play(HypCluster(2), app, 6, NEAR, rounds=2, config=STEPS)
    ledger = StepLedger().add(1.0, choice_noise_multiplier(0.5), 2)
    expected = ledger.add(1.0, 1.0, 2 * STEPS["local-epochs"]).epsilon(1e-3)
    assert played.train(2)["example-epsilon"] == pytest.approx(expected)
    # One model is no choice, and costs none.
    one = {"0/weight": NEAR["0/weight"]}
    alone = play(HypCluster(1), app, 6, one, config=STEPS).train()
    steps = StepLedger().add(1.0, 1.0, STEPS["local-epochs"]).epsilon(1e-3)
    assert alone["example-epsilon"] == pytest.approx(steps)


@pytest.mark.parametrize("released", [False, True])
def test_a_choice_that_evaluations_tell_of_is_private_too(
    linear_task, play, released, monkeypatch
):
    """By the loss of the model that was chosen: it is charged where that is told."""
    scales = []

    def spy(scores, scale, uniforms):
        scales.append(scale)
        return noisy_least(scores, scale, uniforms)

    monkeypatch.setattr("flower_ext.client.private_session.noisy_least", spy)
    task = linear_task([population(TRUE[i % 2], i) for i in range(3)], 2)
    privacy = SiloPrivacy(**LOUD, **CHOICE)
    trainer = DPSGD(privacy, release_evaluation=released)
    app = client_app(task, HypClusterClient, trainer=trainer)
    played = play(HypCluster(2), app, 3, NEAR, rounds=2, config=STEPS)
    choices = 3 if released else 2  # of two rounds, and of the evaluation between them
    ledger = StepLedger().add(1.0, choice_noise_multiplier(0.5), choices)
    expected = ledger.add(1.0, 1.0, 2 * STEPS["local-epochs"]).epsilon(1e-3)
    assert played.train(2)["example-epsilon"] == pytest.approx(expected)
    assert scales == [2.0 / 0.5] * 3 * (4 if released else 2)
    assert ("loss" in played.evaluate(2)) == released


def test_an_evaluation_that_comes_first_finds_the_noise_of_the_rounds(
    linear_task, play
):
    privacy = {"epsilon": 8.0, "num_rounds": 3, "clipping_norm": 1.0, "delta": 1e-3}
    task = linear_task([population(TRUE[i % 2], i) for i in range(3)], 2)
    found = []
    for first in (0.0, 1.0):
        trainer = DPSGD(SiloPrivacy(**privacy, **CHOICE), release_evaluation=True)
        app = client_app(task, HypClusterClient, trainer=trainer)
        grid = LocalGrid(app, 3, STEPS)
        if first:
            play(HypCluster(2, fraction_train=0.0), grid, 3, NEAR)
        options = {"fraction_evaluate": 0.0}
        spent = play(HypCluster(2, **options), grid, 3, NEAR).train()
        found.append(spent["example-epsilon"])
    assert found[0] < found[1] < 1.5 * found[0]  # one choice more, of the same noise


def test_a_target_covers_choices_and_steps(silos, play):
    privacy = {"epsilon": 8.0, "num_rounds": 2, "clipping_norm": 1.0, "delta": 1e-3}
    app = silos({**privacy, **CHOICE})
    played = play(HypCluster(2), app, 6, NEAR, rounds=3, config=STEPS)
    assert 7.9 < played.train(2)["example-epsilon"] <= 8.0
    assert played.train(3)["num-errors"] == 6


def test_a_budget_that_ends_before_the_training_makes_no_choice(silos, play, caplog):
    ledger = StepLedger().add(1.0, choice_noise_multiplier(0.5), 1)
    # Enough for a round and a further choice, but not for its steps.
    most = 0.1 + ledger.add(1.0, choice_noise_multiplier(0.5), 1).add(
        1.0, 1.0, STEPS["local-epochs"]
    ).epsilon(1e-3)
    app = silos({**LOUD, **CHOICE, "max_epsilon": most})
    played = play(HypCluster(2), app, 6, NEAR, rounds=3, config=STEPS)
    assert played.train(1)["num-errors"] == 0
    spent = played.train(1)["example-epsilon"]
    assert played.train(2)["num-errors"] == played.train(3)["num-errors"] == 6
    # Twice refused, and nothing was charged for it: the same is said to be spent.
    said = [r.message for r in caplog.records if "would exceed" in r.message]
    assert len(said) >= 12 and all(f"{spent:.6g} is spent" in x for x in said)


def test_the_same_seed_chooses_the_same_and_other_data_do_not(silos, monkeypatch, play):
    drawn = []

    def spy(scores, scale, uniforms):
        drawn.append(tuple(uniforms))
        return 0

    monkeypatch.setattr("flower_ext.client.private_session.noisy_least", spy)
    privacy = {**LOUD, **CHOICE, "seed": 3}
    for app in (silos(privacy), silos(privacy), silos(privacy, y=np.ones(12))):
        play(HypCluster(2), app, 6, NEAR, config=STEPS)
    first, again, other = drawn[0:6], drawn[6:12], drawn[12:18]
    assert first == again
    assert first[0] != other[0] and first[1:] == other[1:]
    assert len(set(first)) == 6


def test_a_choice_that_is_not_private_is_refused(silos, play):
    with pytest.raises(EveryClientFailed, match="among models reads the silo's data"):
        play(HypCluster(2), silos(LOUD), 6, NEAR, config=STEPS)
