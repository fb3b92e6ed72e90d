"""Both transports of the packed grid inside Flower's own simulation engine."""

import json
import sys
from pathlib import Path

import pytest

from flower_ext.launch import run_app
from flower_ext.simulation.local import LocalGrid, app_config

APP = Path(__file__).parent / "flower_app"
pytestmark = pytest.mark.slow


@pytest.fixture
def expected():
    """Run the same strategy on plain clients, without Ray."""
    import numpy as np
    from flwr.app import Array, ArrayRecord

    sys.path.insert(0, str(APP))
    try:
        from packed_app.client_app import app
        from packed_app.server_app import collect
    finally:
        sys.path.remove(str(APP))
    from flower_ext import AdditiveStrategy

    result = AdditiveStrategy(
        fraction_train=0.5, fraction_evaluate=0.0, train_metrics_aggr_fn=collect
    ).start(
        LocalGrid(app, 30, app_config(APP)),
        ArrayRecord({"w": Array(np.zeros(4, np.float32))}),
        num_rounds=3,
    )
    rounds = result.train_metrics_clientapp.values()
    return {
        "w": result.arrays["w"].numpy().tolist(),
        "visits": [record["visits"] for record in rounds],
    }


def test_both_transports_under_flwr_run_give_what_plain_clients_give(
    expected, tmp_path
):
    file = tmp_path / "results.json"
    run_app(APP, run_config={"results": str(file)}, num_supernodes=2, timeout=120)
    results = json.loads(file.read_text("utf-8"))
    assert set(results) == {"ray", "messages"}
    workers = {}
    for transport, found in results.items():
        assert found["w"] == expected["w"]
        assert found["visits"] == expected["visits"]
        workers[transport] = {pid for pids in found["pids"] for pid in pids}
    # Ray's are the grid's own, the others are Flower's.
    assert not workers["ray"] & workers["messages"]
