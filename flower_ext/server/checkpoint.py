"""Save a run after each round and continue it, with safetensors for arrays.

A saved round is a folder ``round-00012`` with ``model.safetensors``,
``state.safetensors`` (moments and other arrays of the strategy and of callbacks),
``state.json``, and the states of the clients where the grid has them. It is written
under another name, flushed to the disk and renamed, so that a folder of that name is
complete. Only then is the round before the last one deleted.

Under a mechanism a round is released once it is saved, and ``released.json`` says which
one was released last. A run is never continued from an earlier round, since it would
release another model in the place of the one that was seen.
"""

import fcntl
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, UserConfig
from flwr.common import NDArray
from flwr.serverapp.strategy import Result
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flower_ext._flower import log
from flower_ext.core.arrays import Arrays, from_record, layout, to_record
from flower_ext.core.files import flush
from flower_ext.core.states import Stateful
from flower_ext.core.strict_json import read, write
from flower_ext.server.at_work import AtWork
from flower_ext.server.run_settings import (
    Changes,
    Configs,
    Settings,
    differences,
    digest,
    readable,
    settings_of,
    text_of,
)
from flower_ext.server.saved_states import Found, SavedStates

FORMAT = 3
_NAME = re.compile(r"round-(\d{5,})")
_LOCK = ".lock"
_RELEASED = "released.json"
_MODEL, _STATE, _JSON = "model.safetensors", "state.safetensors", "state.json"
_METRICS = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)


class CheckpointError(RuntimeError):
    """A run that cannot be saved in, or continued from, a folder."""


class Checkpoint:
    """The saved rounds of one run.

    Parameters
    ----------
    folder : path
        Made if missing, ``~`` is the home. One folder belongs to one run.
    strategy : Stateful
        Its ``state_dict`` is saved and restored.
    configs : Mapping[str, ConfigRecord], optional
        The configurations that the run hands to its strategy, by name. Changes that
        the strategy makes in them are saved and restored as well.
    grid : Grid, optional
        If its clients' ``states`` are in reach, they are saved and restored, and so is
        what the grid itself has in its ``state_dict``.
    callbacks : Stateful, optional
        Their states are saved and restored beside the strategy's.
    run_config : Mapping, optional
        The run config that clients may read. If it differs from that of the saved run,
        a warning says so; it is not refused, since some of it, such as a folder of
        results, may differ.
    releases : bool (default: False)
        Whether rounds are released under a mechanism, each once and for all.
    at_work : AtWork, optional
        The clients at work, in an asynchronous run.

    Raises
    ------
    CheckpointError
        If the folder cannot be written or the strategy has no state to save.
    """

    def __init__(
        self,
        folder: Path | str,
        strategy: object,
        configs: Configs | None = None,
        *,
        grid: object = None,
        callbacks: Stateful | None = None,
        run_config: UserConfig | None = None,
        releases: bool = False,
        at_work: AtWork | None = None,
    ) -> None:
        if not isinstance(strategy, Stateful):
            raise CheckpointError(
                f"{type(strategy).__name__} has no state_dict and load_state_dict: "
                "a run of it cannot be continued; Flower's own strategies have none"
            )
        if not isinstance(folder, Path | str) or not str(folder):
            raise CheckpointError(f"checkpoint={folder!r} must be the path of a folder")
        self.folder = Path(folder).expanduser().absolute()
        self.strategy = strategy
        self._grid = grid if isinstance(grid, Stateful) else None
        states = getattr(grid, "states", None)
        self._clients = None if states is None else SavedStates(states)
        self._callbacks = callbacks
        self._at_work = at_work
        self._configs = dict(configs or {})
        self._changes = Changes(self._configs)
        self._begun = self._settings()
        self._run_config = readable(run_config or {})
        self._initial = ""
        self.releases = releases
        # Tried now, so that a folder without permission does not cost the first round.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.write_bytes(b"?")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint={str(folder)!r} must be a folder that can be written: "
                f"{error.strerror}"
            ) from error

    def _settings(self) -> Settings:
        """Return what a run that continues this one must have in common with it."""
        found = settings_of(self.strategy, self._configs)
        if self._at_work:
            own = self._at_work.settings.settings()
            found |= {f"asynchronous.{name}": text_of(x) for name, x in own.items()}
        return found

    def contents(self) -> str:
        """Return where rounds are saved, and whether clients' states are with them."""
        if self._clients:
            return f"{self.folder}, with what clients keep"
        return (
            f"{self.folder}, but not what clients keep in context.state: it is out of "
            "this grid's reach, so that clients of a continued run start anew. A "
            "LocalGrid has it in reach, and so has a PackedGrid in a simulation"
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out of the folder; until this one ends.

        Raises
        ------
        CheckpointError
            If another run is at work in it.
        """
        path = self.folder / _LOCK
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise CheckpointError(
                    f"checkpoint={str(self.folder)!r} is in use by another run, "
                    f"{file.read().strip() or 'of an unknown process'}: wait for its "
                    "end, or choose another folder"
                ) from None
            except OSError as error:
                log(
                    WARNING,
                    "%s cannot be locked (%s): see to it that one run alone uses it",
                    self.folder,
                    error.strerror,
                )
            with suppress(OSError):  # a full disk keeps nobody from running
                file.truncate(0)
                file.write(
                    f"process {os.getpid()} on {socket.gethostname()}, since "
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
                )
                file.flush()
            yield

    def rounds(self) -> list[int]:
        """Return the saved rounds, in order."""
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def save(self, server_round: int, result: Result) -> bool:
        """Save a round; if the disk fails, log that and return False.

        A round may be saved twice, first without its evaluation: at every moment one of
        the two is complete on the disk.
        """
        partial = self.folder / f".partial-{os.getpid()}"
        final = self._path(server_round)
        replaced = self.folder / f".replaced-{server_round}"
        try:
            for leftover in self.folder.glob(".partial-*"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
            # Noise of later rounds and seeds of cohorts are in it.
            partial.mkdir(0o700 if self.releases else 0o777, parents=True)
            self._write(partial, server_round, result)
            # A folder cannot be renamed over another one: the old one steps aside, and
            # ``restore`` puts it back if the process is killed between the two steps.
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            partial.rename(final)
            flush(self.folder)
            if self._clients:
                self._clients.has_written(final)
            if self.releases:
                self._note_release(server_round)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            log(
                ERROR,
                "Round %s could not be saved in %s (%s).%s %s",
                server_round,
                self.folder,
                error,
                "" if self.releases else " The run goes on;",
                self._situation(),
            )
            return False
        shutil.rmtree(replaced, ignore_errors=True)
        # Two rounds are kept: if the last one is damaged, the one before can be used.
        for old in self.rounds()[:-2]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return True

    def restore(self, result: Result, num_rounds: int | None = None) -> int:
        """Load the last saved round into result and strategy; return its number.

        Parameters
        ----------
        result : Result
            Holds the initial model, which a saved one must match in layout.
        num_rounds : int, optional
            Rounds of the whole run. With as many saved it is complete, and its initial
            model must be this one.

        Raises
        ------
        CheckpointError
            If the saved run is of another strategy, model or setting, longer than
            ``num_rounds``, or damaged.
        """
        self._initial = digest(result.arrays)
        for replaced in self.folder.glob(".replaced-*"):  # of a killed process
            final = self._path(int(replaced.name.rpartition("-")[2]))
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                replaced.rename(final)
        rounds = self.rounds()
        self._require_released(max(rounds, default=0))
        if not rounds:
            return 0
        # Everything is read and compared first: a run that is refused has changed
        # neither the strategy nor the result.
        path = self._path(rounds[-1])
        try:
            saved = self._read(path)
            model = load_file(path / _MODEL)
            arrays = to_record({name: model[name] for name in saved["model"]})
            states = _join(saved["states"], load_file(path / _STATE))
            clients = self._saved_clients(path, saved["clients"])
            metrics = {
                field: {int(r): MetricRecord(m) for r, m in rounds.items()}
                for field, rounds in saved["metrics"].items()
            }
            done = int(saved["round"])
            self._require_same(path, saved, result.arrays)
            begun, now = (Settings(saved["settings"][k]) for k in ("begun", "now"))
            self._require_settings(path, begun, now)
            self._require_rounds(path, done, num_rounds)
            self._compare_start(path, str(saved["initial"]), done == num_rounds)
            self._compare_run_configs(Settings(saved["run-config"]), num_rounds)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}: {error}); "
                + (_NOT_AGAIN if self.releases else _DELETE)
            ) from error
        try:
            self.strategy.load_state_dict(states["strategy"])
            if self._callbacks:
                self._callbacks.load_state_dict(states["callbacks"])
            if self._grid and states["grid"]:
                self._grid.load_state_dict(states["grid"])
            if self._at_work:
                self._at_work.load_state_dict(states["at-work"])
            if self._clients and clients:
                self._clients.restore(clients)
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be continued: {error}") from error
        self._changes.load_state_dict(saved["changes"])
        self._begun, self._initial = begun, str(saved["initial"])
        result.arrays = arrays
        for field in _METRICS:
            getattr(result, field).update(metrics[field])
        if done != num_rounds:
            log(INFO, "Continuing after round %s, saved in %s", done, path)
            if clients is None:
                log(
                    WARNING,
                    "Clients start anew: their states are not in the checkpoint, since "
                    "they were out of the grid's reach",
                )
        return done

    def _saved_clients(
        self, path: Path, about: Mapping[str, Any] | None
    ) -> Found | None:
        """Return the saved states of clients; None if they are not in the checkpoint.

        A run whose clients have states cannot go on where these are out of reach.
        """
        if about is None:
            return None
        if self._clients:
            return self._clients.read(path, about)
        if num := len(about["small"]) + len(about["files"]):
            raise CheckpointError(
                f"{path} holds the states of {num} clients, which this grid cannot "
                "hand to them: continue on a LocalGrid or a PackedGrid in a simulation"
            )
        return None

    def _note_release(self, server_round: int) -> None:
        """Write that a round is released, on the disk, before anybody sees it."""
        partial = self.folder / ".released"
        partial.write_text(write({"round": server_round}), "utf-8")
        flush(partial)
        partial.replace(self.folder / _RELEASED)
        flush(self.folder)

    def _require_released(self, last: int) -> None:
        """Refuse to continue from before a round that was released."""
        path = self.folder / _RELEASED
        if not self.releases or not path.exists():
            return
        try:
            released = int(read(path.read_text("utf-8"))["round"])
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read; {_NOT_AGAIN}") from error
        if released > last:
            raise CheckpointError(
                f"{self.folder} lacks round {released}, which was released, and ends "
                f"with round {last}; {_NOT_AGAIN}"
            )

    def _situation(self) -> str:
        try:
            free = shutil.disk_usage(self.folder).free // 2**20
            last = max(self.rounds(), default="none")
        except OSError as error:
            return f"the folder is gone: {error}"
        return f"{free} MB are free, the last saved round is {last}"

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:05d}"

    def _write(self, folder: Path, server_round: int, result: Result) -> None:
        model = from_record(result.arrays)
        grid = self._grid.state_dict() if self._grid else {}
        callbacks = self._callbacks.state_dict() if self._callbacks else {}
        states, arrays = _split(
            {
                "strategy": self.strategy.state_dict(),
                "grid": grid,
                "callbacks": callbacks,
                "at-work": self._at_work.state_dict() if self._at_work else {},
            }
        )
        saved = {
            "format": FORMAT,
            "round": server_round,
            "strategy": _name(self.strategy),
            "model": layout(model),
            "states": states,
            "clients": self._clients.write(folder) if self._clients else None,
            "settings": {
                "begun": self._begun,
                "now": self._settings(),
            },
            "run-config": self._run_config,
            "initial": self._initial,
            "changes": self._changes.state_dict(),
            "metrics": {
                field: {r: dict(m) for r, m in getattr(result, field).items()}
                for field in _METRICS
            },
        }
        save_file(_contiguous(model), folder / _MODEL)
        save_file(_contiguous(arrays), folder / _STATE)
        saved["sha256"] = {name: _digest(folder / name) for name in (_MODEL, _STATE)}
        (folder / _JSON).write_text(write(saved, tagged=True, indent=1), "utf-8")
        for path in (folder / _MODEL, folder / _STATE, folder / _JSON, folder):
            flush(path)

    def _read(self, path: Path) -> dict[str, Any]:
        """Read a saved round's JSON, and check the files beside it."""
        saved = read((path / _JSON).read_text("utf-8"))
        if saved["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {saved['format']}, not {FORMAT}")
        for name in (_MODEL, _STATE):
            if _digest(path / name) != saved["sha256"][name]:
                raise ValueError(f"{name} is not as it was written")
        return dict(saved)

    def _require_same(
        self, path: Path, saved: Mapping[str, object], initial: ArrayRecord
    ) -> None:
        if saved["strategy"] != _name(self.strategy):
            raise CheckpointError(
                f"{path} was saved by {saved['strategy']}, this run uses "
                f"{_name(self.strategy)}: choose another folder"
            )
        own = layout(from_record(initial))
        if saved["model"] != own:
            theirs = dict(saved["model"])  # type: ignore[call-overload]
            differ = [k for k in own.keys() | theirs if own.get(k) != theirs.get(k)]
            raise CheckpointError(
                f"{path} holds another model: {sorted(differ)[:5]} differ from the "
                "initial arrays of this run: choose another folder"
            )

    def _require_settings(self, path: Path, begun: Settings, now: Settings) -> None:
        if differ := differences(self._begun, begun, now):
            raise CheckpointError(
                f"{path} was saved with other settings: {'; '.join(differ)}. Choose "
                "another folder for another run, or the same settings to continue"
            )

    def _require_rounds(self, path: Path, done: int, num_rounds: int | None) -> None:
        if num_rounds is not None and done > num_rounds:
            raise CheckpointError(
                f"num_rounds={num_rounds} must be >= {done}, the rounds that are "
                f"saved in {path}: choose another folder for a shorter run"
            )

    def _compare_start(self, path: Path, initial: str, complete: bool) -> None:
        """Compare the initial model with that of the saved run.

        A complete run with another one is refused, since its result would be returned
        for the wrong start. An interrupted run is continued with a warning, because a
        model that is initialised without a seed is another one in every process.
        """
        if initial in ("", self._initial):
            return
        if complete:
            raise CheckpointError(
                f"{path} is the end of a run that began with another initial model "
                "than initial_arrays: choose another folder, or seed the model"
            )
        log(
            WARNING,
            "initial_arrays are not those that the saved run began with, and are not "
            "used: the run continues from its own model",
        )

    def _compare_run_configs(self, saved: Settings, num_rounds: int | None) -> None:
        # More rounds are what a run is continued for, whatever the app calls them.
        grown = {
            name: saved[name]
            for name, value in self._run_config.items()
            if "rounds" in name and value == str(num_rounds) and name in saved
        }
        if differ := differences(Settings({**self._run_config, **grown}), saved):
            log(
                WARNING,
                "The run config is not that of the saved run: %s. What clients read "
                "from it changes the result, and needs another folder",
                "; ".join(differ),
            )


_DELETE = "delete it to continue from the round before"
_NOT_AGAIN = (
    "to continue from a round before would release another model in its place, and "
    "count both as one: put that very round back from a copy of it, or start a new run "
    "in another folder, whose epsilon adds to this one's"
)


def _name(strategy: object) -> str:
    return f"{type(strategy).__module__}.{type(strategy).__qualname__}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contiguous(arrays: Mapping[str, NDArray]) -> Arrays:
    # safetensors writes memory as it lies; and NumPy makes 1-d arrays of 0-d ones here.
    return {
        name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()
    }


def _split(state: object, path: str = "") -> tuple[object, Arrays]:
    """Take the arrays out of nested dicts; leave ``{"$array": path}`` in place."""
    # NumPy makes scalars of the sums and multiples of 0-d arrays.
    if isinstance(state, np.ndarray | np.generic):
        return {"$array": path}, {path: np.asarray(state)}
    if isinstance(state, Mapping):
        rest, arrays = {}, {}
        for i, (key, value) in enumerate(state.items()):
            rest[key], found = _split(value, f"{path}/{i}" if path else str(i))
            arrays.update(found)
        return rest, arrays
    return state, {}


def _join(state: object, arrays: Arrays) -> Any:
    """Put the arrays back in their places."""
    if isinstance(state, dict):
        if set(state) == {"$array"}:
            return arrays[state["$array"]]
        return {key: _join(inner, arrays) for key, inner in state.items()}
    return state
