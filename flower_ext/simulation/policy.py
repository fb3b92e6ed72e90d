"""What becomes of a pack of clients: who is late, what runs again, what is given up.

    waits --> sent --> begun --> answered
      ^        |         |
      +--------+         +--> its worker died, or hangs:
      |  no room, or a   |      several clients: each waits again, alone
      |  false start     |      one client: again once; then that is its error
      +------------------+

No Ray and no clock in here: the transport says what happened, and when.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from logging import WARNING
from typing import Any

from flwr.app import Error

from flower_ext._flower import CLIENT_CRASHED, log
from flower_ext.simulation.clients import over_time
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.machines import Resources

START_SECONDS = 60.0  # after which a worker that has no room is worth a warning
HELD_SECONDS = 600.0  # after which nobody will make room any more
FALSE_STARTS = 20  # in a row, after which no worker will ever start
HANG_SECONDS = 5.0  # beyond its limit, for a client to be interrupted
LOOK_SECONDS = 1.0  # between two looks at a worker that starts


@dataclass(frozen=True, eq=False)
class Pack:
    """Jobs that one worker runs in one go.

    Attributes
    ----------
    jobs : sequence of Job
        At least one.
    resources : Resources
        Of each of the clients, and so of their worker.
    broadcast : object
        What the transport sends along.
    again : bool
        Whether a worker died over these jobs before.
    """

    jobs: Sequence[Job]
    resources: Resources
    broadcast: Any = None
    again: bool = False

    def without(self, keys: Collection[int]) -> "Pack | None":
        """Return the pack without some jobs, or None if no other is left."""
        jobs = [job for job in self.jobs if job.key not in keys]
        return replace(self, jobs=jobs) if jobs else None


@dataclass(kw_only=True, eq=False)
class Attempt:
    """A pack at a worker: when it was sent, and when its worker was ready for it."""

    pack: Pack
    sent: float
    begun: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The packs that run again, and the outcomes of clients that do not."""

    again: list[Pack]
    outcomes: list[Outcome]


class Policy:
    """Decides.

    Parameters
    ----------
    client_timeout : float or None
        Seconds a client may take.
    held_seconds : float
        Seconds after which a worker that has no room will never have any.
    """

    def __init__(self, client_timeout: float | None, held_seconds: float) -> None:
        self._client_timeout = client_timeout
        self._held_seconds = held_seconds
        self._false_starts = 0  # in a row
        self._warned: set[Resources] = set()

    # Looking -------------------------------------------------------------------------

    def patience(
        self, attempts: Iterable[Attempt], now: float, end: float | None
    ) -> float | None:
        """Return how long to wait before looking at what the workers do."""
        moments = [] if end is None else [end]
        for attempt in attempts:
            if attempt.begun is None:
                moments.append(now + LOOK_SECONDS)
            elif (due := self._due(attempt)) is not None:
                moments.append(due)
        return max(0.0, min(moments) - now) if moments else None

    def _due(self, attempt: Attempt) -> float | None:
        """Return when a pack has taken so long that it must hang.

        Clients are interrupted from within, one after the other; only one that cannot
        be takes longer than all of their limits.
        """
        if self._client_timeout is None or attempt.begun is None:
            return None
        limit = self._client_timeout * len(attempt.pack.jobs)
        return attempt.begun + limit + HANG_SECONDS

    # Starting ------------------------------------------------------------------------

    def is_late(self, attempt: Attempt, now: float) -> bool:
        """Whether a worker should have started by now."""
        return attempt.begun is None and now > attempt.sent + START_SECONDS

    def no_room(self, attempt: Attempt, now: float, others: bool, free: str) -> bool:
        """Return whether to do without a late worker that Ray has no room for.

        Parameters
        ----------
        attempt : Attempt
            The pack that waits for it.
        now : float
            Seconds.
        others : bool
            Whether others like it have room, and will do its work.
        free : str
            What is free, in words.

        Raises
        ------
        RuntimeError
            If there will never be room.
        """
        waited, resources = now - attempt.sent, attempt.pack.resources
        reason = (
            f"a worker that needs {resources} has waited {waited:.0f} s for others "
            f"that hold it ({free}): Flower's own workers, another grid that was not "
            "closed, or somebody else's work"
        )
        if waited > self._held_seconds and not others:
            raise RuntimeError(f"no worker can start: {reason}")
        if resources not in self._warned:
            self._warned.add(resources)
            log(WARNING, "Not all workers can start: %s", reason)
        return others

    def false_start(self, pack: Pack, reason: str) -> Verdict:
        """Try again after a worker died before it could run; no client is to blame.

        Raises
        ------
        RuntimeError
            If none has stayed alive in many tries.
        """
        self._false_starts += 1
        log(WARNING, "A worker died before it could run a client: %s", reason)
        if self._false_starts > FALSE_STARTS:
            raise RuntimeError(f"no worker stays alive: {reason}")
        return Verdict([pack], [])

    # Running -------------------------------------------------------------------------

    def answered(self) -> None:
        """Take note that a worker has done its work: workers do stay alive."""
        self._false_starts = 0

    def died(self, pack: Pack, reason: str) -> Verdict:
        """Run the clients of a dead worker once more, each alone.

        None of their replies has arrived, so nothing counts twice. A client whose
        worker dies again is to blame, or has bad luck: that is its error.
        """
        clients = [job.client for job in pack.jobs]
        if pack.again:
            log(WARNING, "A worker died again while it ran client %s", *clients)
            error = Error(CLIENT_CRASHED, f"its worker process died: {reason}")
            return Verdict([], [Outcome(job.key, None, error) for job in pack.jobs])
        log(
            WARNING,
            "A worker died while it ran clients %s, which are run again: %s",
            clients,
            reason,
        )
        alone = [replace(pack, jobs=[job], again=True) for job in pack.jobs]
        return Verdict(alone, [])

    def hung(self, attempt: Attempt, now: float) -> Verdict | None:
        """Decide on a pack that hangs; None if it does not.

        Of several clients nobody knows which one it is. One alone is over its time,
        and trying again would cost the same.
        """
        due = self._due(attempt)
        if due is None or now < due:
            return None
        if len(attempt.pack.jobs) > 1:
            return self.died(attempt.pack, "a client hangs")
        error = over_time(self._client_timeout)
        return Verdict([], [Outcome(attempt.pack.jobs[0].key, None, error)])
