"""The in-process grid: what a client sees, and what comes back."""

import copy
from asyncio import CancelledError

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod, fixedclipping_mod
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAvg,
)

from flower_ext.simulation.local import LocalGrid, app_config, run_local
from flower_ext.simulation.packed_grid import PackedGrid


def app_of(function, *, mods=None):
    """A ClientApp that answers training messages with the content it is given."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message, context):
        return Message(function(message.content, context), reply_to=message)

    return app


def ask(grid, content=None, kind="train"):
    """Send every node a message of its own; return the replies."""
    messages = [
        Message(content or RecordDict(), node, kind) for node in grid.get_node_ids()
    ]
    return list(grid.send_and_receive(messages))


def number(value, key="x"):
    return RecordDict({"m": MetricRecord({key: value})})


# A whole app ----------------------------------------------------------------------


def stock_apps(seen):
    """A linear regression as in Flower's quickstart, by hand in NumPy."""
    client, server = ClientApp(), ServerApp()

    def data(context):
        partition = context.node_config["partition-id"]
        x = np.random.default_rng(partition).normal(size=(20 + partition, 2))
        return x, x @ [2.0, -1.0]

    @client.train()
    def train(message, context):
        x, y = data(context)
        w = message.content["arrays"]["w"].numpy()
        for _ in range(context.run_config["local-epochs"]):
            w = w - message.content["config"]["lr"] * x.T @ (x @ w - y) / len(y)
        content = {
            "arrays": ArrayRecord({"w": Array(w)}),
            "metrics": MetricRecord({"num-examples": len(y)}),
        }
        return Message(RecordDict(content), reply_to=message)

    @client.evaluate()
    def evaluate(message, context):
        x, y = data(context)
        error = float(np.mean((x @ message.content["arrays"]["w"].numpy() - y) ** 2))
        metrics = MetricRecord({"num-examples": len(y), "mse": error})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid, context):
        seen.update(
            FedAvg(fraction_evaluate=0.5)
            .start(
                grid=grid,
                initial_arrays=ArrayRecord({"w": Array(np.zeros(2))}),
                train_config=ConfigRecord({"lr": context.run_config["lr"]}),
                num_rounds=context.run_config["num-server-rounds"],
            )
            .__dict__
        )
        context.state["done"] = ConfigRecord({"yes": True})

    return server, client


CONFIG = {"lr": 0.3, "local-epochs": 2, "num-server-rounds": 4}


def test_an_unmodified_app_runs_as_the_formulas_say():
    seen = {}
    server, client = stock_apps(seen)
    run_local(server, client, num_supernodes=3, run_config=CONFIG)
    w, weights = np.zeros(2), [20, 21, 22]
    for _ in range(4):
        models = []
        for partition in range(3):
            x = np.random.default_rng(partition).normal(size=(20 + partition, 2))
            y, local = x @ [2.0, -1.0], w
            for _ in range(2):
                local = local - 0.3 * x.T @ (x @ local - y) / len(y)
            models.append(local)
        w = np.average(models, axis=0, weights=weights)
    np.testing.assert_allclose(seen["arrays"]["w"].numpy(), w, rtol=1e-12)
    assert list(seen["evaluate_metrics_clientapp"]) == [1, 2, 3, 4]


def test_run_local_returns_the_servers_context():
    server, client = stock_apps({})
    context = run_local(server, client, run_config=CONFIG)
    assert context.state["done"]["yes"] is True
    assert context.run_config == CONFIG


def test_flowers_own_mods_and_wrappers_work():
    seen = {}
    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy = DifferentialPrivacyClientSideFixedClipping(
            FedAvg(fraction_evaluate=0.0), 0.0, 0.5, 2
        )
        initial = ArrayRecord({"w": Array(np.zeros(4))})
        seen["w"] = strategy.start(grid, initial, num_rounds=1).arrays["w"].numpy()

    def far(content, context):
        w = content["arrays"]["w"].numpy() + 100
        return RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(w)}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )

    client = app_of(far, mods=[arrays_size_mod, fixedclipping_mod])
    run_local(server, client, num_supernodes=2)
    assert np.linalg.norm(seen["w"]) == pytest.approx(0.5)


@pytest.mark.parametrize("by_name", [False, True])
def test_an_app_of_many_packed_clients_runs_in_process(virtual, ask, by_name):
    server = ServerApp()
    found = []

    @server.main()
    def main(grid, context):
        with PackedGrid(
            grid,
            num_clients=7,
            client_app="virtual:app" if by_name else virtual,
            run_config=context.run_config,
        ) as clients:
            assert list(clients.get_node_ids()) == list(range(7))
            replies = ask(clients, (5, 2))
            found.extend(dict(reply.content["metrics"]) for reply in replies)

    run_local(server, ClientApp(), run_config={"x": 3})
    assert [(m["node"], m["partitions"], m["run-config"]) for m in found] == [
        (5, 7, 3),
        (2, 7, 3),
    ]


def test_an_error_of_the_server_reaches_the_caller():
    server = ServerApp()

    @server.main()
    def main(grid, context):
        raise KeyError("lr")

    with pytest.raises(KeyError, match="lr"):
        run_local(server, ClientApp())


def test_the_run_config_that_was_given_is_not_changed():
    server, config = ServerApp(), {"lr": 0.1}

    @server.main()
    def main(grid, context):
        context.run_config["lr"] = 5.0
        for reply in ask(grid):
            assert not reply.has_error()

    def change(content, context):
        assert context.run_config == {"lr": 0.1}
        context.run_config["lr"] = 7.0
        return RecordDict()

    run_local(server, app_of(change), run_config=config)
    assert config == {"lr": 0.1}


# Clients --------------------------------------------------------------------------


def test_every_client_knows_its_partition_and_their_number():
    def tell(content, context):
        return RecordDict({"c": ConfigRecord(dict(context.node_config))})

    grid = LocalGrid(app_of(tell), 3)
    assert [dict(reply.content["c"]) for reply in ask(grid)] == [
        {"partition-id": i, "num-partitions": 3} for i in range(3)
    ]


def test_every_client_keeps_its_own_state_between_messages():
    def count(content, context):
        before = context.state.metric_records.get("m", {"x": 0})
        step = 1 + context.node_config["partition-id"]
        context.state["m"] = MetricRecord({"x": before["x"] + step})
        return number(context.state["m"]["x"])

    grid = LocalGrid(app_of(count), 2)
    found = [[r.content["m"]["x"] for r in ask(grid)] for _ in range(3)]
    assert found == [[1, 2], [2, 4], [3, 6]]


def test_a_client_that_fails_keeps_the_state_it_had():
    def count(content, context):
        known = context.state.metric_records.setdefault("m", MetricRecord({"x": 0}))
        known["x"] += 1
        context.state["m"] = known
        if known["x"] == 2 and content["m"]["x"]:
            raise ValueError("after the state was changed")
        return number(known["x"])

    grid = LocalGrid(app_of(count), 1)
    replies = [ask(grid, number(fails))[0] for fails in (0, 1, 0)]
    assert [r.has_error() for r in replies] == [False, True, False]
    assert [r.content["m"]["x"] for r in replies[::2]] == [1, 2]
    assert grid.states.read(0)["m"]["x"] == 2


def test_a_state_of_another_type_is_the_clients_error():
    def spoil(content, context):
        context.state = None
        return RecordDict()

    [reply] = ask(LocalGrid(app_of(spoil), 1))
    assert "context.state must be a RecordDict, not None" in reply.error.reason


def test_another_grid_has_new_states():
    def count(content, context):
        known = "m" in context.state
        context.state["m"] = MetricRecord({"x": 1})
        return number(int(known))

    app = app_of(count)
    for _ in range(2):
        assert [r.content["m"]["x"] for r in ask(LocalGrid(app, 2))] == [0, 0]


def test_mods_run_around_the_client_outermost_first():
    def mod(name):
        def apply(message, context, call_next):
            message.content["m"]["x"] = message.content["m"]["x"] * 10 + name
            reply = call_next(message, context)
            reply.content["m"]["y"] = reply.content["m"]["y"] * 10 + name
            return reply

        return apply

    app = app_of(
        lambda content, context: RecordDict(
            {"m": MetricRecord({"x": content["m"]["x"], "y": 0})}
        ),
        mods=[mod(1), mod(2)],
    )
    [reply] = ask(LocalGrid(app, 1), number(0))
    assert dict(reply.content["m"]) == {"x": 12, "y": 21}


def test_an_exception_becomes_the_clients_error_reply():
    def fail(content, context):
        if context.node_config["partition-id"] == 1:
            raise ValueError("lr must be positive")
        return RecordDict()

    grid = LocalGrid(app_of(fail), 3)
    replies = ask(grid)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    error = replies[1].error
    assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert error.reason.startswith("ValueError: lr must be positive")
    assert "in fail" in error.reason
    assert replies[1].metadata.src_node_id == list(grid.get_node_ids())[1]


@pytest.mark.parametrize("end", [SystemExit, CancelledError])
def test_a_client_that_ends_its_process_or_its_task_is_an_error_reply(end):
    def leave(content, context):
        raise end("no licence")

    for reply in ask(LocalGrid(app_of(leave), 2)):
        assert reply.error.reason.startswith(f"{end.__name__}: no licence")


def test_an_interrupt_in_a_client_reaches_the_caller():
    def interrupted(content, context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(LocalGrid(app_of(interrupted), 2))


def test_a_client_that_returns_no_message_is_an_error_reply():
    app = ClientApp()

    @app.train()
    def forgets(message, context):
        pass

    [reply] = ask(LocalGrid(app, 1))
    assert reply.has_error()
    assert "must return a Message" in reply.error.reason


def test_a_message_of_a_kind_without_function_is_an_error_reply():
    [reply] = ask(LocalGrid(ClientApp(), 1), kind="query")
    assert "No query function registered" in reply.error.reason


def test_queries_and_custom_actions_reach_their_functions():
    app = ClientApp()
    for decorate, name in [
        (app.query(), "query"),
        (app.query("size"), "query.size"),
        (app.train("warm_up"), "train.warm_up"),
        (app.evaluate("quick"), "evaluate.quick"),
    ]:
        decorate(
            lambda message, context, name=name: Message(
                RecordDict({"c": ConfigRecord({"name": name})}), reply_to=message
            )
        )
    grid = LocalGrid(app, 1)
    for kind in ("query", "query.size", "train.warm_up", "evaluate.quick"):
        [reply] = ask(grid, kind=kind)
        assert reply.content["c"]["name"] == kind


def test_the_lifespan_of_an_app_surrounds_every_message():
    events = []
    app = app_of(lambda content, context: events.append("work") or RecordDict())

    @app.lifespan()
    def lifespan(context):
        events.append("enter")
        yield
        events.append("leave")

    ask(LocalGrid(app, 2))
    assert events == ["enter", "work", "leave"] * 2


# What one client does is not seen by another ----------------------------------------


def vandal(content, context):
    """Report what was received, then spoil all of it."""
    array = content["a"]["w"]
    report = {
        "w": array.numpy().tolist(),
        "keys": float(len(content)),
        "lr": content["c"]["lr"],
        "list": content["c"]["list"][0],
        "metric": content["m"]["x"][0],
    }
    content["c"]["list"][0] = 99.0
    content["c"]["lr"] = 99.0
    content["m"]["x"][0] = 99.0
    values = array.numpy()
    values += 99
    array.data = Array(values).data
    content["a"]["v"] = array
    content["extra"] = ConfigRecord()
    return RecordDict({"m": MetricRecord(report)})


def valuables():
    return RecordDict(
        {
            "a": ArrayRecord({"w": Array(np.ones(2))}),
            "c": ConfigRecord({"lr": 0.1, "list": [1.0]}),
            "m": MetricRecord({"x": [5.0]}),
        }
    )


def test_a_client_that_spoils_its_message_does_not_spoil_that_of_others():
    replies = ask(LocalGrid(app_of(vandal), 3), valuables())
    assert {str(dict(reply.content["m"])) for reply in replies} == {
        str({"w": [1.0, 1.0], "keys": 3.0, "lr": 0.1, "list": 1.0, "metric": 5.0})
    }


def test_a_client_that_spoils_its_message_does_not_spoil_the_servers():
    content = valuables()
    ask(LocalGrid(app_of(vandal), 2), content)
    assert content == valuables()


def test_the_bytes_of_arrays_are_not_copied():
    content = valuables()
    seen = []

    def look(received, context):
        seen.append(received["a"]["w"].data)
        return RecordDict()

    ask(LocalGrid(app_of(look), 2), content)
    assert all(data is content["a"]["w"].data for data in seen)


# The grid -------------------------------------------------------------------------


def test_replies_come_in_the_order_of_the_messages():
    grid = LocalGrid(
        app_of(lambda content, context: number(context.node_config["partition-id"])), 3
    )
    nodes = list(grid.get_node_ids())
    messages = [Message(RecordDict(), nodes[i], "train") for i in (2, 0, 1, 0)]
    replies = grid.send_and_receive(messages, timeout=1.0)
    assert [reply.content["m"]["x"] for reply in replies] == [2, 0, 1, 0]


def test_replies_are_pulled_once_by_the_ids_of_the_push():
    grid = LocalGrid(app_of(lambda content, context: content), 2)
    nodes = list(grid.get_node_ids())
    ids = list(
        grid.push_messages([Message(number(i), nodes[i], "train") for i in (0, 1)])
    )
    [second] = grid.pull_messages([ids[1]])
    assert second.content["m"]["x"] == 1
    assert second.metadata.reply_to_message_id == ids[1]
    assert [m.content["m"]["x"] for m in grid.pull_messages(ids)] == [0]
    assert list(grid.pull_messages(ids)) == []


def test_an_unknown_node_is_refused():
    grid = LocalGrid(app_of(lambda content, context: content), 2)
    with pytest.raises(ValueError, match="dst_node_id=7 must be one of 2 clients"):
        grid.push_messages([Message(RecordDict(), 7, "train")])


def test_a_created_message_is_answered():
    grid = LocalGrid(app_of(lambda content, context: content), 1)
    [node] = grid.get_node_ids()
    [reply] = grid.send_and_receive([grid.create_message(number(3), "train", node, "")])
    assert reply.content["m"]["x"] == 3
    assert reply.metadata.src_node_id == node


def test_groups_and_destinations_reach_the_client():
    seen = []

    def mod(message, context, call_next):
        seen.append(
            (message.metadata.group_id, message.metadata.dst_node_id, context.node_id)
        )
        return call_next(message, context)

    grid = LocalGrid(app_of(lambda content, context: content, mods=[mod]), 1)
    [node] = grid.get_node_ids()
    ids = grid.push_messages([grid.create_message(number(3), "train", node, "7")])
    assert len(list(ids)) == 1
    assert seen == [("7", node, node)]


def test_nodes_registered_in_the_order_of_the_partitions():
    grid = LocalGrid(ClientApp(), 12)
    nodes = sorted(grid.get_nodes(), key=lambda node: node.registered_at)
    assert [node.node_id for node in nodes] == list(grid.get_node_ids())


def test_the_run_can_be_set():
    grid = LocalGrid(ClientApp(), 1)
    run = copy.copy(grid.run)
    grid.set_run(run)
    assert grid.run is run


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3"])
def test_a_bad_number_of_nodes_is_refused(bad):
    with pytest.raises(
        ValueError, match=rf"num_supernodes={bad!r} must be an integer >= 1"
    ):
        LocalGrid(ClientApp(), bad)


# The configuration of an app --------------------------------------------------------


def test_app_config_flattens_nested_tables(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.flwr.app]\npublisher = 'x'\n"
        "[tool.flwr.app.config]\nlr = 0.1\nrounds = 3\nname = 'a'\nfast = true\n"
        "[tool.flwr.app.config.model]\nwidth = 8\n[tool.flwr.app.config.model.x]\ny=1\n"
    )
    assert app_config(tmp_path) == {
        "lr": 0.1,
        "rounds": 3,
        "name": "a",
        "fast": True,
        "model.width": 8,
        "model.x.y": 1,
    }


def test_an_app_without_config_has_an_empty_one(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app]\npublisher = 'x'\n")
    assert app_config(str(tmp_path)) == {}


def test_contexts_are_flowers_own():
    seen = []

    def look(content, context):
        seen.append(context)
        return RecordDict()

    ask(LocalGrid(app_of(look), 1, {"a": 1}))
    assert type(seen[0]) is Context
    assert seen[0].run_config == {"a": 1}
