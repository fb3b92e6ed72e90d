"""What a grid asks of the place where its workers are: Ray, or this machine alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flower_ext.simulation.machines import Machine, Resources
from flower_ext.simulation.worker import Broadcast, PackAnswer, Shared


class WorkerDied(Exception):
    """The process of a worker has ended; the message says why."""


class WorkerFailed(Exception):
    """What runs outside of clients has raised in a worker, and would again."""


class CannotStart(Exception):
    """No worker would ever start."""


@dataclass(eq=False)
class Hired(ABC):
    """A worker, and what it holds of which machine."""

    resources: Resources
    machine: Machine
    gpus: dict[int, float]

    @abstractmethod
    def has_room(self) -> bool:
        """Whether the worker has its resources; until then it is kept waiting."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether the worker has started and loaded the app, or failed to."""

    @abstractmethod
    def has_worked(self) -> bool:
        """Whether a worker that is dead now had come so far as to run clients."""

    @abstractmethod
    def ask(self, number: int, shared: Shared, *pack: Any) -> Any:
        """Let it run a pack; return what to wait for.

        The arguments are those of :meth:`~flower_ext.simulation.worker.Worker.run`.
        """

    @abstractmethod
    def stop(self) -> None:
        """End its process, if it has not ended."""


class Workplace(ABC):
    """Starts workers and carries what they are asked, and answer.

    Attributes
    ----------
    here : str
        Name of the machine of this process.
    held_seconds : float
        Seconds after which a worker that has no room will never have any.
    """

    here: str
    held_seconds: float

    @abstractmethod
    def machines(self) -> Iterable[Machine]:
        """Return the machines that are there now, with nothing taken."""

    @abstractmethod
    def start(
        self, resources: Resources, machine: Machine, gpus: dict[int, float]
    ) -> Hired:
        """Start a worker without waiting for it."""

    @abstractmethod
    def share(self, broadcast: Broadcast) -> Shared:
        """Put what all packs of a round read where each worker reads it once.

        Raises
        ------
        Exception
            If it cannot be pickled.
        """

    @abstractmethod
    def wait(self, calls: Sequence[Any], seconds: float | None) -> Sequence[Any]:
        """Return the calls that are answered, once one is; none if time is up.

        It may return none earlier, when a worker has started.
        """

    @abstractmethod
    def answer(self, call: Any) -> PackAnswer:
        """Return the answer to a call.

        Raises
        ------
        WorkerDied, WorkerFailed, CannotStart
            If there is none.
        """

    @abstractmethod
    def require_free(self, asked: Iterable[Resources]) -> None:
        """Refuse to wait for what somebody else will never give back."""

    @abstractmethod
    def free(self) -> str:
        """Say what is free of CPUs and GPUs."""

    @abstractmethod
    def close(self) -> None:
        """Leave, after all workers were stopped."""


def threads_of(resources: Resources) -> int:
    """Return how many threads a worker with these resources computes with."""
    return max(1, int(resources.num_cpus))
