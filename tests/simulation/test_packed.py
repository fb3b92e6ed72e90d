"""The packed grid, the same however its clients are reached."""

import random
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flower_ext._flower import CLIENT_CRASHED, CLIENT_RAISED
from flower_ext.simulation import LocalGrid, PackedGrid
from flower_ext.strategies import DPFTRL, FLASC, FedFish
from flower_ext.strategies.flasc import Tier

CLIENTS = 40


def packed_grid(transport, app, num_clients=CLIENTS, **options):
    if transport == "messages":
        inner = LocalGrid(app, 3, options.pop("run_config", None))
        return PackedGrid(inner, num_clients=num_clients, **options)
    if transport == "direct":
        inner = LocalGrid(ClientApp(), 1)
        return PackedGrid(inner, num_clients=num_clients, client_app=app, **options)
    options = {"num_workers": 2, "transport": transport, **options}
    return PackedGrid(num_clients=num_clients, client_app=app, **options)


@pytest.fixture(
    scope="module",
    params=[
        "messages",
        "direct",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ray", "processes")),
    ],
)
def transport(request):
    """Name one transport after the other."""
    return request.param


@pytest.fixture(scope="module")
def grid(transport, virtual, ray_if):
    """Return a grid that the tests below share; each uses clients of its own."""
    ray_if(transport)
    with packed_grid(transport, virtual, run_config={"x": 7}) as grid:
        yield grid


def metrics(replies):
    return [dict(reply.content["metrics"]) for reply in replies]


# What a client is given -------------------------------------------------------------


def test_each_client_has_its_own_context(grid, ask):
    found = metrics(ask(grid, [3, 0, 2]))
    assert [m["node"] for m in found] == [3, 0, 2]
    assert [m["num-examples"] for m in found] == [4, 1, 3]
    assert {m["partitions"] for m in found} == {CLIENTS}
    assert {m["run-config"] for m in found} == {7}


def test_clients_get_the_model_and_replies_come_in_order(grid, ask):
    clients = list(range(CLIENTS))
    random.Random(0).shuffle(clients)
    replies = ask(grid, clients, stateful=False)
    assert [reply.metadata.src_node_id for reply in replies] == clients
    for client, reply in zip(clients, replies, strict=True):
        np.testing.assert_array_equal(
            reply.content["arrays"]["w"].numpy(), np.arange(3) + client
        )


def test_state_lasts_and_is_found_again(grid, ask):
    for visit in (1, 2, 3):
        found = metrics(ask(grid, [4, 5, 6, 7, 8]))
        assert [m["visits"] for m in found] == [visit] * 5
    assert metrics(ask(grid, [9, 8]))[1]["visits"] == 4


def test_a_state_that_is_emptied_is_gone(transport, ask, ray_if):
    from toggle import app

    ray_if(transport)
    with packed_grid(transport, app) as grid:
        had = [ask(grid, [0])[0].content["m"]["had"] for _ in range(4)]
    assert had == [0, 1, 0, 1]


def test_an_exception_is_one_clients_error(grid, ask):
    replies = ask(grid, [10, 11, 12], **{"raise": [11]})
    assert [reply.has_error() for reply in replies] == [False, True, False]
    error = replies[1].error
    assert error.code == CLIENT_RAISED
    assert error.reason.startswith("ValueError: client 11 was told to fail")
    assert "in _misbehave" in error.reason
    assert replies[1].metadata.src_node_id == 11


def test_a_client_that_leaves_is_one_clients_error(grid, ask):
    replies = ask(grid, [10, 11, 12], exit=[11])
    assert [reply.has_error() for reply in replies] == [False, True, False]
    reason = replies[1].error.reason
    assert reason.startswith("SystemExit: client 11 was told to leave")


def test_a_client_that_failed_keeps_the_state_it_had(grid, ask):
    assert metrics(ask(grid, [13]))[0]["visits"] == 1
    assert ask(grid, [13], **{"raise-late": [13]})[0].has_error()
    assert metrics(ask(grid, [13]))[0]["visits"] == 2


def test_states_are_in_reach(grid, ask):
    ask(grid, [14])
    assert grid.states.read(14)["visits"]["n"] == 1
    for visits in (41, 0):
        record = MetricRecord({"n": visits})
        grid.states.write(14, RecordDict({"visits": record} if visits else {}))
        assert metrics(ask(grid, [14]))[0]["visits"] == visits + 1


def test_evaluation_and_queries_reach_their_functions(grid, ask):
    [reply] = ask(grid, [2], "evaluate")
    assert reply.content["metrics"]["mean"] == 1.0
    assert [r.content["m"]["client"] for r in ask(grid, [5, 1], "query.number")] == [
        5,
        1,
    ]
    [reply] = ask(grid, [2], "query")
    assert "No query function" in reply.error.reason


def test_messages_of_several_kinds_and_contents_go_together(grid):
    def message(client, kind, value, group="g"):
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(np.full(2, value, np.float32))})}
        )
        return Message(content, client, kind, group_id=group)

    messages = [
        message(1, "train", 5),
        message(2, "evaluate", 6),
        message(1, "evaluate", 7),
        message(3, "train", 8, "h"),
    ]
    replies = list(grid.send_and_receive(messages, timeout=60))
    assert replies[0].content["arrays"]["w"].numpy().tolist() == [6, 6]
    assert [r.content["metrics"]["mean"] for r in replies[1:3]] == [6, 7]
    assert replies[3].content["arrays"]["w"].numpy().tolist() == [11, 11]
    assert [r.metadata.group_id for r in replies] == ["g", "g", "g", "h"]


def test_a_client_asked_twice_answers_twice(grid, ask):
    found = metrics(ask(grid, [20, 20], stateful=False))
    assert [m["node"] for m in found] == [20, 20]


def test_push_and_pull(grid):
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(1))})})
    ids = list(grid.push_messages([Message(content, i, "evaluate") for i in (0, 1)]))
    replies = {}
    end = time.monotonic() + 60
    while len(replies) < 2 and time.monotonic() < end:
        for reply in grid.pull_messages(ids):
            replies[reply.metadata.reply_to_message_id] = reply
    assert [replies[i].metadata.src_node_id for i in ids] == [0, 1]
    assert list(grid.pull_messages(ids)) == []


def test_a_created_message_is_answered(grid):
    arrays = ArrayRecord({"w": Array(np.ones(1))})
    message = grid.create_message(RecordDict({"arrays": arrays}), "evaluate", 4, "")
    [reply] = grid.send_and_receive([message])
    assert reply.content["metrics"]["mean"] == 1.0


def test_nobody_asked_is_nobody_answered(grid):
    assert list(grid.send_and_receive([], timeout=5)) == []


def test_an_unknown_client_is_refused(grid):
    with pytest.raises(ValueError, match="dst_node_id=40 must be one of 40 clients"):
        grid.push_messages([Message(RecordDict(), 40, "train")])


def test_ids_are_stable_and_in_order(grid):
    assert list(grid.get_node_ids()) == list(range(CLIENTS))
    nodes = sorted(grid.get_nodes(), key=lambda node: node.registered_at)
    assert [node.node_id for node in nodes] == list(range(CLIENTS))
    assert grid.get_nodes() is grid.get_nodes()


def test_a_client_that_takes_too_long_is_stopped(transport, virtual, ask, ray_if):
    ray_if(transport)
    with packed_grid(transport, virtual, client_timeout=1.0) as grid:
        ask(grid, [0, 1, 2, 3])  # workers are up
        begun = time.monotonic()
        replies = ask(grid, [0, 1, 2], sleep=[1])
        assert time.monotonic() - begun < 45  # the client sleeps for 60
        assert not ask(grid, [1])[0].has_error()
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == CLIENT_CRASHED
    assert "client_timeout=1 s" in replies[1].error.reason


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("virtual:no_such_app", "has no attribute 'no_such_app'"),
        ("virtual:np", "is no ClientApp"),
    ],
)
def test_what_is_no_app_is_refused(importable, app, message):
    with pytest.raises((AttributeError, TypeError), match=message):
        packed_grid("direct", app)


# Results are those of the unpacked run ----------------------------------------------


# That all methods give the same on a packed grid is in the table of all methods,
# tests/strategies/test_every_method.py. Here, messages of every form: a model, records
# beside it, encoded arrays with a state of the client, rounds with noise.
STRATEGIES = {
    "FedAvg": lambda: FedAvg(fraction_train=0.5),
    "FedFish": lambda: FedFish(fraction_train=0.5),
    "FLASC": lambda: FLASC(
        download_density=0.5,
        upload_density=0.25,
        tiers=(Tier(upload_density=1.0), Tier()),
        precision="bfloat16",
        client_freeze=True,
        error_feedback=True,
        fraction_train=0.5,
    ),
    "DPFTRL": lambda: DPFTRL(
        num_rounds=3,
        num_sampled_clients=4,
        population_size=12,
        min_separation=2,
        noise_multiplier=0.5,
        target_delta=1e-2,
        unprotected_metrics=True,
        seed=1,
    ),
}


@pytest.fixture(scope="module")
def plain_and_packed(transport, importable, ray_if):
    """Return the same clients on two grids."""
    import small
    import torch

    ray_if(transport)
    settings = {"batch-size": 4, "lr": 0.1}
    app = small.with_mod if transport == "messages" else small.app
    torch.set_num_threads(1)
    options = {"run_config": settings, "partial_sums": False}
    with packed_grid(transport, app, 12, **options) as grid:
        yield LocalGrid(small.app, 12, settings), grid


@pytest.mark.parametrize("name", STRATEGIES)
def test_results_are_those_of_the_unpacked_run(plain_and_packed, name):
    import small

    initial = ArrayRecord(small.initial())
    results = []
    for grid in plain_and_packed:
        random.seed(3)  # Flower's own strategies draw their cohorts from it
        results.append(
            STRATEGIES[name]().start(grid=grid, initial_arrays=initial, num_rounds=3)
        )
    plain, ours = results
    for key, array in plain.arrays.items():
        np.testing.assert_array_equal(ours.arrays[key].numpy(), array.numpy())
    assert ours.train_metrics_clientapp == plain.train_metrics_clientapp
    assert ours.evaluate_metrics_clientapp == plain.evaluate_metrics_clientapp
    assert ours.train_metrics_clientapp[3]["train-loss"] > 0
    assert ours.evaluate_metrics_clientapp[3]["loss"] > 0
