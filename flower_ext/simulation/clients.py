"""Running one virtual client: its message, its state, its error, its time."""

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Protocol

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from flower_ext._flower import (
    CLIENT_CRASHED,
    CLIENT_RAISED,
    NO_REPLY,
    ensure_task_identity,
    quick_message,
)
from flower_ext.core.meeting import CLIENTS_OWN, around, at_once, side_by_side
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.records import Record, own_copy, record_dict
from flower_ext.simulation.setting import Setting

Call = Callable[[Message, Context], Message]


class LostState(RuntimeError):
    """A client's state was there and is gone, with the machine that held it."""


class States(Protocol):
    """Where the states of clients are kept between their messages."""

    def read(self, client: int) -> RecordDict:
        """Return a client's state, the caller's own; empty for a new client.

        Raises
        ------
        LostState
            If there was one that cannot be had.
        """

    def write(self, client: int, state: RecordDict) -> None:
        """Keep a client's state."""


class OverTime(BaseException):
    """Ends a client that took too long; no ``except Exception`` catches it."""


def load_client_app(app: object) -> ClientApp:
    """Return a ClientApp, or import it by ``"package.module:app"``.

    Raises
    ------
    TypeError
        If it is none.
    """
    if isinstance(app, str):
        module, _, name = app.partition(":")
        app = getattr(import_module(module), name)
    if not isinstance(app, ClientApp):
        raise TypeError(f"client_app={app!r} is no ClientApp")
    return app


def run_clients(
    call: Call,
    setting: Setting,
    jobs: Iterable[Job],
    shared: Sequence[Record],
    states: States,
) -> Iterator[Outcome]:
    """Run virtual clients, one after the other, or some side by side.

    Parameters
    ----------
    call, setting, shared, states
        As of :func:`run_client`.
    jobs : iterable of Job
        What the clients are asked.

    Yields
    ------
    Outcome
        In the order of the jobs.
    """
    most = at_once(call)
    # A client can be interrupted where it alone is at work.
    if setting.client_timeout is not None:
        most = 1
    run = partial(run_client, call, setting, shared=shared, states=states)
    with around(call):
        for some in _chunks(jobs, most):
            if len(some) == 1:
                yield run(some[0])
                continue
            for outcome, seconds in side_by_side([partial(run, job) for job in some]):
                yield replace(outcome, seconds=seconds)


def _chunks(jobs: Iterable[Job], most: int) -> Iterator[list[Job]]:
    """Cut jobs into those that may run side by side: trainings of different clients."""
    some: list[Job] = []
    for job in jobs:
        trains = job.kind.partition(".")[0] == MessageType.TRAIN
        again = any(job.client == other.client for other in some)
        if some and (len(some) == most or again or not trains):
            yield some
            some = []
        some.append(job)
        if not trains:
            yield some
            some = []
    if some:
        yield some


def run_client(
    call: Call, setting: Setting, job: Job, shared: Sequence[Record], states: States
) -> Outcome:
    """Run one virtual client; whatever it raises is its own error.

    The only place that reads and writes a client's state. It is written when the
    client has replied, so that one that fails is as it was before.

    Parameters
    ----------
    call : callable
        The ClientApp, or what is left of it behind a mod.
    setting : Setting
        Of all clients. ``client_timeout`` interrupts one that executes Python code, in
        the main thread of a process.
    job : Job
        What the client is asked.
    shared : sequence of Record
        Records that the job names by their place.
    states : States
        Where the client's state is.
    """
    ensure_task_identity(setting.run_id)  # without it, Flower makes no messages
    try:
        state = states.read(job.client)
    except LostState as lost:
        # Said once, to the server too: a client that forgets is another client.
        states.write(job.client, RecordDict())
        reason = f"the client's state is lost, it starts anew: {lost}"
        return Outcome(job.key, None, Error(NO_REPLY, reason))
    context = setting.context(job.client, state)
    message = _message(job, shared, context.node_id)
    content, error = None, None
    begun = time.perf_counter()
    try:
        with _limited(setting.client_timeout):
            reply = call(message, context)
        _check(reply, context)
        if reply.has_error():  # a mod may have caught what the client raised
            error = reply.error
        else:
            content = reply.content
    except OverTime:
        error = over_time(setting.client_timeout)
    except CLIENTS_OWN as problem:
        reason = f"{type(problem).__name__}: {problem}\n{traceback.format_exc()}"
        error = Error(CLIENT_RAISED, reason)
    seconds = time.perf_counter() - begun
    if content is not None:
        states.write(job.client, context.state)
    return Outcome(job.key, content, error, seconds)


def _message(job: Job, shared: Sequence[Record], node: int) -> Message:
    """Make a client's message, of records that it may spoil."""
    records = {name: own_copy(shared[place]) for name, place in job.shared.items()}
    records |= {name: own_copy(record) for name, record in job.own.items()}
    content = record_dict(records)
    return quick_message(content, node, job.kind, job.group, str(job.key))


def _check(reply: object, context: Context) -> None:
    """Refuse what would not fail here but later, in code that is no client's."""
    if not isinstance(reply, Message):
        raise TypeError(f"a client must return a Message, not {reply!r}")
    if not isinstance(context.state, RecordDict):
        raise TypeError(f"context.state must be a RecordDict, not {context.state!r}")


def over_time(limit: float | None) -> Error:
    """Return the error of a client that was stopped for taking too long."""
    return Error(
        CLIENT_CRASHED, f"the client was stopped after client_timeout={limit:g} s"
    )


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Interrupt what takes too long, by the only means that needs no help from it."""
    # Python handles signals in the main thread. In another, or where a client executes
    # no Python code, the worker is stopped from outside.
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise OverTime

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
