"""Workers: as many as fit, with the resources that are asked for."""

import math
from contextlib import suppress

from flower_ext.simulation.machines import Machine, Resources
from flower_ext.simulation.workplace import Hired, Workplace

#: The most workers that start before the first round, which seldom has fewer clients.
_EARLY = 8


class Pool:
    """Starts workers, lends them, and stops idle ones to make room for others.

    Parameters
    ----------
    workplace : Workplace
        Where they are.
    limit : int or None
        The most workers; None starts as many as fit.
    """

    def __init__(self, workplace: Workplace, limit: int | None) -> None:
        self._workplace = workplace
        self._limit = limit
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
                worker = self._workplace.start(resources, machine, gpus)
                self._busy.add(worker)
                return worker
        return None

    def _load(self, machine: Machine) -> tuple[int, float]:
        here = sum(w.machine is machine for w in [*self._busy, *self._idle])
        return here, -machine.cpus

    def _size(self) -> int:
        return len(self._idle) + len(self._busy)

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
        with suppress(Exception):  # it may be dead
            worker.stop()
        self._busy.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)

    def look_again(self) -> None:
        """Forget machines that have left; welcome new ones."""
        now = {machine.name: machine for machine in self._workplace.machines()}
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
