"""The process that runs virtual clients, one after the other."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from flwr.app import Error, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from flower_ext._flower import NO_REPLY
from flower_ext.simulation.clients import client_context, run_client
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.records import Record, Wire, from_wire, from_wires, to_wires


@dataclass(frozen=True)
class Setting:
    """What all workers of a grid have in common.

    Attributes
    ----------
    app : bytes
        The pickled ClientApp or its import string.
    paths : list of str
        Where the driver finds modules.
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

    def outcome(self) -> Outcome:
        """Return it as the grid takes it."""
        if self.content is None:
            assert self.error is not None
            return Outcome(self.key, None, Error(*self.error), self.seconds)
        return Outcome(self.key, from_wires(self.content), None, self.seconds)


States = dict[int, dict[str, Wire]]


class Worker:
    """Runs packs of virtual clients. A Ray actor is made of this class.

    The ClientApp is loaded once, and so are the modules that it imports: what they
    keep at module level, such as a data set, stays.
    """

    def __init__(self, setting: Setting, threads: int) -> None:
        self._setting = setting
        self._threads = threads
        self._app: ClientApp | None = None
        self._shared: tuple[int, list[Record]] = (-1, [])

    def run(
        self, number: int, shared: list[Any], jobs: list[WireJob]
    ) -> tuple[list[Answer], States | None]:
        """Run clients.

        Parameters
        ----------
        number : int
            Which broadcast ``shared`` is of.
        shared : list
            One reference to the shared records, fetched once a broadcast.
        jobs : list of WireJob
            One for each client.

        Returns
        -------
        list of Answer
            In the order of the jobs.
        dict, optional
            The states of those clients that have one.
        """
        app = self.load()
        if number != self._shared[0]:
            self._shared = (number, [from_wire(wire) for wire in _fetch(shared[0])])
        answers, states = [], States()
        for job in jobs:
            answer, state = self._run_one(app, job)
            answers.append(answer)
            if state:
                states[job.job.client] = state
        return answers, states or None

    def _run_one(
        self, app: ClientApp, sent: WireJob
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
        done = run_client(app, job, self._shared[1], context, setting.client_timeout)
        if done.content is None:
            assert done.error is not None
            error = (done.error.code, done.error.reason or "")
            return Answer(job.key, None, error, done.seconds, "kept"), None
        content = to_wires(done.content)
        after = to_wires(context.state)
        kind: Literal["new", "none"] = "new" if after else "none"
        return Answer(job.key, content, None, done.seconds, kind), after

    def ready(self) -> None:
        """Return when clients can run."""
        self.load()

    def load(self) -> ClientApp:
        """Load the ClientApp in the first call, with as many threads as CPUs."""
        if self._app is None:
            os.environ["OMP_NUM_THREADS"] = str(self._threads)  # torch reads it once
            sys.path += [path for path in self._setting.paths if path not in sys.path]
            from ray import cloudpickle

            app = cloudpickle.loads(self._setting.app)
            if isinstance(app, str):
                module, _, name = app.partition(":")
                app = getattr(import_module(module), name)
            if not isinstance(app, ClientApp):
                raise TypeError(f"client_app={app!r} is no ClientApp")
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
