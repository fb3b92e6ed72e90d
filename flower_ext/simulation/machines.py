"""CPUs and GPUs: what a client takes of a machine, and whether a machine has it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import UserConfig

from flower_ext.core.errors import at_least, positive, refuse

#: ``(partition_id, run_config) -> {"num_cpus": 1, "num_gpus": 0.5}``
ResourcesFunction = Callable[[int, UserConfig], Mapping[str, float]]
#: The same for all clients, or by client.
ClientResources = Mapping[str, float] | ResourcesFunction

_ROUNDING = 1e-6  # three thirds of a GPU are one


@dataclass(frozen=True, order=True)
class Resources:
    """CPUs, and GPUs: a fraction of one, or whole ones.

    The more GPUs, the greater: these are the hardest to place.
    """

    num_gpus: float = 0.0
    num_cpus: float = 1.0

    @classmethod
    def of(cls, asked: Mapping[str, float]) -> "Resources":
        """Read what a user asked for; a missing key is no GPU, or one CPU."""
        if unknown := sorted(set(asked) - {"num_cpus", "num_gpus"}):
            refuse("resources", unknown, "of 'num_cpus' and 'num_gpus'")
        gpus = at_least("num_gpus", asked.get("num_gpus", 0.0), 0)
        if gpus > 1 and gpus != int(gpus):  # as Ray has it
            refuse("num_gpus", gpus, "a fraction of one GPU or a whole number")
        return cls(gpus, positive("num_cpus", asked.get("num_cpus", 1.0)))

    def __str__(self) -> str:
        return f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs"


@dataclass
class Machine:
    """One machine: what is free on it.

    Parameters
    ----------
    name : str
        Of a node of Ray, its id.
    cpus : float
        CPUs; infinite if somebody else counts them.
    gpus : list of float
        What is free of each GPU, between 0 and 1.
    """

    name: str
    cpus: float
    gpus: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._all = self.cpus, len(self.gpus)

    def empty(self) -> "Machine":
        """Return the machine with nothing taken."""
        cpus, gpus = self._all
        return Machine(self.name, cpus, [1.0] * gpus)

    def __str__(self) -> str:
        cpus, gpus = self._all
        return f"{cpus:g} CPUs and {gpus} GPUs"

    def place(self, resources: Resources) -> dict[int, float] | None:
        """Return what to take of which GPU, or None if it does not fit.

        A fraction is taken from the fullest GPU that still has it, as Ray does.
        """
        if self.cpus + _ROUNDING < resources.num_cpus:
            return None
        if resources.num_gpus >= 1:  # of GPUs that nobody uses
            free = [i for i, left in enumerate(self.gpus) if left > 1 - _ROUNDING]
            count = int(resources.num_gpus)
            return dict.fromkeys(free[:count], 1.0) if len(free) >= count else None
        if resources.num_gpus == 0:
            return {}
        enough = [
            (left, i)
            for i, left in enumerate(self.gpus)
            if left + _ROUNDING >= resources.num_gpus
        ]
        return {min(enough)[1]: resources.num_gpus} if enough else None

    def take(self, resources: Resources, gpus: Mapping[int, float]) -> None:
        """Take what was placed."""
        self._change(-1, resources, gpus)

    def give_back(self, resources: Resources, gpus: Mapping[int, float]) -> None:
        """Return what was taken."""
        self._change(1, resources, gpus)

    def _change(
        self, sign: int, resources: Resources, gpus: Mapping[int, float]
    ) -> None:
        self.cpus += sign * resources.num_cpus
        for i, share in gpus.items():
            self.gpus[i] += sign * share


def ray_machines(nodes: Sequence[Mapping[str, object]]) -> Iterator[Machine]:
    """Read the living machines from ``ray.nodes()``."""
    for node in nodes:
        resources = node["Resources"]
        if node["Alive"] and isinstance(resources, Mapping):
            yield Machine(
                str(node["NodeID"]),
                float(resources.get("CPU", 0)),
                [1.0] * int(resources.get("GPU", 0)),
            )


def require_room(machines: Sequence[Machine], clients: Mapping[Resources, int]) -> None:
    """Refuse what no machine could ever run.

    Parameters
    ----------
    machines : sequence of Machine
        Those that there are.
    clients : Mapping[Resources, int]
        One client for each of the resources that are asked for.
    """
    for resources, client in clients.items():
        # Whatever is taken now will be free some time, so only what exists counts.
        if all(machine.empty().place(resources) is None for machine in machines):
            have = "; ".join(map(str, machines)) or "there is none"
            raise ValueError(
                f"client {client} needs {resources}, more than any machine has: {have}"
            )
