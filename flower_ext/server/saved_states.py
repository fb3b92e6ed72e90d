"""Clients' states in the folders of saved rounds: only those that are new are written.

::

    round-00011/clients/   small  3  7  9         3: written in round 4
    round-00012/clients/   small  3  7  9         7: written in round 12, the others are
                                                     second names of round 11's files

Every round has all of its states, in files of its own or under second names of those of
the round before, so that any of them can be deleted, copied or put back without others.
States of a disk's block or less are in one file, which is written in every round.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flower_ext.core.files import flush, link_or_copy

_FOLDER, _TOGETHER = "clients", "small"
_BLOCK = 4096  # bytes; a smaller file would take as many
_FLUSHES = 8  # at once: disks are far faster than with one after the other


class States(Protocol):
    """The states of the clients of a grid, by the clients' numbers."""

    def versions(self) -> Mapping[int, int]:
        """Return a number for each client with a state: another for each new state."""

    def saved(self, client: int) -> bytes | Path:
        """Return a client's state: its bytes, or a file that will not change."""

    def restore(self, states: Mapping[int, bytes | Path]) -> None:
        """Replace all states, but for what clients have spent."""


class _Written(NamedTuple):
    """A file that a saved round has: of which state, and its digest."""

    version: int
    digest: str


class SavedStates:
    """Writes the states of clients beside the models of their rounds.

    Parameters
    ----------
    states : States
        Those of a grid in whose reach they are.
    """

    def __init__(self, states: States) -> None:
        self._states = states
        self._last: Path | None = None  # the round that was saved last, and its files
        self._written: dict[int, _Written] = {}
        self._writing: dict[int, _Written] = {}

    def write(self, round_folder: Path) -> dict[str, object]:
        """Write all states into a round's folder; return what :meth:`read` must know.

        The files are on the disk when this returns.
        """
        self._writing = {}
        versions = dict(sorted(self._states.versions().items()))
        if not versions:
            return {"small": [], "files": []}
        folder = round_folder / _FOLDER
        folder.mkdir(mode=0o700)
        together: list[bytes] = []
        small: list[tuple[int, int]] = []
        fresh = [folder / _TOGETHER]
        for client, version in versions.items():
            state = self._states.saved(client)
            if isinstance(state, bytes) and len(state) <= _BLOCK:
                together.append(state)
                small.append((client, len(state)))
                continue
            path = folder / str(client)
            written = self._written.get(client)
            if written and written.version == version and self._link(client, path):
                self._writing[client] = written
                continue
            if isinstance(state, bytes):
                path.write_bytes(state)
            else:
                link_or_copy(state, path)
            self._writing[client] = _Written(version, _digest(path))
            fresh.append(path)
        (folder / _TOGETHER).write_bytes(b"".join(together))
        with ThreadPoolExecutor(_FLUSHES) as pool:
            list(pool.map(flush, fresh))
        flush(folder)
        return {
            "small": small,
            "sha256": _digest(folder / _TOGETHER),
            "files": [(client, w.digest) for client, w in self._writing.items()],
        }

    def _link(self, client: int, path: Path) -> bool:
        """Give the last round's file of a client a second name, if that can be."""
        if self._last is None:
            return False
        try:
            path.hardlink_to(self._last / _FOLDER / str(client))
        except OSError:  # the folder is gone, or the disk knows no links
            return False
        return True

    def has_written(self, round_folder: Path) -> None:
        """Take note that a round is saved, in a folder of this name."""
        self._last, self._written = round_folder, self._writing

    def read(self, round_folder: Path, about: Mapping[str, Any]) -> "Found":
        """Read the states of a saved round.

        Raises
        ------
        OSError, LookupError, TypeError, ValueError
            If a file is missing, damaged, or of another round.
        """
        folder = round_folder / _FOLDER
        found: dict[int, bytes | Path] = {}
        written: dict[int, str] = {}
        if about["small"] or about["files"]:
            _require(folder / _TOGETHER, about["sha256"])
            data, at = (folder / _TOGETHER).read_bytes(), 0
            for client, size in about["small"]:
                found[client] = data[at : at + size]
                at += size
        for client, digest in about["files"]:
            path = folder / str(client)
            _require(path, digest)
            found[client], written[client] = path, digest
        return Found(round_folder, found, written)

    def restore(self, found: "Found") -> None:
        """Let clients go on from the states of a saved round."""
        self._states.restore(found.states)
        versions = self._states.versions()
        # What a client has spent may differ from the file: nobody reads it there.
        self._written = {
            client: _Written(versions[client], digest)
            for client, digest in found.digests.items()
            if client in versions
        }
        self._last = found.folder


class Found(NamedTuple):
    """The states of a saved round, and the digests of those that are files."""

    folder: Path
    states: dict[int, bytes | Path]
    digests: dict[int, str]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require(path: Path, digest: str) -> None:
    if _digest(path) != digest:
        raise ValueError(f"{_FOLDER}/{path.name} is not as it was written")
