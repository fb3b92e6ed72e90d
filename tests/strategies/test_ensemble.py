"""Ensemble: its models are those of runs of their own; choices on held-out examples."""

from functools import partial

import numpy as np
import pytest
import torch

from flower_ext import AdditiveStrategy
from flower_ext.client.app import client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.half import ClientHalf
from flower_ext.client.personalization import hold_out
from flower_ext.core.several import stack, unstack
from flower_ext.privacy import SiloPrivacy
from flower_ext.server.optimizers import SGD, Adam, TorchOptimizer
from flower_ext.strategies.ensemble import Ensemble, EnsembleClient
from flower_ext.wire import ErrorFeedback, TopK

TRUE = np.array([[1.0, -2.0], [-1.0, 0.5]])
STARTS = stack([{"weight": np.float32([[j, 1 - j]])} for j in range(3)])
DECAYING = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
STEPS = {"lr": 0.1, "batch-size": 50, "local-epochs": 2}


def population(w, seed, size=20):
    x = np.random.default_rng(seed).standard_normal((size, 2))
    return {"x": x, "y": x @ w}


@pytest.fixture
def people(linear_task):
    clients = [population(TRUE[i % 2], i) for i in range(4)]
    return client_app(linear_task(clients, 2), EnsembleClient)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"server_optimizer": SGD(0.8, momentum=0.9)},
        lambda: {"server_optimizer": Adam(0.1, bias_correction=True)},
        lambda: {"server_optimizer": TorchOptimizer(DECAYING)},
        # What an upload leaves out comes with the next one of the same model.
        lambda: {"upload": ErrorFeedback(TopK(0.5))},
    ],
    ids=["momentum", "adam", "torch", "error-feedback"],
)
def test_its_models_are_those_of_federated_averaging_in_runs_of_their_own(
    people, play, options
):
    """Full batches and cohorts, so that nothing depends on a round's number."""
    strategy = Ensemble(3, holdout=0.0, **options())
    together = play(strategy, people, 4, STARTS, rounds=6, config=STEPS)
    for j, start in enumerate(unstack(STARTS)):
        strategy = AdditiveStrategy(**options())
        alone = play(strategy, people, 4, start, rounds=2, config=STEPS)
        np.testing.assert_allclose(
            unstack(together.models[-1])[j]["weight"],
            alone.models[-1]["weight"],
            rtol=1e-6,
        )
    # In its first rounds the third model was as it had started.
    np.testing.assert_array_equal(together.models[2]["2/weight"], STARTS["2/weight"])


def test_only_the_model_that_is_trained_travels_to_be_trained(people, play, spied):
    app, calls = spied(people)
    play(Ensemble(3), app, 4, STARTS, config=STEPS)
    for call in calls:
        if call.kind == "train":
            assert list(call.reply["arrays"]) == ["weight"]
            assert call.reply["metrics"]["num-examples"] == 16  # a fifth is held out


def test_clients_use_the_model_that_is_best_on_what_they_hold_out(linear_task, play):
    kept = []

    class Spy(EnsembleClient):
        def receive(self, local, arrays):
            rest, held = hold_out(local, 0.25)
            kept.append((local.client, rest, held))
            return super().receive(local, arrays)

    # Noise that no model knows; the first two models of which are close.
    rng = np.random.default_rng(3)
    clients = [population(TRUE[0], i) for i in range(4)]
    for client in clients:
        client["y"] = client["y"] + rng.standard_normal(20)
    starts = stack([{"weight": np.float32([TRUE[0] + d])} for d in (0.0, 0.05, 0.1)])
    task = linear_task(clients, 2)
    strategy = Ensemble(3, holdout=0.25, fraction_train=0.0)
    metrics = play(strategy, client_app(task, Spy), 4, starts).evaluate()
    sizes, losses = np.zeros(3), []
    for client, _, held in kept:
        assert len(held["y"]) == 5
        found = [
            np.mean((held["y"].numpy() - held["x"].numpy() @ m["weight"][0]) ** 2)
            for m in unstack(starts)
        ]
        chosen = int(np.argmin(found))
        sizes[chosen] += 1
        w = unstack(starts)[chosen]["weight"][0]
        x, y = clients[client]["x"], clients[client]["y"]
        losses.append(0.5 * np.mean((y - x @ w) ** 2))
    assert [metrics[f"ensemble-size-{j}"] for j in range(3)] == sizes.tolist()
    assert metrics["loss-unseen"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert "ensemble-model" not in metrics
    assert max(sizes) < 4  # held-out examples decide, not the truth


def test_what_is_held_out_is_never_trained_on_and_always_the_same(linear_task, play):
    seen = {"held": set(), "rest": set(), "trained": set()}

    class Spy(EnsembleClient):
        def receive(self, local, arrays):
            for name, part in zip(("rest", "held"), hold_out(local, 0.2), strict=True):
                seen[name] |= {(local.client, y) for y in part["y"].tolist()}
            return super().receive(local, arrays)

        def objective(self, losses, batch):
            seen["trained"] |= set(batch["y"].tolist())
            return losses

    clients = [population(TRUE[0], i) for i in range(3)]
    app = client_app(linear_task(clients, 2), Spy)
    starts = stack(unstack(STARTS)[:2])
    strategy = Ensemble(2, fraction_evaluate=0.0)
    play(strategy, app, 3, starts, rounds=3, config={"batch-size": 4})
    assert len(seen["held"]) == 3 * 4 and len(seen["rest"]) == 3 * 16
    assert seen["trained"] == {y for _, y in seen["rest"]}


@pytest.mark.parametrize(("size", "held"), [(0, 0), (1, 0), (2, 0), (3, 1), (20, 4)])
def test_few_examples(linear_task, play, size, held):
    parts = []

    class Spy(ClientHalf):
        name = "ensemble"

        def receive(self, local, arrays):
            parts.append(hold_out(local, 0.2))
            return arrays

    task = linear_task([population(TRUE[0], 0, size)], 2)
    start = {"weight": np.zeros((1, 2), np.float32)}
    options = {"min_train_nodes": 0, "min_available_nodes": 0, "fraction_evaluate": 0.0}

    class Strategy(AdditiveStrategy):
        client_half = Spy

    play(Strategy(**options), client_app(task, Spy), 1, start)
    rest, out = parts[0]
    assert (len(rest["y"]), len(out["y"])) == (size - held, held)


def test_silos_train_it_privately_without_a_choice(linear_task, play):
    privacy = SiloPrivacy(noise_multiplier=1.0, clipping_norm=1.0, delta=1e-3)
    clients = [population(TRUE[0], i) for i in range(3)]
    task = linear_task(clients, 2)
    app = client_app(task, EnsembleClient, trainer=DPSGD(privacy))
    starts = stack(unstack(STARTS)[:2])
    played = play(Ensemble(2), app, 3, starts, rounds=2, config=STEPS)
    assert played.train(2)["example-epsilon"] > 0
    assert set(played.evaluate(2)) <= {"num-examples"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_models": 0}, "num_models=0 must be an integer >= 1"),
        ({"holdout": 1.5}, "holdout=1.5 must be between 0 and 1"),
        ({"holdout": 1.0}, "holdout=1.0 must be below 1"),
    ],
)
def test_options(options, says):
    with pytest.raises(ValueError, match=says):
        Ensemble(**{"num_models": 2, **options})
