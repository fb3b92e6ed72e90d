"""Clients in Ray actors of our own: no polls, nothing copied twice.

The model of a round is put into Ray's object store once; every worker reads it there
and decodes it once. A client's state stays in the object store, where the next worker
that runs the client finds it.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import ERROR, INFO, WARNING
from typing import Any

from flwr.app import Error, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from flower_ext._flower import CLIENT_CRASHED, in_simulation, log
from flower_ext.server.partial_sums import PackSum, Summand
from flower_ext.simulation.clients import over_time
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.machines import Need, ResourcesFunction, require_room
from flower_ext.simulation.packing import Workload
from flower_ext.simulation.ray_pool import Hired, Pool
from flower_ext.simulation.records import Record, to_wire, to_wires
from flower_ext.simulation.transport import Transport
from flower_ext.simulation.worker import Answer, Broadcast, Setting, WireJob

Resources = Mapping[str, float] | ResourcesFunction

_ENGINE_SECONDS = 120.0  # Flower's engine takes 5 to 20 s to start Ray
_START_SECONDS = 60.0  # after which a worker that has no room is worth a warning
_HELD_SECONDS = 600.0  # after which nobody will make room any more
_FALSE_STARTS = 20  # in a row, after which no worker will ever start
_HANG_SECONDS = 5.0  # beyond its limit, for a client to be interrupted


@dataclass
class _Pack:
    """Jobs that one worker runs in one go."""

    jobs: list[Job]
    need: Need
    number: int
    shared: list[Any]
    again: bool = False
    worker: Hired | None = None
    states: Any = None
    sent: float = 0.0
    begun: float | None = None  # once its worker was ready


class RayTransport(Transport):
    """Runs clients in Ray actors.

    Parameters
    ----------
    grid : Grid or None
        That of Flower's simulation engine, whose Ray is used; without it, the Ray of
        this process, which is started if it does not run.
    client_app : ClientApp or str
        The ClientApp, or its import string ``"package.module:app"``.
    num_clients, run_id, run_config
        What goes into every client's context.
    num_workers : int or None
        Most workers; None takes as many as have CPUs and GPUs.
    resources : Mapping or callable
        What a client needs: the same for all, or by client.
    client_timeout : float or None
        Seconds a client may take.
    workload : Workload
        Makes the packs.
    """

    def __init__(
        self,
        grid: Grid | None,
        client_app: ClientApp | str,
        num_clients: int,
        run_id: int,
        run_config: UserConfig,
        num_workers: int | None,
        resources: Resources,
        client_timeout: float | None,
        workload: Workload,
    ) -> None:
        self._resources = resources
        self._run_config = run_config
        self._client_timeout = client_timeout
        self._workload = workload
        self._needs: dict[int, Need] = {}
        self._waiting: list[_Pack] = []
        self._running: dict[Any, _Pack] = {}
        self._states: dict[int, Any] = {}
        self._warned: set[Need] = set()
        self._told = False  # that there are no partial sums
        self._false_starts = 0  # in a row
        self._numbers = itertools.count()
        from ray import cloudpickle

        self._inside = inside = in_simulation(grid)
        self._own_ray = _connect(inside)
        setting = Setting(
            cloudpickle.dumps(client_app),  # type: ignore[no-untyped-call]
            [path for path in sys.path if path],
            num_clients,
            run_id,
            run_config,
            client_timeout,
        )
        self._pool = Pool(setting, num_workers, hold_cpus=not inside)
        clients = range(num_clients) if callable(resources) else range(1)
        needs: dict[Need, int] = {}
        for client in clients:
            needs.setdefault(self._need(client), client)
        require_room(self._pool.machines, needs)
        if inside and any(need.num_gpus for need in needs):
            _require_free_gpus()

    def _need(self, client: int) -> Need:
        if not callable(self._resources):
            client = 0
        if client not in self._needs:
            asked = self._resources
            self._needs[client] = Need.of(
                asked(client, self._run_config) if callable(asked) else asked
            )
        return self._needs[client]

    def submit(
        self,
        jobs: Sequence[Job],
        shared: Sequence[Record],
        summand: Summand | None = None,
    ) -> None:
        """Deal jobs out to packs and start as many as there are workers."""
        import ray

        records = [to_wire(record) for record in shared]
        try:
            reference = [ray.put(Broadcast(records, summand))]
        except Exception as problem:  # something in the strategy cannot be pickled
            if summand is None:
                raise
            if not self._told:
                log(WARNING, "Rounds run without partial sums: %s", problem)
            self._told, summand = True, None
            reference = [ray.put(Broadcast(records, None))]
        number = next(self._numbers)
        alike: dict[tuple[Need, str], list[Job]] = {}
        for job in jobs:
            alike.setdefault((self._need(job.client), job.kind), []).append(job)
        for need, kind in sorted(alike, reverse=True):  # the hardest to place first
            for pack in self._workload.packs(
                alike[need, kind], max(self._pool.room(need), 1), summed=bool(summand)
            ):
                self._waiting.append(_Pack(pack, need, number, reference))
        self._start()

    def _start(self) -> None:
        """Start waiting packs while there is room."""
        no_room: set[Need] = set()
        for pack in list(self._waiting):
            if pack.need in no_room:
                continue
            worker = self._pool.hire(pack.need)
            if worker is None:
                no_room.add(pack.need)
                continue
            self._waiting.remove(pack)
            pack.worker, pack.sent = worker, time.monotonic()
            sent = [
                WireJob(
                    replace(job, own={}),
                    to_wires(RecordDict(job.own)),
                    self._states.get(job.client),
                )
                for job in pack.jobs
            ]
            answers, pack.states = worker.actor.run.options(num_returns=2).remote(
                pack.number, pack.shared, sent
            )
            self._running[answers] = pack
        if self._waiting and not self._running:
            self._pool.look_again()
            require_room(
                self._pool.machines,
                {pack.need: pack.jobs[0].client for pack in self._waiting},
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
            patience = self._patience(end)
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=patience)
            if done and len(self._running) > 1:
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

    def _finish(self, reference: Any) -> Iterator[Outcome]:
        """Fetch the answers of a pack, or deal with the death of its worker."""
        import ray

        pack = self._running[reference]
        assert pack.worker is not None
        try:
            answers: list[Answer]
            answers, total = ray.get(reference)
        except ray.exceptions.RayTaskError as problem:
            self._running.pop(reference)
            self._pool.give_back(pack.worker)
            raise RuntimeError(f"a worker cannot run clients: {problem}") from problem
        except ray.exceptions.RayError as problem:
            if "creation task" in str(problem):  # no worker would ever start
                raise RuntimeError(f"no worker can start: {problem}") from problem
            yield from self._lost(reference, str(problem))
            return
        self._running.pop(reference)
        self._pool.give_back(pack.worker)
        self._false_starts = 0
        done = list(zip(pack.jobs, answers, strict=True))
        together = None
        if total is not None:
            clients = [job.client for job, answer in done if answer.is_in_sum()]
            together = PackSum(total, frozenset(clients))
        for job, answer in done:
            if answer.state == "new":
                self._states[job.client] = pack.states
            elif answer.state == "none":
                self._states.pop(job.client, None)
            yield answer.outcome(together)
        timed = [(job.client, answer.seconds) for job, answer in done]
        self._workload.learn_pace(pack.jobs[0].kind, timed)

    def _lost(self, reference: Any, reason: str) -> Iterator[Outcome]:
        """Run the clients of a dead worker once more, each alone.

        None of their replies has arrived, so nothing counts twice. A client whose
        worker dies again is to blame, or has bad luck: that is its error.
        """
        pack = self._running.pop(reference)
        worker = pack.worker
        assert worker is not None
        self._pool.dismiss(worker)
        clients = [job.client for job in pack.jobs]
        reason = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        if not worker.has_worked():
            self._never_started(worker, reason)
            self._waiting.append(replace(pack, worker=None, begun=None))
            return
        self._pool.look_again()
        if pack.again:
            log(WARNING, "A worker died again while it ran client %s", *clients)
            error = Error(CLIENT_CRASHED, f"its worker process died: {reason}")
            yield from (Outcome(job.key, None, error) for job in pack.jobs)
            return
        log(
            WARNING,
            "A worker died while it ran clients %s, which are run again: %s",
            clients,
            reason,
        )
        self._waiting += [
            replace(pack, jobs=[job], again=True, worker=None, begun=None)
            for job in pack.jobs
        ]

    def _never_started(self, worker: Hired, reason: str) -> None:
        """Try elsewhere; no client is to blame."""
        self._false_starts += 1
        log(WARNING, "A worker died before it could run a client: %s", reason)
        if self._false_starts > _FALSE_STARTS:
            raise RuntimeError(f"no worker stays alive: {reason}")
        self._pool.avoid(worker.machine)

    def _patience(self, end: float | None) -> float | None:
        """Return how long to wait before looking at what the workers do."""
        moments = [] if end is None else [end]
        now = time.monotonic()
        for pack in self._running.values():
            if pack.begun is None:
                moments.append(now + 1.0)
            elif (due := self._due(pack)) is not None:
                moments.append(due)
        return max(0.0, min(moments) - now) if moments else None

    def _look_at_starts(self) -> None:
        """Note which workers have started; do without those that never will."""
        now = time.monotonic()
        for reference, pack in list(self._running.items()):
            worker = pack.worker
            assert worker is not None
            if pack.begun is not None:
                continue
            if worker.ready():
                pack.begun = now
            elif now > pack.sent + _START_SECONDS and not worker.has_room():
                if self._pool.others(worker):  # which do the work, later
                    self._running.pop(reference)
                    self._pool.do_without(worker)
                    self._waiting.append(replace(pack, worker=None))
                self._say_who_holds(pack, now - pack.sent)

    def _say_who_holds(self, pack: _Pack, seconds: float) -> None:
        """Warn that there is no room; end the run where there will never be any."""
        reason = (
            f"a worker that needs {pack.need} has waited {seconds:.0f} s for others "
            f"that hold it ({_free()}): Flower's own workers, another grid that was "
            "not closed, or somebody else's work"
        )
        limit = _START_SECONDS if self._inside else _HELD_SECONDS
        if seconds > limit and pack.worker and not self._pool.others(pack.worker):
            raise RuntimeError(f"no worker can start: {reason}")
        if pack.need not in self._warned:
            self._warned.add(pack.need)
            log(WARNING, "Not all workers can start: %s", reason)

    def _due(self, pack: _Pack) -> float | None:
        """Return when a pack has taken so long that it must hang."""
        if self._client_timeout is None or pack.begun is None:
            return None
        return pack.begun + self._client_timeout * len(pack.jobs) + _HANG_SECONDS

    def _stop_hung(self) -> list[Outcome]:
        """Stop workers whose client cannot be interrupted from within."""
        now = time.monotonic()
        outcomes: list[Outcome] = []
        for reference, pack in list(self._running.items()):
            due = self._due(pack)
            if due is None or now < due:
                continue
            if len(pack.jobs) > 1:
                outcomes += self._lost(reference, "a client hangs")
                continue
            self._running.pop(reference)
            assert pack.worker is not None
            self._pool.dismiss(pack.worker)
            error = over_time(self._client_timeout)
            outcomes.append(Outcome(pack.jobs[0].key, None, error))
        return outcomes

    def give_up(self, keys: Iterable[int]) -> None:
        """Drop waiting jobs, and stop the workers of running ones."""
        gone = set(keys)
        for pack in list(self._waiting):
            pack.jobs = [job for job in pack.jobs if job.key not in gone]
            if not pack.jobs:
                self._waiting.remove(pack)
        for reference, pack in list(self._running.items()):
            if any(job.key in gone for job in pack.jobs):
                self._running.pop(reference)
                assert pack.worker is not None
                self._pool.dismiss(pack.worker)
                if rest := [job for job in pack.jobs if job.key not in gone]:
                    self._waiting.append(
                        replace(pack, jobs=rest, worker=None, begun=None)
                    )

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here."""
        import ray

        self._waiting.clear()
        self._running.clear()
        self._states.clear()
        if ray.is_initialized():
            self._pool.close()
            if self._own_ray:
                ray.shutdown()


def _connect(inside: bool) -> bool:
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
    if ray.is_initialized():
        return False
    log(INFO, "Starting Ray")
    paths = os.pathsep.join([*filter(None, sys.path), os.environ.get("PYTHONPATH", "")])
    ray.init(
        include_dashboard=False,
        logging_level=ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": paths.rstrip(os.pathsep)}},
    )
    return True


def _require_free_gpus() -> None:
    """Refuse to wait for GPUs that Flower's own workers hold.

    Flower starts them after its Ray, all of a size: the first one tells. Where none
    comes, the wait for a worker of the grid ends with the reason.
    """
    import ray

    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    end = time.monotonic() + _START_SECONDS
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
        if held["CPU"] > 0:
            return
        time.sleep(0.1)


def _free() -> str:
    import ray

    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return " and ".join(
        f"{free.get(key, 0):g} of {there.get(key, 0):g} {key}s are free"
        for key in ("CPU", "GPU")
    )
