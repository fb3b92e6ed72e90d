"""Workers that stay: what is in them, and the sums that they make."""

import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flower_ext import AdditiveStrategy
from flower_ext._flower import InconsistentMessageReplies
from flower_ext.server.optimizers import FedExP
from flower_ext.simulation import (
    Asynchronous,
    LocalGrid,
    LogNormal,
    PackedGrid,
    VirtualClock,
)

pytestmark = pytest.mark.slow

INITIAL = ArrayRecord({"w": Array(np.zeros(3, np.float32))})


@pytest.fixture(scope="module", params=["ray", "processes"])
def options(request, ray_if):
    """Return what makes a grid of two workers, in Ray and beside it."""
    ray_if(request.param)
    return {"num_workers": 2, "transport": request.param}


@pytest.fixture(scope="module")
def grid(options, importable):
    """Return a grid whose two workers serve all tests that harm none."""
    with PackedGrid(num_clients=12, client_app="virtual:app", **options) as grid:
        yield grid


def test_workers_stay_and_load_the_app_once(grid, ask):
    replies = [reply for _ in range(3) for reply in ask(grid, range(12))]
    metrics = [reply.content["metrics"] for reply in replies]
    assert len({m["pid"] for m in metrics}) == len({m["loaded"] for m in metrics}) == 2


def test_clients_without_gpus_see_none(grid, ask):
    replies = ask(grid, range(4))
    assert {reply.content["where"]["gpus"] for reply in replies} == {"none"}


def test_replies_of_a_sum_are_few_and_without_arrays(grid, monkeypatch):
    packs = []
    send = grid.send_and_sum

    def look(messages, summand, *, timeout):
        replies = list(send(messages, summand, timeout=timeout))
        packs.append({id(reply.content.pack): reply.content.pack for reply in replies})
        assert not any(reply.content.array_records for reply in replies)
        assert [r.metadata.src_node_id for r in replies] == list(range(12))
        return replies

    monkeypatch.setattr(grid, "send_and_sum", look)
    runs = []
    for _ in range(2):
        strategy = AdditiveStrategy(fraction_evaluate=0.0)
        runs.append(strategy.start(grid, INITIAL, num_rounds=2))
        assert len(runs[-1].train_metrics_clientapp) == 2
    assert runs[0].arrays == runs[1].arrays
    for of_round in packs:
        assert len(of_round) == 4  # two a worker
        clients = [pack.clients for pack in of_round.values()]
        assert sorted(c for pack in clients for c in pack) == list(range(12))
        assert sum(pack.total.count for pack in of_round.values()) == 12


def test_a_strategy_that_cannot_be_pickled_runs_without_sums(grid, caplog):
    strategy = AdditiveStrategy(fraction_evaluate=0.0)
    strategy.lock = threading.Lock()
    result = strategy.start(grid, INITIAL, num_rounds=2)
    assert result.train_metrics_clientapp[2]["num-replies"] == 12
    assert caplog.text.count("without partial sums") == 1


def test_what_contribution_raises_for_all_ends_the_run_with_the_reason(grid):
    class Wrong(AdditiveStrategy):
        def contribution(self, reply, round):
            raise KeyError("no such thing")

    with pytest.raises(InconsistentMessageReplies, match="no such thing"):
        Wrong(fraction_evaluate=0.0).start(grid, INITIAL, num_rounds=1)


def test_stacked_clients_are_in_one_pack_a_worker_and_end_as_alone(
    options, monkeypatch, importable
):
    import small

    config = {"batch-size": 8, "local-epochs": 2}
    options = {"client_app": "small:stacked", "run_config": config, **options}
    packs = []
    with PackedGrid(num_clients=8, **options) as grid:
        send = grid.send_and_sum

        def look(messages, summand, *, timeout):
            replies = list(send(messages, summand, timeout=timeout))
            packs.append(len({id(reply.content.pack) for reply in replies}))
            return replies

        monkeypatch.setattr(grid, "send_and_sum", look)
        strategy = AdditiveStrategy(fraction_evaluate=0.0)
        start = ArrayRecord(small.initial())
        found = strategy.start(grid, start, num_rounds=3)
    assert packs == [4, 2, 2]  # once it is known that they are
    plain = LocalGrid(small.app, 8, config)
    strategy = AdditiveStrategy(fraction_evaluate=0.0)
    expected = strategy.start(plain, start, num_rounds=3)
    for name, x in expected.arrays.items():
        np.testing.assert_allclose(
            found.arrays[name].numpy(), x.numpy(), rtol=1e-4, atol=1e-6
        )


def test_squared_norms_are_added_up_by_the_workers(grid, virtual):
    found = []
    for one in (grid, LocalGrid(virtual, 12)):
        optimizer = FedExP(1e-9)
        strategy = AdditiveStrategy(fraction_evaluate=0.0, server_optimizer=optimizer)
        result = strategy.start(one, INITIAL, num_rounds=2)
        found.append((result.arrays["w"].numpy(), optimizer.spread))
    (summed, own), (plain, its) = found
    np.testing.assert_allclose(summed, plain, rtol=1e-6)
    assert own == pytest.approx(its)
    assert its.mean_square > its.square_of_mean > 0


def test_asynchronous_clients_are_added_up_by_the_workers(grid, virtual):
    how = Asynchronous(4, 8, clock=VirtualClock(LogNormal()))
    results = []
    for one in (grid, LocalGrid(virtual, 12)):
        strategy = AdditiveStrategy(fraction_evaluate=0.0)
        results.append(strategy.start(one, INITIAL, 4, asynchronous=how))
    summed, plain = results
    assert summed.arrays != INITIAL
    np.testing.assert_allclose(
        summed.arrays["w"].numpy(), plain.arrays["w"].numpy(), rtol=1e-6
    )
    for number, metrics in plain.train_metrics_clientapp.items():
        found = summed.train_metrics_clientapp[number]
        for name in ("num-replies", "staleness-mean", "virtual-seconds"):
            assert found[name] == metrics[name]


def test_asynchronous_clients_take_part_as_workers_are_done(grid):
    """Last, since the clients that are at work in the end are stopped."""
    strategy = AdditiveStrategy(fraction_evaluate=0.5)
    result = strategy.start(grid, INITIAL, 4, asynchronous=Asynchronous(3, 6))
    metrics = list(result.train_metrics_clientapp.values())
    assert [m["num-replies"] for m in metrics] == [3] * 4
    assert not any(m["num-errors"] for m in metrics)
    assert metrics[0]["staleness-max"] == 0 < max(m["staleness-max"] for m in metrics)
    assert not grid._asked and not grid._replies
    # It works on.
    after = AdditiveStrategy(fraction_evaluate=0.0).start(grid, INITIAL, num_rounds=1)
    assert after.train_metrics_clientapp[1]["num-replies"] == 12
