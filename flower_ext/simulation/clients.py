"""Running one virtual client: its message, its context, its error, its time."""

import signal
import threading
import time
import traceback
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from flower_ext._flower import CLIENT_CRASHED, CLIENT_RAISED, ensure_task_identity
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.records import Record, own_copy

Call = Callable[[Message, Context], Message]


# What ends a client and no more: its exit, too, and a task that it has cancelled.
CLIENTS_OWN = (Exception, SystemExit, CancelledError)


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


def client_context(
    run_id: int,
    client: int,
    num_clients: int,
    state: RecordDict,
    run_config: UserConfig,
    node_config: UserConfig | None = None,
) -> Context:
    """Make the context of one virtual client, on a node with a configuration."""
    return Context(
        run_id=run_id,
        node_id=client,
        node_config={
            **(node_config or {}),
            "partition-id": client,
            "num-partitions": num_clients,
        },
        state=state,
        run_config=dict(run_config),
    )


def run_client(
    call: Call,
    job: Job,
    shared: Sequence[Record],
    context: Context,
    limit: float | None = None,
) -> Outcome:
    """Run one virtual client; whatever it raises is its own error.

    Parameters
    ----------
    call : callable
        The ClientApp, or what is left of it behind a mod.
    job : Job
        What the client is asked.
    shared : sequence of Record
        Records that the job names by their place.
    context : Context
        The client's own.
    limit : float, optional
        Seconds after which the client is interrupted. Works in the main thread of a
        process, once the client executes Python code.
    """
    records = {name: own_copy(shared[place]) for name, place in job.shared.items()}
    records |= {name: own_copy(record) for name, record in job.own.items()}
    ensure_task_identity(context.run_id)
    message = Message(RecordDict(records), job.client, job.kind, group_id=job.group)
    message.metadata.__dict__["_message_id"] = str(job.key)
    begun = time.perf_counter()
    content, error = None, None
    try:
        with _limited(limit):
            reply = call(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"a client must return a Message, not {reply!r}")
        if reply.has_error():
            error = reply.error
        else:
            content = reply.content
    except OverTime:
        error = over_time(limit)
    except CLIENTS_OWN as problem:
        reason = f"{type(problem).__name__}: {problem}\n{traceback.format_exc()}"
        error = Error(CLIENT_RAISED, reason)
    return Outcome(job.key, content, error, time.perf_counter() - begun)


def over_time(limit: float | None) -> Error:
    """Return the error of a client that was stopped for taking too long."""
    return Error(
        CLIENT_CRASHED, f"the client was stopped after client_timeout={limit:g} s"
    )


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
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
