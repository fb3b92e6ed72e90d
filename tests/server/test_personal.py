"""How metrics of personal models are spread over clients."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import client_app
from flower_ext.client.half import ClientHalf
from flower_ext.core.sampling import UniformSampler
from flower_ext.server.personal import PersonalStrategy, spread
from flower_ext.simulation import LocalGrid


def test_spread_by_hand():
    rows = [
        ("seen", {"accuracy": 0.5, "received-accuracy": 0.5, "val-loss": 1.0}),
        ("seen", {"accuracy": 0.9, "received-accuracy": 1.0, "val-loss": 3.0}),
        ("unseen", {"accuracy": 0.1, "received-accuracy": 0.0}),
        ("unseen", {"val-loss": 2.0, "received-val-loss": 1.5}),
    ]
    found = spread(iter(rows))
    assert found["accuracy-seen"] == pytest.approx(0.7)
    assert found["accuracy-unseen"] == 0.1
    assert found["accuracy-seen-p10"] == pytest.approx(0.54)
    assert found["accuracy-seen-p50"] == pytest.approx(0.7)
    assert found["received-accuracy-seen-p90"] == pytest.approx(0.95)
    assert found["accuracy-seen-std"] == pytest.approx(0.2)
    assert found["accuracy-seen-hurt"] == 0.5  # equal is not hurt
    assert found["accuracy-unseen-hurt"] == 0.0
    assert found["val-loss-unseen-hurt"] == 1.0  # of those that report both
    assert "val-loss-seen-hurt" not in found
    assert not any(name.endswith("hurt") and "received" in name for name in found)
    assert spread([]) == {}
    diverged = spread([("seen", {"received-loss": 1.0, "accuracy": 0.5})])
    assert diverged["loss-seen-hurt"] == 1.0
    assert "accuracy-seen-hurt" not in diverged


class Untrained(ClientHalf):
    """Evaluates zeros beside the received model."""

    name = "untrained"
    compares = True

    def model_to_evaluate(self, local):
        return {name: x * 0 for name, x in local.start.items()}


def test_clients_tell_how_the_received_model_does(task, initial):
    seen = []

    class Kept(PersonalStrategy):
        client_half = Untrained

        def report_evaluate(self, replies, round):
            seen.append([reply.numbers() for reply in replies])
            return super().report_evaluate(replies, round)

    grid = LocalGrid(client_app(task, Untrained), 4, {"batch-size": 4})
    strategy = Kept(fraction_train=0.5, sampler=UniformSampler(seed=1))
    metrics = strategy.start(grid, initial, num_rounds=1).evaluate_metrics_clientapp[1]
    plain = PersonalStrategy(fraction_train=0.5, sampler=UniformSampler(seed=1))
    expected = plain.start(grid, initial, num_rounds=1).evaluate_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx(np.log(2))  # zeros know nothing
    assert metrics["received-loss"] == pytest.approx(expected["loss"])
    assert "received-loss" not in expected
    hurt = sum(row["loss"] > row["received-loss"] for row in seen[0])
    shares = [metrics[f"loss-{kind}-hurt"] for kind in ("seen", "unseen")]
    assert sum(shares) * 2 == hurt
    halves = [metrics["received-loss-seen"], metrics["received-loss-unseen"]]
    every = [row["received-loss"] for row in seen[0]]
    assert np.mean(halves) == pytest.approx(np.mean(every))
    assert halves[0] != halves[1]


def test_who_was_asked_is_saved(task, initial, tmp_path):
    def play(rounds):
        grid = LocalGrid(client_app(task), 6, {"batch-size": 4})
        strategy = PersonalStrategy(fraction_train=0.3, sampler=UniformSampler(seed=1))
        result = strategy.start(grid, initial, num_rounds=rounds, checkpoint=tmp_path)
        return strategy.state_dict()["trained"], result.evaluate_metrics_clientapp

    first, _ = play(1)
    both, metrics = play(2)
    assert len(first) == 2 and set(first) < set(both)
    assert "loss-unseen" in metrics[2]


def test_metrics_that_are_beyond_all_bounds_do_not_end_a_run(initial):
    def answer(message, context):
        huge = 1e308 if context.node_config["partition-id"] else -1e308
        metrics = MetricRecord({"num-examples": 1, "loss": huge})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    app = ClientApp()
    app.evaluate()(answer)
    strategy = PersonalStrategy(fraction_train=0.0)
    result = strategy.start(LocalGrid(app, 3), initial, num_rounds=1)
    assert "loss" in result.evaluate_metrics_clientapp[1]


class Keeping(ClientHalf):
    """Keeps its model."""

    name = "keeping"
    keeps = True

    def after_training(self, local):
        local.personal.save(model=local.end)


@pytest.mark.parametrize("trouble", ["", "keep each client's", "do not say so"])
def test_clients_without_their_state_are_named_once(task, initial, caplog, trouble):
    class Kept(PersonalStrategy):
        client_half = Keeping

    inner = client_app(task, Keeping)

    def answer(message, context):
        if "keep" in trouble:  # a grid that keeps nothing
            context = forgotten(context)
        if "say" in trouble:  # a loop of one's own
            message.content["config"]["client-half"] = "plain"
        return inner(message, context)

    app = ClientApp()
    app.train()(answer)
    app.evaluate()(answer)
    strategy = Kept(fraction_train=0.4, sampler=UniformSampler(seed=1))
    result = strategy.start(LocalGrid(app, 3, {"batch-size": 20}), initial)
    text = "none of the 2 clients that have been asked to train and now evaluate"
    assert caplog.text.count("PERSONAL STATE IS LOST") == bool(trouble)
    assert (text in caplog.text) == bool(trouble)
    assert trouble in caplog.text
    metrics = result.evaluate_metrics_clientapp[3]
    assert not any("has-personal-state" in name for name in metrics)


def forgotten(context):
    """Return the context of a client that has just been started."""
    return replace(context, state=RecordDict())
