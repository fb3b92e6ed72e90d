"""Workers on Ray: as many as fit, of the sizes that are needed."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from flower_ext.simulation.machines import Machine, Need, ray_machines
from flower_ext.simulation.worker import Setting, Worker


@dataclass(eq=False)
class Hired:
    """A worker, and what it holds of which machine."""

    actor: Any
    need: Need
    machine: Machine
    gpus: dict[int, float]
    placed: Any  # a reference that is there once Ray has found room
    started: Any  # a reference that is there once the app is loaded
    _placed: bool = False
    _ready: bool = False

    def has_room(self) -> bool:
        """Whether the worker has what it needs; until then Ray keeps it waiting."""
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


class Pool:
    """Starts workers, lends them, and stops idle ones to make room for other sizes.

    Parameters
    ----------
    setting : Setting
        For every worker.
    limit : int or None
        Most workers at a time; None lets the CPUs decide.
    hold_cpus : bool
        Whether Ray is told of the CPUs that the workers use. Inside Flower's engine it
        is not: Flower's own workers, which then only wait, hold them all.
    """

    def __init__(
        self,
        setting: Setting,
        limit: int | None,
        *,
        hold_cpus: bool,
    ) -> None:
        self._setting = setting
        self._limit = limit
        self._hold_cpus = hold_cpus
        self._idle: list[Hired] = []
        self._busy: set[Hired] = set()
        self.machines: list[Machine] = []
        self.look_again()

    def room(self, need: Need) -> int:
        """Return how many workers of one size can work at the same time."""
        count = 0
        for machine in [machine.empty() for machine in self.machines]:
            while count != self._limit and (gpus := machine.place(need)) is not None:
                machine.take(need, gpus)
                count += 1
        return count

    def hire(self, need: Need) -> Hired | None:
        """Lend a worker of a size, or None while there is no room for it."""
        for worker in self._idle:
            if worker.need == need:
                self._idle.remove(worker)
                self._busy.add(worker)
                return worker
        found = self._start(need)
        # While one of this size works, the others may stay: starting takes seconds.
        if all(worker.need != need for worker in self._busy):
            while found is None and self._idle:
                self.dismiss(self._idle[0])
                found = self._start(need)
        return found

    def _start(self, need: Need) -> Hired | None:
        if self._limit is not None and self._size() >= self._limit:
            return None
        # The emptiest machine first: clients spread over a cluster.
        for machine in sorted(self.machines, key=self._load):
            gpus = machine.place(need)
            if gpus is not None:
                machine.take(need, gpus)
                actor = self._actor(need, machine)
                placed = actor.placed.remote()
                worker = Hired(actor, need, machine, gpus, placed, actor.ready.remote())
                self._busy.add(worker)
                return worker
        return None

    def _load(self, machine: Machine) -> tuple[int, float]:
        here = sum(w.machine is machine for w in [*self._busy, *self._idle])
        return here, -machine.cpus

    def _size(self) -> int:
        return len(self._idle) + len(self._busy)

    def _actor(self, need: Need, machine: Machine) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": need.num_cpus if self._hold_cpus else 0,
            "num_gpus": need.num_gpus,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(
                machine.name, soft=False
            ),
        }
        threads = max(1, int(need.num_cpus))
        return ray.remote(Worker).options(**options).remote(self._setting, threads)

    def others(self, worker: Hired) -> bool:
        """Whether there is another worker of this size that has room."""
        return any(
            other is not worker and other.need == worker.need and other.has_room()
            for other in [*self._busy, *self._idle]
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
        worker.machine.give_back(worker.need, worker.gpus)

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
        self.machines = [known.get(name, machine) for name, machine in now.items()]
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
