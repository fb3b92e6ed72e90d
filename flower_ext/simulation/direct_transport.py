"""Clients in this very process, one after the other."""

from collections.abc import Iterable, Sequence

from flower_ext.server.partial_sums import Summand
from flower_ext.simulation.clients import load_client_app, run_clients
from flower_ext.simulation.jobs import Job, Outcome
from flower_ext.simulation.records import Record
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import ClientStates
from flower_ext.simulation.transport import Transport


class DirectTransport(Transport):
    """Calls the ClientApp; nothing is added up on the way, since nothing travels.

    Parameters
    ----------
    setting : Setting
        Of the clients.
    """

    def __init__(self, setting: Setting) -> None:
        self._app = load_client_app(setting.client_app)
        self._setting = setting
        self._ready: list[Outcome] = []
        memory = setting.state_memory
        self.states: ClientStates = ClientStates(setting.num_clients, memory)

    def submit(
        self,
        jobs: Sequence[Job],
        shared: Sequence[Record],
        summand: Summand | None = None,
    ) -> None:
        """Run the clients."""
        self._ready += run_clients(self._app, self._setting, jobs, shared, self.states)

    def wait(self, seconds: float | None) -> list[Outcome]:
        """Return the outcomes, which are all there."""
        ready, self._ready = self._ready, []
        return ready

    def give_up(self, keys: Iterable[int]) -> None:
        """Do nothing: no job is ever under way."""

    def close(self) -> None:
        """Forget the clients' states."""
        self.states.close()
