"""Who is asked in a round: drawing cohorts, and knowing clients by their places."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.serverapp import Grid

from flower_ext._flower import in_simulation, log
from flower_ext.core.errors import refuse
from flower_ext.core.nodes import NodeOrder, is_fixed, ordered_nodes, wait_for_nodes
from flower_ext.core.protocol import Phase
from flower_ext.core.sampling import Sampler, TooFewClients
from flower_ext.privacy.private_sum import PrivateSum


@dataclass(frozen=True)
class Seats:
    """Who may be asked next where clients train at any time.

    Attributes
    ----------
    taken : collection of int
        Nodes that are at work, or whose contributions wait for the update: they are not
        asked to train.
    free : int
        How many may begin now.
    draw : int
        Number of the draw, which the sampler takes for that of a round.
    away : collection of int
        Nodes that are not asked to evaluate.
    """

    taken: Collection[int]
    free: int
    draw: int
    away: Collection[int] = ()

    def barred(self, phase: Phase) -> Collection[int]:
        """Return the nodes that may not be asked."""
        return self.taken if phase == "train" else self.away

    def require_room(self, drawn: int) -> None:
        """Refuse a sampler that draws more clients than are asked for."""
        if drawn > self.free:
            bound = f"one that draws at most as many clients as asked for, {self.free}"
            refuse("sampler", f"one that drew {drawn}", bound)


class Cohorts:
    """The clients that are asked, in each phase of a round.

    Attributes
    ----------
    sampler : Sampler
        What draws them, unless a mechanism brings its own.
    asked : dict[str, dict[int, int]]
        For each phase the nodes that were asked, with the places of their clients.
    places : Mapping[int, int]
        The place of every node. Ids are new in every run, places are not.
    number : int
        The number of the round of training that the sampler was last told: under a
        mechanism that of the release.
    drawn : dict[str, int]
        The number of the round for which a cohort was last drawn, by phase.
    trained : set of int
        The places of the clients that have been asked to train.
    answered : set of int
        Those of them that have answered, with no error.
    last : tuple of (int, frozenset of int)
        The number of the last round of training that was aggregated, and the places of
        the clients that answered in it.
    seats : Seats or None
        Who may be asked next, in an asynchronous run.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.asked: dict[Phase, dict[int, int]] = {"train": {}, "evaluate": {}}
        self.places: Mapping[int, int] = {}
        self.number = 0
        self.drawn: dict[Phase, int] = {}
        self.trained: set[int] = set()
        self.answered: set[int] = set()
        self.last: tuple[int, frozenset[int]] = (0, frozenset())
        self.seats: Seats | None = None
        self._nodes: Sequence[int] = ()
        self._by_place = False

    def draw(
        self,
        grid: Grid,
        phase: Phase,
        server_round: int,
        *,
        share: float,
        least: int,
        available: int,
        private: PrivateSum | None = None,
    ) -> dict[int, int]:
        """Draw a cohort; wait for nodes where there are too few.

        Parameters
        ----------
        grid : Grid
            Of the nodes.
        phase : {"train", "evaluate"}
            What they are asked for.
        server_round : int
            The round.
        share : float
            Of the nodes that are asked, without a mechanism.
        least, available : int
            Nodes that are asked, and that there must be, at the least.
        private : PrivateSum, optional
            A mechanism, which says how many train.

        Returns
        -------
        dict[int, int]
            The place of every node that is to be asked.
        """
        number = server_round
        if private:
            if phase == "train":
                self.number = private.number(server_round)
            number = self.number or server_round
        sampler = private.sampler if private else self.sampler
        while True:
            nodes = self._find(grid, phase, least, available)
            # In a simulation ids are new in every run; places are the partitions.
            self._by_place = by_place = in_simulation(grid)
            names = range(len(nodes)) if by_place else nodes
            size = max(int(len(nodes) * share), least)
            if self.seats is not None:
                barred = self.seats.barred(phase)
                names = [
                    name
                    for name in sampler.eligible(names, phase)
                    if (nodes[name] if by_place else name) not in barred
                ]
                if phase == "train":
                    size, number = self.seats.free, self.seats.draw
            if private and phase == "train":
                private.require_nodes(len(nodes))
                size = private.mechanism.cohort
            elif private and private.evaluation:
                size = private.evaluation.cohort
            try:
                chosen = sampler.sample(names, size, number, phase)
            except TooFewClients as problem:
                if sampler.when_short != "wait" or is_fixed(grid):
                    raise
                log(INFO, "%s; waiting for others to connect", problem)
                time.sleep(1)
                continue
            break
        if private:
            private.require_population(sampler.num_known)
            if phase == "train":
                private.require_cohort(chosen)
        if phase == "train" and self.seats is not None:
            self.seats.require_room(len(chosen))
        elif private is None or not private.mechanism.hides_cohorts:
            planned = size if private and private.releases(phase) else 0
            _tell(phase, server_round, len(chosen), len(nodes), planned)
        asked = [nodes[i] for i in chosen] if by_place else chosen
        self.drawn[phase] = server_round
        self.asked[phase] = {}
        self._ask(phase, asked)
        return self.asked[phase]

    def hear(self, phase: Phase, reports: Mapping[int, Mapping[str, float]]) -> None:
        """Tell the sampler what nodes report, by what it knows them by."""
        places = self.places
        self.sampler.hear(
            {
                places[node] if self._by_place else node: report
                for node, report in reports.items()
            },
            phase,
        )

    def note_answers(self, server_round: int, nodes: Iterable[int]) -> None:
        """Take down which nodes have answered in a round of training."""
        places = frozenset(self.asked["train"][node] for node in nodes)
        self.answered |= places
        self.last = server_round, places

    def answered_before(self, server_round: int) -> frozenset[int]:
        """Return the places of those that answered in the round before this one."""
        number, places = self.last
        return places if number == server_round - 1 else frozenset()

    def let_in(self, seats: Seats | None) -> None:
        """Ask clients as ``seats`` says from now on; None asks for whole rounds."""
        self.seats = seats
        if seats is None:  # the next run may be on another grid
            self._nodes = ()

    def _find(
        self, grid: Grid, phase: Phase, least: int, available: int
    ) -> Sequence[int]:
        """Return the nodes in their order, once there are enough."""
        # A grid whose nodes never change takes many looks for waiting.
        if self._nodes and phase == "train" and is_fixed(grid):
            return self._nodes
        nodes = wait_for_nodes(
            grid, min_available_nodes=available, **{f"min_{phase}_nodes": least}
        )
        self.places = NodeOrder(nodes)
        self._nodes = nodes if self.seats is not None else ()
        return nodes

    def adopt(
        self, grid: Grid, phase: Phase, nodes: Sequence[int], *, added: bool
    ) -> None:
        """Take over nodes that somebody else has asked: to those drawn, or alone."""
        if not added:
            self.places = NodeOrder(ordered_nodes(grid))
            self.asked[phase] = {}
        self._ask(phase, nodes)

    def _ask(self, phase: Phase, nodes: Sequence[int]) -> None:
        self.asked[phase].update({node: self.places[node] for node in nodes})
        if phase == "train":
            self.trained.update(self.asked[phase].values())


def _tell(phase: Phase, server_round: int, size: int, nodes: int, planned: int) -> None:
    if 2 * size < planned:
        log(
            WARNING,
            "%s has %s of its %s planned clients: %s are connected, and some may "
            "have to wait. The rest is noise",
            f"round {server_round}" + ", evaluation," * (phase == "evaluate"),
            size,
            planned,
            nodes,
        )
    log(INFO, "configure_%s: Sampled %s nodes (out of %s)", phase, size, nodes)
