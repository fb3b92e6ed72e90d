"""Prepared data sets on disk: written once, then memory-mapped by every process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flower_ext.data.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

_LOG = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
# Part of the folder name: raise it when the prepared columns or rows change.
_LAYOUT = "v1"


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder that holds downloads and prepared data.

    Parameters
    ----------
    cache_dir : path or None
        Used as it is when given. Otherwise ``$FLOWER_EXT_CACHE``, else
        ``$XDG_CACHE_HOME/flower-ext``, else ``~/.cache/flower-ext``.

    Returns
    -------
    pathlib.Path
        The folder; it need not exist yet.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("FLOWER_EXT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "flower-ext"


def prepared_dir(root: Path, key: str) -> Path:
    """Folder of the prepared data set `key`."""
    return root / "prepared" / _LAYOUT / key


def prepared(root: Path, key: str, build: Callable[[], DatasetDict]) -> DatasetDict:
    """Open the prepared data set `key`, building it first if need be.

    A folder whose files are missing or have other sizes than when they were written
    is rebuilt. Any number of processes may call this at once: one builds, the others
    wait for it. An intact folder is opened without a lock, so it may be read-only.

    Parameters
    ----------
    root : pathlib.Path
        Cache folder, see `cache_root`.
    key : str
        Folder name, unique for the data set and its options.
    build : callable
        Makes the data set in memory; called at most once.

    Returns
    -------
    datasets.DatasetDict
        Memory-mapped splits.

    Raises
    ------
    DataError
        The cache cannot be written, or what was written cannot be read back.
    """
    folder = prepared_dir(root, key)
    found = _open(folder)
    if found is None:
        with _locked(root, key):
            # Another process may have built it while this one waited for the lock.
            found = _open(folder)
            if found is None:
                if folder.exists():
                    _LOG.warning("%s is damaged: building it again", folder)
                _write(build(), folder)
                found = _open(folder)
    if found is None:
        raise DataError(
            f"prepared data in {folder} cannot be read back right after it was "
            "written: usually a full or failing disk. Free some space or choose "
            "another folder with $FLOWER_EXT_CACHE"
        )
    return found


def is_intact(folder: Path) -> bool:
    """Whether every file of a prepared folder is there with its recorded size."""
    # Checksums would read all of the data at every start.
    try:
        return bool(json.loads((folder / _MANIFEST).read_text()) == _sizes(folder))
    except (OSError, ValueError):
        return False


def _open(folder: Path) -> DatasetDict | None:
    if not folder.exists():
        return None
    if is_intact(folder):
        from datasets import load_from_disk

        # The sizes are right, so that a failure means altered contents: None has it
        # built again.
        with suppress(OSError, ValueError, KeyError, TypeError):
            return load_from_disk(str(folder))
    return None


def _write(data: DatasetDict, folder: Path) -> None:
    try:
        # Written beside its place and renamed when complete: readers never see a part
        # of it, and an interrupted build leaves nothing that looks like data.
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=".tmp-", ignore_cleanup_errors=True
        ) as tmp:
            new = Path(tmp) / "new"
            with _no_progress_bars():
                data.save_to_disk(str(new))
            (new / _MANIFEST).write_text(json.dumps(_sizes(new)))
            # A folder cannot replace one that is not empty: the damaged one goes first.
            if folder.exists():
                shutil.rmtree(folder)
            new.replace(folder)
    except OSError as error:
        raise DataError(
            f"cannot write prepared data to {folder}: {error}. Free some space or "
            "choose another folder with cache_dir= or $FLOWER_EXT_CACHE"
        ) from error


def _sizes(folder: Path) -> dict[str, int]:
    """Sizes of the files that `save_to_disk` wrote."""
    # Operations on an open data set put files of their own beside it later on.
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != _MANIFEST
        and not path.name.startswith(("cache-", "tmp"))
    }


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    from filelock import FileLock

    try:
        prepared_dir(root, key).parent.mkdir(parents=True, exist_ok=True)
        locks = root / "locks"
        locks.mkdir(exist_ok=True)
        lock = FileLock(locks / f"{key}.lock")
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"cannot write to the cache folder {root}: {error}. Choose another one "
            "with cache_dir= or $FLOWER_EXT_CACHE"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
