"""The states of virtual clients: small ones in memory, others in files.

A state is what a client keeps in ``context.state``, as bytes. Its size decides where it
is kept::

    64 KiB or less, and all such states together within a bound    the server's memory
    else                                                           a file of its own

A file is written once, under a name that nobody else has, and its name is told only
when it is whole. So a worker that dies, or answers too late, spoils nothing: the server
never takes up the name of what it wrote. Where server and workers see the same folder,
the name is all that travels.
"""

import fcntl
import gc
import json
import os
import shutil
import struct
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flower_ext.core.errors import refuse, whole
from flower_ext.core.files import link_or_copy
from flower_ext.core.held import fields_of
from flower_ext.core.protocol import ACCOUNT_PREFIX
from flower_ext.simulation.clients import LostState
from flower_ext.simulation.records import sent_array
from flower_ext.simulation.setting import STATE_MEMORY

# A larger one costs less to write and read than to carry to the server and back.
_LARGE = 1 << 16
_ARRAYS, _METRICS, _CONFIG = "arrays", "metrics", "config"
_LENGTH = struct.Struct("<Q")
_PREFIX = "flower-ext-states-"

_own_folders: set[Path] = set()

#: A state as it travels: its bytes, or the name of its file on the shelf.
Kept = bytes | str


def encode(state: RecordDict) -> bytes:
    """Return the bytes of a state: what is in it as JSON, then what are bytes already.

    The array bytes are Flower's own. Its protocol buffers would copy them four times.
    """
    blobs: list[bytes] = []

    def plain(value: object) -> object:
        if isinstance(value, bytes):
            blobs.append(value)
            return {"bytes": len(value)}
        return [plain(x) for x in value] if isinstance(value, list) else value

    table: list[tuple[str, str, object]] = []
    for key, record in state.items():
        if isinstance(record, ArrayRecord):
            entries = [[name, *fields_of(array)] for name, array in record.items()]
            table.append((key, _ARRAYS, plain(entries)))
        else:
            kind = _METRICS if isinstance(record, MetricRecord) else _CONFIG
            table.append((key, kind, {k: plain(v) for k, v in record.items()}))
    text = json.dumps(table).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *blobs])


def decode(data: bytes) -> RecordDict:
    """Read what :func:`encode` made.

    Raises
    ------
    ValueError
        If bytes are missing, or there are others behind them.
    """
    start = _LENGTH.size
    at = start + _LENGTH.unpack_from(data)[0]

    def full(value: Any) -> Any:
        nonlocal at
        if isinstance(value, dict):
            at += value["bytes"]
            return data[at - value["bytes"] : at]
        return [full(x) for x in value] if isinstance(value, list) else value

    state = RecordDict()
    for key, kind, entries in json.loads(data[start:at]):
        if kind == _ARRAYS:
            arrays = state[key] = ArrayRecord()
            for name, dtype, shape, stype, blob in entries:
                arrays[name] = sent_array(dtype, tuple(shape), stype, full(blob))
        else:
            values = {name: full(value) for name, value in entries.items()}
            record = MetricRecord if kind == _METRICS else ConfigRecord
            state[key] = record(values)
    if at != len(data):
        raise ValueError(f"a state of {at} bytes has {len(data)}")
    return state


@dataclass(frozen=True)
class Shelf:
    """The folder of large states, as far as this process sees it.

    Attributes
    ----------
    folder : Path
        Of a name that is given once: where there is one of this name, it is this one.
    """

    folder: Path

    def is_here(self) -> bool:
        """Whether this process sees the folder: it may run on another machine."""
        return self.folder.is_dir()

    def is_own(self) -> bool:
        """Whether this very process has made the folder."""
        return self.folder in _own_folders

    def read(self, kept: Kept | None) -> RecordDict:
        """Return a client's state; an empty one if it has none.

        Raises
        ------
        LostState
            If its file is gone or damaged.
        """
        if kept is None:
            return RecordDict()
        try:
            data = kept if isinstance(kept, bytes) else self.path(kept).read_bytes()
            return decode(data)
        except (OSError, LookupError, TypeError, ValueError, struct.error) as error:
            raise LostState(str(error)) from error

    def write(self, state: RecordDict) -> Kept | None:
        """Keep a state, large ones in a file; None if it is empty."""
        if not state:
            return None
        data = encode(state)
        if len(data) <= _LARGE or not self.is_here():
            return data
        return self.file(data)

    def file(self, data: bytes) -> str:
        """Write a file; return its name."""
        handle, path = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return Path(path).name

    def path(self, name: str) -> Path:
        """Return the path of a file; nothing outside the folder is one."""
        return self.folder / Path(name).name


class PackStates:
    """The states of some clients, where these run.

    What is written here is known to nobody else until all of them are done: where the
    process dies before, its clients are as they were, and can run again.

    Parameters
    ----------
    lent : Mapping[int, Kept]
        The states of those that have one.
    shelf : Shelf
        Where large ones are.
    """

    def __init__(self, lent: Mapping[int, Kept], shelf: Shelf) -> None:
        self._lent = lent
        self._shelf = shelf
        self.changed: dict[int, Kept | None] = {}

    def read(self, client: int) -> RecordDict:
        """Return a client's state: one that was asked twice sees what it did first."""
        found = self.changed if client in self.changed else self._lent
        kept = found.get(client)
        if isinstance(kept, str):
            # Flower's records refer to themselves, and Python looks for such garbage
            # after a number of objects: of large states those would be too many.
            gc.collect(1)
        return self._shelf.read(kept)

    def write(self, client: int, state: RecordDict) -> None:
        """Keep a client's state."""
        kept = self._shelf.write(state)
        if kept is not None or client in self.changed or client in self._lent:
            self.changed[client] = kept


class ClientStates:
    """The states of all virtual clients of a grid, by their numbers.

    Parameters
    ----------
    num_clients : int
        They are numbered from 0.
    memory : int
        Bytes that the states in this process's memory may take. 0 puts every state into
        a file.
    """

    def __init__(self, num_clients: int, memory: int = STATE_MEMORY) -> None:
        whole("state_memory", memory, 0)
        self._num_clients = num_clients
        self._memory = memory
        self._kept: dict[int, Kept] = {}
        self._versions: dict[int, int] = {}
        self._changes = 0
        self._used = 0
        self._replaced: list[str] = []
        self._shelf: Shelf | None = None
        self._end: weakref.finalize[..., ClientStates] | None = None

    @property
    def in_memory(self) -> int:
        """Bytes of the states that are in memory."""
        return self._used

    def shelf(self) -> Shelf:
        """Return the folder, which is made when it is first asked for.

        It lasts as long as this object, and no longer than this process: what a process
        left that was killed is removed here.
        """
        if self._shelf is None:
            _remove_abandoned()
            folder, lock = _locked_folder()
            self._shelf = Shelf(folder)
            _own_folders.add(folder)
            self._end = weakref.finalize(self, _remove, folder, lock)
        return self._shelf

    def read(self, client: int) -> RecordDict:
        """Return a copy of a client's state; an empty one if it has none."""
        kept = self._kept.get(client)
        return RecordDict() if kept is None else self.shelf().read(kept)

    def write(self, client: int, state: RecordDict) -> None:
        """Keep a client's new state."""
        self.take(client, encode(state) if state else None)

    def lend(self, clients: Iterable[int], *, named: bool) -> dict[int, Kept]:
        """Return states as they travel to whoever runs the clients.

        Parameters
        ----------
        clients : iterable of int
            Whose. Those without a state are left out.
        named : bool
            Whether the receiver sees the shelf, so that names will do.
        """
        lent = {c: self._kept[c] for c in clients if c in self._kept}
        for client, kept in lent.items():
            if isinstance(kept, str) and not named:
                with suppress(OSError):  # else its name says what is lost
                    lent[client] = self.shelf().path(kept).read_bytes()
        return lent

    def take_back(self, changed: Mapping[int, Kept | None]) -> None:
        """Keep what became of states that were lent."""
        for client, kept in changed.items():
            self.take(client, kept)

    def take(self, client: int, kept: Kept | None) -> None:
        """Keep a client's new state, as it came back; None is an empty one."""
        before = self._kept.pop(client, None)
        if isinstance(before, str):
            self._replaced.append(before)
        elif before is not None:
            self._used -= len(before)
        if kept is None:
            if before is not None:
                del self._versions[client]
            return
        if isinstance(kept, bytes):
            if len(kept) > _LARGE or self._used + len(kept) > self._memory:
                kept = self.shelf().file(kept)
            else:
                self._used += len(kept)
        self._kept[client] = kept
        self._changes += 1
        self._versions[client] = self._changes

    def tidy(self) -> None:
        """Remove files of states that were replaced, once no client is at work.

        A client that is asked twice at once starts both times from the same state.
        """
        for name in self._replaced:
            self.shelf().path(name).unlink(missing_ok=True)
        self._replaced.clear()

    def close(self) -> None:
        """Forget all states, and remove their files."""
        self._kept.clear()
        self._versions.clear()
        self._replaced.clear()
        self._used = 0
        if self._end is not None:
            self._end()
        self._shelf = None

    # What a checkpoint asks for ------------------------------------------------------

    def versions(self) -> Mapping[int, int]:
        """Return a number for each client with a state: another for each new state."""
        return self._versions

    def saved(self, client: int) -> bytes | Path:
        """Return a client's state: its bytes, or a file that will not change."""
        kept = self._kept[client]
        return kept if isinstance(kept, bytes) else self.shelf().path(kept)

    def restore(self, states: Mapping[int, bytes | Path]) -> None:
        """Replace all states by saved ones, but for what a client has spent.

        Accounts are records whose keys begin with ``account/``. What was charged after
        the round was saved has been spent all the same, so that none is put back: a
        client keeps the account that it has here, or none, and has to know by itself.

        Raises
        ------
        ValueError
            If a saved state is that of a client that is not there.
        """
        for client in states:
            if client not in range(self._num_clients):
                refuse(
                    "num_clients",
                    self._num_clients,
                    f"> {client}, a client with a saved state",
                    "a run goes on with the clients that it had",
                )
        found = {client: _accounts(self._bytes(client)) for client in self._kept}
        for client in self._kept.keys() - states.keys():
            self.write(client, found[client])
        for client, state in states.items():
            data = state if isinstance(state, bytes) else state.read_bytes()
            account = found.get(client)
            if account or ACCOUNT_PREFIX.encode() in data:
                records = decode(data)
                for key in _accounts(data):
                    del records[key]
                self.write(client, RecordDict({**records, **(account or {})}))
            elif isinstance(state, bytes) or len(data) <= _LARGE:
                self.take(client, data)
            else:
                self.take(client, self._linked(state))
        self.tidy()

    def _bytes(self, client: int) -> bytes:
        state = self.saved(client)
        return state if isinstance(state, bytes) else state.read_bytes()

    def _linked(self, path: Path) -> str:
        """Take a saved file over, without a copy where the disk is the same."""
        name = f"restored-{self._changes}"
        link_or_copy(path, self.shelf().path(name))
        return name


def _accounts(data: bytes) -> RecordDict:
    """Return the records of a state that say what a client has spent."""
    if ACCOUNT_PREFIX.encode() not in data:
        return RecordDict()
    records = decode(data)
    return RecordDict({k: records[k] for k in records if k.startswith(ACCOUNT_PREFIX)})


def _locked_folder() -> tuple[Path, int]:
    """Make a folder that is this process's own as long as it lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Until it is locked, another process may take it for abandoned: then again.
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            if _lock(lock) and folder.is_dir():
                return folder, lock
            os.close(lock)


def _lock(folder: int) -> bool:
    """Lock a folder, unless another process has; where none can, none is removed."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _remove_abandoned() -> None:
    """Remove the folders of processes that were killed: nobody locks them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _remove(folder: Path, lock: int) -> None:
    _own_folders.discard(folder)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
