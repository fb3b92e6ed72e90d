"""HeteroFL: counted means by hand, FedAvg bit for bit, bytes, and who is refused."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.submodels import narrow, shapes_of
from flower_ext.privacy import Mechanism
from flower_ext.server.optimizers import Adam
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import HeteroFL, HeteroFLClient
from flower_ext.strategies.heterofl import Scaler

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
SENT = {"w": np.float32([[1, 2, 3], [4, 5, 6]]), "out": np.float32([7, 8])}


def corner(width):
    """Two rows of which a width has the first, three columns of which two; outputs."""
    rows, columns = {1.0: (2, 3), 0.5: (1, 2), 0.1: (1, 1)}[width]
    return {"w": np.zeros((rows, columns)), "out": np.zeros(2)}


def sliced(**options):
    return HeteroFL(**{"model": corner, "widths": (1.0, 0.5), **ANY, **options})


def trained(width, change):
    """Return the slice of a width, all of whose numbers have changed alike."""
    small = narrow(SENT, shapes_of(corner(width)))
    return {name: x + np.float32(change) for name, x in small.items()}


def test_every_number_moves_by_the_mean_over_those_that_hold_it(aggregate, reply):
    """Weights 1 and 3 in the slice, of which 1 beside it: (1 * 8 + 3 * 4) / 4 is 5."""
    contents = [reply(trained(1.0, 8), 1), reply(trained(0.5, 4), 3)]
    new, metrics = aggregate(sliced(), SENT, contents)
    assert (new["w"] - SENT["w"]).tolist() == [[5, 5, 8], [8, 8, 8]]
    assert (new["out"] - SENT["out"]).tolist() == [5, 5]
    assert (metrics["tier-weight-0"], metrics["tier-weight-1"]) == (1, 3)


def test_what_is_outside_of_all_slices_stays(aggregate, reply, caplog):
    strategy = sliced(widths=(0.5, 0.1), server_optimizer=Adam(0.1))
    contents = [reply(trained(0.5, 8)), reply(trained(0.1, 4))]
    new, _ = aggregate(strategy, SENT, contents)
    assert (new["w"] != SENT["w"]).tolist() == [[True, True, False], [False] * 3]
    assert "1 arrays of the model, such as 'w', are larger" in caplog.text


def test_a_tier_of_nobody_and_one_without_examples_are_survived(aggregate, reply):
    strategy = sliced(widths=(1.0, 0.5, 0.1), width_of=lambda c: (1.0, 0.5)[c % 2])
    contents = [reply(trained(1.0, 99), 0), reply(trained(0.5, 4), 2)]
    new, metrics = aggregate(strategy, SENT, contents)
    assert (new["w"] - SENT["w"]).tolist() == [[4, 4, 0], [0, 0, 0]]
    assert [metrics[f"tier-weight-{i}"] for i in range(3)] == [0, 2, 0]


def test_a_slice_of_another_width_is_left_out(aggregate, reply):
    contents = [reply(trained(1.0, 8)), reply(trained(0.5, 4)), reply(trained(0.5, 9))]
    new, metrics = aggregate(sliced(), SENT, contents)
    assert metrics["num-dropped"] == 1
    assert new["out"].tolist() == [7 + 6, 8 + 6]


def test_under_a_mechanism_the_divisor_is_planned(aggregate, reply):
    """Two of four clients are wide: of a cohort of four, two are counted on."""
    strategy = HeteroFL(
        model=corner,
        widths=(1.0, 0.5),
        mechanism=Mechanism(
            num_rounds=1,
            num_sampled_clients=4,
            population_size=4,
            noise_multiplier=0.0,
            clipping=1e6,
            target_delta=1e-2,
        ),
    )
    contents = [reply(trained((1.0, 0.5)[i % 2], 4), i + 1) for i in range(4)]
    contents[2] = RuntimeError("a wide one that fails")
    new, _ = aggregate(strategy, SENT, contents)
    np.testing.assert_allclose(new["w"] - SENT["w"], [[3, 3, 2], [2, 2, 2]])


def test_equal_widths_are_fedavg_bit_for_bit(task, initial, play):
    app, config = client_app(task, HeteroFLClient), {"batch-size": 4, "lr": 0.1}
    start = from_record(initial)
    one = HeteroFL(model=lambda width: start, widths=(1.0,), fraction_train=0.5)
    ours, plain = (
        play(strategy, app, 6, start, rounds=3, config=config)
        for strategy in (one, AdditiveStrategy(fraction_train=0.5))
    )
    for name, x in plain.models[-1].items():
        assert ours.models[-1][name].tobytes() == x.tobytes()
        assert x.tobytes() != start[name].tobytes()


# Clients that train -----------------------------------------------------------------


class Net(nn.Module):
    """An input of 8, hidden layers of 16 units, 4 classes; half the units: a quarter.

    Seven tenths of 16 units are 11, which does not come out even.
    """

    def __init__(self, width=1.0, scales=False):
        super().__init__()
        units = int(16 * width)
        self.into = nn.Linear(units, units, bias=False)
        self.scaler = Scaler(width) if scales else nn.Identity()
        self.out = nn.Linear(units, units, bias=False)
        self.units = units

    def forward(self, x):
        return self.out(torch.relu(self.scaler(self.into(x[:, : self.units]))))


def _loss(model, batch):
    return model(batch["x"]).square().mean(1)


def _data(context):
    generator = torch.Generator().manual_seed(context.node_config["partition-id"])
    columns = {"x": torch.randn(8, 16, generator=generator)}
    return columns, columns


def net_task(make=lambda config: Net(config["width"])):
    return Task(make, _data, _loss)


class Tapped(LocalGrid):
    """Keeps the contents of the messages to and from every client."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        if messages:
            self.seen = [[m.content for m in x] for x in (messages, replies)]
        return replies


def values(content):
    """Return the bytes of the numbers of a model."""
    return sum(x.nbytes for x in from_record(content["arrays"]).values())


def test_a_client_of_a_quarter_of_the_numbers_receives_and_sends_a_quarter():
    grid = Tapped(client_app(net_task(), HeteroFLClient), 2, {"lr": 0.1})
    strategy = HeteroFL(model=Net, widths=(1.0, 0.5), fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=1)
    for contents in grid.seen:
        whole, half = map(values, contents)
        assert whole == 4 * 2 * 16 * 16 == 4 * half


def test_widths_that_do_not_come_out_even_train_and_are_evaluated(play):
    app = client_app(net_task(), HeteroFLClient)
    strategy = HeteroFL(model=Net, widths=(1.0, 0.7, 0.3))
    start = {name: x.numpy() for name, x in Net().state_dict().items()}
    played = play(strategy, app, 3, start, rounds=2, config={"lr": 0.5})
    found = played.evaluate(2)
    assert strategy.slice(played.models[-1], 0.7)["out.weight"].shape == (11, 11)
    for client, width in enumerate(strategy.widths):
        net = Net(width)
        arrays = strategy.slice(played.models[-1], width)
        net.load_state_dict({n: torch.tensor(x) for n, x in arrays.items()})
        batch = _data(type("Context", (), {"node_config": {"partition-id": client}}))
        expected = float(_loss(net, batch[0]).mean().detach())
        assert found[f"loss-width-{width:g}"] == pytest.approx(expected, rel=1e-5)
    mean = np.mean([found[f"loss-width-{width:g}"] for width in strategy.widths])
    assert found["loss"] == pytest.approx(mean)


def test_a_scaled_layer_of_half_the_units_has_the_size_of_the_whole_one():
    torch.manual_seed(0)
    whole, half = Net(1.0, scales=True), Net(0.5, scales=True)
    for net in (whole, half):
        nn.init.constant_(net.into.weight, 0.1)
    x = torch.ones(1, 16)
    heights = [
        float(net.scaler(net.into(x[:, : net.units])).mean()) for net in (whole, half)
    ]
    assert heights == pytest.approx([1.6, 1.6])
    half.eval()
    assert float(half.scaler(half.into(x[:, :8])).mean()) == pytest.approx(0.8)


def test_a_task_that_knows_no_width_is_told_so(play):
    app = client_app(net_task(lambda config: Net()), HeteroFLClient)
    start = {name: x.numpy() for name, x in Net().state_dict().items()}
    with pytest.raises(EveryClientFailed, match=r"must read run_config\['width'\]"):
        play(HeteroFL(model=Net, widths=(0.5,)), app, 2, start)


# Refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": ()}, "at least one number"),
        ({"widths": (0.5, 0.5)}, "must be different"),
        ({"widths": (2.0,)}, "widths=2.0 must be"),
        ({"model": corner(1.0)}, "must be a function of the width"),
        ({"model": lambda width: 3}, "a torch module, or arrays by name"),
        ({"width_of": 0.5}, "must be a function of the client's place"),
    ],
)
def test_options_are_looked_at(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        sliced(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width_of": lambda client: 0.7}, r"width_of\(0\)=0.7 must be one of widths"),
        ({"model": lambda width: {"w": np.zeros((2, 3))}}, "with array 'out'"),
        (
            {"model": lambda width: {**corner(width), "w": np.zeros((2, 4))}},
            r"'w' in model\(1.0\)=\(2, 4\) must be a slice of \(2, 3\)",
        ),
        (
            {"model": lambda width: {**corner(width), "w": np.zeros((0, 3))}},
            "must make no layer larger, empty",
        ),
        (
            {"model": lambda width: {**corner(width), "w": np.zeros(2)}},
            "must make no layer larger, empty or of other axes",
        ),
    ],
)
def test_small_models_that_are_no_slices_are_refused_before_a_round(
    options, words, exchange, reply
):
    with pytest.raises(ValueError, match=words):
        exchange(sliced(**options), SENT, [reply(SENT)])


def test_a_record_is_left_as_it_was():
    record = to_record(SENT)
    found = sliced().slice(from_record(record), 0.5)
    assert found["w"].tolist() == [[1, 2]]
    assert from_record(record)["w"].tolist() == SENT["w"].tolist()
