"""Nodes: their order, waiting for them, and knowing them again."""

import json
import logging
import time
from types import SimpleNamespace

import pytest

from flower_ext._flower import NodeInfo
from flower_ext.nodes import NodeRegistry, Places, ordered_nodes, wait_for_nodes


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
    nodes = ordered_nodes(SimpleNamespace(get_node_ids=lambda: range(3)))
    assert list(nodes) == [0, 1, 2]


@pytest.mark.parametrize("nodes", [[7, 3, 9], range(3), range(4, 10, 2)])
def test_places_are_those_in_the_order(nodes):
    places = Places(nodes)
    assert dict(places) == {node: i for i, node in enumerate(nodes)}
    assert len(places) == 3
    assert places.get(11) is None


def test_a_round_waits_until_there_are_enough_nodes(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "flwr")
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    a, b, c = (1, "a"), (2, "b"), (3, "c")
    grid = grid_of([], [a], [a, b, c])
    assert wait_for_nodes(grid, 2) == [1, 2, 3]
    assert len(naps) == 2
    assert "1 connected (minimum required: 2)" in caplog.text


def test_no_nodes_are_waited_for_if_none_are_needed(monkeypatch):
    monkeypatch.setattr(time, "sleep", pytest.fail)
    assert wait_for_nodes(grid_of([]), 0) == []


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


def test_a_simulation_is_recognised_by_its_order():
    assert resumed([50, 7, 9]).number([1, 2, 3]) == {1: 0, 2: 1, 3: 2}


def test_another_simulation_is_refused():
    with pytest.raises(ValueError, match="knew 3 nodes, this one has 2"):
        resumed([50, 7, 9]).number([1, 2])
