"""Clients in Ray actors of our own: no polls, nothing copied twice.

The model of a round is put into Ray's object store once; every worker reads it there
and decodes it once. A client's state travels with its work, or its name does where
driver and worker see the same folder.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

from flwr.serverapp import Grid

from flower_ext._flower import in_simulation, log
from flower_ext.server.partial_sums import PackSum, Summand
from flower_ext.simulation import policy
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.machines import Resources, require_room
from flower_ext.simulation.packing import Workload
from flower_ext.simulation.policy import Attempt, Pack, Policy, Verdict
from flower_ext.simulation.ray_pool import Hired, Pool
from flower_ext.simulation.ray_session import (
    connect,
    free,
    require_free_gpus,
    this_machine,
)
from flower_ext.simulation.records import Record, to_wire
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import ClientStates
from flower_ext.simulation.transport import Transport
from flower_ext.simulation.worker import Broadcast, PackAnswer, WireJob


@dataclass(kw_only=True, eq=False)
class _Running(Attempt):
    """A pack at a worker."""

    worker: Hired


class RayTransport(Transport):
    """Runs clients in Ray actors.

    Parameters
    ----------
    grid : Grid or None
        That of Flower's simulation engine, whose Ray is used; without it, the Ray of
        this process, which is started if it does not run.
    setting : Setting
        Of the clients.
    """

    def __init__(self, grid: Grid | None, setting: Setting) -> None:
        inside = in_simulation(grid)
        self._own_ray = connect(inside)
        self._setting = setting
        self.workload: Workload = Workload(setting.num_examples)
        self._pool = Pool(setting, hold_cpus=not inside)
        # Flower's own workers, which hold what is not free, never let go of it.
        held = policy.START_SECONDS if inside else policy.HELD_SECONDS
        self._policy = Policy(setting.client_timeout, held)
        memory = setting.state_memory
        self.states: ClientStates = ClientStates(setting.num_clients, memory)
        self._here = this_machine()
        self._waiting: list[Pack] = []
        self._running: dict[Any, _Running] = {}  # by the reference to their answers
        self._numbers = itertools.count()
        self._told = False  # that there are no partial sums
        # Asked of all clients now: what cannot run is refused before the first round.
        self._resources: dict[int, Resources] = {}
        clients = range(setting.num_clients if callable(setting.resources) else 1)
        first: dict[Resources, int] = {}
        for client in clients:
            first.setdefault(self._resources_of(client), client)
        require_room(self._pool.machines, first)
        if inside and any(resources.num_gpus for resources in first):
            require_free_gpus()
        if len(first) == 1:  # of several sizes, it is not known which come first
            self._pool.prepare(next(iter(first)), setting.num_clients)

    def _resources_of(self, client: int) -> Resources:
        asked = self._setting.resources
        if not callable(asked):
            client = 0  # one entry for all
        if client not in self._resources:
            if callable(asked):
                asked = asked(client, self._setting.run_config)
            self._resources[client] = Resources.of(asked)
        return self._resources[client]

    def submit(
        self,
        jobs: Sequence[Job],
        shared: Sequence[Record],
        summand: Summand | None = None,
    ) -> None:
        """Make packs of jobs and start as many as there are workers."""
        broadcast, summed = self._broadcast(shared, summand)
        alike: dict[tuple[Resources, str], list[Job]] = {}
        for job in jobs:
            alike.setdefault((self._resources_of(job.client), job.kind), []).append(job)
        # The hardest to place first.
        for (resources, _), same in sorted(alike.items(), reverse=True):
            workers = max(self._pool.room(resources), 1)
            packs = self.workload.packs(same, workers, summed=summed)
            self._waiting += [Pack(pack, resources, broadcast) for pack in packs]
        self._start()

    def _broadcast(
        self, shared: Sequence[Record], summand: Summand | None
    ) -> tuple[tuple[int, list[Any]], bool]:
        """Put what all packs read into the object store, once.

        Returns
        -------
        tuple
            Its number and, in a list, the reference; in a list Ray hands it on as it
            is, and each worker fetches it once a round instead of once a pack.
        bool
            Whether workers can add up replies.
        """
        import ray

        records = [to_wire(record) for record in shared]
        try:
            reference = ray.put(Broadcast(records, summand))
        except Exception as problem:  # something in the strategy cannot be pickled
            if summand is None:
                raise
            if not self._told:
                log(WARNING, "Rounds run without partial sums: %s", problem)
            self._told, summand = True, None
            reference = ray.put(Broadcast(records, None))
        return (next(self._numbers), [reference]), summand is not None

    def _start(self) -> None:
        """Start waiting packs while there is room."""
        no_room: set[Resources] = set()
        waiting, self._waiting = self._waiting, []
        for pack in waiting:
            asked = pack.resources
            worker = None if asked in no_room else self._pool.hire(asked)
            if worker is None:
                no_room.add(asked)
                self._waiting.append(pack)
            else:
                self._send(pack, worker)
        if self._waiting and not self._running:
            # Nobody will make room: either a machine has come, or none ever will.
            self._pool.look_again()
            require_room(
                self._pool.machines,
                {pack.resources: pack.jobs[0].client for pack in self._waiting},
            )

    def _send(self, pack: Pack, worker: Hired) -> None:
        sent = [WireJob.of(job) for job in pack.jobs]
        lent = self.states.lend(
            (job.client for job in pack.jobs), named=worker.machine.name == self._here
        )
        answers = worker.actor.run.remote(
            *pack.broadcast, sent, lent, self.states.shelf()
        )
        self._running[answers] = _Running(
            pack=pack, sent=time.monotonic(), worker=worker
        )

    def wait(self, seconds: float | None) -> list[Outcome]:
        """Return the outcomes of packs as they end."""
        import ray

        end = None if seconds is None else time.monotonic() + seconds
        while True:
            self._look_at_starts()
            self._start()
            if not self._running:
                return []
            now = time.monotonic()
            patience = self._policy.patience(self._running.values(), now, end)
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=patience)
            if done and len(self._running) > 1:  # others may have come with it
                done, _ = ray.wait(
                    list(self._running), num_returns=len(self._running), timeout=0
                )
            outcomes = [outcome for ref in done for outcome in self._finish(ref)]
            outcomes += self._stop_hung()
            if outcomes:
                self._start()  # workers work while the outcomes are used
                return outcomes
            if end is not None and time.monotonic() >= end:
                return []

    def _look_at_starts(self) -> None:
        """Note which workers have started; do without those that never will."""
        now = time.monotonic()
        for reference, running in list(self._running.items()):
            worker = running.worker
            if running.begun is None and worker.ready():
                running.begun = now
            elif self._policy.is_late(running, now) and not worker.has_room():
                others = self._pool.others(worker)
                if self._policy.no_room(running, now, others, free()):
                    self._running.pop(reference)
                    self._pool.do_without(worker)
                    self._waiting.append(running.pack)

    def _finish(self, reference: Any) -> list[Outcome]:
        """Fetch the answers of a pack, or find that its worker has died."""
        import ray

        try:
            done: PackAnswer = ray.get(reference)
        except ray.exceptions.RayTaskError as problem:
            # What runs outside of clients has failed, and will again.
            self._pool.give_back(self._running.pop(reference).worker)
            raise RuntimeError(f"a worker cannot run clients: {problem}") from problem
        except ray.exceptions.RayError as problem:
            if "creation task" in str(problem):  # no worker would ever start
                raise RuntimeError(f"no worker can start: {problem}") from problem
            return self._lost(reference, str(problem))
        running = self._running.pop(reference)
        self._pool.give_back(running.worker)
        self._policy.answered()
        self.states.take_back(done.changed)
        self.workload.at_once = done.at_once
        return self._read(running.pack, done)

    def _read(self, pack: Pack, done: PackAnswer) -> list[Outcome]:
        """Turn the answers of a pack into outcomes."""
        clients = [job.client for job in pack.jobs]
        together = None
        if done.total is not None:
            answered = zip(clients, done.answers, strict=True)
            summed = frozenset(c for c, answer in answered if answer.is_in_sum())
            together = PackSum(done.total, summed)
        outcomes = [answer.outcome(together) for answer in done.answers]
        timed = list(zip(clients, outcomes, strict=True))
        self.workload.learn(pack.jobs[0].kind, timed)
        return outcomes

    def _lost(self, reference: Any, reason: str) -> list[Outcome]:
        """Replace a worker that died."""
        running = self._dismiss(reference)
        reason = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        if not running.worker.has_worked():
            verdict = self._policy.false_start(running.pack, reason)
            self._pool.avoid(running.worker.machine)
        else:
            verdict = self._policy.died(running.pack, reason)
            self._pool.look_again()  # its machine may have left
        return self._carry_out(verdict)

    def _stop_hung(self) -> list[Outcome]:
        """Stop workers whose client cannot be interrupted from within."""
        now = time.monotonic()
        outcomes: list[Outcome] = []
        for reference, running in list(self._running.items()):
            if verdict := self._policy.hung(running, now):
                self._dismiss(reference)
                outcomes += self._carry_out(verdict)
        return outcomes

    def _dismiss(self, reference: Any) -> _Running:
        """Stop a worker; what it may still answer is forgotten."""
        running = self._running.pop(reference)
        self._pool.dismiss(running.worker)
        return running

    def _carry_out(self, verdict: Verdict) -> list[Outcome]:
        self._waiting += verdict.again
        return verdict.outcomes

    def give_up(self, keys: Iterable[int]) -> None:
        """Drop waiting jobs, and stop the workers of running ones."""
        gone = set(keys)
        left = [pack.without(gone) for pack in self._waiting]
        for reference, running in list(self._running.items()):
            if any(job.key in gone for job in running.pack.jobs):
                left.append(self._dismiss(reference).pack.without(gone))
        self._waiting = [pack for pack in left if pack is not None]

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here."""
        import ray

        self._waiting.clear()
        self._running.clear()
        self.states.close()
        if ray.is_initialized():
            self._pool.close()
            if self._own_ray:
                ray.shutdown()
