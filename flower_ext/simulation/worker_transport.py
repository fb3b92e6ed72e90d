"""Clients in workers of the grid's own: no polls, nothing copied twice.

The model of a round is put into shared memory once; every worker reads it there and
decodes it once. A client's state travels with its work, or its name does where
driver and worker see the same folder.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

from flower_ext._flower import log
from flower_ext.server.partial_sums import PackSum, Summand
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.machines import Resources, require_room
from flower_ext.simulation.packing import Workload
from flower_ext.simulation.policy import Attempt, Pack, Policy, Verdict
from flower_ext.simulation.pool import Pool
from flower_ext.simulation.records import Record, to_wire
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import ClientStates
from flower_ext.simulation.transport import Transport
from flower_ext.simulation.worker import Broadcast, PackAnswer, Shared, WireJob
from flower_ext.simulation.workplace import (
    CannotStart,
    Hired,
    WorkerDied,
    WorkerFailed,
    Workplace,
)


@dataclass(kw_only=True, eq=False)
class _Running(Attempt):
    """A pack at a worker."""

    worker: Hired


class WorkerTransport(Transport):
    """Runs clients in workers, which stay from round to round.

    Parameters
    ----------
    workplace : Workplace
        Where the workers are; closed with the transport.
    setting : Setting
        Of the clients.
    """

    def __init__(self, workplace: Workplace, setting: Setting) -> None:
        self._workplace = workplace
        self._setting = setting
        self.workload: Workload = Workload(setting.num_examples)
        self._pool = Pool(workplace, setting.num_workers)
        self._policy = Policy(setting.client_timeout, workplace.held_seconds)
        memory = setting.state_memory
        self.states: ClientStates = ClientStates(setting.num_clients, memory)
        self._waiting: list[Pack] = []
        self._running: dict[Any, _Running] = {}  # by what the worker was asked
        self._numbers = itertools.count()
        self._told = False  # that there are no partial sums
        # Asked of all clients now: what cannot run is refused before the first round.
        self._resources: dict[int, Resources] = {}
        clients = range(setting.num_clients if callable(setting.resources) else 1)
        first: dict[Resources, int] = {}
        for client in clients:
            first.setdefault(self._resources_of(client), client)
        require_room(self._pool.machines, first)
        workplace.require_free(first)
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
    ) -> tuple[tuple[int, Shared], bool]:
        """Put what all packs read where the workers are, once.

        Returns
        -------
        tuple
            Its number, and where it is.
        bool
            Whether workers can add up replies.
        """
        records = [to_wire(record) for record in shared]
        try:
            put = self._workplace.share(Broadcast(records, summand))
        except Exception as problem:  # something in the strategy cannot be pickled
            if summand is None:
                raise
            if not self._told:
                log(WARNING, "Rounds run without partial sums: %s", problem)
            self._told, summand = True, None
            put = self._workplace.share(Broadcast(records, None))
        return (next(self._numbers), put), summand is not None

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
            (job.client for job in pack.jobs),
            named=worker.machine.name == self._workplace.here,
        )
        asked = worker.ask(*pack.broadcast, sent, lent, self.states.shelf())
        self._running[asked] = _Running(pack=pack, sent=time.monotonic(), worker=worker)

    def wait(self, seconds: float | None) -> list[Outcome]:
        """Return the outcomes of packs as they end."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            self._look_at_starts()
            self._start()
            if not self._running:
                return []
            now = time.monotonic()
            patience = self._policy.patience(self._running.values(), now, end)
            done = self._workplace.wait(list(self._running), patience)
            outcomes = [outcome for call in done for outcome in self._finish(call)]
            outcomes += self._stop_hung()
            if outcomes:
                self._start()  # workers work while the outcomes are used
                return outcomes
            if end is not None and time.monotonic() >= end:
                return []

    def _look_at_starts(self) -> None:
        """Note which workers have started; do without those that never will."""
        now = time.monotonic()
        for call, running in list(self._running.items()):
            worker = running.worker
            if running.begun is None and worker.ready():
                running.begun = now
            elif self._policy.is_late(running, now) and not worker.has_room():
                others, free = self._pool.others(worker), self._workplace.free()
                if self._policy.no_room(running, now, others, free):
                    self._running.pop(call)
                    self._pool.do_without(worker)
                    self._waiting.append(running.pack)

    def _finish(self, call: Any) -> list[Outcome]:
        """Fetch the answers of a pack, or find that its worker has died."""
        try:
            done = self._workplace.answer(call)
        except WorkerFailed as problem:
            self._pool.give_back(self._running.pop(call).worker)
            raise RuntimeError(f"a worker cannot run clients: {problem}") from problem
        except CannotStart as problem:
            raise RuntimeError(f"no worker can start: {problem}") from problem
        except WorkerDied as problem:
            return self._lost(call, str(problem))
        running = self._running.pop(call)
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

    def _lost(self, call: Any, reason: str) -> list[Outcome]:
        """Replace a worker that died."""
        running = self._dismiss(call)
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
        for call, running in list(self._running.items()):
            if verdict := self._policy.hung(running, now):
                self._dismiss(call)
                outcomes += self._carry_out(verdict)
        return outcomes

    def _dismiss(self, call: Any) -> _Running:
        """Stop a worker; what it may still answer is forgotten."""
        running = self._running.pop(call)
        self._pool.dismiss(running.worker)
        return running

    def _carry_out(self, verdict: Verdict) -> list[Outcome]:
        self._waiting += verdict.again
        return verdict.outcomes

    def give_up(self, keys: Iterable[int]) -> None:
        """Drop waiting jobs, and stop the workers of running ones."""
        gone = set(keys)
        left = [pack.without(gone) for pack in self._waiting]
        for call, running in list(self._running.items()):
            if any(job.key in gone for job in running.pack.jobs):
                left.append(self._dismiss(call).pack.without(gone))
        self._waiting = [pack for pack in left if pack is not None]

    def close(self) -> None:
        """Stop the workers and leave."""
        self._waiting.clear()
        self._running.clear()
        self.states.close()
        self._pool.close()
        self._workplace.close()
