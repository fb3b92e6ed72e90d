"""Nodes: their order, waiting for them, and knowing them again."""

import itertools
import json
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flower_ext._flower import NodeInfo
from flower_ext.core import nodes
from flower_ext.core.nodes import NodeOrder, NodeRegistry, ordered_nodes, wait_for_nodes
from flower_ext.core.sampling import MinSeparationSampler
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.rounds import run_rounds
from flower_ext.simulation.local import LocalGrid
from flower_ext.simulation.packed_grid import PackedGrid


def grid_of(*polls):
    """A grid that shows these (node, time of registration) pairs, poll by poll."""
    remaining = list(polls)

    def get_nodes():
        found = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return [NodeInfo(node_id=n, registered_at=at) for n, at in found]

    return SimpleNamespace(get_nodes=get_nodes, get_node_ids=set)


def test_nodes_are_ordered_by_registration():
    grid = grid_of(
        [
            (5, "2026-01-01T10:00:02.5+00:00"),
            (9, "2026-01-01T10:00:00+00:00"),
            (1, "2026-01-01T10:00:02.25+00:00"),
        ]
    )
    assert ordered_nodes(grid) == [9, 1, 5]


def test_nodes_that_registered_together_are_ordered_by_id():
    assert ordered_nodes(grid_of([(5, "t"), (3, "t"), (4, "s")])) == [4, 3, 5]


def test_numbered_clients_are_in_order():
    found = ordered_nodes(SimpleNamespace(get_node_ids=lambda: range(3)))
    assert list(found) == [0, 1, 2]


@pytest.mark.parametrize("order", [[7, 3, 9], range(3), range(4, 10, 2)])
def test_places_are_those_in_the_order(order):
    places = NodeOrder(order)
    assert dict(places) == {node: i for i, node in enumerate(order)}
    assert len(places) == 3
    assert places.get(11) is None


def test_a_round_waits_until_there_are_enough_nodes(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "flwr")
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    a, b, c = (1, "a"), (2, "b"), (3, "c")
    grid = grid_of([], [a], [a, b, c])
    assert wait_for_nodes(grid, a=1, b=2) == [1, 2, 3]
    assert len(naps) == 2
    assert "1 connected (minimum required: 2)" in caplog.text


def test_no_nodes_are_waited_for_if_none_are_needed(monkeypatch):
    monkeypatch.setattr(time, "sleep", pytest.fail)
    assert wait_for_nodes(grid_of([]), a=0) == []


def test_nodes_that_cannot_come_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(time, "sleep", pytest.fail)
    grid = grid_of([(1, "a"), (2, "b")])
    grid.is_fixed = True
    text = r"at_least=3 must be <= 2, the nodes of this federation: no other will conn"
    with pytest.raises(ValueError, match=text):
        wait_for_nodes(grid, fewer=1, at_least=3)


def test_a_simulation_that_has_settled_is_not_waited_for(monkeypatch):
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    monkeypatch.setattr(nodes, "in_simulation", lambda grid: True)
    a, b = (1, "a"), (2, "b")
    with pytest.raises(ValueError, match="at_least=3 must be <= 2"):
        wait_for_nodes(grid_of([], [], [a], [a, b]), at_least=3)
    assert 10 <= len(naps) <= 20
    assert wait_for_nodes(grid_of(*[[]] * 30, [a, b]), at_least=2) == [1, 2]


FEDERATIONS = {
    "in process": lambda app: LocalGrid(app, 3),
    "packed": lambda app: PackedGrid(
        LocalGrid(app, 1), num_clients=3, transport="messages"
    ),
}
ASKED = [
    {"min_available_nodes": 4},
    {"min_train_nodes": 4, "fraction_evaluate": 0.0},
    {"min_evaluate_nodes": 4},
    {"min_evaluate_nodes": 4, "fraction_train": 0.0},
]


@pytest.mark.parametrize("options", ASKED, ids=str)
@pytest.mark.parametrize("strategy", [FedAvg, AdditiveStrategy])
@pytest.mark.parametrize("make", FEDERATIONS.values(), ids=FEDERATIONS)
def test_a_run_that_would_wait_for_ever_is_refused(
    monkeypatch, make, strategy, options
):
    monkeypatch.setattr(time, "sleep", pytest.fail)
    app = ClientApp()
    app.train()(pytest.fail)
    text = f"{next(iter(options))}=4 must be <= 3, the nodes of this federation"
    with pytest.raises(ValueError, match=text):
        run_rounds(strategy(**options), make(app), ArrayRecord([np.zeros(1)]))


@pytest.mark.parametrize("make", FEDERATIONS.values(), ids=FEDERATIONS)
def test_flowers_own_loop_does_not_wait_for_ever(monkeypatch, make):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda s: None)
    strategy = FedAvg(min_available_nodes=4)
    with pytest.raises(RuntimeError, match="more nodes than the 3 of this federation"):
        strategy.start(make(ClientApp()), ArrayRecord([np.zeros(1)]))


@pytest.mark.parametrize("make", FEDERATIONS.values(), ids=FEDERATIONS)
def test_a_loop_that_looks_often_does_not_wait_for_ever(monkeypatch, make):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: 0.1 * next(clock))
    grid = make(ClientApp())
    with pytest.raises(RuntimeError, match="more nodes than the 3 of this federation"):
        for _ in range(1000):
            grid.get_node_ids()


def test_looking_for_nodes_between_slow_rounds_is_no_waiting(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    grid = LocalGrid(ClientApp(), 3)
    for _ in range(20):
        grid.get_node_ids()
        grid.push_messages([])


def test_a_sampler_waits_only_for_nodes_that_can_come(monkeypatch):
    monkeypatch.setattr(time, "sleep", pytest.fail)
    app = ClientApp()

    @app.train()
    def train(message, context):
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": message.content["arrays"], "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    sampler = MinSeparationSampler(2, when_short="wait")
    strategy = AdditiveStrategy(sampler=sampler, fraction_evaluate=0.0)
    result = strategy.start(LocalGrid(app, 3), ArrayRecord([np.zeros(1)]), num_rounds=3)
    assert list(result.train_metrics_clientapp) == [1]


def test_nodes_keep_their_number_and_new_ones_get_the_next():
    registry = NodeRegistry()
    assert registry.number([50, 7]) == {50: 0, 7: 1}
    assert registry.number([7, 9]) == {7: 1, 9: 2}


def resumed(saved):
    registry = NodeRegistry()
    registry.number(saved)
    other = NodeRegistry()
    other.load_state_dict(json.loads(json.dumps(registry.state_dict())))
    assert other.state_dict() == registry.state_dict()
    return other


def test_a_deployment_is_recognised_by_its_ids():
    assert resumed([50, 7, 9]).number([9, 11, 50]) == {9: 2, 11: 3, 50: 0}


def test_nodes_that_all_have_new_ids_are_not_taken_for_those_of_before():
    for others in ([1, 2, 3], [3, 1, 2], [1, 2]):
        with pytest.raises(ValueError, match="knew 3 clients.* 0 of them with"):
            resumed([50, 7, 9]).number(others)


def test_a_simulation_is_recognised_by_its_numbers():
    assert resumed(range(3)).number(range(3)) == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize("clients", [range(2), range(4), range(5, 8)])
def test_another_simulation_is_refused(clients):
    with pytest.raises(ValueError, match="as many clients as before"):
        resumed(range(3)).number(clients)


def test_nobody_yet_is_waited_for():
    registry = resumed([50, 7])
    assert registry.number([]) == {}
    with pytest.raises(ValueError, match="knew 2 clients"):
        registry.number([8])


def test_a_node_that_is_new_is_said_to_be_counted(caplog):
    registry = NodeRegistry()
    registry.number([50, 7])
    assert not caplog.text
    registry.number([7, 8])
    assert "1 node(s) are new and counted as new clients" in caplog.text
    caplog.clear()
    registry.number([7, 8])
    registry.number(range(5))
    assert not caplog.text
