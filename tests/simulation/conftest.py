"""A ClientApp that workers can import."""

import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flower_ext.simulation import PackedGrid, process_workplace
from flower_ext.simulation.local import LocalGrid, app_config

_APP = str(Path(__file__).parent / "app")


@pytest.fixture(scope="session", autouse=True)
def importable():
    """Let this process, and workers that are told its path, import ``virtual``."""
    sys.path.insert(0, _APP)
    yield
    sys.path.remove(_APP)


@pytest.fixture(scope="session")
def virtual(importable):
    """Return the app of tests/simulation/app/virtual.py."""
    import virtual

    return virtual.app


@pytest.fixture(scope="session")
def ask():
    """Ask clients of a grid; return their replies."""

    def run(grid, clients, kind="train", timeout=60, size=3, **config):
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(np.arange(size, dtype=np.float32))}),
                "config": ConfigRecord(config),
            }
        )
        messages = [Message(content, client, kind) for client in clients]
        return list(grid.send_and_receive(messages, timeout=timeout))

    return run


@pytest.fixture(scope="session")
def ray_if(cluster):
    """Start Ray for the transport that needs it."""
    return lambda transport: cluster() if transport == "ray" else None


@pytest.fixture
def packed_grids(virtual):
    """Make packed grids of two workers, closed at the end of the test."""
    grids = []

    def make(num_clients=12, **options):
        options = {"client_app": virtual, "num_workers": 2, **options}
        grids.append(PackedGrid(num_clients=num_clients, **options))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


@pytest.fixture
def four_gpus(ray_if, monkeypatch):
    """Give Ray, or this process, four CPUs and four made-up GPUs."""

    def give(transport):
        ray_if(transport)
        if transport == "processes":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
            monkeypatch.setattr(process_workplace, "cpus_here", lambda: 4.0)

    return give


@pytest.fixture(scope="session")
def plain_clients():
    """Run rounds of the app in flower_app on plain clients, without Ray."""
    folder = str(Path(__file__).parent / "flower_app")
    sys.path.insert(0, folder)
    try:
        from packed_app.client_app import app
        from packed_app.server_app import strategy
    finally:
        sys.path.remove(folder)

    def run(num_rounds, *, codecs=False):
        result = strategy(codecs).start(
            LocalGrid(app, 30, {**app_config(folder), "codecs": codecs}),
            ArrayRecord({"w": Array(np.zeros(4, np.float32))}),
            num_rounds=num_rounds,
        )
        rounds = result.train_metrics_clientapp.values()
        return {
            "w": result.arrays["w"].numpy().tolist(),
            "visits": [record["visits"] for record in rounds],
        }

    return run
