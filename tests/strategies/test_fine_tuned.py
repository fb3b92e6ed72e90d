"""Fine-tuning: FedAvg in training, gradient descent by hand in an evaluation."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from flower_ext import DPSGD, AdditiveStrategy, ClientHalf, client_app
from flower_ext.core.sampling import UniformSampler
from flower_ext.privacy import SiloPrivacy
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FineTuned, FineTunedClient

START = {"w": np.float32(0.0)}
LINE = {"weight": np.zeros((1, 1), np.float32)}
# Two clients, whose losses are (w - 1)^2 / 2 and (w - 5)^2 / 2; tested are both on 3.
CLIENTS = [({"c": [1.0]}, {"c": [3.0]}), ({"c": [5.0]}, {"c": [3.0]})]
RATE = {"lr": 0.1, "batch-size": 8}


def losses(w, rate, epochs):
    """Return each client's test loss after so many steps towards its centre."""
    tuned = [c + (1 - rate) ** epochs * (w - c) for c in (1, 5)]
    return [0.5 * (x - 3) ** 2 for x in tuned]


def playing(play, point_task, **options):
    app = client_app(point_task(CLIENTS), FineTunedClient)
    return play(FineTuned(**options), app, 2, START, 1, RATE)


@pytest.mark.parametrize(
    ("options", "rate", "epochs"),
    [
        ({}, 0.1, 1),
        ({"tuning_epochs": 3}, 0.1, 3),
        ({"tuning_steps": 2, "tuning_epochs": 7}, 0.1, 2),
        ({"tuning_epochs": 2, "tuning_learning_rate": 0.5}, 0.5, 2),
    ],
)
def test_the_evaluated_model_by_hand(play, point_task, options, rate, epochs):
    played = playing(play, point_task, **options)
    w = played.models[1]["w"]
    assert w == pytest.approx(0.3, rel=1e-6)
    found, expected = played.evaluate(), losses(w, rate, epochs)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert found["loss-seen-std"] == pytest.approx(np.std(expected), rel=1e-4)
    assert found["received-loss"] == pytest.approx(0.5 * (w - 3) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("evaluate", "rate"), [({}, 0.3), ({"learning-rate": 0.2}, 0.2), ({"lr": 0.2}, 0.2)]
)
def test_settings_of_the_training_are_those_of_the_fine_tuning(
    play, point_task, evaluate, rate
):
    app = client_app(point_task(CLIENTS), FineTunedClient)
    configs = {
        "train_config": ConfigRecord({"lr": 0.3, "batch-size": 8}),
        "evaluate_config": ConfigRecord(evaluate),
    }
    played = play(FineTuned(tuning_epochs=2), app, 2, START, 1, None, **configs)
    expected = losses(played.models[1]["w"], rate, 2)
    assert played.evaluate()["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert dict(configs["evaluate_config"]) == evaluate  # the caller's own


def test_every_epoch_is_reported_and_the_best_number_of_them(play, point_task):
    options = {"tuning_epochs": 6, "tuning_learning_rate": 0.3}
    played = playing(play, point_task, **options)
    found, w = played.evaluate(), played.models[1]["w"]
    table = {i: losses(w, 0.3, i) for i in range(7)}
    for epoch in range(1, 7):
        mean = np.mean(table[epoch])
        assert found[f"epoch-{epoch}-loss"] == pytest.approx(mean, rel=1e-5)
        # Client 0 goes from 0.3 to 1 and client 1 to 5, past 3: who is further from 3?
        hurt = np.mean([x > table[0][0] for x in table[epoch]])
        assert found[f"epoch-{epoch}-loss-seen-hurt"] == hurt
        quantile = np.percentile(table[epoch], 90)
        assert found[f"epoch-{epoch}-loss-seen-p90"] == pytest.approx(
            quantile, rel=1e-5
        )
    assert found["epoch-6-loss"] == found["loss"]
    best = min(table, key=lambda i: np.mean(table[i]))
    assert found["best-epochs"] == best and 0 < best < 6
    assert not any(name.startswith("epoch-1-received") for name in found)
    # The metrics are no further metrics, spread as such.
    assert sum(name.startswith("epoch-1-") for name in found) == 7


def test_no_epoch_is_best_where_all_are_worse(play, point_task):
    clients = [({"c": [9.0]}, {"c": [0.0]})] * 2
    app = client_app(point_task(clients), FineTunedClient)
    strategy = FineTuned(tuning_epochs=3, fraction_train=0.0)
    found = play(strategy, app, 2, START, 1, RATE).evaluate()
    assert found["best-epochs"] == 0
    assert found["loss-unseen-hurt"] == found["epoch-1-loss-unseen-hurt"] == 1


def test_clients_that_diverge_count_against_their_epochs(play, point_task):
    """A rate of 1e20 is infinite after two epochs, and near the end after none."""
    clients = [({"c": [3.1]}, {"c": [3.0]}), ({"c": [-1.0]}, {"c": [2.0]})]
    app = client_app(point_task(clients), FineTunedClient)
    options = {"tuning_epochs": 3, "tuning_learning_rate": 1e20}
    strategy = FineTuned(fraction_train=0.0, **options)
    found = play(strategy, app, 2, START, 1, RATE).evaluate()
    assert found["best-epochs"] == 0


def test_clients_without_training_examples_stay_where_they_are(play, point_task):
    clients = [CLIENTS[0], ({"c": []}, {"c": [3.0]})]
    app = client_app(point_task(clients), FineTunedClient)
    options = {"tuning_epochs": 2, "tuning_learning_rate": 0.1}
    strategy = FineTuned(fraction_train=0.0, **options)
    found = play(strategy, app, 2, {"w": np.float32(0.0)}, 1, RATE).evaluate()
    table = [(losses(0.0, 0.1, epochs)[0] + 4.5) / 2 for epochs in (1, 2)]
    # In the means over all examples, too, which are of metrics that all have.
    assert found["epoch-1-loss"] == pytest.approx(table[0], rel=1e-5)
    assert found["epoch-2-loss-unseen"] == pytest.approx(table[1], rel=1e-5)
    assert found["best-epochs"] == 2


# With a real model ------------------------------------------------------------------


def run(task, initial, strategy, half, rounds=2):
    grid = LocalGrid(client_app(task, half), 4, {"batch-size": 5, "lr": 0.1})
    return strategy.start(grid, initial, num_rounds=rounds)


def test_no_epoch_is_fedavg_in_every_metric(task, initial):
    options = {"fraction_train": 0.5, "sampler": UniformSampler(seed=3)}
    found = run(task, initial, FineTuned(tuning_epochs=0, **options), FineTunedClient)
    plain = run(task, initial, AdditiveStrategy(**options), ClientHalf)
    for name, array in plain.arrays.items():
        assert found.arrays[name].data == array.data
    for number, metrics in plain.evaluate_metrics_clientapp.items():
        ours = found.evaluate_metrics_clientapp[number]
        assert {name: ours[name] for name in metrics} == dict(metrics)
        assert ours["loss-seen-hurt"] == 0
    assert found.train_metrics_clientapp == plain.train_metrics_clientapp


def test_looking_at_every_epoch_changes_none(task, initial, spied):
    """With shuffled batches, dropout and BatchNorm, three epochs pass through two."""

    def tuned(epochs):
        return FineTuned(tuning_epochs=epochs, fraction_train=0.0)

    app, calls = spied(client_app(task, FineTunedClient))
    grid = LocalGrid(app, 3, {"batch-size": 5, "lr": 0.1})
    for epochs in (3, 2):
        tuned(epochs).start(grid, initial, num_rounds=1)
    metrics = [dict(call.reply["metrics"]) for call in calls]
    for longer, shorter in zip(metrics[:3], metrics[3:], strict=True):
        assert longer["epoch-2-loss"] == shorter["loss"]
        assert longer["epoch-1-loss"] == shorter["epoch-1-loss"]
        assert longer["loss"] != shorter["loss"] != shorter["received-loss"]
    assert not any(call.state for call in calls)


def test_an_evaluation_leaves_the_training_as_it_was(task, initial):
    arrays = []
    for fraction in (1.0, 0.0):
        strategy = FineTuned(tuning_epochs=2, fraction_evaluate=fraction)
        arrays.append(run(task, initial, strategy, FineTunedClient, 3).arrays)
    for name, array in arrays[0].items():
        assert arrays[1][name].data == array.data


def test_who_never_trained_fine_tunes_too(task, initial):
    strategy = FineTuned(fraction_train=0.25, sampler=UniformSampler(seed=1))
    metrics = run(task, initial, strategy, FineTunedClient, 1)
    found = metrics.evaluate_metrics_clientapp[1]
    assert found["loss-unseen"] != found["received-loss-unseen"]


def test_a_silo_pays_for_each_fine_tuning(play, linear_task):
    clients = [{"x": np.ones((20, 1)) * i, "y": np.ones(20)} for i in (1, 2)]
    privacy = SiloPrivacy(noise_multiplier=1.0, delta=1e-3, clipping_norm=1.0, seed=3)
    app = client_app(linear_task(clients, 1), FineTunedClient, trainer=DPSGD(privacy))
    config = {"lr": 0.1, "batch-size": 10}
    tuned = play(FineTuned(tuning_epochs=2), app, 2, LINE, 2, config)
    plain = play(AdditiveStrategy(), app, 2, LINE, 4, config)
    assert tuned.train(2)["num-errors"] == 0
    # A training and two epochs of fine-tuning come before the second training.
    expected = plain.train(4)["example-epsilon"]
    assert tuned.train(2)["example-epsilon"] == pytest.approx(expected)
    assert "loss" not in tuned.evaluate(2)  # withheld, unless it is asked for


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"tuning_epochs": -1},
            "tuning_epochs=-1 must be an integer >= 0: 0",
        ),
        ({"tuning_steps": 0.5}, "tuning_steps=0.5 must be an integer"),
        (
            {"tuning_learning_rate": 0.0},
            "tuning_learning_rate=0.0 must be .*: None",
        ),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        FineTuned(**options)
