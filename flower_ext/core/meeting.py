"""Calls that run side by side, and meet for work that is done for all of them at once.

::

    call 1  ----> meet --.                       .--> ----> done
    call 2  ----> meet ---+--> work for all  ----+--> ----> done
    call 3  ----> meet --'                       '--> ----> done

A call is written as if it ran alone. Each has a thread, and only one runs at a time, so
that none sees another in the middle of something.
"""

import time
from asyncio import CancelledError
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from threading import Lock, Thread
from typing import Any, Generic, TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

# What ends a client and no more: its exit, too, and a task that it has cancelled. An
# interrupt from the keyboard is the user's, and ends the run.
CLIENTS_OWN = (Exception, SystemExit, CancelledError)

R = TypeVar("R")
Work = Callable[[list[Any]], None]


class _Abandoned(BaseException):
    """Ends a call whose meeting is over; no ``except Exception`` catches it."""


class _Runner:
    """A thread that runs one call after the other."""

    def __init__(self) -> None:
        self._go = _closed()
        self._work: Callable[[], None]
        # A daemon, so that a process that is told to end does not wait for it.
        Thread(target=self._run, daemon=True).start()

    def start(self, work: Callable[[], None]) -> None:
        self._work = work
        self._go.release()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            self._work()


_idle: list[_Runner] = []  # to start a thread takes longer than to wake one


class _Call(Generic[R]):
    """One of the calls, and its thread."""

    def __init__(self, function: Callable[[], R], back: Lock) -> None:
        self._back = back  # is released whenever the thread comes to a halt
        self._go = _closed()
        self._abandoned = False
        self._error: BaseException | None = None
        self._result: R
        self.is_done = False
        self.waits_for: tuple[Work, Any] | None = None
        self.seconds = 0.0
        runner = _idle.pop() if _idle else _Runner()

        def run() -> None:
            self._go.acquire()
            _CALL.set(self)
            try:
                self._result = function()
            except BaseException as error:
                self._error = error
            self.is_done = True
            _idle.append(runner)
            self._back.release()

        runner.start(partial(copy_context().run, run))

    def go_on(self) -> None:
        """Let the thread run until it waits or ends."""
        begun = time.perf_counter()
        self._go.release()
        self._back.acquire()
        self.seconds += time.perf_counter() - begun

    def wait(self, work: Work, item: object) -> None:
        """Come to a halt, in the thread, until the work is done."""
        self.waits_for = work, item
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def result(self) -> R:
        """Return what the call has returned, or raise what it has raised."""
        if self._error is not None:
            raise self._error
        return self._result

    def abandon(self) -> None:
        """End the thread where it waits."""
        if not self.is_done:
            self._abandoned = True
            self.go_on()


_CALL: ContextVar["_Call[Any] | None"] = ContextVar("call", default=None)
_AT_ONCE = ContextVar("at_once", default=1)


def _closed() -> Lock:
    lock = Lock()
    lock.acquire()
    return lock


def may_meet() -> bool:
    """Whether this call is one of several that run side by side."""
    return _CALL.get() is not None


def meet(work: Work, item: object) -> None:
    """Wait until work is done for this call and for all others that wait for it.

    Parameters
    ----------
    work : callable
        Takes the items of those that wait for it, in the order of their calls. What
        goes wrong with one of them is noted in it, and not raised.
    item : object
        What is to be worked on.
    """
    call = _CALL.get()
    if call is None:
        work([item])
    else:
        call.wait(work, item)


def side_by_side(
    functions: Sequence[Callable[[], R]],
) -> list[tuple[R, float]]:
    """Call functions that may meet.

    Returns
    -------
    list of (result, float)
        What each has returned, in order, and the seconds that it took: its own, and its
        share of what was done for several.

    Examples
    --------
    >>> def double(items):
    ...     for item in items:
    ...         item[1] = 2 * item[0] + 100 * len(items)
    >>> def call(number):
    ...     item = [number, None]
    ...     meet(double, item)
    ...     return item[1]
    >>> found = side_by_side([lambda: call(1), lambda: call(2), lambda: "alone"])
    >>> [result for result, _ in found]
    [202, 204, 'alone']
    """
    back = _closed()
    calls: list[_Call[R]] = []
    try:
        for function in functions:
            calls.append(_Call(function, back))
            calls[-1].go_on()
        while waiting := [call for call in calls if call.waits_for]:
            _work(waiting)
            for call in waiting:
                call.waits_for = None
                call.go_on()
        return [(call.result(), call.seconds) for call in calls]
    finally:
        for call in calls:
            call.abandon()


def _work(waiting: Sequence[_Call[Any]]) -> None:
    """Do the work that calls wait for; what several wait for, at once."""
    alike: dict[Work, list[_Call[Any]]] = {}
    for call in waiting:
        if call.waits_for:
            alike.setdefault(call.waits_for[0], []).append(call)
    for work, calls in alike.items():
        begun = time.perf_counter()
        work([call.waits_for[1] for call in calls if call.waits_for])
        for call in calls:
            call.seconds += (time.perf_counter() - begun) / len(calls)


class MeetingApp(ClientApp):
    """A ClientApp whose clients may meet.

    Parameters
    ----------
    at_once : int
        How many of them may run side by side.
    around : callable
        Makes a context manager that is around several clients, and not around each.
    **options
        Of Flower's ClientApp.
    """

    def __init__(
        self,
        at_once: int,
        around: Callable[[], AbstractContextManager[None]],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.at_once = at_once
        self.around = around

    def __call__(self, message: Message, context: Context) -> Message:
        """Handle a message; mods find how many may run side by side."""
        token = _AT_ONCE.set(self.at_once)
        try:
            return super().__call__(message, context)
        finally:
            _AT_ONCE.reset(token)


def at_once(app: object = None) -> int:
    """Return how many clients of an app, or of that which calls, run side by side."""
    return app.at_once if isinstance(app, MeetingApp) else _AT_ONCE.get()


def around(app: object) -> AbstractContextManager[None]:
    """Return what is to be around several clients of an app."""
    return app.around() if isinstance(app, MeetingApp) else nullcontext()
