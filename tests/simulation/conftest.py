"""A ClientApp that workers can import."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

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

    def run(grid, clients, kind="train", timeout=60, **config):
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(np.arange(3, dtype=np.float32))}),
                "config": ConfigRecord(config),
            }
        )
        messages = [Message(content, client, kind) for client in clients]
        return list(grid.send_and_receive(messages, timeout=timeout))

    return run


@pytest.fixture(scope="session")
def ray_here():
    """Start a Ray of this process when it is first needed: 4 CPUs, 4 made-up GPUs."""
    import ray

    def start():
        if not ray.is_initialized():
            paths = os.pathsep.join([_APP, *filter(None, sys.path)])
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=4,
                include_dashboard=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
            )

    yield start
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_if(ray_here):
    """Start Ray for the transport that needs it."""
    return lambda transport: ray_here() if transport == "ray" else None
