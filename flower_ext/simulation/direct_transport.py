"""Clients in this very process, one after the other: a packed grid in ``run_local``."""

from collections.abc import Iterable, Sequence

from flwr.app import RecordDict, UserConfig
from flwr.clientapp import ClientApp

from flower_ext.server.partial_sums import Summand
from flower_ext.simulation.clients import client_context, load_client_app, run_client
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.records import Record, own_copies
from flower_ext.simulation.transport import Transport


class DirectTransport(Transport):
    """Calls the ClientApp; nothing is added up on the way, since nothing travels.

    Parameters
    ----------
    client_app : ClientApp or str
        The ClientApp, or its import string ``"package.module:app"``.
    num_clients, run_id, run_config
        What goes into every client's context.
    client_timeout : float or None
        Seconds a client may take.
    """

    def __init__(
        self,
        client_app: ClientApp | str,
        num_clients: int,
        run_id: int,
        run_config: UserConfig,
        client_timeout: float | None,
    ) -> None:
        self._app = load_client_app(client_app)
        self._num_clients = num_clients
        self._run_id = run_id
        self._run_config = run_config
        self._client_timeout = client_timeout
        self._states: dict[int, RecordDict] = {}
        self._ready: list[Outcome] = []

    def submit(
        self,
        jobs: Sequence[Job],
        shared: Sequence[Record],
        summand: Summand | None = None,
    ) -> None:
        """Run the clients; one that fails keeps the state that it had."""
        for job in jobs:
            before = self._states.get(job.client, RecordDict())
            context = client_context(
                self._run_id,
                job.client,
                self._num_clients,
                own_copies(before),
                self._run_config,
            )
            outcome = run_client(self._app, job, shared, context, self._client_timeout)
            if outcome.content is not None:
                self._states[job.client] = context.state
            self._ready.append(outcome)

    def wait(self, seconds: float | None) -> list[Outcome]:
        """Return the outcomes, which are all there."""
        ready, self._ready = self._ready, []
        return ready

    def give_up(self, keys: Iterable[int]) -> None:
        """Do nothing: no job is ever under way."""

    def close(self) -> None:
        """Forget the clients' states."""
        self._states.clear()
