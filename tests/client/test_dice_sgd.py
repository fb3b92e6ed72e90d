"""DiceSGD: its limits, its residual by hand, and what an example moves later on."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flower_ext import DPSGD, client_app
from flower_ext.client import DiceSGD
from flower_ext.client.dice_sgd import RESIDUAL, DiceSteps
from flower_ext.client.half import ClientHalf, Local, LocalSettings
from flower_ext.client.noisy_steps import NoisePlan
from flower_ext.client.personal import PERSONAL
from flower_ext.client.task import Task
from flower_ext.core.arrays import to_record
from flower_ext.privacy import SiloPrivacy, StepLedger
from flower_ext.simulation import LocalGrid

NOISY = {"noise_multiplier": 1.0, "clipping_norm": 0.5, "delta": 1e-3, "seed": 1}
FREE = {"noise_multiplier": 0.0, "clipping_norm": math.inf, "delta": 1e-3, "seed": 1}


def place():
    """A model that is one number, for inputs of 1."""
    return nn.Linear(1, 1, bias=False)


def pull(model, batch):
    """Each example draws the model towards its target."""
    return (model(batch["x"])[:, 0] - batch["y"]) ** 2 / 2


def targets(*places):
    return {"x": torch.ones(len(places), 1), "y": torch.tensor(places)}


class Silo:
    def __init__(self, trainer, data, net=place, loss=pull, half=ClientHalf):
        task = Task(lambda config: net(), lambda context: (data, data), loss)
        self.grid = LocalGrid(client_app(task, half, trainer=trainer), 1)
        self.round = 0

    def send(self, arrays, kind="train", **config):
        self.round += 1
        config = {k.replace("_", "-"): v for k, v in config.items()}
        record = ConfigRecord({"server-round": self.round, **config})
        content = RecordDict({"arrays": to_record(arrays), "config": record})
        message = Message(content, next(iter(self.grid.get_node_ids())), kind)
        [reply] = self.grid.send_and_receive([message])
        return reply

    def train(self, arrays, **config):
        reply = self.send(arrays, **config)
        assert reply.has_content(), reply.error.reason
        return {name: a.numpy() for name, a in reply.content["arrays"].items()}

    @property
    def residual(self):
        record = self.grid.states.read(0).array_records[PERSONAL + RESIDUAL]
        return {name: a.numpy() for name, a in record.items()}


def start(value=0.0):
    return {"weight": np.full((1, 1), value, np.float32)}


def dice(privacy, feedback_norm, **options):
    return DiceSGD(SiloPrivacy(**privacy), feedback_norm=feedback_norm, **options)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_without_feedback_it_is_dp_sgd_bit_for_bit(mode):
    replies = []
    data = targets(*np.linspace(-3, 3, 20, dtype=np.float32).tolist())
    for trainer in (DPSGD(SiloPrivacy(**NOISY), mode=mode), dice(NOISY, 0, mode=mode)):
        silo, arrays = Silo(trainer, data), start()
        for _ in range(2):
            reply = silo.send(arrays, batch_size=5, local_steps=4, lr=0.3)
            arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        replies.append((arrays["weight"].tobytes(), dict(reply.content["metrics"])))
    assert replies[0] == replies[1]


@pytest.mark.parametrize("feedback_norm", [0.5, math.inf])
def test_without_clipping_nothing_is_left_and_it_is_sgd(feedback_norm):
    silo = Silo(dice(FREE, feedback_norm), targets(-3.0, 1.0, 40.0))
    w = silo.train(start(), batch_size=3, local_steps=5, lr=0.25)["weight"].item()
    expected = 0.0
    for _ in range(5):
        expected -= 0.25 * (expected - 38 / 3)
    assert w == pytest.approx(expected, rel=1e-6)
    assert silo.residual["weight"].item() == 0.0


def steady(model, batch):
    return batch["y"] * model(batch["x"])[:, 0]


def test_the_residual_is_what_the_algorithm_says():
    """A gradient of 5 in every step, both norms 1: the sums are 1, 2, 2."""
    privacy = {**FREE, "clipping_norm": 1.0}
    silo, arrays = Silo(dice(privacy, 1.0), targets(5.0), loss=steady), start()
    for kept, moved in ((4.0, -1.0), (7.0, -3.0), (10.0, -5.0)):
        arrays = silo.train(arrays, batch_size=1, local_steps=1, lr=1.0)
        assert silo.residual["weight"].item() == pytest.approx(kept, rel=1e-5)
        assert arrays["weight"].item() == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize(
    ("feedback_norm", "rests_at"), [(1.0, 10 / 3), (0.5, 10 / 3), (0.0, 0.5)]
)
def test_it_rests_where_the_mean_gradient_is_zero(feedback_norm, rests_at):
    """Clipped to 1, two examples at 0 and one at 10 are in balance at 0.5."""
    privacy = {**FREE, "clipping_norm": 1.0}
    silo = Silo(dice(privacy, feedback_norm), targets(0.0, 0.0, 10.0))
    found = silo.train(start(2.0), batch_size=3, local_steps=300, lr=0.1)
    assert found["weight"].item() == pytest.approx(rests_at, abs=1e-3)


def test_an_empty_batch_feeds_back_too():
    found = sums([5.0], [[True], [False], [False]])
    assert found == pytest.approx([1.0, 0.5, 0.5], rel=1e-5)


def sums(gradients, presence, feedback_norm=0.5, expected=1.0):
    """What noise is added to, step by step, on a model that stays: clipped to 1."""
    data = targets(*gradients)
    local = Local(
        task=Task(lambda config: place(), lambda context: (data, data), steady),
        model=place(),
        train=data,
        test=data,
        settings=LocalSettings(learning_rate=1.0, batch_size=1),
        config=ConfigRecord(),
        context=Context(1, 1, {"partition-id": 0}, RecordDict(), {}),
        device=torch.device("cpu"),
    )
    plan = NoisePlan(len(presence), expected / len(gradients), len(gradients), 1.0, 0.0)
    steps = DiceSteps(local, ClientHalf(), plan, "hooks", feedback_norm)
    found = []
    for drawn in presence:
        rows = torch.tensor(drawn)
        _, total = steps.summed({name: x[rows] for name, x in data.items()})
        found.append(float(total[local.model.weight]))
    steps.end()
    return found


GRADIENT = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    gradients=st.lists(GRADIENT, min_size=3, max_size=3),
    presence=st.lists(
        st.lists(st.booleans(), min_size=3, max_size=3), min_size=8, max_size=8
    ),
    feedback_norm=st.sampled_from([0.1, 1.0]),
)
def test_an_example_moves_a_sum_by_what_is_charged(gradients, presence, feedback_norm):
    expected = 1.5
    gradients[1] = gradients[1] or 1.0
    one = sums(gradients, presence, feedback_norm, expected)
    other = sums([0.0, *gradients[1:]], presence, feedback_norm, expected)
    for drawn, a, b in zip(presence, one, other, strict=True):
        moved = abs(a - b)
        assert moved <= drawn[0] + 2 * expected * feedback_norm + 1e-9


def test_one_large_gradient_moves_all_later_sums():
    """So that what is fed back is charged without amplification by sampling."""
    presence = [[True, True], *[[False, True]] * 6]
    one, other = (sums([x, 0.5], presence) for x in (1e4, 0.0))
    assert np.subtract(one, other)[1:] == pytest.approx([0.5] * 6)


def test_both_parts_are_charged():
    data = targets(*range(20))
    silo = Silo(dice(NOISY, 0.1), data)
    reply = silo.send(start(), batch_size=5, local_steps=4, lr=0.1)
    # 2 q n C_2 / C_1
    ledger = StepLedger().add(0.25, 1.0, 4, shift=2 * 5 * 0.1 / 0.5)
    spent = dict(reply.content["metrics"])["example-epsilon"]
    assert spent == ledger.epsilon(1e-3)
    assert spent > 1.5 * StepLedger().add(0.25, 1.0, 4).epsilon(1e-3)


def test_a_target_is_met_with_what_is_fed_back():
    privacy = SiloPrivacy(
        epsilon=5.0, num_rounds=2, clipping_norm=1.0, delta=1e-3, seed=1
    )
    silo = Silo(DiceSGD(privacy, feedback_norm=0.1), targets(*range(20)))
    for spent in (False, True):
        reply = silo.send(start(), batch_size=5, local_steps=4, lr=0.1)
        epsilon = dict(reply.content["metrics"])["example-epsilon"]
        assert (epsilon > 4.9) == spent and epsilon <= 5.0
    assert silo.send(start(), batch_size=5, local_steps=4, lr=0.1).has_error()


def test_the_residual_stays_with_the_client():
    silo = Silo(dice(NOISY, 0.1), targets(50.0, 3.0))
    reply = silo.send(start(), batch_size=2, local_steps=3, lr=0.1)
    assert list(reply.content["arrays"]) == ["weight"]
    assert not any(RESIDUAL in key for key in reply.content)
    before = silo.residual["weight"].copy()
    assert abs(before.item()) > 1
    silo.send(start(), batch_size=2, local_steps=3, lr=0.1)
    assert silo.residual["weight"].item() != before.item()


def test_the_residual_of_another_model_is_refused():
    silo = Silo(dice(NOISY, 0.1), targets(50.0, 3.0), net=lambda: nets.pop())
    nets = [nn.Linear(1, 2, bias=False), place()]
    assert silo.send(start(), batch_size=2, local_steps=1, lr=0.1).has_content()
    two = {"weight": np.zeros((2, 1), np.float32)}
    reply = silo.send(two, batch_size=2, local_steps=1, lr=0.1)
    assert "saved for another model" in reply.error.reason


class Two(ClientHalf):
    num_trainings = 2


def test_a_half_of_two_models_is_refused():
    silo = Silo(dice(NOISY, 0.1), targets(50.0, 3.0), half=Two)
    reply = silo.send(start(), batch_size=2, local_steps=1, lr=0.1)
    assert "num_trainings=2 must be 1 under DiceSGD" in reply.error.reason


@pytest.mark.parametrize("feedback_norm", [-0.1, math.nan])
def test_bad_norms_are_refused(feedback_norm):
    with pytest.raises(ValueError, match="feedback_norm="):
        dice(NOISY, feedback_norm)


def test_feedback_without_bound_and_noise_exclude_each_other():
    silo = Silo(dice(NOISY, math.inf), targets(50.0, 3.0))
    reply = silo.send(start(), batch_size=2, local_steps=1, lr=0.1)
    assert "feedback_norm=inf must be finite: noise scales" in reply.error.reason
