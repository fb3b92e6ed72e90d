"""What a grid of virtual clients asks of whatever carries its work."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from flower_ext.server.partial_sums import Summand
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.packing import Workload
from flower_ext.simulation.records import Record
from flower_ext.simulation.states import ClientStates


class Transport(ABC):
    """Carries jobs to where clients run, and outcomes back.

    Attributes
    ----------
    states : States or None
        The clients' states, or None where they are out of reach.
    workload : Workload or None
        What the packs of later rounds depend on, or None where nothing is packed.
    """

    states: ClientStates | None
    workload: Workload | None = None

    @abstractmethod
    def submit(
        self,
        jobs: Sequence[Job],
        shared: Sequence[Record],
        summand: Summand | None = None,
    ) -> None:
        """Start jobs; ``shared`` are the records that they name by place.

        With a ``summand`` replies may be added up on the way.
        """

    @abstractmethod
    def wait(self, seconds: float | None) -> list[Outcome]:
        """Return outcomes once there are any; none if nothing is left or time is up."""

    @abstractmethod
    def give_up(self, keys: Iterable[int]) -> None:
        """Stop jobs, and forget what comes of those that cannot be stopped."""

    @abstractmethod
    def close(self) -> None:
        """Free all resources."""
