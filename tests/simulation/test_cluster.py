"""A Ray cluster of two machines, one of which leaves."""

import threading
import time

import pytest

from flower_ext.simulation import PackedGrid

pytestmark = pytest.mark.slow


@pytest.fixture
def second(cluster):
    """Add a machine to that of the other tests; return what makes it leave."""
    head = cluster()
    node = head.add_node(num_cpus=1)
    left = []

    def leave():
        left.append(node)
        head.remove_node(node, allow_graceful=False)

    yield leave
    if not left:
        leave()


def test_clients_run_on_both_machines_and_go_on_when_one_leaves(second, ask):
    import ray

    def play(**config):
        """Let all clients run; say where each ran, how often, or its error."""
        return [
            {"error": reply.error.reason}
            if reply.has_error()
            else {
                "machine": reply.content["where"]["machine"],
                "visits": reply.content["metrics"]["visits"],
            }
            for reply in ask(grid, range(8), size=50_000, **config)
        ]

    # Two workers, one on each machine: the emptiest is next.
    with PackedGrid(num_clients=8, client_app="virtual:app", num_workers=2) as grid:
        rounds = [play(), play()]
        leave = threading.Timer(1.0, second)
        leave.start()
        rounds.append(play(sleep=list(range(8)), seconds=0.5))
        leave.join()
        while sum(node["Alive"] for node in ray.nodes()) > 1:
            time.sleep(0.05)
        rounds += [play(), play()]
    machines = [{c["machine"] for c in clients if "machine" in c} for clients in rounds]
    assert len(machines[0] | machines[1]) == 2
    # A state is found on whichever machine the client runs next.
    assert [client["visits"] for client in rounds[0]] == [1] * 8
    assert [client["visits"] for client in rounds[1]] == [2] * 8
    # In the round in which a machine leaves, a client may have lost its state with it,
    # which it says; then it starts anew, and nobody else is hurt.
    visits = [0] * 8
    for clients in rounds:
        for i, client in enumerate(clients):
            if "error" in client:
                assert "state is lost" in client["error"]
                visits[i] = 0
            else:
                visits[i] += 1
                assert client["visits"] == visits[i]
    assert len(machines[4]) == 1
    assert not any("error" in client for client in rounds[4])
