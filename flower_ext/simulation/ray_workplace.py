"""Workers as Ray actors: Flower's Ray, that of this process, or a new one."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.serverapp import Grid

from flower_ext._flower import in_simulation
from flower_ext.simulation import policy
from flower_ext.simulation.machines import Machine, Resources, ray_machines
from flower_ext.simulation.ray_session import (
    connect,
    free,
    require_free_gpus,
    this_machine,
)
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.worker import Broadcast, PackAnswer, Shared
from flower_ext.simulation.workplace import (
    CannotStart,
    Hired,
    WorkerDied,
    WorkerFailed,
    Workplace,
    threads_of,
)


@dataclass(eq=False)
class _Actor(Hired):
    """A Ray actor."""

    actor: Any

    def __post_init__(self) -> None:
        # References that are there once Ray has found room, and once the app is loaded.
        self._room, self._start = self.actor.placed.remote(), self.actor.ready.remote()
        self._placed = self._ready = False

    def has_room(self) -> bool:
        import ray

        self._placed = self._placed or bool(ray.wait([self._room], timeout=0)[0])
        return self._placed

    def ready(self) -> bool:
        import ray

        self._ready = self._ready or bool(ray.wait([self._start], timeout=0)[0])
        return self._ready

    def has_worked(self) -> bool:
        import ray

        try:
            ray.get(self._start, timeout=0)
        except ray.exceptions.RayError:
            return False
        return True

    def ask(self, number: int, shared: Shared, *pack: Any) -> Any:
        return self.actor.run.remote(number, shared, *pack)

    def stop(self) -> None:
        import ray

        ray.kill(self.actor)


@dataclass(frozen=True)
class _Put:
    """An object in Ray's store, which each worker fetches once a round."""

    reference: Any

    def read(self) -> Broadcast:
        import ray

        found: Broadcast = ray.get(self.reference)
        return found


def worker_class() -> type:
    """Return the class of workers, which Ray sends as it is written here.

    Of a class that can be imported Ray sends the name, and workers would look for this
    package before they know where the driver has it.
    """

    class Worker:
        def __init__(self, pickled: bytes, paths: list[str], threads: int) -> None:
            # Ray looks in the current folder first, where there may be another version.
            others = [path for path in sys.path if path not in paths]
            sys.path[:] = [*paths, *others]
            from flower_ext.simulation import worker

            self._worker = worker.Worker(pickled, threads)

        def placed(self) -> None:
            """Return at once: Ray has found room for this worker."""

        def ready(self) -> None:
            """Return when clients can run."""
            self._worker.load()

        def run(self, *pack: Any) -> Any:
            return self._worker.run(*pack)

    return Worker


class RayWorkplace(Workplace):
    """Ray, on one machine or many.

    Parameters
    ----------
    grid : Grid or None
        That of Flower's simulation engine, whose Ray is used; without it, the Ray of
        this process, which is started if it does not run.
    setting : Setting
        Of the clients.
    """

    def __init__(self, grid: Grid | None, setting: Setting) -> None:
        self._inside = in_simulation(grid)
        self._own_ray = connect(self._inside)
        import ray

        self.here = this_machine()
        # Flower's own workers, which hold what is not free, never let go of it.
        held = policy.START_SECONDS if self._inside else policy.HELD_SECONDS
        self.held_seconds = held
        self._pickled = setting.pickled()
        self._remote: Any = ray.remote(worker_class())
        self._paths = [path for path in sys.path if path]

    def machines(self) -> Iterator[Machine]:
        """Return those that are in Ray now."""
        import ray

        return ray_machines(ray.nodes())  # type: ignore[no-untyped-call]

    def start(
        self, resources: Resources, machine: Machine, gpus: dict[int, float]
    ) -> Hired:
        """Start an actor, which Ray lets wait until there is room."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Not restarted by Ray: the transport knows what a dead worker was running. On
        # this machine or nowhere: what is free there was counted. Inside Flower's
        # engine its own workers, which then only wait, hold all CPUs.
        options = {
            "num_cpus": 0 if self._inside else resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(
                machine.name, soft=False
            ),
        }
        actor = self._remote.options(**options)
        actor = actor.remote(self._pickled, self._paths, threads_of(resources))
        return _Actor(resources, machine, gpus, actor)

    def share(self, broadcast: Broadcast) -> Shared:
        """Put it into Ray's store."""
        import ray

        return _Put(ray.put(broadcast))

    def wait(self, calls: Sequence[Any], seconds: float | None) -> Sequence[Any]:
        """Wait for one, and return those that have come with it."""
        import ray

        calls = list(calls)
        done, _ = ray.wait(calls, num_returns=1, timeout=seconds)
        if done and len(calls) > 1:
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return done

    def answer(self, call: Any) -> PackAnswer:
        """Fetch it."""
        import ray

        try:
            found: PackAnswer = ray.get(call)
        except ray.exceptions.RayTaskError as problem:
            raise WorkerFailed(problem) from problem
        except ray.exceptions.RayError as problem:
            if "creation task" in str(problem):
                raise CannotStart(problem) from problem
            raise WorkerDied(problem) from problem
        return found

    def require_free(self, asked: Iterable[Resources]) -> None:
        """Refuse to wait for GPUs that Flower's own workers hold."""
        if self._inside and any(resources.num_gpus for resources in asked):
            require_free_gpus()

    def free(self) -> str:
        """Say what is free of Ray's CPUs and GPUs."""
        return free()

    def close(self) -> None:
        """Stop Ray if it was started here."""
        import ray

        if self._own_ray and ray.is_initialized():
            ray.shutdown()
