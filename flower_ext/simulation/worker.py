"""The process that runs virtual clients, one after the other."""

import ctypes
import gc
import os
import pickle
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import Error
from flwr.clientapp import ClientApp

from flower_ext._flower import make_arrays_by, unchecked
from flower_ext.core.contribution import Total
from flower_ext.core.held import flower_array, holding_replies
from flower_ext.core.meeting import at_once
from flower_ext.server.partial_sums import PackSum, PartialSum, Summand, Summed
from flower_ext.simulation.clients import load_client_app, run_clients
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.records import Record, Wire, from_wire, from_wires, to_wires
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import Kept, PackStates, Shelf
from flower_ext.wire.traffic import Traffic


@dataclass(frozen=True)
class WireJob:
    """A job as it travels."""

    job: Job
    own: dict[str, Wire]

    @classmethod
    def of(cls, job: Job) -> "WireJob":
        """Make it of a job, whose own records travel beside it."""
        if not job.own:
            return cls(job, {})
        return cls(replace(job, own={}), to_wires(job.own))


@dataclass(frozen=True)
class Answer:
    """An outcome as it travels."""

    key: int
    content: dict[str, Wire] | None
    error: Error | None
    seconds: float
    #: Of a reply that was to be added up: what it was, and why it is in no sum.
    summed: tuple[Traffic, str] | None = None

    @classmethod
    def of(cls, outcome: Outcome, client: int, into: PartialSum | None) -> "Answer":
        """Make it of an outcome, whose arrays stay here if they are added up."""
        key, content, seconds = outcome.key, outcome.content, outcome.seconds
        if content is None:
            return cls(key, None, outcome.error, seconds)
        if into is None:
            return cls(key, to_wires(content), None, seconds)
        rest = into.add(content, client)
        return cls(key, to_wires(rest), None, seconds, (rest.traffic, rest.problem))

    def is_in_sum(self) -> bool:
        """Whether the reply was added up."""
        return self.summed is not None and not self.summed[1]

    def outcome(self, pack: PackSum | None) -> Outcome:
        """Return it as the grid takes it; ``pack`` is the sum it may be in."""
        if self.content is None:
            return Outcome(self.key, None, self.error, self.seconds)
        if self.summed is None:
            content = from_wires(self.content)
            return Outcome(self.key, content, None, self.seconds)
        rest = unchecked(
            Summed(), {key: from_wire(wire) for key, wire in self.content.items()}
        )
        rest.traffic, rest.problem = self.summed
        rest.pack = None if rest.problem else pack
        return Outcome(self.key, rest, None, self.seconds)


@dataclass(frozen=True)
class PackAnswer:
    """What came of a pack.

    Attributes
    ----------
    answers : list of Answer
        In the order of the jobs.
    total : Total or None
        The sum of their replies, if they were to be added up.
    changed : dict[int, Kept or None]
        New states; None is an empty one.
    at_once : int
        How many clients the app can run side by side.
    """

    answers: list[Answer]
    total: Total | None
    changed: dict[int, Kept | None]
    at_once: int


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


class Shared(Protocol):
    """Where a :class:`Broadcast` was put."""

    def read(self) -> Broadcast:
        """Return it; in a worker."""


class Worker:
    """Runs packs of virtual clients, in a process of its own.

    The ClientApp is loaded once, and so are the modules that it imports: what they
    keep at module level, such as a data set, stays.

    Parameters
    ----------
    pickled : bytes
        The :class:`Setting` of the clients.
    threads : int
        Of torch and of other libraries.
    """

    def __init__(self, pickled: bytes, threads: int) -> None:
        self._pickled = pickled
        self._threads = threads
        self._app: ClientApp | None = None
        self._setting: Setting
        self._number = -1  # of the broadcast that was read last
        self._shared: list[Record] = []
        self._summand: Summand | None = None

    def run(
        self,
        number: int,
        shared: Shared,
        jobs: list[WireJob],
        lent: dict[int, Kept],
        shelf: Shelf,
    ) -> PackAnswer:
        """Run clients.

        Parameters
        ----------
        number : int
            Which broadcast this is: packs of a round share it, and it is read once.
        shared : Shared
            Where that is.
        jobs : list of WireJob
            One for each client.
        lent : dict[int, Kept]
            The states of those clients that have one.
        shelf : Shelf
            Where large states are.
        """
        app = self.load()
        if number != self._number:
            found = shared.read()
            self._shared = [from_wire(wire) for wire in found.records]
            self._summand, self._number = found.summand, number
        into = PartialSum(self._summand) if self._summand else None
        states = PackStates(lent, shelf)
        clients = [sent.job.client for sent in jobs]
        # What is added up here, before the next client, is not serialised for it.
        with holding_replies() if into else nullcontext():
            outcomes = run_clients(
                app, self._setting, map(_read, jobs), self._shared, states
            )
            answers = [
                Answer.of(outcome, client, into)
                for client, outcome in zip(clients, outcomes, strict=True)
            ]
        total = into.total if into else None
        return PackAnswer(answers, total, states.changed, at_once(app))

    def load(self) -> ClientApp:
        """Load the ClientApp in the first call, with as many threads as CPUs."""
        if self._app is None:
            os.environ["OMP_NUM_THREADS"] = str(self._threads)  # torch reads it once
            # Imports make very many objects that stay: no garbage is looked for
            # meanwhile, nor among them later.
            gc.disable()
            try:
                # Only now: unpickling imports the module that has the app.
                self._setting = pickle.loads(self._pickled)
                app = load_client_app(self._setting.client_app)
            finally:
                gc.freeze()
                gc.enable()
            # Where torch was there before the variable. One that was not imported by
            # the app is not imported for it: that takes seconds.
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(self._threads)
            keep_freed_memory()
            make_arrays_by(flower_array)
            self._app = app
        return self._app


# What glibc calls its parameters, and the bytes that it keeps.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 29


def keep_freed_memory() -> None:
    """Let this process keep memory that was freed, for the next client.

    Otherwise large arrays are given back to the system and asked for again by every
    client, and the system clears them each time, which takes as long as copying them.
    It is no more than was used before. Where there is no glibc, nothing changes.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def _read(sent: WireJob) -> Job:
    """Return a job with what came beside it: Ray shares no arrays of Flower's."""
    if sent.own:
        sent.job.own.update(from_wires(sent.own))
    return sent.job
