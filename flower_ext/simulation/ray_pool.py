"""Workers on Ray: as many as fit, with the resources that are asked for."""

import contextlib
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

from flower_ext.simulation.machines import Machine, Resources, ray_machines
from flower_ext.simulation.setting import Setting

#: The most workers that start before the first round, which seldom has fewer clients.
_EARLY = 8


@dataclass(eq=False)
class Hired:
    """A worker, and what it holds of which machine."""

    actor: Any
    resources: Resources
    machine: Machine
    gpus: dict[int, float]
    placed: Any  # a reference that is there once Ray has found room
    started: Any  # a reference that is there once the app is loaded
    _placed: bool = False
    _ready: bool = False

    def has_room(self) -> bool:
        """Whether the worker has its resources; until then Ray keeps it waiting."""
        import ray

        self._placed = self._placed or bool(ray.wait([self.placed], timeout=0)[0])
        return self._placed

    def ready(self) -> bool:
        """Whether the worker has started and loaded the app, or failed to."""
        import ray

        self._ready = self._ready or bool(ray.wait([self.started], timeout=0)[0])
        return self._ready

    def has_worked(self) -> bool:
        """Whether a worker that is dead now had come so far as to run clients."""
        import ray

        try:
            ray.get(self.started, timeout=0)
        except ray.exceptions.RayError:
            return False
        return True


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


class Pool:
    """Starts workers, lends them, and stops idle ones to make room for others.

    Parameters
    ----------
    setting : Setting
        For every worker.
    hold_cpus : bool
        Whether Ray is told of the CPUs that the workers use. Inside Flower's engine it
        is not: Flower's own workers, which then only wait, hold them all.
    """

    def __init__(self, setting: Setting, *, hold_cpus: bool) -> None:
        import ray
        from ray import cloudpickle

        # Workers are told how to run a client, not where: a function of the user's
        # that says so may not even be picklable.
        told = replace(setting, resources={}, num_examples=None)
        self._pickled = cloudpickle.dumps(told)  # type: ignore[no-untyped-call]
        self._remote: Any = ray.remote(worker_class())
        self._paths = [path for path in sys.path if path]
        self._limit = setting.num_workers
        self._hold_cpus = hold_cpus
        self._idle: list[Hired] = []
        self._busy: set[Hired] = set()
        self.machines: list[Machine] = []
        self.look_again()

    def room(self, resources: Resources) -> int:
        """Return how many workers with these resources can work at the same time."""
        count = 0
        for machine in [machine.empty() for machine in self.machines]:
            while count != self._limit:
                gpus = machine.place(resources)
                if gpus is None:
                    break
                machine.take(resources, gpus)
                count += 1
        return count

    def prepare(self, resources: Resources, num_clients: int) -> None:
        """Start workers before it is known how many clients a round has."""
        most = min(num_clients, _EARLY)
        while self._size() < most and (worker := self._start(resources)):
            self.give_back(worker)

    def hire(self, resources: Resources) -> Hired | None:
        """Lend a worker with these resources, or None while there is no room for it."""
        for worker in self._idle:
            if worker.resources == resources:
                self._idle.remove(worker)
                self._busy.add(worker)
                return worker
        found = self._start(resources)
        # While one like it works, idle others may stay: starting takes seconds.
        if all(worker.resources != resources for worker in self._busy):
            while found is None and self._idle:  # those that idle longest first
                self.dismiss(self._idle[0])
                found = self._start(resources)
        return found

    def _start(self, resources: Resources) -> Hired | None:
        if self._limit is not None and self._size() >= self._limit:
            return None
        # The emptiest machine first: clients spread over a cluster.
        for machine in sorted(self.machines, key=self._load):
            gpus = machine.place(resources)
            if gpus is not None:
                machine.take(resources, gpus)
                actor = self._actor(resources, machine)
                placed, started = actor.placed.remote(), actor.ready.remote()
                worker = Hired(actor, resources, machine, gpus, placed, started)
                self._busy.add(worker)
                return worker
        return None

    def _load(self, machine: Machine) -> tuple[int, float]:
        here = sum(w.machine is machine for w in [*self._busy, *self._idle])
        return here, -machine.cpus

    def _size(self) -> int:
        return len(self._idle) + len(self._busy)

    def _actor(self, resources: Resources, machine: Machine) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Not restarted by Ray: the transport knows what a dead worker was running. On
        # this machine or nowhere: what is free there was counted.
        options = {
            "num_cpus": resources.num_cpus if self._hold_cpus else 0,
            "num_gpus": resources.num_gpus,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(
                machine.name, soft=False
            ),
        }
        threads = max(1, int(resources.num_cpus))
        actor = self._remote.options(**options)
        return actor.remote(self._pickled, self._paths, threads)

    def others(self, worker: Hired) -> bool:
        """Whether there is another worker like this one that has room."""
        others = [other for other in [*self._busy, *self._idle] if other is not worker]
        return any(
            other.resources == worker.resources and other.has_room() for other in others
        )

    def do_without(self, worker: Hired) -> None:
        """Stop a worker; what it waits for is somebody else's and stays taken."""
        self._stop(worker)

    def give_back(self, worker: Hired) -> None:
        """Take back a worker that is done."""
        self._busy.discard(worker)
        self._idle.append(worker)

    def dismiss(self, worker: Hired) -> None:
        """Stop a worker and free what it held."""
        self._stop(worker)
        worker.machine.give_back(worker.resources, worker.gpus)

    def _stop(self, worker: Hired) -> None:
        import ray

        with contextlib.suppress(Exception):  # it may be dead
            ray.kill(worker.actor)
        self._busy.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)

    def look_again(self) -> None:
        """Forget machines that have left Ray; welcome new ones."""
        import ray

        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        now = {machine.name: machine for machine in ray_machines(nodes)}
        known = {machine.name: machine for machine in self.machines}
        # A machine that stays keeps what is taken of it.
        self.machines = [known.get(name, machine) for name, machine in now.items()]
        # Who says how many workers there are has thought of the CPUs.
        if self._limit is not None:
            for machine in self.machines:
                machine.cpus = math.inf

    def avoid(self, machine: Machine) -> None:
        """Do without a machine on which workers do not start, if there is another."""
        if len(self.machines) > 1 and machine in self.machines:
            self.machines.remove(machine)

    def close(self) -> None:
        """Stop all workers."""
        for worker in [*self._busy, *self._idle]:
            self.dismiss(worker)
