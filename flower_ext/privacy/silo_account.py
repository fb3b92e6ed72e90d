"""Where a silo keeps what it has spent: in a file of its own, or for one run only."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from filelock import FileLock
from flwr.app import ConfigRecord, RecordDict

from flower_ext.core.errors import fraction, refuse, whole
from flower_ext.core.files import flush
from flower_ext.core.protocol import ACCOUNT_PREFIX, RUN_NAME, RUN_RESUMED

FORMAT = 2
# What was written before steps had a group size each is read as well.
_READ = (1, FORMAT)

_STATE = f"{ACCOUNT_PREFIX}example-level-dp"
# Of the saved runs that this process took part in, by run and client.
_remembered: dict[tuple[str, int], ConfigRecord] = {}


class SiloAccount:
    """The account of one client in one round.

    With a ledger all runs and processes share the account in that file. Without one the
    account is that of the run. It is in ``context.state``, or in the memory of this
    process where a run goes on from a checkpoint.

    Parameters
    ----------
    ledger : Path, optional
        The silo's file.
    state : RecordDict
        The client's ``context.state``.
    client, server_round : int
        Whose account it is, and when.
    run : ConfigRecord
        What the server says of a run that it saves.
    """

    def __init__(
        self,
        ledger: Path | None,
        state: RecordDict,
        *,
        client: int,
        server_round: int,
        run: ConfigRecord,
    ) -> None:
        self._ledger, self._state = ledger, state
        self._round = server_round
        self._resumed = RUN_RESUMED in run
        self._key = (str(run.get(RUN_NAME, "")), client)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from reading until this round is charged."""
        if self._ledger is None:
            yield
            return
        if not self._ledger.parent.is_dir():
            refuse(
                "ledger",
                str(self._ledger),
                "in a folder that is there",
                "a disk that is not mounted must not look like an account of 0",
            )
        with FileLock(f"{self._ledger}.lock"):
            yield

    def read(self) -> ConfigRecord | None:
        """Return the record of all steps so far; None if nothing is known."""
        found = None if self._ledger is None else load_record(self._ledger)
        own = self._state.config_records.get(_STATE)
        if found is None:
            found = own
        elif own is not None and _steps(found) < _steps(own):
            refuse(
                "ledger",
                str(self._ledger),
                f"of at least {_steps(own)} steps, not {_steps(found)}",
                "this run has charged more to it, so that an older copy was put back",
            )
        if found is None and self._resumed:
            # In this process the first part of the run has charged its rounds.
            found = _remembered.get(self._key)
        return found

    def require(self, record: ConfigRecord | None) -> None:
        """Refuse to go on where earlier rounds may be missing from the account.

        Without a record a silo that joins late looks like one that has forgotten.
        """
        if record is not None:
            return
        if self._ledger is None and self._round > 1:
            refuse(
                "ledger",
                None,
                "a file of the silo's own",
                f"round {self._round} is the first that it knows of; after a restart, "
                "or where silos are drawn at random, only a ledger says what the "
                "rounds before have spent: SiloPrivacy(ledger=...)",
            )
        if self._resumed:
            refuse(
                "ledger",
                str(self._ledger),
                "a file that is there when a run goes on from a checkpoint",
                "what its first rounds have spent is not known; if the silo took no "
                "part in them, StepLedger().save(ledger) says so",
            )

    def write(self, record: ConfigRecord) -> None:
        """Keep the record: on the disk first, where there is a ledger."""
        if self._ledger is not None:
            try:
                save_record(self._ledger, record)
            except OSError as error:
                why = (
                    f"ledger={str(self._ledger)!r} cannot be written: {error.strerror}"
                )
                raise OSError(error.errno, why) from error
        self._state[_STATE] = record
        if self._key[0]:
            _remembered[self._key] = record


def _steps(record: ConfigRecord) -> int:
    return sum(cast("list[int]", record["steps"]))


def ledger_path(ledger: str | os.PathLike[str]) -> Path:
    """Return the path of a ledger: absolute, ``~`` and links followed."""
    if not isinstance(ledger, str | os.PathLike) or not os.fspath(ledger):
        refuse("ledger", ledger, "the path of a file")
    path = Path(ledger).expanduser()
    if not path.is_absolute():
        refuse(
            "ledger",
            str(ledger),
            "an absolute path",
            "a relative one is another file where the process starts elsewhere",
        )
    if path.is_dir():
        cause = "a silo has one of its own: privacy may be a function of its context"
        refuse("ledger", str(ledger), "a file, not a folder", cause)
    return path.resolve()


def load_record(path: Path) -> ConfigRecord | None:
    """Read a ledger's file, unless it is damaged; None where there is none."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
        if (form := found.pop("format")) not in _READ:
            raise ValueError(f"format must be one of {_READ}")
        whole("group-size", found["group-size"], 1)
        if not isinstance(found["unit"], str):
            refuse("unit", found["unit"], "the name of a column, or empty")
        rates, noises = found["rates"], found["noise-multipliers"]
        # Only what the accounting can read: a damaged ledger must not count less.
        for rate, noise, steps in zip(rates, noises, found["steps"], strict=True):
            fraction("rates", rate)
            whole("steps", steps, 1)
            if not float(noise) >= 0:
                refuse("noise-multipliers", noise, ">= 0")
        if form > 1:
            for size, _ in zip(found["group-sizes"], rates, strict=True):
                whole("group-sizes", size, 1)
        return ConfigRecord(found)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"ledger={str(path)!r} cannot be read ({type(error).__name__}: {error}): a "
            "silo that does not know what it has spent trains nothing; put a copy back"
        ) from error


def save_record(path: Path, record: ConfigRecord) -> None:
    """Write a ledger's file: all of it, and to the disk, or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **record}, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush(path.parent)
