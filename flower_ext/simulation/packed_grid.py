"""PackedGrid: thousands of virtual clients on a few workers, as a Flower grid.

::

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        clients = PackedGrid(
            grid, num_clients=1000, client_app="my_app.client_app:app",
            run_config=context.run_config,
        )
        strategy.start(grid=clients, initial_arrays=..., num_rounds=...)

The strategy and the ClientApp stay as they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, get_args

from flwr.app import Message, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from flower_ext._flower import Run, in_simulation
from flower_ext.core.errors import one_of, positive, refuse, whole
from flower_ext.core.nodes import is_fixed
from flower_ext.server.partial_sums import Summand
from flower_ext.simulation.base_grid import BaseGrid
from flower_ext.simulation.direct_transport import DirectTransport
from flower_ext.simulation.local import LocalGrid
from flower_ext.simulation.machines import ClientResources
from flower_ext.simulation.message_transport import MessageTransport
from flower_ext.simulation.process_workplace import ProcessWorkplace, is_possible
from flower_ext.simulation.ray_session import is_chosen
from flower_ext.simulation.ray_workplace import RayWorkplace
from flower_ext.simulation.setting import STATE_MEMORY, Setting
from flower_ext.simulation.transport import Transport
from flower_ext.simulation.worker_transport import WorkerTransport

TransportName = Literal["auto", "ray", "processes", "messages"]


class PackedGrid(BaseGrid):
    """Logical clients 0 to N-1, many to a worker, for any strategy.

    Each has its own :class:`~flwr.app.Context`: ``partition-id`` (and ``node_id``) is
    its number, ``num-partitions`` is N, and its ``state`` is kept between rounds and
    moves to whichever worker runs the client. An exception in one client is that
    client's error reply. Replies come in the order of the messages, whoever finished
    first.

    Parameters
    ----------
    grid : Grid, optional
        Flower's, as handed to the ServerApp; none in plain scripts.
    num_clients : int
        Number of logical clients.
    client_app : ClientApp or str
        The ClientApp, or its import string ``"package.module:app"``. Flower's messages
        go to the ClientApp of the nodes, which needs the mod ``packed``.
    transport : {"auto", "ray", "processes", "messages"}
        How clients are reached: in Ray actors of the grid's own, on all machines of the
        Ray that runs or in one that is started; in processes of this machine alone,
        which start faster and answer sooner (Linux); or by Flower's messages to its
        nodes. ``"auto"`` takes messages in deployments; in Flower's simulations and in
        scripts Ray, if ``RAY_ADDRESS`` names one or the script is connected to it, and
        else processes. In ``run_local``, with a ``client_app``, clients run in this
        process.
    run_config : dict, optional
        What clients find in ``context.run_config``; hand on the server's. With
        messages they find their node's.
    num_workers : int, optional
        The most processes that run clients; by default, as many as the CPUs and GPUs
        allow. With messages, Flower's nodes are the workers.
    resources : Mapping or callable
        CPUs and GPUs of a client, ``{"num_cpus": 1, "num_gpus": 0.25}``, or a function
        ``(partition_id, run_config)`` that returns them. The GPU is chosen for the
        worker, in whose ``CUDA_VISIBLE_DEVICES`` it is. With messages, see the mod
        ``resources``.
    client_timeout : float, optional
        Seconds a client may take; one that takes longer is stopped, which is its error.
    num_examples : sequence of float, optional
        Sizes of the clients, so that the largest begin first from the first round on;
        by default, sizes are learned from the ``num-examples`` that clients report.
    partial_sums : bool (default: True)
        In workers, for strategies that are sums: replies are added up where they are
        made, so that what travels, and the server's memory, do not grow with the
        cohort. The same numbers are added, in float64, in another order: the last bit
        may differ, but not between runs with as many workers.
        ``train_metrics_aggr_fn`` then sees no arrays. With False, replies arrive as
        they are.
    state_memory : int (default: 64 MiB)
        Bytes that the states of clients may take in the memory of the server. States
        beyond, and each of more than 64 KiB, are files in a temporary folder (below
        ``TMPDIR``), which ends with the grid. 0 keeps none in memory. In a deployment
        states stay where their clients are.

    Notes
    -----
    A worker that dies is replaced, and the clients that it was running are run once
    more, each alone. A client that kills its worker twice gets an error reply. None is
    counted twice: replies of a pack arrive together or not at all.

    Examples
    --------
    In a script, with clients on all CPUs of this machine::

        with PackedGrid(num_clients=1000, client_app=app) as grid:
            FedAvg(fraction_train=0.02).start(grid=grid, initial_arrays=arrays)
    """

    def __init__(
        self,
        grid: Grid | None = None,
        *,
        num_clients: int,
        client_app: ClientApp | str | None = None,
        transport: TransportName = "auto",
        run_config: UserConfig | None = None,
        num_workers: int | None = None,
        resources: ClientResources | None = None,
        client_timeout: float | None = None,
        num_examples: Sequence[float] | None = None,
        partial_sums: bool = True,
        state_memory: int = STATE_MEMORY,
    ) -> None:
        whole("num_clients", num_clients, 1)
        one_of("transport", transport, get_args(TransportName))
        if num_workers is not None:
            whole("num_workers", num_workers, 1)
        if client_timeout is not None:
            positive("client_timeout", client_timeout)
        if num_examples is not None and len(num_examples) != num_clients:
            refuse(
                "num_examples",
                f"{len(num_examples)} sizes",
                f"one for each of num_clients={num_clients}",
            )
        if not isinstance(partial_sums, bool):
            refuse("partial_sums", partial_sums, "True or False")
        run = grid.run if grid else Run.create_empty(run_id=1)
        if grid is None:  # Flower's grids know their run
            run.override_config = dict(run_config or {})
        setting = Setting(
            client_app,
            range(num_clients),
            run.run_id,
            dict(run_config or {}),
            client_timeout=client_timeout,
            resources=resources or {},
            num_workers=num_workers,
            num_examples=num_examples,
            state_memory=state_memory,
        )
        super().__init__(run, setting, _transport(transport, grid, setting))
        self._partial_sums = partial_sums

    def __enter__(self) -> "PackedGrid":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; the end of the process does so, too."""
        self._transport.close()

    def state_dict(self) -> dict[str, object]:
        """Return what later rounds depend on beside the states of the clients.

        That is the clients' sizes: they decide whose replies are added up first.
        """
        workload = self._transport.workload
        return workload.state_dict() if workload else {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on as the grid of a saved run."""
        if workload := self._transport.workload:
            workload.load_state_dict(state)

    def send_and_sum(
        self, messages: Iterable[Message], summand: Summand, *, timeout: float | None
    ) -> Iterable[Message]:
        """Do as :meth:`send_and_receive`; replies may be added up by the workers."""
        summand_if_any = summand if self._partial_sums else None
        push = partial(self._push, summand=summand_if_any)
        return self._exchange(push, messages, timeout)


def _transport(name: TransportName, grid: Grid | None, setting: Setting) -> Transport:
    """Choose how clients are reached."""
    if name == "auto":
        # A ServerApp in ``run_local`` gets a grid of this process: so are its clients.
        if isinstance(grid, LocalGrid) and setting.client_app is not None:
            return DirectTransport(setting)
        name = "messages"
        if grid is None or in_simulation(grid):
            in_ray = is_chosen(grid) or not is_possible()
            name = "ray" if in_ray else "processes"
    if name != "messages":
        if setting.client_app is None:
            refuse("client_app", None, "a ClientApp or its import string")
        in_ray = name == "ray"
        place = RayWorkplace(grid, setting) if in_ray else ProcessWorkplace(setting)
        return WorkerTransport(place, setting)
    if grid is None:
        refuse("grid", None, "Flower's grid", "messages need its nodes")
    in_reach = in_simulation(grid) or is_fixed(grid)
    return MessageTransport(grid, setting, in_reach=in_reach)
