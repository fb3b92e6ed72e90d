"""Packing by Flower's messages: which node runs whom, and what goes over the wire."""

import re

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from flower_ext._flower import NO_REPLY
from flower_ext.simulation import LocalGrid, PackedGrid, packed
from flower_ext.simulation.message_transport import parse_clients
from flower_ext.simulation.pack_message import PackMessage
from flower_ext.simulation.states import Shelf


class Nodes(LocalGrid):
    """Keeps what was sent; nodes may host clients, leave, and fail.

    Like a deployment's: more may come, and clients' states are theirs.
    """

    is_fixed = False

    def __init__(self, app, num_nodes, hosted=()):
        def node(message, context, call_next):
            if self.broken:
                raise OSError("the disk is full")
            place = context.node_config["partition-id"]
            if place < len(hosted):
                context.node_config["logical-clients"] = hosted[place]
            return call_next(message, context)

        outer = ClientApp(mods=[node])
        outer.train()(app)
        super().__init__(outer, num_nodes)
        self.sent = []
        self.away = set()
        self.broken = False

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node not in self.away]

    def push_messages(self, messages):
        messages = list(messages)
        self.sent += messages
        return super().push_messages(messages)


@pytest.fixture
def nodes(virtual):
    return lambda num_nodes=2, hosted=(): Nodes(virtual, num_nodes, hosted)


def where(nodes, of):
    """Return which node each client was sent to, by the last messages."""
    return {
        job.client: message.metadata.dst_node_id - 1000
        for message in of
        for job in PackMessage.read(message.content).jobs
    }


def test_each_node_gets_one_message_with_the_model_in_it_once(nodes, ask):
    inner = nodes(3)
    grid = PackedGrid(inner, num_clients=30, transport="messages")
    ask(grid, range(30))
    hello, work = inner.sent[:3], inner.sent[3:]
    assert [m.metadata.dst_node_id for m in hello] == [1000, 1001, 1002]
    assert len(work) == 3
    for message in work:
        assert len(message.content.array_records) == 1
    inner.sent.clear()
    ask(grid, range(30))
    assert len(inner.sent) == 3  # nodes introduce themselves once


def test_clients_are_packed_evenly_and_stay_where_their_state_is(nodes, ask):
    inner = nodes(2)
    grid = PackedGrid(inner, num_clients=10)
    ask(grid, range(4))
    first = where(inner, inner.sent[2:])
    assert sorted(first.values()) == [0, 0, 1, 1]
    inner.sent.clear()
    ask(grid, [3, 1, 8])
    again = where(inner, inner.sent)
    assert again[3] == first[3] and again[1] == first[1]


def test_clients_without_state_roam(nodes, ask):
    inner = nodes(2)
    grid = PackedGrid(inner, num_clients=10, num_examples=[1] * 9 + [100])
    ask(grid, [0, 9], stateful=False)
    first = where(inner, inner.sent[2:])
    inner.sent.clear()
    ask(grid, [9, 1, 2], stateful=False)
    then = where(inner, inner.sent)
    assert first[0] != first[9]
    assert then[1] == then[2] != then[9]  # the large client has a node of its own


def test_a_node_says_whom_it_hosts(nodes, ask):
    inner = nodes(3, ["0-2", "5,7"])
    grid = PackedGrid(inner, num_clients=10)
    assert not any(r.has_error() for r in ask(grid, range(10)))
    there = where(inner, inner.sent[3:])
    assert [there[c] for c in (0, 1, 2, 5, 7)] == [0, 0, 0, 1, 1]
    assert {there[c] for c in (3, 4, 6, 8, 9)} == {2}


def test_a_client_that_no_node_hosts_is_an_error(nodes, ask):
    grid = PackedGrid(nodes(2, ["0-2", "3"]), num_clients=5)
    replies = ask(grid, range(5))
    assert [reply.has_error() for reply in replies] == [False] * 4 + [True]
    assert replies[4].error.code == NO_REPLY
    assert "no node hosts it" in replies[4].error.reason


def test_a_state_that_left_with_its_node_is_an_error_once(nodes, ask):
    inner = nodes(2)
    grid = PackedGrid(inner, num_clients=4)
    ask(grid, range(4))
    gone = where(inner, inner.sent[2:])
    inner.away = {1001}
    replies = ask(grid, range(4))
    for client, reply in enumerate(replies):
        assert reply.has_error() == (gone[client] == 1)
    assert (
        "its node has left with its state"
        in [r.error.reason for r in replies if r.has_error()][0]
    )
    visits = [reply.content["metrics"]["visits"] for reply in ask(grid, range(4))]
    assert [visits[c] for c in range(4)] == [1 if gone[c] else 3 for c in range(4)]


def test_a_new_node_takes_part(nodes, ask):
    inner = nodes(2)
    inner.away = {1001}
    grid = PackedGrid(inner, num_clients=4)
    ask(grid, range(4), stateful=False)
    inner.away = set()
    inner.sent.clear()
    ask(grid, range(4), stateful=False)
    assert set(where(inner, inner.sent).values()) == {0, 1}


@pytest.mark.parametrize("plain", [True, False])
def test_an_app_without_the_mod_ends_the_run(ask, plain):
    app = ClientApp()

    @app.train()
    def train(message, context):
        if plain:
            return Message(RecordDict(), reply_to=message)
        return Message(message.content["arrays"], reply_to=message)

    with pytest.raises(RuntimeError, match=r"mods=\[flower_ext.simulation.packed\]"):
        ask(PackedGrid(LocalGrid(app, 1), num_clients=2), [0])


def test_an_error_of_a_node_is_that_of_its_clients(nodes, ask):
    inner = nodes(1)
    grid = PackedGrid(inner, num_clients=3)
    ask(grid, [0])
    inner.broken = True
    replies = ask(grid, range(3))
    assert all(reply.has_error() for reply in replies)
    assert "the disk is full" in replies[0].error.reason
    inner.broken = False
    assert ask(grid, [0])[0].content["metrics"]["visits"] == 2


class Silent(LocalGrid):
    """Nodes whose answers are late."""

    silent = False

    def pull_messages(self, message_ids):
        return [] if self.silent else super().pull_messages(message_ids)


@pytest.mark.parametrize("in_reach", [True, False])
def test_a_node_that_does_not_answer_is_given_up(virtual, ask, in_reach):
    inner = Silent(virtual, 1)
    inner.is_fixed = in_reach
    grid = PackedGrid(inner, num_clients=3)
    ask(grid, [0])
    inner.silent = True
    replies = ask(grid, [0, 1], timeout=0.1)
    assert [reply.error.code for reply in replies] == [NO_REPLY] * 2
    inner.silent = False
    # A state that came with a late answer is none; what a node keeps, it has kept.
    again = ask(grid, [0])[0].content["metrics"]["visits"]
    assert again == (2 if in_reach else 3)


def test_a_late_state_is_not_mixed_up_with_those_that_are_in_time(virtual):
    inner = Silent(virtual, 1)
    grid = PackedGrid(inner, num_clients=3)
    inner.silent = True
    ids = grid.push_messages([Message(RecordDict(), c, "train") for c in (0, 1)])
    grid._transport.give_up([int(ids[0])])
    inner.silent = False
    [reply] = grid.pull_messages(ids)
    assert reply.metadata.src_node_id == 1
    assert set(grid.states.versions()) == {1}


def test_states_come_and_go_with_the_work_where_they_are_in_reach(virtual, ask):
    inner = LocalGrid(virtual, 3)
    grid = PackedGrid(inner, num_clients=30, num_examples=[1] * 29 + [100])
    for visit in (1, 2, 3):
        for reply in ask(grid, range(visit, 30, visit)):
            assert not reply.has_error()
    assert grid.states.read(6)["visits"]["n"] == 3
    assert grid.states.read(7)["visits"]["n"] == 1
    assert not inner.states.versions()  # nothing is left on the nodes
    deployed = Nodes(virtual, 3)
    assert PackedGrid(deployed, num_clients=30).states is None


def test_a_node_of_a_deployment_gives_no_state_away(virtual, tmp_path):
    pack = PackMessage(3, None, [], [], Shelf(tmp_path), {0: "file"})
    message = Message(pack.write(), 1000, "train")
    [reply] = Nodes(virtual, 1).send_and_receive([message])
    assert "which does not leave this node" in reply.error.reason


def test_other_messages_pass_through_the_mod(virtual):
    [reply] = LocalGrid(virtual, 1).send_and_receive(
        [Message(RecordDict({"arrays": ArrayRecord()}), 1000, "train")]
    )
    assert reply.content["metrics"]["visits"] == 1


def test_later_mods_run_for_each_client(ask):
    seen = []

    def mod(message, context, call_next):
        seen.append(context.node_config["partition-id"])
        return call_next(message, context)

    app = ClientApp(mods=[packed, mod])
    app.train()(lambda message, context: Message(RecordDict(), reply_to=message))
    ask(PackedGrid(LocalGrid(app, 1), num_clients=5), [4, 2])
    assert sorted(seen) == [2, 4]


def test_names_of_records_may_hold_anything(ask):
    app = ClientApp(mods=[packed])

    @app.train()
    def train(message, context):
        context.state["a/b"] = message.content["config"]
        had = sorted(context.state)
        assert had == ["a/b"]
        return Message(
            RecordDict({"x/1/y": message.content["arrays"]}), reply_to=message
        )

    grid = PackedGrid(LocalGrid(app, 1), num_clients=12)
    for _ in range(2):
        for reply in ask(grid, [1, 11]):
            np.testing.assert_array_equal(
                reply.content["x/1/y"]["w"].numpy(), np.arange(3)
            )


def test_lists_of_clients_are_read():
    assert parse_clients("0-2, 7,9-9") == {0, 1, 2, 7, 9}
    for bad in ("a", "1-", "-1", "1;2", ""):
        with pytest.raises(
            ValueError, match=re.escape(f"logical-clients={bad!r} must list clients")
        ):
            parse_clients(bad)


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 0}, "num_clients=0 must be an integer >= 1"),
        ({"transport": "tcp"}, "transport='tcp' must be one of ('auto', 'ray', 'proc"),
        ({"transport": "ray"}, "client_app=None must be a ClientApp or its import str"),
        ({"client_timeout": 0}, "client_timeout=0 must be a finite number > 0"),
        ({"num_workers": 0}, "num_workers=0 must be an integer >= 1"),
        ({"num_examples": [1]}, "num_examples='1 sizes' must be one for each of num_"),
        ({"grid": None, "transport": "messages"}, "grid=None must be Flower's grid"),
    ],
)
def test_bad_arguments_are_refused(nodes, options, message):
    arguments = {"grid": nodes(), "num_clients": 2, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedGrid(**arguments)
