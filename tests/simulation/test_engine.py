"""Both transports of the packed grid inside Flower's own simulation engine."""

import json
from pathlib import Path

import pytest

from flower_ext.runs.launch import run_app

APP = Path(__file__).parent / "flower_app"
pytestmark = pytest.mark.slow


def test_both_transports_under_flwr_run_give_what_plain_clients_give(
    plain_clients, tmp_path
):
    file = tmp_path / "results.json"
    run_app(APP, run_config={"results": str(file)}, num_supernodes=2, timeout=300)
    results = json.loads(file.read_text("utf-8"))
    assert set(results) == {"ray", "messages"}
    workers, expected = {}, plain_clients(3)
    for transport, found in results.items():
        assert {key: found[key] for key in expected} == expected
        workers[transport] = {pid for pids in found["pids"] for pid in pids}
    # Ray's are the grid's own, the others are Flower's.
    assert not workers["ray"] & workers["messages"]
