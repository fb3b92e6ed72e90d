"""The in-process grid: a ServerApp and its ClientApp without Ray, in milliseconds.

The way to unit-test an app::

    from flower_ext import run_local
    from my_app.client_app import app as client_app
    from my_app.server_app import app as server_app

    run_local(server_app, client_app, num_supernodes=10, run_config={"lr": 0.1})
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from flower_ext._flower import Run, flatten_dict
from flower_ext.core.errors import refuse, whole
from flower_ext.simulation.base_grid import BaseGrid
from flower_ext.simulation.direct_transport import DirectTransport
from flower_ext.simulation.setting import STATE_MEMORY, Setting

# Flower's node ids are no partitions either: an app that takes one for the other fails.
_FIRST_NODE = 1000


class LocalGrid(BaseGrid):
    """Calls a ClientApp directly, one virtual client after the other.

    Every client has its own :class:`~flwr.app.Context` with ``partition-id`` and
    ``num-partitions``, whose ``state`` lasts as long as the grid; an exception in a
    client, ``sys.exit`` included, becomes that client's error reply, as under Ray.
    Clients get records of their own, so that one cannot change what another receives.

    Parameters
    ----------
    client_app : ClientApp
        The app under test; its mods run too.
    num_supernodes : int
        Number of virtual clients.
    run_config : Mapping, optional
        What ``context.run_config`` holds.
    state_memory : int (default: 64 MiB)
        As of a :class:`~flower_ext.simulation.PackedGrid`.

    Notes
    -----
    ``timeout`` has no effect: a reply exists when ``push_messages`` returns.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: UserConfig | None = None,
        *,
        state_memory: int = STATE_MEMORY,
    ) -> None:
        whole("num_supernodes", num_supernodes, 1)
        if not isinstance(client_app, ClientApp):
            refuse("client_app", client_app, "a ClientApp")
        run = Run.create_empty(run_id=1)
        run.override_config = _settings(run_config)
        nodes = range(_FIRST_NODE, _FIRST_NODE + num_supernodes)
        setting = Setting(
            client_app,
            nodes,
            run.run_id,
            run.override_config,
            state_memory=state_memory,
        )
        super().__init__(run, setting, DirectTransport(setting))


def run_local(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_supernodes: int = 2,
    run_config: Mapping[str, bool | float | int | str] | None = None,
) -> Context:
    """Run a whole app in this process.

    Parameters
    ----------
    server_app, client_app
        The two halves of a Flower app, unmodified.
    num_supernodes : int (default: 2)
        Number of virtual clients.
    run_config : Mapping, optional
        What ``context.run_config`` holds on both sides; in a Flower app it comes from
        ``[tool.flwr.app.config]``, see :func:`app_config`.

    Returns
    -------
    Context
        The ServerApp's context after the run.
    """
    if not isinstance(server_app, ServerApp):
        refuse("server_app", server_app, "a ServerApp", "the ClientApp comes second")
    config = _settings(run_config)
    grid = LocalGrid(client_app, num_supernodes, config)
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config
    )
    server_app(grid, context)
    return context


def _settings(
    run_config: Mapping[str, bool | float | int | str] | None,
) -> UserConfig:
    if not isinstance(run_config, Mapping | None):
        cause = "app_config(folder) returns that of an app"
        refuse("run_config", run_config, "a dict", cause)
    return dict(run_config or {})


def app_config(app_dir: Path | str) -> dict[str, bool | float | int | str]:
    """Return the run config of a Flower app: ``[tool.flwr.app.config]``, flattened."""
    text = (Path(app_dir).expanduser() / "pyproject.toml").read_text("utf-8")
    nested = tomllib.loads(text)["tool"]["flwr"]["app"].get("config", {})
    return flatten_dict(nested)
