"""The process that runs virtual clients, one after the other."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flwr.app import Error, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from flower_ext._flower import NO_REPLY
from flower_ext.core.contribution import Total
from flower_ext.server.partial_sums import PackSum, PartialSum, Summand, Summed
from flower_ext.simulation.clients import client_context, load_client_app, run_client
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.records import Record, Wire, from_wire, from_wires, to_wires
from flower_ext.wire.traffic import Traffic


@dataclass(frozen=True)
class Setting:
    """What all workers of a grid have in common.

    Attributes
    ----------
    app : bytes
        The pickled ClientApp or its import string.
    paths : list of str
        Where the driver finds modules; workers look there in the same order.
    num_clients, run_id, run_config
        What goes into every client's context.
    client_timeout : float or None
        Seconds a client may take.
    """

    app: bytes
    paths: list[str]
    num_clients: int
    run_id: int
    run_config: UserConfig
    client_timeout: float | None


@dataclass(frozen=True)
class WireJob:
    """A job as it travels; ``state`` is a reference to what holds the client's."""

    job: Job
    own: dict[str, Wire]
    state: Any


@dataclass(frozen=True)
class Answer:
    """An outcome as it travels, and what became of the client's state.

    A client that failed keeps the state that it had.
    """

    key: int
    content: dict[str, Wire] | None
    error: tuple[int, str] | None
    seconds: float
    state: Literal["kept", "new", "none"]
    #: Of a reply that was to be added up: what it was, and why it is in no sum.
    summed: tuple[Traffic, str] | None = None

    def is_in_sum(self) -> bool:
        """Whether the reply was added up."""
        return self.summed is not None and not self.summed[1]

    def outcome(self, pack: PackSum | None) -> Outcome:
        """Return it as the grid takes it; ``pack`` is the sum it may be in."""
        if self.content is None:
            assert self.error is not None
            return Outcome(self.key, None, Error(*self.error), self.seconds)
        if self.summed is None:
            content = from_wires(self.content)
            return Outcome(self.key, content, None, self.seconds)
        rest = Summed({key: from_wire(wire) for key, wire in self.content.items()})
        rest.traffic, rest.problem = self.summed
        rest.pack = None if rest.problem else pack
        return Outcome(self.key, rest, None, self.seconds)


States = dict[int, dict[str, Wire]]


@dataclass(frozen=True)
class Broadcast:
    """What the clients of a round have in common.

    Attributes
    ----------
    records : list
        Those that the jobs name by place.
    summand : Summand or None
        With it, replies are added up.
    """

    records: list[Wire]
    summand: Summand | None


class Worker:
    """Runs packs of virtual clients. A Ray actor is made of this class.

    The ClientApp is loaded once, and so are the modules that it imports: what they
    keep at module level, such as a data set, stays.
    """

    def __init__(self, setting: Setting, threads: int) -> None:
        self._setting = setting
        self._threads = threads
        self._app: ClientApp | None = None
        self._number = -1
        self._shared: list[Record] = []
        self._summand: Summand | None = None

    def run(
        self, number: int, shared: list[Any], jobs: list[WireJob]
    ) -> tuple[tuple[list[Answer], Total | None], States | None]:
        """Run clients.

        Parameters
        ----------
        number : int
            Which broadcast ``shared`` is of.
        shared : list
            One reference to the :class:`Broadcast`, fetched once.
        jobs : list of WireJob
            One for each client.

        Returns
        -------
        list of Answer
            In the order of the jobs.
        Total, optional
            The sum of their replies, if they are to be added up.
        dict, optional
            The states of those clients that have one.
        """
        app = self.load()
        if number != self._number:
            broadcast: Broadcast = _fetch(shared[0])
            self._shared = [from_wire(wire) for wire in broadcast.records]
            self._summand, self._number = broadcast.summand, number
        into = PartialSum(self._summand) if self._summand else None
        answers, states = [], States()
        for job in jobs:
            answer, state = self._run_one(app, job, into)
            answers.append(answer)
            if state:
                states[job.job.client] = state
        return (answers, into.total if into else None), states or None

    def _run_one(
        self, app: ClientApp, sent: WireJob, into: PartialSum | None
    ) -> tuple[Answer, dict[str, Wire] | None]:
        job, setting = sent.job, self._setting
        try:
            state = _fetch_state(sent.state, job.client)
        except Exception as problem:  # Ray has many names for a lost object
            reason = f"the client's state is lost, it starts anew: {problem}"
            return Answer(job.key, None, (NO_REPLY, reason), 0.0, "none"), None
        context = client_context(
            setting.run_id, job.client, setting.num_clients, state, setting.run_config
        )
        job.own.update(from_wires(sent.own))
        done = run_client(app, job, self._shared, context, setting.client_timeout)
        if done.content is None:
            assert done.error is not None
            error = (done.error.code, done.error.reason or "")
            return Answer(job.key, None, error, done.seconds, "kept"), None
        after = to_wires(context.state)
        kind: Literal["new", "none"] = "new" if after else "none"
        content, summed = done.content, None
        if into:
            content = rest = into.add(content)
            summed = rest.traffic, rest.problem
        wires = to_wires(content)
        return Answer(job.key, wires, None, done.seconds, kind, summed), after

    def placed(self) -> None:
        """Return at once: Ray has found room for this worker."""

    def ready(self) -> None:
        """Return when clients can run."""
        self.load()

    def load(self) -> ClientApp:
        """Load the ClientApp in the first call, with as many threads as CPUs."""
        if self._app is None:
            os.environ["OMP_NUM_THREADS"] = str(self._threads)  # torch reads it once
            # Ray looks in the current folder first, where there may be another version.
            paths = self._setting.paths
            sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
            from ray import cloudpickle

            app = load_client_app(cloudpickle.loads(self._setting.app))
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(self._threads)
            self._app = app
        return self._app


def _fetch(reference: Any) -> Any:
    import ray

    return ray.get(reference)


def _fetch_state(reference: Any, client: int) -> RecordDict:
    if reference is None:
        return RecordDict()
    state: Mapping[str, Wire] = _fetch(reference)[client]
    return from_wires(state)
