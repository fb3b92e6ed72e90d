"""A log of the bytes of every array in every message, as one csv file."""

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from logging import ERROR
from pathlib import Path

from flower_ext._flower import log
from flower_ext.core.errors import refuse
from flower_ext.server.callbacks import Callback
from flower_ext.server.finished import FinishedRound, RunInfo

SERVER = -1
_HEADER = ("round", "phase", "sender", "receiver", "name", "bytes")
Row = dict[str, int | str]


class ByteLog(Callback):
    """Writes what every message took, array by array, to a csv file.

    Each row has ``round``, ``phase`` (``train`` or ``evaluate``), ``sender`` and
    ``receiver`` (a client's place among the nodes, or -1, the server), ``name``
    (of the record and the array, ``arrays/head.weight``) and ``bytes``, as Flower
    serialises it. Names of records, metrics and configurations are ``(rest)``; a reply
    that was added up where it was made is one row, ``(all)``. The rows of a round add
    up to the ``bytes/down`` and ``bytes/up`` of :class:`~flower_ext.Tracker`. What a
    codec makes of a model is one array.

    A log of this kind was asked of the entries to the PFL-DocVQA competition (Tobaben
    et al. 2024), by which communication was compared.

    Parameters
    ----------
    path : path
        The file; its folder is made if missing. A run that is continued keeps the
        earlier rounds, a new run starts anew. Refused under a mechanism, whose epsilon
        does not cover who took part.

    Examples
    --------
    >>> import tempfile
    >>> from flower_ext.server.finished import Sent
    >>> path = Path(tempfile.mkdtemp(), "bytes.csv")
    >>> byte_log = ByteLog(path)
    >>> byte_log.begin(RunInfo(1))
    >>> reply = Sent("train", 3, up=True, bytes={"arrays/w": 40, "(rest)": 2})
    >>> byte_log.round(FinishedRound(1, messages=(reply,)))
    >>> [(x["sender"], x["receiver"], x["name"], x["bytes"]) for x in read_bytes(path)]
    [(3, -1, 'arrays/w', 40), (3, -1, '(rest)', 2)]
    """

    needs_messages = True

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def name(self) -> str:
        """Return the class with the file's name."""
        return f"{type(self).__name__}({self.path.name})"

    def begin(self, run: RunInfo) -> str | None:
        """Start the file, with the rows of the rounds that were done."""
        if run.private:
            cause = "who has taken part is not covered by epsilon"
            refuse("callbacks", "ByteLog", "left out under a mechanism", cause)
        kept = [row for row in read_bytes(self.path) if int(row["round"]) <= run.done]
        # By a rename, so that an interruption loses no row.
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_HEADER)
            csv.DictWriter(file, _HEADER).writerows(kept)
        partial.replace(self.path)
        return None

    def round(self, this: FinishedRound) -> str | None:
        """Append a round's rows, or none; a disk that fails is logged."""
        end = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, _HEADER).writerows(_rows(this))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, end)
            log(ERROR, "round %s is not in %s: %s", this.number, self.path, error)
        return None


def _rows(this: FinishedRound) -> Iterator[Row]:
    for sent in this.messages:
        ends = (sent.client, SERVER) if sent.up else (SERVER, sent.client)
        for name, size in sent.bytes.items():
            values = (this.number, sent.phase, *ends, name, size)
            yield dict(zip(_HEADER, values, strict=True))


def read_bytes(path: Path | str) -> list[Row]:
    """Read a file of :class:`ByteLog`; [] if missing.

    A last line that was cut off by an interruption is left out.
    """
    path = Path(path).expanduser()
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(_numbers(csv.DictReader(_whole(file))))


def _whole(lines: Iterable[str]) -> Iterator[str]:
    return (line for line in lines if line.endswith("\n"))


def _numbers(rows: Iterable[dict[str, str]]) -> Iterator[Row]:
    for row in rows:
        words = {"phase", "name"}
        yield {key: x if key in words else int(x) for key, x in row.items()}
