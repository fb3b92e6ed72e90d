"""What all virtual clients of a grid have in common."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Context, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from flower_ext.simulation.machines import ClientResources

#: Bytes that the states of clients may take in the server's memory, by default.
STATE_MEMORY = 64 * 2**20


@dataclass(frozen=True)
class Setting:
    """How clients are run, the same in every round and in every worker.

    Attributes
    ----------
    client_app : ClientApp or str or None
        The ClientApp, or its import string ``"package.module:app"``. None where the
        nodes that run the clients have it.
    nodes : sequence of int
        The node id of every client, in the order of their numbers.
    run_id, run_config, node_config
        What goes into every client's context.
    client_timeout : float or None
        Seconds a client may take.
    resources : Mapping or callable
        CPUs and GPUs of a client: the same for all, or by client.
    num_workers : int or None
        The most processes that run clients; None takes as many as the CPUs and GPUs
        allow.
    state_memory : int
        Bytes that the states of clients may take in the server's memory.
    num_examples : sequence of float or None
        Sizes of the clients, as far as they are known.
    """

    client_app: ClientApp | str | None
    nodes: Sequence[int]
    run_id: int = 1
    run_config: UserConfig = field(default_factory=dict)
    node_config: UserConfig = field(default_factory=dict)
    client_timeout: float | None = None
    resources: ClientResources = field(default_factory=dict)
    num_workers: int | None = None
    num_examples: Sequence[float] | None = None
    state_memory: int = STATE_MEMORY

    @property
    def num_clients(self) -> int:
        """Number of virtual clients."""
        return len(self.nodes)

    def pickled(self) -> bytes:
        """Return it as workers read it, with what a script defines.

        Workers are told how to run a client, not where: a function of the user's that
        says so may not even be picklable.
        """
        import cloudpickle

        told = replace(self, resources={}, num_examples=None)
        pickled: bytes = cloudpickle.dumps(told)
        return pickled

    def context(self, client: int, state: RecordDict) -> Context:
        """Make the context of a client.

        Every message gets one of its own: what a client writes into its configuration
        must not be there the next time, since another worker may run it then.
        """
        return Context(
            run_id=self.run_id,
            node_id=self.nodes[client],
            node_config={
                **self.node_config,
                "partition-id": client,
                "num-partitions": self.num_clients,
            },
            state=state,
            run_config=dict(self.run_config),
        )
