"""FedConv: torch's own convolutions, HeteroFL and FedAvg as limits, and learning."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.core.contribution import Total
from flower_ext.core.protocol import Round
from flower_ext.core.submodels import SliceMap
from flower_ext.server.learned_maps import ConvolutionMap, PublicLoss
from flower_ext.strategies import FedConv, FedConvClient, HeteroFL, HeteroFLClient

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}


class Net(nn.Module):
    """A small convolutional net of three classes; its width is of the channels."""

    def __init__(self, width=1.0):
        super().__init__()
        channels = int(8 * width)
        self.one = nn.Conv2d(1, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Linear(channels * 4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.one(x)))
        return self.out(functional.max_pool2d(torch.relu(self.two(x)), 2).flatten(1))


def images(seed, size=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 4, 4, generator=generator)
    return {"x": x, "y": x.flatten(1)[:, :3].argmax(1)}


TASK = Task(
    lambda config: Net(config.get("width", 1.0)),
    lambda context: [images(context.node_config["partition-id"])] * 2,
    lambda model, b: functional.cross_entropy(model(b["x"]), b["y"], reduction="none"),
)
CONFIG = {"lr": 0.2, "batch-size": 8, "local-epochs": 2}


@pytest.fixture(scope="module")
def start():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {name: x.numpy() for name, x in Net().state_dict().items()}


def learned(**options):
    defaults = {"widths": (1.0, 0.5), "public": images(99), "task": TASK}
    defaults["server_learning_rate"] = 0.01
    return FedConv(**{**defaults, **options})


# Maps ---------------------------------------------------------------------------------


def map_to(small, large, seed=0):
    """Return a map of one array ``w`` with kernels at random."""
    found = ConvolutionMap(SliceMap({"w": small}, {"w": large}), ["w"])
    generator = torch.Generator().manual_seed(seed)
    for key, kernel in found.kernels.items():
        found.kernels[key] = torch.randn(kernel.shape, generator=generator).double()
    return found


def outer(found, way):
    """Return a map's kernels as one of two axes, ``(positions, 1, a, b)``."""
    one, two = (found.kernels[f"{way}/w/{axis}"] for axis in (0, 1))
    return torch.einsum("pa,pb->pab", one, two)[:, None]


@pytest.mark.parametrize("rest", [(), (3, 2)])
def test_down_is_a_convolution_of_torch_and_up_a_transposed_one(rest):
    found = map_to((3, 4, *rest), (5, 7, *rest))
    large, small = torch.randn(5, 7, *rest).double(), torch.randn(3, 4, *rest).double()
    (down,), (up,) = (
        found.apply(way, {"w": x}).values()
        for way, x in (("down", large), ("up", small))
    )
    planes = [
        x.reshape(*x.shape[:2], -1).permute(2, 0, 1)[None] for x in (large, small)
    ]
    count = planes[0].shape[1]
    expected = functional.conv2d(planes[0], outer(found, "down"), groups=count)
    torch.testing.assert_close(down, expected[0].permute(1, 2, 0).reshape(down.shape))
    expected = functional.conv_transpose2d(planes[1], outer(found, "up"), groups=count)
    torch.testing.assert_close(up, expected[0].permute(1, 2, 0).reshape(up.shape))


def test_at_first_a_map_is_that_of_slices():
    slices = SliceMap({"w": (2, 3, 2), "b": (2,)}, {"w": (4, 5, 2), "b": (3,)})
    found = ConvolutionMap(slices, ["w", "b"])
    large = {
        "w": np.random.default_rng(0).random((4, 5, 2)).astype(np.float32),
        "b": np.float32([1, 2, 3]),
    }
    small, plain = found.down(large), slices.down(large)
    for name, x in plain.items():
        assert small[name].tobytes() == x.tobytes() and small[name].dtype == np.float32
    back = found.up({name: torch.tensor(x) for name, x in small.items()})
    for name, x in slices.up(small).items():
        np.testing.assert_array_equal(back[name].numpy(), x)


def test_axes_that_are_whole_and_arrays_that_are_not_trained_are_left_alone(start):
    slices = SliceMap({"w": (2, 3)}, {"w": (4, 3)})
    assert ConvolutionMap(slices, ["w"]).kernels.keys() == {"down/w/0", "up/w/0"}
    found = learned().map_of(1, start)
    assert not any("running" in key or "batches" in key for key in found.kernels)
    for kernel in found.kernels.values():
        kernel[:] = -1.0
    small = found.down(start)
    assert (small["norm.running_var"] == 1).all() and (small["norm.weight"] < 0).all()


# Rounds -------------------------------------------------------------------------------


def test_slices_that_are_not_trained_are_heterofl(play, start):
    app = client_app(TASK, FedConvClient, HeteroFLClient)
    for clients, close in ((2, {"rtol": 0}), (5, {"rtol": 1e-6, "atol": 1e-7})):
        ours, theirs = (
            play(strategy, app, clients, start, rounds=3, config=CONFIG)
            for strategy in (
                learned(server_steps=0),
                HeteroFL(model=Net, widths=(1.0, 0.5)),
            )
        )
        for name, x in theirs.models[-1].items():
            np.testing.assert_allclose(ours.models[-1][name], x, **close)
        assert ours.evaluate(3) == pytest.approx(theirs.evaluate(3))


def test_one_width_of_all_units_is_fedavg_bit_for_bit(play, start):
    app = client_app(TASK, FedConvClient)
    ours, plain = (
        play(strategy, app, 4, start, rounds=3, config=CONFIG)
        for strategy in (learned(widths=(1.0,)), AdditiveStrategy())
    )
    for name, x in plain.models[-1].items():
        assert ours.models[-1][name].tobytes() == x.tobytes()


def test_the_public_loss_falls_of_the_large_model_and_of_small_ones(play, start):
    app = client_app(TASK, FedConvClient)
    strategy = learned(server_steps=30)
    played = play(strategy, app, 4, start, rounds=4, config=CONFIG)
    for number in range(1, 5):
        metrics = played.train(number)
        assert metrics["public-loss"] < metrics["public-loss-start"]
    public = PublicLoss(TASK, Net(0.5), images(99))
    model = played.models[-2]  # that of which the last map was learned
    found, slices = strategy.map_of(1, model), strategy.slices(1, model)
    losses = [
        float(public.of({n: torch.tensor(x) for n, x in arrays.items()}))
        for arrays in (found.down(model), slices.down(model))
    ]
    assert losses[0] < losses[1] - 0.01
    # What is reported is of the model that comes of it.
    model = {name: torch.tensor(x) for name, x in played.models[-1].items()}
    reported = played.train(4)["public-loss"]
    loss = PublicLoss(TASK, Net(), images(99)).of(model)
    assert float(loss) == pytest.approx(reported, rel=1e-5)


class Line(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x[:, : len(self.w)] @ self.w


def test_a_round_by_hand():
    """Three numbers, of which a tier has two; a kernel of halves on the way back.

    The wide tier of weight 2 has changed by 4, the narrow one of weight 6 by 2 and 4:
    halves make 1, 3 and 2 of that. With twice the weight of the narrow tier the sums
    are 2 * 4 + 12 * (1, 3, 2), the divisors 2 + 12 where its slice lies, and else 2.
    """
    task = Task(
        lambda config: Line({1.0: 3, 0.5: 2}[config["width"]]),
        lambda context: ({}, {}),
        lambda model, batch: model(batch["x"]).square(),
    )
    public = {"x": torch.ones(10, 3)}
    strategy = FedConv(task=task, public=public, widths=(1.0, 0.5), server_steps=0)
    sent = {"w": np.zeros(3, np.float32)}
    strategy.map_of(1, sent).kernels["up/w/0"][:] = 0.5
    state = strategy.state_dict()
    state["weights"] = np.log([1.0, 2.0])
    strategy.load_state_dict(state)
    total = Total(
        {"delta-0": {"w": np.full(3, 8.0)}, "delta-1": {"w": np.array([12.0, 24.0])}},
        weight=8.0,
        weights={"delta-0": 2.0, "delta-1": 6.0},
        count=2,
    )
    found = strategy.update(total, Round(1, sent))["w"]
    expected = [(8 + 12) / 14, (8 + 36) / 14, (8 + 24) / 2]
    np.testing.assert_allclose(found, expected)


def test_what_is_learned_of_a_round_that_is_dropped_is_dropped(start):
    strategy = learned()
    before = strategy.map_of(1, start).kernels["up/out.weight/1"].clone()
    zero = strategy.zero(start)
    rng = np.random.default_rng(0)
    total = Total(
        {
            p: {n: rng.normal(0, 0.01, x.shape) for n, x in a.items()}
            for p, a in zero.arrays.items()
        },
        weight=2.0,
        weights={"delta-0": 1.0, "delta-1": 1.0},
        count=2,
    )
    round = Round(1, start)
    strategy.report(total, round)
    strategy.update(total, round)
    kernel = strategy.map_of(1, start).kernels["up/out.weight/1"]
    assert torch.equal(kernel, before) and not kernel.requires_grad
    strategy.advance(total, round)
    assert not torch.equal(strategy.map_of(1, start).kernels["up/out.weight/1"], before)


def test_one_public_example_is_survived_and_said(play, start, caplog):
    app = client_app(TASK, FedConvClient)
    strategy = learned(public=images(99, 1))
    assert "public has 1 examples: the maps learn these by heart" in caplog.text
    played = play(strategy, app, 2, start, config=CONFIG)
    assert all(np.isfinite(x).all() for x in played.models[-1].values())
    assert played.train()["public-loss"] < 0.9 * played.train()["public-loss-start"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"public": images(0, 0)}, "columns with at least one example"),
        ({"public": {}}, "columns with at least one example"),
        ({"task": Net}, "must be a Task"),
        ({"server_steps": -1}, "server_steps=-1 must be"),
        ({"server_learning_rate": -1}, "server_learning_rate=-1 must be"),
    ],
)
def test_options_are_looked_at(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        learned(**options)


def test_models_that_do_not_fit_are_refused_before_a_round(exchange, reply, start):
    larger = {**start, "out.bias": np.zeros(4, np.float32)}
    with pytest.raises(ValueError, match=r"initial_arrays=.* must be of task.model"):
        exchange(learned(widths=(0.5,), **ANY), larger, [reply(larger)])
    with pytest.raises(ValueError, match="of further axes no convolution is learned"):
        map_to((2, 2, 2), (2, 2, 3))


def test_the_random_state_of_the_server_is_left_alone():
    state = torch.get_rng_state()
    learned()
    HeteroFL(model=Net, widths=(1.0, 0.5))
    assert torch.equal(torch.get_rng_state(), state)
