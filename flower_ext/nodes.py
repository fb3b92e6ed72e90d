"""The nodes of a run: their order, waiting for them, and knowing them again."""

import time
from collections.abc import Iterator, Mapping, Sequence
from logging import INFO
from typing import cast

from flwr.serverapp import Grid

from flower_ext._flower import in_simulation, log
from flower_ext.errors import refuse

_SETTLED_SECONDS = 10  # a simulation registers its nodes in milliseconds


def ordered_nodes(grid: Grid) -> Sequence[int]:
    """Return the node ids in the order in which the nodes registered.

    Node ids are random numbers, new in every run. In a simulation nodes register in
    the order of their partitions, so this order is that of ``partition-id``, and a
    seeded cohort names the same partitions in every run. Ids that are a range are
    numbers of clients, and in order.
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
        Of the nodes.
    **at_least : int
        Options that say how many are needed, by name; the largest counts.

    Raises
    ------
    ValueError
        If the federation has a fixed number of nodes, too few of them.
    """
    name = max(at_least, key=lambda option: at_least[option])
    needed, unchanged, before = at_least[name], 0, -1
    while len(nodes := ordered_nodes(grid)) < needed:
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


class Places(Mapping[int, int]):
    """The place of every node in their order; of a range nothing has to be stored."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = nodes
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
    """Numbers nodes as they are first seen, and knows them again in a resumed run.

    In a deployment a node keeps its id, and is recognised by it. In a simulation all
    ids are new after a restart: then the nodes must be as many as before, and each is
    recognised by its place in the order of registration, which is its partition.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._saved: list[int] | None = None

    def number(self, nodes: Sequence[int]) -> dict[int, int]:
        """Return the number of each node, from 0; new nodes get the next ones.

        Raises
        ------
        ValueError
            In a resumed run whose nodes cannot be told to be those of before.
        """
        if self._saved is not None:
            self._recognise(nodes, self._saved)
            self._saved = None
        for node in nodes:
            self._numbers.setdefault(node, len(self._numbers))
        return {node: self._numbers[node] for node in nodes}

    def _recognise(self, nodes: Sequence[int], saved: list[int]) -> None:
        known = saved
        if not set(saved) & set(nodes):
            if saved and len(nodes) != len(saved):
                raise ValueError(
                    f"the saved run knew {len(saved)} nodes, this one has "
                    f"{len(nodes)} and none of the same id: who took part before "
                    "cannot be told; resume with the same number of virtual clients, "
                    "or with the same SuperNodes"
                )
            known = list(nodes)
        self._numbers = {node: i for i, node in enumerate(known)}

    def state_dict(self) -> dict[str, object]:
        """Return the ids in the order of their numbers."""
        return {"nodes": list(self._numbers) if self._saved is None else self._saved}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Recognise these nodes at the next call of :meth:`number`."""
        self._saved = [int(node) for node in cast("list[int]", state["nodes"])]
