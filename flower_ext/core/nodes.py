"""The nodes of a run: their order, waiting for them, and knowing them again."""

import time
from collections.abc import Iterator, Mapping, Sequence
from logging import INFO, WARNING
from typing import cast

from flwr.serverapp import Grid

from flower_ext._flower import in_simulation, log
from flower_ext.core.errors import refuse

_SETTLED_SECONDS = 10  # a simulation registers its nodes in milliseconds


def ordered_nodes(grid: Grid) -> Sequence[int]:
    """Return the node ids in the order in which the nodes registered.

    Node ids are random numbers, new in every run. In a simulation nodes register in
    the order of their partitions, so this order is that of ``partition-id``, and a
    seeded cohort names the same partitions in every run. Ids that come as a range are
    the clients' own numbers, and in order already.
    """
    ids = grid.get_node_ids()
    if isinstance(ids, range):
        return ids
    nodes = sorted(
        grid.get_nodes(), key=lambda node: (node.registered_at, node.node_id)
    )
    return [node.node_id for node in nodes]


def is_fixed(grid: Grid) -> bool:
    """Whether all nodes are there from the start, as on the grids of this package."""
    return bool(getattr(grid, "is_fixed", False))


def wait_for_nodes(grid: Grid, **at_least: int) -> Sequence[int]:
    """Return the nodes in order, once there are so many.

    Parameters
    ----------
    grid : Grid
        The federation's.
    **at_least : int
        How many nodes are needed, by the name of the option that says so. The largest
        counts, and its name is in the error.

    Raises
    ------
    ValueError
        If the federation has a fixed number of nodes, too few of them.
    """
    name = max(at_least, key=lambda option: at_least[option])
    needed, unchanged, before = at_least[name], 0, -1
    while len(nodes := ordered_nodes(grid)) < needed:
        # A simulation registers all of its nodes at the start. If their number has
        # settled below what is needed, waiting would never end.
        unchanged = unchanged + 1 if len(nodes) == before > 0 else 0
        settled = in_simulation(grid) and unchanged >= _SETTLED_SECONDS
        if is_fixed(grid) or settled:
            refuse(
                name,
                needed,
                f"<= {len(nodes)}, the nodes of this federation",
                "no other will connect: simulate more clients, or ask for fewer",
            )
        before = len(nodes)
        log(
            INFO,
            "Waiting for nodes to connect: %d connected (minimum required: %d).",
            len(nodes),
            needed,
        )
        time.sleep(1)
    return nodes


class NodeOrder(Mapping[int, int]):
    """The place of every node in their order."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = nodes
        # A range answers by itself: a million simulated clients take no memory.
        self._index: Mapping[int, int] | None = None
        if not isinstance(nodes, range):
            self._index = {node: i for i, node in enumerate(nodes)}

    def __getitem__(self, node: int) -> int:
        if self._index is not None:
            return self._index[node]
        if node not in self._nodes:
            raise KeyError(node)
        return self._nodes.index(node)

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)


class NodeRegistry:
    """Numbers clients as they are first seen, and knows them again, also when resumed.

    A client is its id. Clients whose ids are a range, those of a simulation, are a
    fixed set: a resumed run must have the same. In a deployment the id is the node's,
    and a SuperNode keeps it over a restart only if it is started with a key of its
    own (``--auth-supernode-private-key``). One that comes back under a new id cannot
    be told from a new client, and is counted as one: a warning says so, and a resumed
    run that knows none of the nodes is refused.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._resumed = False

    def __len__(self) -> int:
        """Return how many clients there have been."""
        return len(self._numbers)

    def number(self, nodes: Sequence[int]) -> dict[int, int]:
        """Return the number of each client, from 0; new ones get the next.

        Raises
        ------
        ValueError
            If a run is resumed and its clients cannot be recognised.
        """
        if self._resumed and self._numbers:
            self._require_known(nodes)
        new = [node for node in nodes if node not in self._numbers]
        # At the start of a run all nodes are new. Those of a simulation keep their ids.
        if new and self._numbers and not isinstance(nodes, range):
            log(
                WARNING,
                "%s node(s) are new and counted as new clients. One that was here "
                "before under another id may take part more often, and sooner, than "
                "the sampler promises: start SuperNodes with a key of their own",
                len(new),
            )
        for node in new:
            self._numbers[node] = len(self._numbers)
        # Checked once, against the first nodes that a resumed run sees.
        self._resumed = self._resumed and not nodes
        return {node: self._numbers[node] for node in nodes}

    def _require_known(self, nodes: Sequence[int]) -> None:
        known = set(self._numbers)
        # A simulation has exactly its clients of before. In a deployment some may be
        # gone: one node that is known shows that ids were kept.
        same = known == set(nodes) if isinstance(nodes, range) else known & set(nodes)
        if nodes and not same:
            raise ValueError(
                f"the saved run knew {len(known)} clients, this one has {len(nodes)}, "
                f"{len(known & set(nodes))} of them with the same id: who took part "
                "before cannot be told. Resume a simulation with as many clients as "
                "before, a deployment with SuperNodes that kept their ids, which "
                "they do if started with a key of their own"
            )

    def state_dict(self) -> dict[str, object]:
        """Return the ids in the order of their numbers."""
        return {"nodes": list(self._numbers)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Recognise these clients from the next call of :meth:`number` on."""
        saved = cast("list[int]", state["nodes"])
        self._numbers = {int(node): i for i, node in enumerate(saved)}
        self._resumed = True
