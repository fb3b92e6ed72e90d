"""The Ray that workers run in: Flower's, that of this process, or a new one."""

import os
import sys
import time
from logging import ERROR, INFO

from flwr.serverapp import Grid

from flower_ext._flower import in_simulation, log
from flower_ext.simulation.policy import START_SECONDS

_ENGINE_SECONDS = 120.0  # Flower's engine takes 5 to 20 s to start Ray


def is_chosen(grid: Grid | None) -> bool:
    """Whether a user has named a Ray or, in a script, connected to one.

    Inside Flower's engine, this process is always connected to the engine's own.
    """
    ray = sys.modules.get("ray")
    connected = ray is not None and bool(ray.is_initialized())
    named = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    return named or (connected and not in_simulation(grid))


def connect(inside: bool) -> bool:
    """Connect to Ray; return whether it was started here.

    Flower's engine starts the ServerApp before its Ray, which has to be waited for.
    """
    import ray

    if inside:
        end = time.monotonic() + _ENGINE_SECONDS
        while not ray.is_initialized():
            if time.monotonic() > end:
                raise RuntimeError(
                    f"Flower's engine has no Ray after {_ENGINE_SECONDS:g} s"
                )
            time.sleep(0.05)
        return False
    if ray.is_initialized():  # by the user, whose it stays
        return False
    log(INFO, "Starting Ray")
    # Without a runtime_env, for which Ray would start further processes: those that it
    # starts by itself become our workers.
    ray.init(include_dashboard=False, logging_level=ERROR)
    return True


def this_machine() -> str:
    """Return the name of the machine of this process, as Ray knows it."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def require_free_gpus() -> None:
    """Refuse to wait for GPUs that Flower's own workers hold.

    Flower starts them after its Ray, all of a size: the first one tells. Where none
    comes, the wait for a worker of the grid ends with the reason.
    """
    import ray

    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        held = {key: there.get(key, 0) - free.get(key, 0) for key in ("CPU", "GPU")}
        if held["GPU"] > 0:
            raise ValueError(
                f"{held['GPU']:g} of {there['GPU']:g} GPUs are held by others: by "
                "Flower's own workers, which would not use them, unless you run with "
                "--federation-config 'client-resources-num-gpus=0', or by a "
                "PackedGrid that was not closed"
            )
        if held["CPU"] > 0:  # Flower's workers are there, and hold no GPU
            return
        time.sleep(0.1)


def free() -> str:
    """Say what is free of Ray's CPUs and GPUs."""
    import ray

    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return " and ".join(
        f"{free.get(key, 0):g} of {there.get(key, 0):g} {key}s are free"
        for key in ("CPU", "GPU")
    )
