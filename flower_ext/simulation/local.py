"""The in-process grid: a ServerApp and its ClientApp without Ray, in milliseconds.

The way to unit-test an app::

    from flower_ext import run_local
    from my_app.client_app import app as client_app
    from my_app.server_app import app as server_app

    run_local(server_app, client_app, num_supernodes=10, run_config={"lr": 0.1})
"""

import tomllib
import traceback
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from uuid import uuid4

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from flower_ext._flower import (
    CLIENT_RAISED,
    NodeInfo,
    Run,
    flatten_dict,
)
from flower_ext.core.errors import refuse, whole
from flower_ext.simulation.base_grid import OwnGrid
from flower_ext.simulation.clients import CLIENTS_OWN

_FIRST_NODE = 1000


class LocalGrid(OwnGrid):
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

    Notes
    -----
    ``timeout`` has no effect: a reply exists when ``push_messages`` returns.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: UserConfig | None = None,
    ) -> None:
        whole("num_supernodes", num_supernodes, 1)
        if not isinstance(client_app, ClientApp):
            refuse("client_app", client_app, "a ClientApp")
        super().__init__(Run.create_empty(run_id=1))
        self._run.override_config = dict(run_config or {})
        self._client_app = client_app
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _FIRST_NODE + i: Context(
                run_id=1,
                node_id=_FIRST_NODE + i,
                node_config={"partition-id": i, "num-partitions": num_supernodes},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for i in range(num_supernodes)
        }

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids, in the order of the partitions."""
        self._look(self._contexts)
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes, registered in the order of the partitions."""
        return [
            NodeInfo(node_id=node, registered_at=f"{i:09d}")
            for i, node in enumerate(self._contexts)
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the client of every message."""
        self._looks = 0
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self._contexts:
                refuse("dst_node_id", node, f"one of {len(self._contexts)} known nodes")
            identifier = str(uuid4())
            self._replies[identifier] = self._call(message, identifier)
            ids.append(identifier)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand over the replies to messages that were pushed, once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return the replies in the same order."""
        return self.pull_messages(self.push_messages(messages))

    def _call(self, message: Message, identifier: str) -> Message:
        own = Message(
            _own_records(message.content),
            message.metadata.dst_node_id,
            message.metadata.message_type,
            group_id=message.metadata.group_id,
        )
        own.metadata.__dict__["_message_id"] = identifier
        try:
            reply = self._client_app(own, self._contexts[own.metadata.dst_node_id])
            if not isinstance(reply, Message):
                raise TypeError(f"a client must return a Message, not {reply!r}")
            return reply
        except CLIENTS_OWN as error:
            reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            return Message(Error(CLIENT_RAISED, reason), reply_to=own)


def _own_records(content: RecordDict) -> RecordDict:
    """Copy the records and their values, but not the bytes of arrays."""
    return RecordDict(
        {
            key: ArrayRecord(dict(record))  # new Arrays of the same bytes
            if isinstance(record, ArrayRecord)
            else deepcopy(record)
            for key, record in content.items()
        }
    )


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
    config = dict(run_config or {})
    grid = LocalGrid(client_app, num_supernodes, config)
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config
    )
    server_app(grid, context)
    return context


def app_config(app_dir: Path | str) -> dict[str, bool | float | int | str]:
    """Return the run config of a Flower app: ``[tool.flwr.app.config]``, flattened."""
    text = (Path(app_dir).expanduser() / "pyproject.toml").read_text("utf-8")
    nested = tomllib.loads(text)["tool"]["flwr"]["app"].get("config", {})
    return flatten_dict(nested)
